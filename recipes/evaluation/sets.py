"""Which clips of a set are measured: drawn once from a seed, decoded in worker processes, told by a content hash."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from temporal_layers import __version__
from temporal_layers.recipes.data.decoding import Window, make_decoder
from temporal_layers.recipes.data.items import DrivingFile, Reference, VideoBytes
from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import Source
from temporal_layers.recipes.evaluation.networks import file_digest
from temporal_layers.recipes.training.streams import Shuffled, generator_at


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """How clips are taken from the videos of a set; the same for generated and real ones.

    Attributes:
        samples: Clips, each from a video of its own unless ``per_video`` allows more.
        num_frames: Of a clip.
        fps: Rate; that of each video if None.
        size: Height and width to which frames are brought: scaled until they cover it, then cut around the centre.
        per_video: Most clips of one video, each from a stretch of its own.
        ordered: Take the first frames of the videos in the order of their names, in place of random stretches in random
            order: for sets whose videos belong together in pairs.
        seed: Of the order of the videos and the stretches.
    """

    samples: int
    num_frames: int
    fps: float | None
    size: tuple[int, int]
    per_video: int = 1
    ordered: bool = False
    seed: int = 0


class EvaluationBatch(NamedTuple):
    """Clips of a set.

    Attributes:
        places: Of each clip in the set.
        frames: Bytes.
        captions: Of the videos.
        rates: Frames per second of each clip.
    """

    places: Int[Tensor, " batch"]
    frames: UInt8[Tensor, "batch 3 frames height width"]
    captions: list[str]
    rates: list[float]


class ClipSet:
    """The clips of a set that are measured.

    Args:
        name: ``generated`` or ``real``, for messages.
        source: Its videos.
        plan: Which clips of them.

    Raises:
        ValueError: If there are too few videos for as many clips.
    """

    def __init__(self, name: str, source: Source, plan: SamplingPlan) -> None:
        self.name, self.source, self.plan = name, source, plan
        if len(source) * plan.per_video < plan.samples:
            raise ValueError(
                f"evaluate: {name}: expected at least {math.ceil(plan.samples / plan.per_video)} videos for "
                f"{plan.samples} samples of at most {plan.per_video} a video, got {len(source)}: repeated ones would "
                "make the set look less varied than it is; add videos, or ask for fewer samples, which no "
                "published number will be comparable with"
            )
        self._order = Shuffled(len(source), plan.seed)
        self._strata = math.ceil(plan.samples / len(source))

    def __len__(self) -> int:
        return self.plan.samples

    def item(self, place: int) -> int:
        """Which video the clip at a place is from."""
        return place % len(self.source) if self.plan.ordered else self._order[place]

    def window(self, place: int) -> Window:
        """Which frames of it."""
        plan = self.plan
        share = 0.0
        if not plan.ordered:
            drawn = torch.rand((), generator=generator_at(plan.seed, place, "evaluate"), dtype=torch.float64).item()
            share = (place // len(self.source) + drawn) / self._strata
        return Window(num_frames=plan.num_frames, size=plan.size, fps=plan.fps, share=share)

    def digest(self) -> str:
        """Hash of the videos' contents and captions, in their order, and of the plan."""
        found = hashlib.blake2b(digest_size=12)
        found.update(repr(replace(self.plan, size=tuple(self.plan.size))).encode())
        for index in dict.fromkeys(self.item(place) for place in range(len(self))):
            item = self.source[index]
            found.update(json.dumps([_content(item.file), item.caption]).encode())
        return found.hexdigest()

    def batches(
        self, *, batch_size: int, loader: LoaderConfig, rank: int = 0, world_size: int = 1
    ) -> Iterator[EvaluationBatch]:
        """The clips at the places ``rank``, ``rank + world_size`` and so on.

        Raises:
            ValueError: If a video cannot be read: a set with holes would be another set.
        """
        places = range(rank, len(self), world_size)
        prefetch = {"prefetch_factor": loader.prefetch} if loader.workers else {}
        clips = _Clips(self, loader)
        batches = DataLoader(
            clips, sampler=places, batch_size=batch_size, collate_fn=list, num_workers=loader.workers, **prefetch
        )
        for rows in batches:
            for row in rows:
                if isinstance(row, str):
                    raise ValueError(
                        f"evaluate: {self.name}: {row}; mend or remove it (`temporal-layers data check` lists all such "
                        "videos)"
                    )
            found, frames, captions, rates = zip(*rows, strict=True)
            yield EvaluationBatch(torch.tensor(found), torch.stack(frames), list(captions), list(rates))


class _Clips(Dataset):
    def __init__(self, clips: ClipSet, loader: LoaderConfig) -> None:
        self.clips, self.decoder = clips, make_decoder(loader.decoder)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, place: int) -> tuple[int, Tensor, str, float] | str:
        item = self.clips.source[self.clips.item(place)]
        try:
            frames, rate = self.decoder.window(item.file, self.clips.window(place))
        except ValueError as error:  # an exception that leaves a worker loses its text
            return str(error)
        return place, frames, item.caption, rate


def check_pairs(generated: ClipSet, real: ClipSet) -> None:
    """Raise a ValueError unless the videos of both sets have the same names, suffixes aside, in the same order."""
    for place in range(len(generated)):
        ours, theirs = (Path(one.source[one.item(place)].key).with_suffix("") for one in (generated, real))
        if ours != theirs:
            raise ValueError(
                f"evaluate: expected pairs of videos of one name, got {ours} (generated) beside {theirs} (real); give "
                "each decoded video the name of the true one"
            )


def _content(file: Reference) -> str:
    """Changes whenever the pixels of a video may."""
    if isinstance(file, DrivingFile):
        return f"{file} of version {__version__}"
    if isinstance(file, VideoBytes):
        return hashlib.blake2b(file.data, digest_size=12).hexdigest()
    if file.size is None:
        return file_digest(file.path)
    return hashlib.blake2b(file.read(), digest_size=12).hexdigest()
