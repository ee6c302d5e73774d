"""Latents of clips and conditioning of captions, computed once and kept in safetensors files.

A cache is a folder: ``cache.json`` says what it was made of, ``clips-*.safetensors`` hold the latents of so many items
each, ``conditioning-*.safetensors`` the rows of so many different captions each, and ``index.json`` names them all.
The index comes last, so a folder without one is a cache under way: the same call goes on with the files that are
missing. Files are put in place whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from temporal_layers.recipes.bases import Conditioning
from temporal_layers.recipes.data.decoding import Window
from temporal_layers.recipes.data.items import VideoFile
from temporal_layers.recipes.data.sources import Source
from temporal_layers.recipes.training.streams import Shuffled, generator_at

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What is computed for a cache; a cache made with other values is refused.

    Attributes:
        base: Name of the image model, changed by the caller whenever its autoencoder or text encoder changes.
        size: Height and width to which frames are scaled and cut, around the centre.
        fps: Rate; at most that of the videos, which None keeps.
        stride: Or: every ``stride``-th frame.
        max_frames: Frames of a clip, from its beginning; None for all.
        min_frames: Shorter clips are left out and reported.
        dtype: Of the latents.
        items_per_file: How many items share a file.
    """

    base: str
    size: tuple[int, int]
    fps: float | None = None
    stride: int = 1
    max_frames: int | None = None
    min_frames: int = 1
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    items_per_file: int = 64

    def __post_init__(self) -> None:
        if not self.base:
            raise ValueError("CacheConfig: base: expected a name for the image model, got an empty string")
        if self.dtype not in DTYPES:
            raise ValueError(f"CacheConfig: dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if min(self.items_per_file, self.min_frames) < 1 or (self.max_frames or self.min_frames) < self.min_frames:
            raise ValueError(
                "CacheConfig: expected items_per_file and min_frames of 1 or more and max_frames not below min_frames, "
                f"got items_per_file={self.items_per_file}, min_frames={self.min_frames}, max_frames={self.max_frames}"
            )
        self.window  # noqa: B018 - checks size, fps and stride

    @property
    def window(self) -> Window:
        """What is decoded of a video."""
        return Window(
            num_frames=self.max_frames, least=self.min_frames, size=self.size, fps=self.fps, stride=self.stride
        )


@dataclass(frozen=True)
class CachedClip:
    """What is known of a clip in a cache.

    Attributes:
        key: Name of the item.
        caption: Its caption.
        label: Its class.
        num_frames: How many frames of latents there are.
        fps: Their rate.
        conditioning: Row of its conditioning.
    """

    key: str
    caption: str
    label: int
    num_frames: int
    fps: float
    conditioning: int


def fingerprint(source: Source) -> str:
    """Changes with the items of a source: their number, order, names, captions, labels and sizes in bytes.

    Files may move, and may get another date; a file that is replaced by one of the same size is not noticed.
    """
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(source)):
        item = source[index]
        file: Any = item.file
        if isinstance(file, VideoFile):
            try:
                file = file.size if file.size is not None else os.path.getsize(file.path)
            except OSError:
                file = "missing"
        digest.update(repr((item.key, item.caption, item.label, file)).encode())
    return digest.hexdigest()


def check_same(who: str, folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a cache of something else.

    Raises:
        ValueError: With the values that differ.
    """
    different = [
        f"{name}={stored.get(name)!r} in place of {value!r}"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{who}: {folder}: expected a cache of the same model, data and settings, got one with "
            f"{', '.join(different)}; delete the folder, or name another one"
        )


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they come back from a JSON file."""
    return json.loads(json.dumps(values))


def _read_records(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as stored:
            return json.loads(stored.metadata()["records"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"CachedClips: {path}: expected a file of a cache, got damaged data ({error}); delete it and index.json, "
            "and write the cache again"
        ) from error


class CachedClips(Sequence[CachedClip]):
    """A cache that ``write_cache`` has finished; latents are read from disk as they are asked for.

    Args:
        folder: Of the cache.
        config: If given, what it must have been made with.
        source: If given, what it must have been made of.

    Attributes:
        bad: Videos that were left out, by name, with the reason.

    Raises:
        ValueError: No finished cache, or one of something else, or a damaged file.
    """

    def __init__(self, folder: str | Path, *, config: CacheConfig | None = None, source: Source | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            state = "one under way" if (self.folder / "cache.json").is_file() else "none"
            raise ValueError(
                f"CachedClips: {folder}: expected a finished cache, got {state}; run temporal-layers data cache"
            )
        wanted: dict[str, Any] = {"format": FORMAT}
        wanted |= {} if config is None else plain(asdict(config))
        wanted |= {} if source is None else {"source": fingerprint(source)}
        self.about = json.loads((self.folder / "cache.json").read_text())
        check_same("CachedClips", self.folder, self.about, wanted)
        self.bad: dict[str, str] = {}
        self._clips: list[CachedClip] = []
        self._places: list[tuple[str, str]] = []
        self._rows: list[tuple[str, int]] = []
        self._open: dict[str, Any] = {}
        self._order: Shuffled | None = None
        for name in json.loads((self.folder / "index.json").read_text())["files"]:
            records = _read_records(self.folder / name)
            self._rows += [(name, row) for row in range(records.get("rows", 0))]
            self.bad |= {bad["name"]: bad["reason"] for bad in records.get("bad", [])}
            for record in records.get("clips", []):
                self._places.append((name, record.pop("tensor")))
                self._clips.append(CachedClip(**record))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index):
        return self._clips[index]

    def num_frames(self, index: int) -> int:
        """Length of a clip."""
        return self._clips[index].num_frames

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]

    def latents(self, index: int, start: int = 0, stop: int | None = None) -> Float[Tensor, "c frames h w"]:
        """Latents of frames ``start`` to ``stop - 1`` of a clip, in the dtype of the cache; others are not read."""
        name, tensor = self._places[index]
        return self._file(name).get_slice(tensor)[start:stop].transpose(0, 1)

    def conditioning(self, index: int) -> Conditioning:
        """Conditioning of a clip, with one row."""
        name, row = self._rows[self._clips[index].conditioning]
        file = self._file(name)
        return {key: file.get_slice(key)[row : row + 1] for key in sorted(file.keys())}

    def draw(self, position: int, *, num_frames: int, seed: int) -> tuple[Tensor, ...]:
        """The sample at a position of a run: a window of latents, then the conditioning, by name.

        For ``training.streams.SampleStream``: every clip comes once an epoch, and the window begins anywhere.

        Args:
            position: In the run.
            num_frames: Of the window; shorter clips are an error.
            seed: Of order and windows.
        """
        if self._order is None or self._order.seed != seed:
            self._order = Shuffled(len(self), seed)
        index = self._order[position]
        spare = self._clips[index].num_frames - num_frames
        if spare < 0:
            raise ValueError(
                f"CachedClips: {self._clips[index].key}: expected at least num_frames={num_frames}, got "
                f"{self._clips[index].num_frames}; write the cache with min_frames={num_frames}"
            )
        start = int(torch.randint(spare + 1, (), generator=generator_at(seed, position, "window")))
        return self.latents(index, start, start + num_frames), *(row[0] for row in self.conditioning(index).values())
