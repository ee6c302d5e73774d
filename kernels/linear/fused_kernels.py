"""Triton kernel of the product: the tile of :func:`project`, weighed and added to its residual before it is written."""

import triton
import triton.language as tl

from temporal_layers.kernels.product import place, project


@triton.jit(do_not_specialize=["rows", "row_tiles", "eps"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, sums_ptr, residual_ptr, alpha_ptr, out_ptr, rows, row_tiles, eps,
    IN: tl.constexpr, OUT: tl.constexpr, ALPHA_PER_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """From dense ``(rows, IN)`` to dense ``(rows, OUT)``; ``sums_ptr`` is None without a layer norm."""
    row_tile, column_tile = place(row_tiles, OUT, BLOCK_N, BAND)
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    update, _ = project(
        x_ptr, weight_ptr, bias_ptr, sums_ptr, row, column, rows, eps, IN, OUT, False, BLOCK_K
    )  # fmt: skip
    if alpha_ptr is not None:
        if ALPHA_PER_CHANNEL:
            update *= (1.0 - tl.load(alpha_ptr + column, mask=column < OUT, other=0.0))[None, :]
        else:
            update *= 1.0 - tl.load(alpha_ptr)
    inside = (row < rows)[:, None] & (column < OUT)[None, :]
    at = row[:, None] * OUT + column[None, :]
    if residual_ptr is not None:
        update += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, update.to(out_ptr.dtype.element_ty), mask=inside)
