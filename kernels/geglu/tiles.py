"""The tile that one program of the fused gated projection works on, and where the kernel is the faster one."""

import torch

from temporal_layers.kernels.launch import target_of
from temporal_layers.kernels.matmul import Family, Tile, family_of

# (target, channels of the input) for which the fused kernel was measured to beat PyTorch's products with their
# pointwise operators; there "auto" takes it. Empty: nothing has been measured yet.
FASTER: frozenset[tuple[str, int]] = frozenset()

# (family, 16 bit) -> tile. A program computes its columns twice, of the value and of the gate.
TABLE: dict[tuple[Family, bool], Tile] = {
    ("hopper", True): Tile(128, 64, 64, warps=8, stages=3),
    ("blackwell", True): Tile(128, 64, 64, warps=8, stages=3),
    ("ampere", True): Tile(128, 64, 64, warps=8, stages=3),
    ("amd", True): Tile(128, 64, 64, warps=8, stages=2),
    ("hopper", False): Tile(64, 32, 16, warps=4, stages=3),
    ("blackwell", False): Tile(64, 32, 16, warps=4, stages=3),
    ("ampere", False): Tile(64, 32, 16, warps=4, stages=3),
    ("amd", False): Tile(64, 32, 16, warps=4, stages=2),
    ("interpreted", True): Tile(32, 16, 16, warps=1, stages=1),  # several tiles each way in a small test
    ("interpreted", False): Tile(32, 16, 16, warps=1, stages=1),
}


def tile_for(target: str, rows: int, columns: int, depth: int, dtype: torch.dtype) -> Tile:
    """Tile for a projection of ``rows`` rows of ``depth`` channels to ``columns`` values and as many gates."""
    return TABLE[family_of(target), dtype != torch.float32].clipped(rows, columns, depth)


def is_faster(x: torch.Tensor) -> bool:
    """Whether the fused kernel was measured to be the faster one for ``x``, on its device."""
    return bool(FASTER) and (target_of(x), x.shape[-1]) in FASTER
