"""The tile that one program of the fused product works on, and where the kernel is the faster one."""

import torch

from temporal_layers.kernels.launch import target_of
from temporal_layers.kernels.matmul import Family, Tile, family_of

# (target, channels of the input, of the result) for which the fused kernel was measured to beat PyTorch's product with
# its norm and its sum; there "auto" takes it. Empty: nothing has been measured yet.
FASTER: frozenset[tuple[str, int, int]] = frozenset()

# (family, 16 bit) -> tile. 320, 640 and 1280 are multiples of 64, not of 128; but a program of 64 columns collects the
# moments of a norm for half as many.
TABLE: dict[tuple[Family, bool], Tile] = {
    ("hopper", True): Tile(128, 128, 64, warps=8, stages=3),
    ("blackwell", True): Tile(128, 128, 64, warps=8, stages=3),
    ("ampere", True): Tile(128, 128, 32, warps=8, stages=4),
    ("amd", True): Tile(128, 128, 64, warps=8, stages=2),
    ("hopper", False): Tile(64, 64, 16, warps=4, stages=3),
    ("blackwell", False): Tile(64, 64, 16, warps=4, stages=3),
    ("ampere", False): Tile(64, 64, 16, warps=4, stages=3),
    ("amd", False): Tile(64, 64, 16, warps=4, stages=2),
    ("interpreted", True): Tile(32, 32, 16, warps=1, stages=1),  # several tiles each way in a small test
    ("interpreted", False): Tile(32, 32, 16, warps=1, stages=1),
}


def tile_for(target: str, rows: int, columns: int, depth: int, dtype: torch.dtype) -> Tile:
    """Tile for a product of ``rows`` rows of ``depth`` channels that gives ``columns`` channels."""
    return TABLE[family_of(target), dtype != torch.float32].clipped(rows, columns, depth)


def is_faster(x: torch.Tensor, columns: int) -> bool:
    """Whether the fused kernel was measured to be the faster one for ``x``, on its device."""
    return bool(FASTER) and (target_of(x), x.shape[-1], columns) in FASTER
