"""Triton kernels of the gated projection: a matrix product whose program holds a value and its gate.

A program computes one tile of the values and the same tile of the gates, so the gate meets its value in registers and
neither is written: of the two thirds of the traffic that the projection's result causes, nothing is left. The backward
kernel computes both again and turns the gradient of their product into theirs.
"""

import triton
import triton.language as tl

from temporal_layers.kernels.product import place, project

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_OF_TWO_PI = tl.constexpr(2.5066282746310002)


@triton.jit(do_not_specialize=["rows", "row_tiles", "eps"])
def geglu_kernel(
    x_ptr, weight_ptr, bias_ptr, sums_ptr, out_ptr, rows, row_tiles, eps, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Values times the GELU of their gates, from dense ``(rows, IN)`` to dense ``(rows, OUT)``."""
    row_tile, column_tile = place(row_tiles, OUT, BLOCK_N, BAND)
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    value, gate = project(
        x_ptr, weight_ptr, bias_ptr, sums_ptr, row, column, rows, eps, IN, OUT, True, BLOCK_K
    )  # fmt: skip
    out = value * gate * (0.5 + 0.5 * tl.erf(gate * ROOT_HALF))
    inside = (row < rows)[:, None] & (column < OUT)[None, :]
    tl.store(out_ptr + row[:, None] * OUT + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "row_tiles", "eps"])
def geglu_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, sums_ptr, grad_ptr, out_ptr, rows, row_tiles, eps, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Gradients ``(rows, 2*OUT)`` of values and gates from those of their products."""
    row_tile, column_tile = place(row_tiles, OUT, BLOCK_N, BAND)
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    value, gate = project(
        x_ptr, weight_ptr, bias_ptr, sums_ptr, row, column, rows, eps, IN, OUT, True, BLOCK_K
    )  # fmt: skip
    inside = (row < rows)[:, None] & (column < OUT)[None, :]
    grad = tl.load(grad_ptr + row[:, None] * OUT + column[None, :], mask=inside, other=0.0).to(tl.float32)
    share = 0.5 + 0.5 * tl.erf(gate * ROOT_HALF)
    density = tl.exp(-0.5 * gate * gate) / ROOT_OF_TWO_PI
    at = out_ptr + row[:, None] * (2 * OUT) + column[None, :]
    tl.store(at, (grad * gate * share).to(out_ptr.dtype.element_ty), mask=inside)
    to_gate = grad * value * (share + gate * density)
    tl.store(at + OUT, to_gate.to(out_ptr.dtype.element_ty), mask=inside)
