"""Which calls the fused kernels take, and the tile that one program of them works on."""

from dataclasses import dataclass

import torch

from temporal_layers.kernels.checks import name_of

MAX_FRAMES = 64
MAX_HEAD_DIM = 160
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The least extent of a matrix product that tensor cores take in the dimension they sum over.
MIN_ROWS = 16


@dataclass(frozen=True)
class Tile:
    """Work of one program: one head of one clip at ``blocks * group`` positions.

    The operands of the matrix products are ``blocks`` matrices. The rows of one are all frames of ``group``
    positions, padded to powers of two. A group of more than one position fills the rows of a tensor core when clips
    are short; the scores between different positions of a group are masked.

    Attributes:
        blocks: Matrices.
        group: Positions in a matrix.
        frames: Query frames, padded.
        key_frames: Key frames, padded.
        chunk: Channels of a head that are held at a time.
        warps: Warps that share the work.
    """

    blocks: int
    group: int
    frames: int
    key_frames: int
    chunk: int
    warps: int

    @property
    def positions(self) -> int:
        """Positions of one program."""
        return self.blocks * self.group


def refusal(num_frames: int, key_frames: int, head_dim: int, dtype: torch.dtype) -> tuple[str, str] | None:
    """Why the fused kernels do not take a call, as what they expect and what they got; None if they take it."""
    if dtype not in DTYPES:
        return "float16, bfloat16 or float32 for 'fused'", name_of(dtype)
    if num_frames > MAX_FRAMES or key_frames > MAX_FRAMES:
        return f"at most {MAX_FRAMES} frames for 'fused'", f"{num_frames} frames and {key_frames} key frames"
    if head_dim % 8 != 0 or not 8 <= head_dim <= MAX_HEAD_DIM:
        return f"a head_dim of 8, 16, ..., {MAX_HEAD_DIM} for 'fused'", f"head_dim {head_dim}"
    return None


def power_of_two(size: int) -> int:
    """Smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


def tile_for(num_frames: int, key_frames: int, head_dim: int, dtype: torch.dtype, *, backward: bool) -> Tile:
    """Tile for a call.

    Args:
        num_frames: Query frames of a clip.
        key_frames: Key frames of a clip.
        head_dim: Channels of a head.
        dtype: Dtype of the operands.
        backward: Whether it is for the backward kernel, which holds twice as many operands.

    Returns:
        The tile.
    """
    longest = power_of_two(max(num_frames, key_frames))
    group = max(MIN_ROWS // longest, 1)
    frames, keys = (max(power_of_two(size), MIN_ROWS // group) for size in (num_frames, key_frames))
    rows = max(longest, MIN_ROWS)
    chunk, blocks, warps = TABLE[dtype == torch.float32, backward, rows]
    chunk = min(chunk, max(power_of_two(head_dim), MIN_ROWS))
    if head_dim > chunk:  # the largest with at most 16 channels of padding: 16 bytes a thread need large chunks
        chunk = next(size for size in (64, 32, 16) if size <= chunk and -head_dim % size <= 16)
    return Tile(blocks, group, frames, keys, chunk, warps)


# (fp32, backward, rows of a matrix) -> (chunk, blocks, warps). A table and not a search at the first call: it is the
# same on every run and every machine, and it is checked by compiling ahead of time.
TABLE = {
    (False, False, 16): (64, 8, 4),
    (False, False, 32): (64, 4, 4),
    (False, False, 64): (64, 1, 4),
    (False, True, 16): (64, 4, 4),
    (False, True, 32): (64, 2, 4),
    (False, True, 64): (32, 1, 4),
    (True, False, 16): (16, 4, 4),
    (True, False, 32): (16, 1, 4),
    (True, False, 64): (16, 1, 8),
    (True, True, 16): (16, 2, 4),
    (True, True, 32): (16, 1, 4),
    (True, True, 64): (16, 1, 4),
}
