"""Triton kernels of the gated projection: a matrix product whose program holds a value and its gate.

A program computes one tile of the values and the same tile of the gates, so the gate meets its value in registers and
neither is written: of the two thirds of the traffic that the projection's result causes, nothing is left. The backward
kernel computes both again and turns the gradient of their product into theirs.
"""

import triton
import triton.language as tl

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_OF_TWO_PI = tl.constexpr(2.5066282746310002)


@triton.jit
def place(row_tiles, INNER: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """Row tile and column tile of this program, in bands of ``BAND`` row tiles: their operands fit the cache."""
    pid = tl.program_id(0)
    columns: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    first = pid // (BAND * columns) * BAND
    height = tl.minimum(row_tiles - first, BAND)
    within = pid % (BAND * columns)
    return first + within % height, within // height


@triton.jit
def project(
    x_ptr, weight_ptr, bias_ptr, row, column, rows,
    IN: tl.constexpr, INNER: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of values and of gates in fp32. ``row`` is int64."""
    value = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    gate = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for step in range((IN + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x_inside, w_inside = (row < rows)[:, None], (column < INNER)[:, None]
        if IN % BLOCK_K != 0:
            x_inside = x_inside & (k < IN)[None, :]
            w_inside = w_inside & (k < IN)[None, :]
        x = tl.load(x_ptr + row[:, None] * IN + k[None, :], mask=x_inside, other=0.0)
        w_at = weight_ptr + column[:, None] * IN + k[None, :]
        of_value = tl.load(w_at, mask=w_inside, other=0.0)
        of_gate = tl.load(w_at + INNER * IN, mask=w_inside, other=0.0)
        value = tl.dot(x, tl.trans(of_value), value, input_precision="ieee")
        gate = tl.dot(x, tl.trans(of_gate), gate, input_precision="ieee")
    if bias_ptr is not None:
        value += tl.load(bias_ptr + column, mask=column < INNER, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_ptr + INNER + column, mask=column < INNER, other=0.0).to(tl.float32)[None, :]
    return value, gate


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def geglu_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, row_tiles, IN: tl.constexpr, INNER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Values times the GELU of their gates, from dense ``(rows, IN)`` to dense ``(rows, INNER)``."""
    row_tile, column_tile = place(row_tiles, INNER, BLOCK_N, BAND)
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    value, gate = project(x_ptr, weight_ptr, bias_ptr, row, column, rows, IN, INNER, BLOCK_K)
    out = value * gate * (0.5 + 0.5 * tl.erf(gate * ROOT_HALF))
    inside = (row < rows)[:, None] & (column < INNER)[None, :]
    tl.store(out_ptr + row[:, None] * INNER + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def geglu_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, out_ptr, rows, row_tiles, IN: tl.constexpr, INNER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Gradients ``(rows, 2*INNER)`` of values and gates from those of their products."""
    row_tile, column_tile = place(row_tiles, INNER, BLOCK_N, BAND)
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    value, gate = project(x_ptr, weight_ptr, bias_ptr, row, column, rows, IN, INNER, BLOCK_K)
    inside = (row < rows)[:, None] & (column < INNER)[None, :]
    grad = tl.load(grad_ptr + row[:, None] * INNER + column[None, :], mask=inside, other=0.0).to(tl.float32)
    share = 0.5 + 0.5 * tl.erf(gate * ROOT_HALF)
    density = tl.exp(-0.5 * gate * gate) / ROOT_OF_TWO_PI
    at = out_ptr + row[:, None] * (2 * INNER) + column[None, :]
    tl.store(at, (grad * gate * share).to(out_ptr.dtype.element_ty), mask=inside)
    to_gate = grad * value * (share + gate * density)
    tl.store(at + INNER, to_gate.to(out_ptr.dtype.element_ty), mask=inside)
