"""Batches of clips decoded in worker processes; what a batch holds depends on the seed and its number alone.

The order is made in the main process and travels to the workers as a list of draws, so their number changes nothing.
A video that cannot be read is replaced by another one of its bucket, the same one on every run, and reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from temporal_layers.recipes.data.decoding import DecoderName, make_decoder
from temporal_layers.recipes.data.probing import Probe, probe_all
from temporal_layers.recipes.data.sampling import Draw, SamplingConfig, Schedule
from temporal_layers.recipes.data.sources import DataConfig, Source, make_source
from temporal_layers.recipes.training.streams import Batch

logger = logging.getLogger(__name__)

_ATTEMPTS = 16
_ENOUGH = 100
"""Videos tried before their share of bad ones is judged; all of them if there are fewer."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How clips are decoded.

    Attributes:
        workers: Processes that decode; 0 decodes in the training process.
        prefetch: Batches that each worker keeps ready.
        decoder: ``pyav``, or ``torchcodec`` if it is installed.
        max_bad_share: Share of videos that may be unreadable before the run is stopped.
    """

    workers: int = 2
    prefetch: int = 2
    decoder: DecoderName = "pyav"
    max_bad_share: float = 0.1

    def __post_init__(self) -> None:
        if self.workers < 0 or self.prefetch < 1 or not 0 <= self.max_bad_share <= 1:
            raise ValueError(
                "LoaderConfig: expected workers of 0 or more, prefetch of 1 or more and max_bad_share from 0 to 1, got "
                f"workers={self.workers}, prefetch={self.prefetch}, max_bad_share={self.max_bad_share}"
            )


class ClipBatch(NamedTuple):
    """Decoded clips of one bucket.

    Attributes:
        frames: The clips.
        captions: One a clip.
        labels: One a clip.
        fps: Rate of each clip.
        keys: Names of the items.
        positions: Of the samples in the run, for what else is to be drawn for them (`streams.generator_at`).
    """

    frames: UInt8[Tensor, "batch 3 frames height width"]
    captions: list[str]
    labels: Int[Tensor, " batch"]
    fps: Float[Tensor, " batch"]
    keys: list[str]
    positions: list[int]


class BadVideos:
    """Count of the videos that could not be read.

    Attributes:
        reasons: By name of the video.
        replaced: How many samples had to be replaced so far.
    """

    def __init__(self, total: int, max_share: float) -> None:
        self.reasons: dict[str, str] = {}
        self.replaced = 0
        self._tried = np.zeros(total, dtype=bool)
        self._bad = np.zeros(total, dtype=bool)
        self._max_share = max_share

    @property
    def tried(self) -> int:
        """How many different videos were tried so far."""
        return int(self._tried.sum())

    def __str__(self) -> str:
        first = f"{int(self._bad.sum())} of {self.tried} videos could not be read"
        return "\n".join([first, *(f"  {name}: {reason}" for name, reason in self.reasons.items())])

    def add(self, item: int, name: str = "", reason: str = "", *, in_training: bool = True) -> None:
        """Note that an item was tried, and what was wrong with it, if anything."""
        self._tried[item] = True
        if reason:
            self.replaced += in_training
            if not self._bad[item]:
                self._bad[item] = True
                self.reasons[name] = reason
                logger.warning("skipped %s: %s", name, reason)

    def check(self) -> None:
        """Stop the run if too many are bad.

        Raises:
            ValueError: With the list.
        """
        tried, bad = self.tried, int(self._bad.sum())
        if tried >= min(len(self._tried), _ENOUGH) and bad > self._max_share * tried:
            raise ValueError(
                f"ClipStream: expected at most max_bad_share={self._max_share:g} of the videos to be unreadable, got "
                f"more; repair or remove them, or raise max_bad_share. {self}"
            )


class _Sample(NamedTuple):
    draw: Draw
    clip: tuple[Tensor, str, int, float, str] | None
    faults: list[tuple[int, str, str]]


class _Clips(Dataset):
    """Decodes draws, in whichever process."""

    def __init__(
        self, source: Source, sampling: SamplingConfig, schedule: Schedule, seed: int, decoder: DecoderName
    ) -> None:
        self.source, self.sampling, self.schedule, self.seed = source, sampling, schedule, seed
        self.decoder = make_decoder(decoder)

    def __getitem__(self, draw: Draw) -> _Sample:
        faults: list[tuple[int, str, str]] = []
        window = self.sampling.window(self.sampling.buckets[draw.bucket], self.seed, draw.position)
        failed: set[int] = set()
        for attempt in range(_ATTEMPTS):
            if attempt:
                draw = self.schedule.substitute(draw, attempt)
            if draw.item in failed:
                continue
            item = self.source[draw.item]
            try:
                frames, fps = self.decoder.window(item.file, window)
            except ValueError as error:
                failed.add(draw.item)
                faults.append((draw.item, item.file.name, str(error)))
                continue
            return _Sample(draw, (frames, item.caption, item.label, fps, item.key), faults)
        return _Sample(draw, None, faults)


def _collate(samples: list[_Sample]) -> tuple[ClipBatch | None, list[int], list[tuple[int, str, str]]]:
    """In the worker, so that one tensor a batch crosses into the main process."""
    faults = [fault for sample in samples for fault in sample.faults]
    tried = [sample.draw.item for sample in samples]
    if any(sample.clip is None for sample in samples):
        return None, tried, faults
    frames, captions, labels, fps, keys = zip(*(sample.clip for sample in samples), strict=True)
    batch = ClipBatch(
        default_collate(list(frames)),  # straight into memory that the processes share
        list(captions),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(fps, dtype=torch.float32),
        list(keys),
        [sample.draw.position for sample in samples],
    )
    return batch, tried, faults


class _Numbers:
    """Endless draws of batches, from where the latest call of ``ClipStream.batches`` wants them."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.first, self.batch_size, self.rank, self.world_size = 0, 1, 0, 1

    def __iter__(self) -> Iterator[list[Draw]]:
        number, size, rank, world_size = self.first, self.batch_size, self.rank, self.world_size
        while True:
            yield self.schedule.batch(number, size * world_size)[rank * size : (rank + 1) * size]
            number += 1


class ClipStream:
    """Batches of decoded clips as a ``training.streams.Stream``.

    Args:
        source: Where clips come from.
        sampling: Which windows of them to take.
        loader: How they are decoded.
        seed: Of the order and of the windows.
        probes: Of every item, from ``probe_all``; needed when there are several buckets. Items whose probe has a fault,
            or that suit no bucket, are left out and reported.
        prepare: Turns a batch into what an objective takes; called in this process. None yields `ClipBatch`.

    Attributes:
        bad: Videos that could not be read so far, on this process.

    Raises:
        ValueError: Several buckets without probes, or no video that suits a bucket, or too many bad ones.
    """

    def __init__(
        self,
        source: Source,
        sampling: SamplingConfig,
        loader: LoaderConfig | None = None,
        *,
        seed: int = 0,
        probes: Sequence[Probe] | None = None,
        prepare: Callable[[ClipBatch], Batch] | None = None,
    ) -> None:
        loader = loader or LoaderConfig()
        self.source, self.sampling, self.prepare = source, sampling, prepare
        self.bad = BadVideos(len(source), loader.max_bad_share)
        self._schedule = Schedule(self._members(probes), seed)
        self._numbers = _Numbers(self._schedule)
        self._clips = _Clips(source, sampling, self._schedule, seed, loader.decoder)
        self._workers, self._prefetch = loader.workers, loader.prefetch
        self._loader: DataLoader | None = None
        self._results: Iterator[Any] | None = None
        self._entered = 0

    def _members(self, probes: Sequence[Probe] | None) -> list[np.ndarray]:
        buckets = self.sampling.buckets
        if probes is None:
            if len(buckets) > 1:
                raise ValueError(
                    f"ClipStream: expected probes, to sort videos into {len(buckets)} buckets, got None; pass "
                    "list(probe_all(source)), or one bucket"
                )
            return [np.arange(len(self.source))]
        if len(probes) != len(self.source):
            raise ValueError(
                f"ClipStream: expected a probe for each of {len(self.source)} items, got {len(probes)}; probe again"
            )
        members: list[list[int]] = [[] for _ in buckets]
        for index, probe in enumerate(probes):
            bucket = None if probe.info is None else self.sampling.nearest(probe.info)
            if bucket is not None:
                members[bucket].append(index)
                self.bad.add(index)
                continue
            reason = probe.fault or f"too short, or its rate too low, for every bucket: {probe.info}"
            self.bad.add(index, self.source[index].file.name, reason, in_training=False)
        if not any(members):
            raise ValueError(f"ClipStream: expected a video that suits a bucket, got none. {self.bad}")
        self.bad.check()
        return [np.array(indices, dtype=np.int64) for indices in members]

    @property
    def bucket_sizes(self) -> list[int]:
        """How many videos each bucket has."""
        return self._schedule.sizes

    def batches(self, first: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """As in `Stream`. A later call ends the batches of an earlier one.

        Raises:
            ValueError: Too many bad videos, with the list.
            RuntimeError: The iterator of an earlier call is used after a later call.
        """
        self._entered += 1
        numbers = self._numbers
        numbers.first, numbers.batch_size, numbers.rank, numbers.world_size = first, batch_size, rank, world_size
        if self._loader is None:
            many = self._workers > 0
            self._loader = DataLoader(
                self._clips,
                batch_sampler=numbers,
                collate_fn=_collate,
                num_workers=self._workers,
                prefetch_factor=self._prefetch if many else None,
                persistent_workers=many,
            )
        self._results = iter(self._loader)
        return self._run(self._entered)

    def close(self) -> None:
        """End the worker processes; ``batches`` starts new ones."""
        self._entered += 1
        self._results = self._loader = None

    def _run(self, entered: int) -> Iterator[Any]:
        while True:
            if self._entered != entered:
                raise RuntimeError(
                    "ClipStream: these batches ended when batches() or close() was called; call it again"
                )
            try:
                batch = self._next()
            except BaseException:
                self.close()
                raise
            yield batch if self.prepare is None else self.prepare(batch)

    def _next(self) -> ClipBatch:
        batch, tried, faults = next(self._results)
        for item in tried:
            self.bad.add(item)
        for fault in faults:
            self.bad.add(*fault)
        self.bad.check()
        if batch is None:
            raise ValueError(f"ClipStream: expected a readable video within {_ATTEMPTS} attempts, got none. {self.bad}")
        return batch


def open_stream(
    data: DataConfig,
    sampling: SamplingConfig,
    loader: LoaderConfig | None = None,
    *,
    seed: int = 0,
    prepare: Callable[[ClipBatch], Batch] | None = None,
) -> ClipStream:
    """A stream from configurations alone; probes the videos if they have to be sorted into buckets.

    Args:
        data: Which videos.
        sampling: Which windows.
        loader: How they are decoded.
        seed: Of the order and of the windows.
        prepare: As in `ClipStream`.
    """
    loader = loader or LoaderConfig()
    source = make_source(data)
    probes = None
    if len(sampling.buckets) > 1:
        store = None if data.index_folder is None else Path(data.index_folder) / "probes.jsonl"
        probes = list(probe_all(source, decoder=loader.decoder, workers=loader.workers, store=store))
    return ClipStream(source, sampling, loader, seed=seed, probes=probes, prepare=prepare)
