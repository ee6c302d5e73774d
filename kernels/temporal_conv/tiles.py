"""The tile that one program of the fused convolution works on, and where the kernel is the faster one."""

import torch

from temporal_layers.kernels.launch import target_of
from temporal_layers.kernels.matmul import Family, Tile, family_of

# (target, channels) for which the fused kernel was measured to beat the library's two-dimensional convolution with its
# pointwise operators; there "auto" takes it. Empty: nothing has been measured yet.
FASTER: frozenset[tuple[str, int]] = frozenset()

# (family, 16 bit, large) -> tile. What limits a product on a recent GPU is the traffic from its second-level cache, so
# tiles are as large as the registers allow: 256 rows rather than 256 columns, since 320 and 640 are multiples of 64 and
# 128. Blackwell keeps sums outside the registers, into which 256 rows of them with all that is added would not fit.
# Small problems take smaller tiles, of which there are enough for all multiprocessors.
TABLE: dict[tuple[Family, bool, bool], Tile] = {
    ("hopper", True, True): Tile(256, 128, 64, warps=8, stages=3),
    ("hopper", True, False): Tile(128, 64, 64, warps=4, stages=4),
    ("blackwell", True, True): Tile(128, 128, 64, warps=8, stages=4),
    ("blackwell", True, False): Tile(128, 64, 64, warps=4, stages=4),
    ("ampere", True, True): Tile(128, 128, 64, warps=8, stages=3),
    ("ampere", True, False): Tile(64, 64, 64, warps=4, stages=3),
    ("amd", True, True): Tile(128, 128, 64, warps=8, stages=2),
    ("amd", True, False): Tile(64, 64, 64, warps=4, stages=2),
    ("hopper", False, True): Tile(64, 64, 16, warps=4, stages=3),
    ("hopper", False, False): Tile(64, 64, 16, warps=4, stages=3),
    ("blackwell", False, True): Tile(64, 64, 16, warps=4, stages=3),
    ("blackwell", False, False): Tile(64, 64, 16, warps=4, stages=3),
    ("ampere", False, True): Tile(64, 64, 16, warps=4, stages=3),
    ("ampere", False, False): Tile(64, 64, 16, warps=4, stages=3),
    ("amd", False, True): Tile(64, 64, 16, warps=4, stages=2),
    ("amd", False, False): Tile(64, 64, 16, warps=4, stages=2),
}
INTERPRETED = Tile(32, 32, 16, warps=1, stages=1)  # several tiles each way, even of the small tensors of a test

ENOUGH_PROGRAMS = 256  # nearly two for each multiprocessor of the largest GPUs


def tile_for(target: str, clips: int, rows: int, columns: int, depth: int, dtype: torch.dtype) -> Tile:
    """Tile for a convolution.

    Args:
        target: Architecture, as :func:`target_of` names it.
        clips: Clips.
        rows: Pixels of all frames of a clip.
        columns: Channels of the result.
        depth: Channels of the input.
        dtype: Dtype of the operands.

    Returns:
        The tile.
    """
    family = family_of(target)
    if family == "interpreted":
        return INTERPRETED.clipped(rows, columns, depth)
    narrow = dtype != torch.float32
    tile = TABLE[family, narrow, True]
    if clips * -(-rows // tile.rows) * -(-columns // tile.columns) < ENOUGH_PROGRAMS:
        tile = TABLE[family, narrow, False]
    return tile.clipped(rows, columns, depth)


def takes_descriptors(target: str, dtype: torch.dtype, *channels: int) -> bool:
    """Whether the operands are copied by the hardware's tensor descriptors: whole 16 bytes on Hopper and newer."""
    return (
        family_of(target) in ("hopper", "blackwell")
        and dtype.itemsize == 2
        and all(count % 8 == 0 for count in channels)
    )


def is_faster(x: torch.Tensor, channels: int) -> bool:
    """Whether the fused kernel was measured to be the faster one for ``x``, on its device."""
    return bool(FASTER) and (target_of(x), channels) in FASTER
