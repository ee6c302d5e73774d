"""Encode the clips of a data set once, so that training reads latents and text embeddings from disk."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress
from torch import nn

from temporal_layers.recipes.bases import LabelBase, VideoBase, load_base
from temporal_layers.recipes.data.cache import CacheConfig, CachedClips
from temporal_layers.recipes.data.cache_writer import write_cache
from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import DataConfig, make_source
from temporal_layers.recipes.image_ldm import SHIPPED_WEIGHTS
from temporal_layers.recipes.training.configs import parse


@dataclass(frozen=True, kw_only=True)
class CacheCommandConfig:
    """What to encode, with which model, to where.

    Attributes:
        out: Folder of the cache.
        base: ``shipped``, a folder with an image model, or a repository on the Hugging Face hub.
        data: Which videos.
        size: Height and width of the frames; those of the model if None.
        fps: Rate of the clips; that of each video if None.
        stride: Or: every ``stride``-th frame.
        max_frames: Frames of a clip, from its beginning; None for all.
        min_frames: Shorter clips are left out and reported.
        dtype: Of the latents.
        items_per_file: How many items share a file.
        batch_frames: Frames that are encoded at a time.
        device: Where the model runs.
        loader: How clips are decoded.
    """

    out: Path = Path("runs/cache")
    base: str = "shipped"
    data: DataConfig = field(default_factory=DataConfig)
    size: tuple[int, int] | None = None
    fps: float | None = None
    stride: int = 1
    max_frames: int | None = None
    min_frames: int = 1
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    items_per_file: int = 64
    batch_frames: int = 16
    device: str = "cpu"
    loader: LoaderConfig = field(default_factory=LoaderConfig)


def base_identity(name: str, base: VideoBase) -> str:
    """A name that changes with the weights that make latents and conditioning.

    Args:
        name: What the user calls the model.
        base: The model, loaded.
    """
    if isinstance(base, LabelBase):
        parts = [base.ldm.vae]  # the conditioning is the label itself
    else:
        pipeline = getattr(base, "pipeline", None)
        names = ("vae", "vqvae", "text_encoder", "text_encoder_2")
        parts = [getattr(pipeline, part, None) for part in names]
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, nn.Module):
            for key, tensor in part.state_dict().items():
                digest.update(f"{key} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return f"{name} {digest.hexdigest()}"


def run_cache(config: CacheCommandConfig) -> CachedClips:
    """Write the cache, or go on with it, and open it.

    Raises:
        ValueError: As ``make_source`` and ``write_cache``.
    """
    source = make_source(config.data)
    base = load_base(SHIPPED_WEIGHTS if config.base == "shipped" else config.base).to(config.device)
    settings = CacheConfig(
        base=base_identity(config.base, base),
        size=config.size or base.frame_size,
        fps=config.fps,
        stride=config.stride,
        max_frames=config.max_frames,
        min_frames=config.min_frames,
        dtype=config.dtype,
        items_per_file=config.items_per_file,
    )
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=None)
        write_cache(
            base,
            source,
            config.out,
            settings,
            loader=config.loader,
            batch_frames=config.batch_frames,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return CachedClips(config.out, config=settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse(CacheCommandConfig, arguments, prog="temporal-layers data cache", description=__doc__)
    try:
        cached = run_cache(config)
    except ValueError as error:
        print(f"temporal-layers data cache: {error}", file=sys.stderr)
        return 1
    frames = sum(clip.num_frames for clip in cached)
    print(f"{config.out}: {len(cached)} clips, {frames} frames, {len(cached.bad)} videos left out")
    for name, reason in cached.bad.items():
        print(f"  {reason if name in reason else f'{name}: {reason}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
