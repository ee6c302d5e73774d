"""Encode the clips of a data set once, so that training reads latents and text embeddings from disk.

temporal-layers data cache --data.path videos --out cache
temporal-layers data cache --data.path videos --out cache --fps 8 --size 256 384 --max-frames 64
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from temporal_layers.recipes.bases import load_base
from temporal_layers.recipes.data.cache import CacheConfig, CachedClips
from temporal_layers.recipes.data.cache_writer import base_identity, write_cache
from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import DataConfig, make_source
from temporal_layers.recipes.training.configs import parse


@dataclass(frozen=True, kw_only=True)
class CacheCommandConfig:
    """What to encode, with which model, to where.

    Attributes:
        out: Folder of the cache.
        model: Folder or repository of an image model; empty for the one that comes with the package.
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
        json: Print JSON in place of text.
    """

    out: Path = Path("runs/cache")
    model: str = ""
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
    json: bool = False


def run_cache(config: CacheCommandConfig) -> CachedClips:
    """Write the cache, or go on with it, and open it.

    Raises:
        ValueError: As ``make_source`` and ``write_cache``.
    """
    source = make_source(config.data)
    base = load_base(config.model).to(config.device)
    settings = CacheConfig(
        base=base_identity(base),
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
    if config.json:
        print(json.dumps({"out": str(config.out), "clips": len(cached), "frames": frames, "bad": cached.bad}, indent=2))
        return 0
    print(f"{config.out}: {len(cached)} clips, {frames} frames, {len(cached.bad)} videos left out")
    for name, reason in cached.bad.items():
        print(f"  {reason if name in reason else f'{name}: {reason}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
