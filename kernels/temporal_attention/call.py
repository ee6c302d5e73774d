"""One call of the fused kernels: its sizes and options, in the form that the kernels take."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from temporal_layers.kernels.temporal_attention.tiles import MAX_FRAMES, Tile, tile_for


@dataclass(frozen=True)
class Call:
    """Sizes and options of a call, read off its tensors by :meth:`of`.

    Attributes:
        batch: Clips.
        num_positions: Positions.
        num_heads: Heads.
        head_dim: Channels of a head.
        num_frames: Query frames of a clip.
        key_frames: Key frames of a clip.
        dtype: Dtype of query, key and value.
        bias: Contiguous ``(heads, frames, key_frames)``, or None.
        frame_mask: Contiguous uint8 ``(batch, key_frames)``, or None.
        causal: Whether later frames are hidden.
        window: Reach in frames, or None.
        scale: Factor on the scores.
    """

    batch: int
    num_positions: int
    num_heads: int
    head_dim: int
    num_frames: int
    key_frames: int
    dtype: torch.dtype
    bias: Tensor | None
    frame_mask: Tensor | None
    causal: bool
    window: int | None
    scale: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        bias: Tensor | None,
        frame_mask: Tensor | None,
        num_frames: int,
        key_frames: int,
        num_heads: int,
        causal: bool,
        window: int | None,
        scale: float,
    ) -> "Call":
        """Call with this query and these options."""
        batch_frames, positions, channels = query.shape
        if bias is not None:
            bias = bias.contiguous()
        if frame_mask is not None:  # bytes: loads of single bits are not portable
            frame_mask = frame_mask.contiguous().view(torch.uint8)
        return cls(
            batch_frames // num_frames, positions, num_heads, channels // num_heads, num_frames, key_frames,
            query.dtype, bias, frame_mask, causal, window, scale,
        )  # fmt: skip

    def tile(self, *, backward: bool = False) -> Tile:
        """Tile of one program; see :func:`tile_for`."""
        sizes = self.num_frames, self.key_frames, self.head_dim
        return tile_for(*sizes, self.dtype, backward=backward)

    def programs(self, tile: Tile) -> int:
        """Programs for all positions of all heads and clips."""
        return self.batch * self.num_heads * -(-self.num_positions // tile.positions)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Arguments ``num_frames, key_frames, num_heads, num_positions`` of the kernels."""
        return self.num_frames, self.key_frames, self.num_heads, self.num_positions

    @property
    def reach(self) -> tuple[int, int]:
        """Arguments ``reach_back, reach_ahead`` of the kernels, in frames; causality is a reach of none ahead."""
        reach = 2 * MAX_FRAMES if self.window is None else min(self.window, 2 * MAX_FRAMES)
        return reach, 0 if self.causal else reach

    def constants(self, tile: Tile) -> dict[str, Any]:
        """Compile-time arguments of the kernels."""
        return {
            "BANDED": self.causal or self.window is not None,
            "DIM": self.head_dim,
            "CHUNK": tile.chunk,
            "BLOCKS": tile.blocks,
            "GROUP": tile.group,
            "FRAMES": tile.frames,
            "KEY_FRAMES": tile.key_frames,
        }
