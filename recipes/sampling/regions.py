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
    frames: Sequence[range] | None = None,
    rows: Sequence[range] | None = None,
    columns: Sequence[range] | None = None,
) -> list[Region]:
    """The regions of all windows over frames, rows and columns; None for all frames, rows or columns."""
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

    What a model says near a border where its region was cut knows less of what is around it. A border of the clips
    themselves is no cut.

    Args:
        denoiser: Of a region.
        regions: That cover the clips.
        ramp: Weigh a prediction by its distance from the cuts of its region, in place of equally.
        margin: Places next to a cut that do not count at all. Where a model sees no farther than that, the result is
            what it says of the whole clips.
    """

    def __init__(self, denoiser: Denoiser, regions: Sequence[Region], *, ramp: bool = False, margin: int = 0) -> None:
        self.denoiser, self.regions, self.ramp, self.margin = denoiser, regions, ramp, margin

    def __call__(self, noisy: Float[Tensor, "b c f h w"], timestep: Tensor, region: Region) -> Tensor:
        """As in `Denoiser`; fused in single precision or wider, returned in that of ``noisy``.

        Raises:
            ValueError: If there are places that no region says anything of.
        """
        if len(self.regions) == 1:
            return self.denoiser(noisy, timestep, region)
        wide = torch.promote_types(noisy.dtype, torch.float32)
        total, weights = torch.zeros_like(noisy, dtype=wide), torch.zeros_like(noisy[:1, :1], dtype=wide)
        for part in self.regions:
            inner = Region(*(_within(own, outer) for own, outer in zip(part, region, strict=True)))
            output = self.denoiser(part.cut(noisy), timestep, inner)
            weight = self._weight(part, total)
            part.cut(total).add_(output * weight)
            part.cut(weights).add_(weight)
        if not weights.all():
            raise ValueError(
                f"InRegions: regions: expected regions that cover clips of {tuple(noisy.shape[2:])}, margin="
                f"{self.margin} left out on both sides of each cut, got {len(self.regions)} that do not; let them "
                "overlap by twice the margin or more"
            )
        return (total / weights).to(noisy.dtype)

    def _weight(self, part: Region, clips: Tensor) -> Tensor:
        weight = clips.new_ones(1, 1, 1, 1, 1)
        for axis, along in enumerate(part, start=2):
            size = clips.shape[axis]
            start, stop, _ = along.indices(size)
            places = torch.arange(start, stop, device=clips.device)
            inside = torch.full_like(places, size + self.margin)
            if start > 0:
                inside = inside.minimum(places - start + 1)
            if stop < size:
                inside = inside.minimum(stop - places)
            inside = (inside - self.margin).clamp(min=0)
            inside = inside / size if self.ramp else inside.sign()
            weight = weight * inside.to(clips.dtype).reshape([-1 if axis == other else 1 for other in range(5)])
        return weight


def in_parts(
    denoiser: Denoiser,
    size: Sequence[int],
    *,
    window: int | None = None,
    overlap: int = 0,
    tile: Sequence[int] | None = None,
    tile_overlap: int = 0,
) -> Denoiser:
    """A denoiser of large clips that is asked about a few frames, and a part of each, at a time.

    Memory for the model then depends on the window and the tile alone. Windows over time are averaged where they
    overlap. Tiles fade into each other over the middle half of their overlap; in its outer quarters only that tile
    counts for which they are no border. So the result of tiles is that of whole frames if the model sees no farther
    than a quarter of their overlap.

    Args:
        denoiser: Of a part.
        size: Frames, height and width of the clips.
        window: Frames at a time; None for all.
        overlap: Frames that a window shares with the one before.
        tile: Height and width of a tile; None for whole frames.
        tile_overlap: Rows, and columns, that a tile shares with the one before.

    Raises:
        ValueError: If windows or tiles do not move on; see `windows`.
    """
    frames, *sides = size
    if tile is not None:
        cuts = [windows(side, part, tile_overlap) for side, part in zip(sides, tile, strict=True)]
        denoiser = InRegions(denoiser, regions(None, *cuts), ramp=True, margin=tile_overlap // 4)
    if window is not None:
        denoiser = InRegions(denoiser, regions(windows(frames, window, overlap)))
    return denoiser
