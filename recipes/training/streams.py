"""Where training batches come from: every sample is a function of the run's seed and of its position in the run.

Position 0 is the first sample of the first batch; a batch of ``n`` samples on each of ``w`` processes takes ``n * w``
positions, in order of the processes.  Nothing else is remembered between samples, so that

- a resumed run goes on at the position it had reached, and draws what the uninterrupted run would have drawn;
- two processes with half the batch size each train on the same samples, with the same noise, as one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

Batch = tuple[Any, ...]
"""What an objective's forward gets: tensors, each with the samples on its first axis, and lists of plain values."""


class Stream(Protocol):
    """Endless batches that can be entered anywhere."""

    def batches(self, first: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Batches ``first``, ``first + 1``, and so on.

        Args:
            first: Number of the batch to begin with, counted from 0 at the start of the run.
            batch_size: Samples of a batch on this process.
            rank: Number of this process.
            world_size: Number of processes, each of which gets ``batch_size`` samples of every batch.
        """


class SampleStream:
    """Batches of samples that are drawn one by one, in this process.

    Args:
        draw: Makes the sample at a position: a tuple of tensors without a batch axis.
    """

    def __init__(self, draw: Callable[[int], tuple[Tensor, ...]]) -> None:
        self.draw = draw

    def batches(self, first: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """As in `Stream`."""
        number = first
        while True:
            samples = [self.draw(position) for position in positions(number, batch_size, rank, world_size)]
            yield tuple(torch.stack(column) for column in zip(*samples, strict=True))
            number += 1


def positions(number: int, batch_size: int, rank: int = 0, world_size: int = 1) -> range:
    """Positions of the samples that a process trains on in batch ``number``."""
    start = (number * world_size + rank) * batch_size
    return range(start, start + batch_size)


def generator_at(seed: int, position: int, purpose: str = "") -> torch.Generator:
    """A generator on the CPU that depends on its arguments alone.

    Args:
        seed: Of the run.
        position: Of the sample, or of the epoch.
        purpose: Keeps apart what is drawn for different purposes at one position.
    """
    digest = hashlib.blake2b(f"{seed}/{position}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Shuffled:
    """Which item each position gets: every epoch takes every item once, in an order of its own.

    Args:
        length: Number of items.
        seed: Of the orders.

    Raises:
        ValueError: If there are no items.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"Shuffled: expected at least one item, got {length}")
        self.length, self.seed = length, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._order = torch.randperm(self.length, generator=generator_at(self.seed, epoch, "epoch"))
            self._epoch = epoch
        return int(self._order[offset])
