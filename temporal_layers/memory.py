"""Cutting independent rows into pieces, so that what a layer works on at a time fits a budget."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["WORKING_TENSORS", "over_positions", "rows_within"]

WORKING_TENSORS = 20
"""Tensors of the size of its input that a transformer block holds at its worst, in the feed-forward: the input, its
norm, the projection to eight times the width, the gate and the product of four times each, and a copy or two."""


def rows_within(budget: int | None, row_bytes: int, rows: int) -> int:
    """How many of ``rows`` rows to work on at a time.

    Args:
        budget: bytes of all that is made meanwhile; ``None`` for no limit.
        row_bytes: of one row of the activation.
        rows: that there are.

    Returns:
        At least 1, whatever the budget, and ``rows`` while gradients are recorded, for which all is kept anyway.
    """
    if budget is None or torch.is_grad_enabled():
        return max(1, rows)
    return max(1, min(rows, budget // (WORKING_TENSORS * max(1, row_bytes))))


def over_positions(
    function: Callable[[Tensor], Tensor], tokens: Float[Tensor, "n positions dim"], size: int
) -> Float[Tensor, "n positions out_dim"]:
    """``function(tokens)``, ``size`` positions at a time, where it treats every position alike."""
    positions = tokens.shape[1]
    if size >= positions:
        return function(tokens)
    result = None
    for start in range(0, positions, size):
        piece = function(tokens[:, start : start + size])
        if result is None:
            result = piece.new_empty((*tokens.shape[:2], piece.shape[-1]))
        result[:, start : start + size] = piece
    return result
