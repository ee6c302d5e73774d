"""Feeding a clip to causal layers block by block: what they keep of the frames that went through."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

__all__ = ["FrameCache", "check_streams"]


@dataclass(frozen=True)
class History:
    """The last frames that went through a layer, and how many did in all."""

    frames: tuple[Tensor, ...]
    total: int


class FrameCache:
    """What causal layers remember of a stream of frames, so that the next block of frames costs no more than itself.

    Attention over frames keeps its keys and values, as many frames as its window reaches back (all without a window); a
    convolution over frames keeps its last ``kernel_size - 1`` input frames. The results of all blocks, one behind the
    other, are those of the whole clip in one pass, up to rounding. One cache is one stream of one model (several clips
    may run side by side in the batch); batch size, resolution, dtype and device follow the first block. For inference.

    Example:
        >>> cache = FrameCache()
        >>> with torch.no_grad():  # doctest: +SKIP
        ...     for frames in blocks:
        ...         with cache.block():
        ...             mixed = layer(frames, num_frames=2, cache=cache)
    """

    def __init__(self) -> None:
        self._total = 0
        self._past: dict[tuple[nn.Module, int], History] = {}
        self._sizes: dict[nn.Module, int] = {}
        self._block: _Block | None = None

    @property
    def num_frames(self) -> int:
        """Frames of all blocks so far, that of a block under way not among them: the index of its first frame."""
        return self._total

    @property
    def nbytes(self) -> int:
        """Memory that is kept between blocks, in bytes."""
        return sum(frames.untyped_storage().nbytes() for past in self._past.values() for frames in past.frames)

    def reset(self) -> None:
        """Forget all frames: the next block starts a new stream, of any batch size and resolution.

        Raises:
            ValueError: inside of a block.
        """
        self._check_closed("reset")
        self._total, self._past, self._sizes = 0, {}, {}

    @contextmanager
    def block(self, *, update: bool = True) -> Iterator[None]:
        """The body runs the next block of frames, once through all layers, in the same order every time.

        If it raises, the cache is as before.

        Args:
            update: remember the block. If false the layers see the frames before it and forget it, so that the same
                frames can run again: while a block is denoised, for instance, with a last pass that is remembered.

        Raises:
            ValueError: if gradients are recorded, or inside of another block.
        """
        self._check_closed("block")
        if torch.is_grad_enabled():
            raise ValueError(
                "FrameCache.block: expected no gradients, got torch.is_grad_enabled(); the frames kept would keep the "
                "graph of all blocks: use torch.no_grad(), and train on whole clips"
            )
        block = self._block = _Block(update)
        try:
            yield
        finally:
            self._block = None
        if update and block.num_frames is not None:
            self._past.update(block.kept)
            self._total += block.num_frames

    def extend(
        self,
        layer: nn.Module,
        tensors: tuple[Shaped[Tensor, "batch frames ..."], ...],
        *,
        keep: int | None,
    ) -> tuple[Shaped[Tensor, "batch more_frames ..."], ...]:
        """Put the frames that ``layer`` keeps in front of new ones; for the forward pass of a layer.

        Args:
            layer: whose frames they are.
            tensors: what it makes of the block's frames, each ``(batch, frames, ...)``.
            keep: frames to keep for the next block; ``None`` for all.

        Returns:
            The tensors with up to ``keep`` earlier frames in front.

        Raises:
            ValueError: outside of a block, or if the frames do not go on where those before ended.
        """
        who, block = type(layer).__name__, self._block
        if block is None:
            raise ValueError(
                f"{who}: cache: expected a call inside of `with cache.block():`, got one outside; one block is one run "
                "of the same frames through all layers"
            )
        key = (layer, block.runs[layer])
        block.runs[layer] += 1
        past = self._past.get(key, History((), 0))
        self._check(who, past, tensors)
        if past.frames:
            tensors = tuple(torch.cat(pair, dim=1) for pair in zip(past.frames, tensors, strict=True))
        if block.update:
            kept = tuple(_last(frames, keep, is_own=bool(past.frames)) for frames in tensors)
            block.kept[key] = History(kept, self._total + block.num_frames)
        return tensors

    def pieces(self, layer: nn.Module, size: int) -> int:
        """Positions that ``layer`` takes at a time: ``size`` in the first block, and the same in all others.

        A piece is a run of the layers in it, whose frames are kept for the same piece of the next block.
        """
        return self._sizes.setdefault(layer, size)

    def _check(self, who: str, past: History, tensors: tuple[Tensor, ...]) -> None:
        block, frames = self._block, tensors[0].shape[1]
        if block.num_frames is None:
            block.num_frames = frames
        if frames != block.num_frames:
            raise ValueError(
                f"{who}: num_frames: expected {block.num_frames}, as in the other layers of this block, got {frames}; "
                "open a block for every block of frames"
            )
        if past.total != self._total:
            raise ValueError(
                f"{who}: cache: expected a layer that all {self._total} frames of the stream went through, got one "
                f"with {past.total}; run the same layers in every block, use one cache for each model, or reset() it"
            )
        for kept, new in zip(past.frames, tensors, strict=False):
            before, now = _kind(kept), _kind(new)
            if before != now:
                raise ValueError(
                    f"{who}: cache: expected clips like those of the first block, (batch, ...) = {before}, got {now}; "
                    "use another cache for another stream, or reset() this one"
                )

    def _check_closed(self, name: str) -> None:
        if self._block is not None:
            raise ValueError(f"FrameCache.{name}: expected no block under way, got a call inside of one; end it first")

    def __repr__(self) -> str:
        return f"FrameCache({self._total} frames, {self.nbytes:,} bytes)"


class _Block:
    """A block under way: its frames, how often each layer ran in it, and what is to be kept of it."""

    def __init__(self, update: bool) -> None:
        self.update = update
        self.num_frames: int | None = None
        self.runs: Counter[nn.Module] = Counter()
        self.kept: dict[tuple[nn.Module, int], History] = {}


def _last(frames: Tensor, keep: int | None, *, is_own: bool) -> Tensor:
    if keep is None or keep >= frames.shape[1]:
        return frames if is_own else frames.clone()  # memory of the model's may be written to behind the layer
    return frames[:, frames.shape[1] - keep :].clone()  # a view would keep all frames alive


def _kind(frames: Tensor) -> tuple:
    return (frames.shape[0], *frames.shape[2:]), frames.dtype, str(frames.device)


def check_streams(who: str, config: Any) -> None:
    """Raise a ``ValueError`` unless a layer with this configuration can take its frames block by block.

    Args:
        who: name of the layer.
        config: its configuration, or the layer itself if it has none.
    """
    if not config.causal:
        raise ValueError(
            f"{who}: cache: expected a causal layer, got causal=False, in which a frame sees later ones; train with "
            "causal=True, or run whole clips"
        )
    alpha = getattr(config, "alpha", None)
    if alpha is not None and alpha.shape == "frame":
        raise ValueError(
            f"{who}: cache: expected an alpha for clips of any length, got one per frame of {alpha.num_frames} frames; "
            "use shape='scalar', or run whole clips"
        )
