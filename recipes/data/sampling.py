"""Which clip, and which window of it, each position of a run gets: a function of the seed and the position alone.

With several buckets (lengths and sizes) a batch holds clips of one bucket. Every bucket has an endless order of its
own, in which each of its clips comes once per round; the buckets take turns in proportion to their clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from temporal_layers.recipes.data.decoding import Window
from temporal_layers.recipes.data.opening import VideoInfo
from temporal_layers.recipes.training.streams import Shuffled, generator_at


class Bucket(NamedTuple):
    """A shape that clips are brought to."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How windows are taken from videos.

    Attributes:
        buckets: Frames, height and width of the clips of a batch; each video goes to the bucket that suits it.
        fps: Rate of the clips; at most that of the videos, which None keeps.
        stride: Or: every ``stride``-th frame.
        start: Begin windows anywhere, or at the first frame.
        crop: Cut frames that are too high or too wide anywhere, or around the centre.
    """

    buckets: tuple[Bucket, ...]
    fps: float | None = None
    stride: int = 1
    start: Literal["random", "first"] = "random"
    crop: Literal["random", "centre"] = "random"

    def __post_init__(self) -> None:
        buckets = tuple(Bucket(*bucket) for bucket in self.buckets)
        if not buckets or min(map(min, buckets)) < 1 or len(set(buckets)) < len(buckets):
            raise ValueError(
                "SamplingConfig: buckets: expected different (frames, height, width) of 1 or more, got "
                f"{tuple(map(tuple, buckets))}"
            )
        object.__setattr__(self, "buckets", buckets)
        if self.start not in ("random", "first") or self.crop not in ("random", "centre"):
            raise ValueError(
                "SamplingConfig: expected start 'random' or 'first' and crop 'random' or 'centre', got "
                f"start={self.start!r}, crop={self.crop!r}"
            )
        self._window(buckets[0])  # checks fps and stride

    def window(self, bucket: Bucket, seed: int, position: int) -> Window:
        """The window that a position takes from whichever video it gets."""
        share, *crop = torch.rand(3, generator=generator_at(seed, position, "window"), dtype=torch.float64).tolist()
        return self._window(
            bucket,
            share if self.start == "random" else 0.0,
            tuple(crop) if self.crop == "random" else (0.5, 0.5),
        )

    def _window(self, bucket: Bucket, share: float = 0.0, crop: tuple[float, float] = (0.5, 0.5)) -> Window:
        size = (bucket.height, bucket.width)
        return Window(num_frames=bucket.frames, size=size, fps=self.fps, stride=self.stride, share=share, crop=crop)

    def nearest(self, info: VideoInfo) -> int | None:
        """The bucket for a video, None if it is too short for all.

        Of the buckets that it is long enough for, those with the most frames; of these the ones nearest in
        proportions, and then in area, counted in ratios. A video that does not say how long it is goes to the
        shortest.
        """
        if self.fps is not None and self.fps > info.fps * 1.01:
            return None
        lasts = [self._window(bucket).seconds(info.fps) for bucket in self.buckets]
        if info.duration <= 0:
            fitting = [index for index, last in enumerate(lasts) if last == min(lasts)]
        else:
            # Half a frame of slack: durations are rounded, and a window that misses one frame is replaced later.
            fitting = [index for index, last in enumerate(lasts) if last <= info.duration + 0.5 / info.fps]
        if not fitting:
            return None

        def distance(index: int) -> tuple[int, float, float, int]:
            frames, height, width = self.buckets[index]
            proportions = abs(math.log(height / width) - math.log(info.height / info.width))
            area = abs(math.log(height * width) - math.log(info.height * info.width))
            return -frames, round(proportions, 9), area, index

        return min(fitting, key=distance)


class Draw(NamedTuple):
    """What one position gets: an item, brought to the shape of a bucket."""

    position: int
    item: int
    bucket: int


class Schedule:
    """Batches of one bucket each, any of which can be asked for at once.

    Args:
        members: For each bucket the indices of its items; a bucket may be empty.
        seed: Of all orders.

    Raises:
        ValueError: If all buckets are empty.
    """

    def __init__(self, members: Sequence[np.ndarray], seed: int) -> None:
        self.members, self.seed = list(members), seed
        self.sizes = [len(items) for items in members]
        if not sum(self.sizes):
            raise ValueError("Schedule: expected an item in at least one bucket, got none")
        self._orders = [Shuffled(size, seed) if size else None for size in self.sizes]
        self._round: tuple[int, int] | None = None
        self._turns = np.empty(0, dtype=np.int64)

    def batch(self, number: int, size: int) -> list[Draw]:
        """Draws of batch ``number``, each with ``size`` samples (of all processes together)."""
        bucket, turn = self._turn(number, size)
        order, items = self._orders[bucket], self.members[bucket]
        places = range(turn * size, (turn + 1) * size)
        return [Draw(number * size + index, int(items[order[place]]), bucket) for index, place in enumerate(places)]

    def substitute(self, draw: Draw, attempt: int) -> Draw:
        """Another item of the bucket, for a position whose item cannot be read."""
        generator = generator_at(self.seed, draw.position, f"substitute {attempt}")
        place = int(torch.randint(self.sizes[draw.bucket], (), generator=generator))
        return draw._replace(item=int(self.members[draw.bucket][place]))

    def _finished(self, rounds: int, size: int) -> list[int]:
        """Batches that each bucket has had after some rounds: as many whole ones as its items are enough for."""
        return [rounds * items // size for items in self.sizes]

    def _turn(self, number: int, size: int) -> tuple[int, int]:
        """The bucket of a batch, and how many batches that bucket had before."""
        # After r rounds there were at most r * items / size batches, which bounds the round from below.
        done = number * size // sum(self.sizes)
        while sum(self._finished(done + 1, size)) <= number:
            done += 1
        before, after = self._finished(done, size), self._finished(done + 1, size)
        if self._round != (done, size):
            turns = np.repeat(np.arange(len(before)), np.subtract(after, before))
            order = torch.randperm(len(turns), generator=generator_at(self.seed, done, "buckets")).numpy()
            self._round, self._turns = (done, size), turns[order]
        place = number - sum(before)
        bucket = int(self._turns[place])
        return bucket, before[bucket] + int((self._turns[:place] == bucket).sum())
