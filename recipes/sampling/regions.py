"""Windows over the frames of a clip, tiles over its height and width, and predictions that are put together of them.

What is fused are the predictions, in every step, as in MultiDiffusion (Bar-Tal et al. 2023): where regions overlap,
they agree on what to denoise towards, so that no seam is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Region(NamedTuple):
    """A part of clips: frames, rows and columns."""

    frames: slice
    rows: slice
    columns: slice

    @classmethod
    def of(cls, clips: Float[Tensor, "b c f h w"]) -> Region:
        """All of them."""
        return cls(*(slice(0, size) for size in clips.shape[2:]))

    def cut(self, clips: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f h w"]:
        """This part of clips."""
        return clips[:, :, self.frames, self.rows, self.columns]


class Denoiser(Protocol):
    """What a model says of noisy clips, guidance included: the one thing that the denoising loop asks for."""

    def __call__(self, noisy: Float[Tensor, "b c f h w"], timestep: Tensor, region: Region) -> Tensor:
        """The prediction for noisy clips, of their shape.

        Args:
            noisy: A region of the clips.
            timestep: ``()``, of the scheduler.
            region: Which one, for what else is told of it.
        """


def windows(length: int, window: int, overlap: int = 0) -> list[range]:
    """Windows over a length, each ``overlap`` into the one before; the last one ends with the length.

    Args:
        length: Frames of a clip, or rows or columns of a frame.
        window: Of them in a window; a shorter length is one window.
        overlap: Below ``window``.

    Raises:
        ValueError: If the windows do not move on.
    """
    if not 0 <= overlap < window:
        raise ValueError(
            f"windows: overlap: expected 0 to below window={window}, got {overlap}; windows have to move on"
        )
    if length <= window:
        return [range(length)]
    starts = [*range(0, length - window, window - overlap), length - window]
    return [range(start, start + window) for start in starts]


def regions(
    frames: Sequence[range], rows: Sequence[range] | None = None, columns: Sequence[range] | None = None
) -> list[Region]:
    """The regions of all windows over frames, rows and columns; None for all rows, or columns."""
    axes = [
        [slice(None)] if axis is None else [slice(w.start, w.stop) for w in axis] for axis in (frames, rows, columns)
    ]
    return [Region(*each) for each in itertools.product(*axes)]


def _within(part: slice, whole: slice) -> slice:
    """A part, counted from the beginning of a whole that is itself one."""
    if part == slice(None):
        return whole
    return slice(whole.start + part.start, min(whole.start + part.stop, whole.stop))


class InRegions:
    """A denoiser that sees one region after the other; where they overlap, the weighted mean of what it says counts.

    Args:
        denoiser: Of a region.
        regions: That cover the clips.
        ramp: Weigh a prediction by its distance from the border of its region, along every axis that is cut, in place
            of equally: what a model says near a border knows less of what is around it.
    """

    def __init__(self, denoiser: Denoiser, regions: Sequence[Region], *, ramp: bool = False) -> None:
        self.denoiser, self.regions, self.ramp = denoiser, regions, ramp

    def __call__(self, noisy: Float[Tensor, "b c f h w"], timestep: Tensor, region: Region) -> Tensor:
        """As in `Denoiser`; what is fused is in the precision of ``noisy``."""
        if len(self.regions) == 1:
            return self.denoiser(noisy, timestep, region)
        total, weights = torch.zeros_like(noisy), torch.zeros_like(noisy[:1, :1])
        for part in self.regions:
            inner = Region(*(_within(own, outer) for own, outer in zip(part, region, strict=True)))
            output = self.denoiser(part.cut(noisy), timestep, inner).to(noisy.dtype)
            weight = self._weight(part, output)
            part.cut(total).add_(output * weight)
            part.cut(weights).add_(weight)
        return total / weights

    def _weight(self, part: Region, output: Tensor) -> Tensor:
        weight = output.new_ones(1, 1, 1, 1, 1)
        if not self.ramp:
            return weight
        for axis, along in enumerate(part, start=2):
            if along != slice(None):
                size = output.shape[axis]
                places = torch.arange(1, size + 1, device=output.device, dtype=output.dtype)
                shape = [size if axis == other else 1 for other in range(5)]
                weight = weight * torch.minimum(places, size + 1 - places).reshape(shape)
        return weight
