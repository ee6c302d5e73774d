"""Running a spatial module on a few frames at a time: it treats every frame alike."""

from collections.abc import Callable
from typing import Any

import torch

from temporal_layers.adapters.chunks import Joined, rows_of, sample_of
from temporal_layers.memory import rows_within

__all__ = ["over_frames"]


def over_frames(function: Callable, args: tuple, kwargs: dict[str, Any], budget: int) -> Any:
    """``function(*args, **kwargs)``, as many rows of the batch at a time as fit a budget.

    Args:
        function: forward pass of a module whose rows do not see each other; its first argument is a tensor with the
            batch in front, and so is what it returns, alone, first in a tuple or as ``sample``.
        args: with the batch in front, or whatever all rows share.
        kwargs: likewise.
        budget: bytes.
    """
    first = args[0] if args else next(iter(kwargs.values()), None)
    if not torch.is_tensor(first) or first.ndim == 0 or len(first) == 0:
        return function(*args, **kwargs)
    total = len(first)
    size = rows_within(budget, first[0].nbytes, total)
    if size >= total:
        return function(*args, **kwargs)
    joined = None
    for start in range(0, total, size):
        rows = slice(start, start + size)
        output = function(*rows_of(args, rows, total), **rows_of(kwargs, rows, total))
        joined = joined or Joined(output, total)
        joined.add(sample_of(output))
        del output  # not to be kept while the next rows are worked on
    return joined.result()
