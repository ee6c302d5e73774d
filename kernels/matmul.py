"""What the fused operators that are matrix products share: which calls they take, and the tiles of their programs.

Tiles come from a table and not from a search at the first call: the same on every run and machine, and checked by
compiling ahead of time. Nothing here imports triton.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from temporal_layers.kernels.checks import name_of

Family = Literal["ampere", "hopper", "blackwell", "amd", "interpreted"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The least extent of a matrix product that tensor cores take.
SMALLEST = 16


@dataclass(frozen=True)
class Tile:
    """Work of one program: ``rows * columns`` results, whose terms come ``depth`` at a time.

    Attributes:
        rows: Rows of the result.
        columns: Columns of the result.
        depth: Terms of each sum between two synchronisations.
        warps: Warps that share the work.
        stages: Operands that are on their way at a time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def clipped(self, rows: int, columns: int, depth: int) -> "Tile":
        """The tile for a problem that may be smaller than it."""
        return replace(
            self, rows=min(self.rows, power_of_two(rows)), columns=min(self.columns, power_of_two(columns)),
            depth=min(self.depth, power_of_two(depth)),
        )  # fmt: skip


def power_of_two(size: int) -> int:
    """Smallest power of two that is at least ``size`` and fills a tensor core."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def family_of(target: str) -> Family:
    """Kind of GPU that an architecture belongs to, by what its matrix units and copy engines can do."""
    if target == "interpreted":
        return "interpreted"
    if target.startswith("gfx"):
        return "amd"
    number = int(target.removeprefix("sm_"))
    if number < 90 or number >= 120:  # consumer GPUs of Blackwell's generation have Ampere's matrix units and memory
        return "ampere"
    return "hopper" if number < 100 else "blackwell"


def refusal(dtype: torch.dtype) -> tuple[str, str] | None:
    """Why the fused kernels do not take a dtype, as what they expect and what they got; None if they take it."""
    if dtype in DTYPES:
        return None
    return "float16, bfloat16 or float32 for 'fused'", name_of(dtype)
