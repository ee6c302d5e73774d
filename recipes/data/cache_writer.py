"""Write a cache of latents and conditioning: resumable, by any number of processes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from temporal_layers.recipes.bases import LabelBase, VideoBase
from temporal_layers.recipes.data.cache import DTYPES, FORMAT, CacheConfig, CachedClip, check_same, fingerprint, plain
from temporal_layers.recipes.data.decoding import DecoderName, Window, make_decoder
from temporal_layers.recipes.data.loader import BadVideos, LoaderConfig
from temporal_layers.recipes.data.sources import Source

_ROWS_PER_FILE = 256

Content = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors of a file, and what its header says about them."""


def base_identity(base: VideoBase) -> str:
    """What `CacheConfig.base` is to be: it changes with the weights that make latents and conditioning.

    Args:
        base: The image model, by whatever name it was loaded.
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
    return digest.hexdigest()


def write_cache(
    base: VideoBase,
    source: Source,
    folder: str | Path,
    config: CacheConfig,
    *,
    loader: LoaderConfig | None = None,
    batch_frames: int = 16,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> BadVideos:
    """Encode the clips of a source, frame by frame, and their captions.

    Interrupted, the same call goes on where it stopped; finished, it does nothing. Several processes share the files
    between them if each passes its rank; the one that finishes last writes the index.

    Args:
        base: The image model.
        source: Where the clips come from.
        folder: To be written to; made if missing.
        config: What to compute.
        loader: How clips are decoded.
        batch_frames: Frames that are encoded at a time.
        rank: Number of this process.
        world_size: Number of processes.
        progress: Called with the files finished and the number of files, after each.

    Returns:
        The videos that could not be read, on this call.

    Raises:
        ValueError: The folder holds a cache of something else, or too many videos are bad.
    """
    folder, loader = Path(folder), loader or LoaderConfig()
    folder.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, **plain(asdict(config)), "source": fingerprint(source)}
    _claim(folder, about)
    rows = _rows(source)
    texts = _parts(folder, "conditioning", list(rows), _ROWS_PER_FILE)
    clips = _parts(folder, "clips", range(len(source)), config.items_per_file)
    parts = {**texts, **clips}
    mine = [path for number, path in enumerate(parts) if number % world_size == rank and not path.is_file()]
    bad = BadVideos(len(source), loader.max_bad_share)
    items = [index for path in mine if path in clips for index in clips[path]]
    decoded = _decode(source, items, config.window, loader)
    for number, path in enumerate(mine):
        if path in texts:
            content = _conditioning(base, texts[path])
        else:
            encode = functools.partial(encode_frames, base, batch_frames=batch_frames)
            content = _latents(source, clips[path], decoded, encode, config, rows, bad)
        partial = path.with_suffix(f".partial-{rank}")
        save_file(content[0], partial, metadata={"records": json.dumps(content[1])})
        os.replace(partial, path)
        if progress is not None:
            progress(number + 1, len(mine))
    if not (folder / "index.json").is_file() and all(path.is_file() for path in parts):
        _write_json(folder / "index.json", {"files": [path.name for path in parts]})
    return bad


def _parts(folder: Path, name: str, things: Sequence[Any], per_file: int) -> dict[Path, Sequence[Any]]:
    """What each file is to hold."""
    starts = range(0, len(things), per_file)
    return {
        folder / f"{name}-{number:05d}.safetensors": things[start : start + per_file]
        for number, start in enumerate(starts)
    }


class _Decoded(Dataset):
    """Frames and rate of each item, or why there are none."""

    def __init__(self, source: Source, window: Window, decoder: DecoderName) -> None:
        self.source, self.window, self.decoder = source, window, make_decoder(decoder)

    def __getitem__(self, index: int) -> tuple[Tensor, float] | str:
        try:
            return self.decoder.window(self.source[index].file, self.window)
        except ValueError as error:
            return str(error)


def _decode(
    source: Source, items: list[int], window: Window, loader: LoaderConfig
) -> Iterator[tuple[Tensor, float] | str]:
    dataset = _Decoded(source, window, loader.decoder)
    prefetch = loader.prefetch if loader.workers else None
    options = {"batch_size": None, "num_workers": loader.workers, "prefetch_factor": prefetch}
    return iter(DataLoader(dataset, sampler=items, collate_fn=_as_it_is, **options))


def _as_it_is(result: Any) -> Any:
    return result


def _latents(
    source: Source,
    indices: Sequence[int],
    decoded: Iterator[tuple[Tensor, float] | str],
    encode: Callable[[Tensor], Tensor],
    config: CacheConfig,
    rows: dict[tuple[int, str], int],
    bad: BadVideos,
) -> Content:
    tensors: dict[str, Tensor] = {}
    records: dict[str, Any] = {"clips": [], "bad": []}
    for index in indices:
        item, result = source[index], next(decoded)
        if isinstance(result, str):
            bad.add(index, item.file.name, result)
            records["bad"].append({"name": item.file.name, "reason": result})
        else:
            bad.add(index)
            frames, fps = result
            # Frames first: then a window of them is one stretch of the file.
            latents = encode(frames).to(DTYPES[config.dtype]).contiguous()
            row = rows[item.label, item.caption]
            clip = CachedClip(item.key, item.caption, item.label, len(latents), fps, row)
            tensors[str(index)] = latents
            records["clips"].append({"tensor": str(index), **asdict(clip)})
        bad.check()
    return tensors, records


def encode_frames(base: VideoBase, frames: Tensor, batch_frames: int = 16) -> Float[Tensor, "frames c h w"]:
    """Latents of uint8 frames ``(3, frames, height, width)``, frame by frame, on the CPU.

    Args:
        base: The image model.
        frames: A decoded clip.
        batch_frames: Frames that are encoded at a time.
    """
    parts = frames.transpose(0, 1).split(batch_frames)
    with torch.no_grad():
        return torch.cat([base.encode(part.float() / 255).cpu() for part in parts])


def _rows(source: Source) -> dict[tuple[int, str], int]:
    """A row for each different pair of label and caption."""
    rows: dict[tuple[int, str], int] = {}
    for index in range(len(source)):
        item = source[index]
        rows.setdefault((item.label, item.caption), len(rows))
    return rows


def _conditioning(base: VideoBase, pairs: Sequence[tuple[int, str]]) -> Content:
    labels, captions = zip(*pairs, strict=True)
    tensors = base.conditioning(labels, captions)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"rows": len(pairs)}


def _claim(folder: Path, about: dict[str, Any]) -> None:
    place = folder / "cache.json"
    if place.is_file():
        check_same("write_cache", folder, json.loads(place.read_text()), about)
    else:
        _write_json(place, about)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)
