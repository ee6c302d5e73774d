"""What the fused products of rows with a weight share: the walk over tiles, the product, and a layer norm in front.

A layer norm would have to be known before the product begins, and costs a pass over memory of its own. But it is linear
in all except its two moments, so that with ``W' = W * gamma``

    ``LN(x) W^T = rstd * (x W'^T - mean * sum(W')) + W beta``

and a program collects the moments of its rows from the tiles that it multiplies anyway. What cancels decides how. A
mean may be large beside its deviation, so sums of squares are those of distances from an element of the row. In 16 bits
products are exact, and their fp32 sum may hold the mean. In fp32 that would cost digits which the result has: there
the rows are multiplied as distances too, and from the mean of some elements, since the first may be an outlier.
``sum(W')`` is that of the rounded weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from temporal_layers.kernels.launch import launch
from temporal_layers.kernels.matmul import Tile

BAND = 8  # row tiles whose programs run together
FOLDED_AT_ONCE = 512  # terms of a row of the weight: 8 for each thread of AMD's wider warp


@triton.jit
def place(row_tiles, OUT: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """Row tile and column tile of this program, in bands of ``BAND`` row tiles: their operands fit the cache."""
    pid = tl.program_id(0)
    columns: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    first = pid // (BAND * columns) * BAND
    height = tl.minimum(row_tiles - first, BAND)
    within = pid % (BAND * columns)
    return first + within % height, within // height


@triton.jit
def project(
    x_ptr, weight_ptr, bias_ptr, sums_ptr, row, column, rows, eps,
    IN: tl.constexpr, OUT: tl.constexpr, PAIRED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the product with its bias in fp32; if ``PAIRED``, also the one ``OUT`` columns further on.

    Args:
        x_ptr: Dense ``(rows, IN)``.
        weight_ptr: Dense ``(OUT or 2*OUT, IN)``; with a layer norm, ``W'``.
        bias_ptr: One value for each row of the weight, or None; with a layer norm ``W beta`` is in it.
        sums_ptr: Sums of the rows of ``W'``; None without a layer norm.
        row: Rows of the tile, int64.
        column: Columns of the tile.
        rows: Rows that there are.
        eps: Epsilon of the layer norm.
    """
    NORMED: tl.constexpr = sums_ptr is not None
    CENTRED: tl.constexpr = NORMED and x_ptr.dtype.element_ty == tl.float32
    first = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    second = first
    if NORMED:
        origin = origin_of(x_ptr, row, rows, IN, BLOCK_K if CENTRED else 1)
        # Eight neighbours are one thread's, so that threads meet only behind the loop.
        total = tl.zeros([row.shape[0], BLOCK_K // 8], tl.float32)
        squares = tl.zeros([row.shape[0], BLOCK_K // 8], tl.float32)
    for step in range((IN + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x_inside, w_inside = (row < rows)[:, None], (column < OUT)[:, None]
        if IN % BLOCK_K != 0:
            x_inside = x_inside & (k < IN)[None, :]
            w_inside = w_inside & (k < IN)[None, :]
        x = tl.load(x_ptr + row[:, None] * IN + k[None, :], mask=x_inside, other=0.0)
        w_at = weight_ptr + column[:, None] * IN + k[None, :]
        of_first = tl.load(w_at, mask=w_inside, other=0.0)
        if NORMED:
            distance = x.to(tl.float32) - origin[:, None]
            if IN % BLOCK_K != 0:
                distance = tl.where((k < IN)[None, :], distance, 0.0)
            eights = tl.reshape(distance, [row.shape[0], BLOCK_K // 8, 8])
            total += tl.sum(eights, axis=2)
            squares += tl.sum(eights * eights, axis=2)
            if CENTRED:
                x = distance
        first = tl.dot(x, tl.trans(of_first), first, input_precision="ieee")
        if PAIRED:
            of_second = tl.load(w_at + OUT * IN, mask=w_inside, other=0.0)
            second = tl.dot(x, tl.trans(of_second), second, input_precision="ieee")
    if NORMED:
        mean = tl.sum(total, axis=1) / IN
        rstd = tl.rsqrt(tl.maximum(tl.sum(squares, axis=1) / IN - mean * mean, 0.0) + eps)
        if not CENTRED:
            mean += origin
        first = normed(first, sums_ptr, mean, rstd, column, OUT)
        if PAIRED:
            second = normed(second, sums_ptr + OUT, mean, rstd, column, OUT)
    if bias_ptr is not None:
        first += tl.load(bias_ptr + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
        if PAIRED:
            second += tl.load(bias_ptr + OUT + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
    return first, second


@triton.jit
def origin_of(x_ptr, row, rows, IN: tl.constexpr, COUNT: tl.constexpr):
    """Mean of the first ``COUNT`` elements of each row, or of all if they are fewer."""
    if COUNT == 1:
        return tl.load(x_ptr + row * IN, mask=row < rows, other=0.0).to(tl.float32)
    k = tl.arange(0, COUNT)
    inside = (row < rows)[:, None] & (k < IN)[None, :]
    first = tl.load(x_ptr + row[:, None] * IN + k[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.sum(first, axis=1) / (COUNT if COUNT < IN else IN)


@triton.jit
def normed(product, sums_ptr, mean, rstd, column, OUT: tl.constexpr):
    """The product with normed rows, from that with the rows themselves."""
    sums = tl.load(sums_ptr + column, mask=column < OUT, other=0.0)
    return (product - mean[:, None] * sums[None, :]) * rstd[:, None]


@triton.jit
def fold_norm_kernel(
    weight_ptr, bias_ptr, gamma_ptr, beta_ptr, folded_ptr, shift_ptr, sums_ptr,
    IN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of the weight times ``gamma``, its sum, and its product with ``beta`` plus the bias."""
    row = tl.program_id(0).to(tl.int64)
    total, shift = tl.zeros([BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    for step in range((IN + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        weight = tl.load(weight_ptr + row * IN + k, mask=k < IN, other=0.0).to(tl.float32)
        folded = weight
        if gamma_ptr is not None:
            folded *= tl.load(gamma_ptr + k, mask=k < IN, other=0.0).to(tl.float32)
        folded = folded.to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + row * IN + k, folded, mask=k < IN)
        total += folded.to(tl.float32)
        if beta_ptr is not None:
            shift += weight * tl.load(beta_ptr + k, mask=k < IN, other=0.0).to(tl.float32)
    added = tl.sum(shift, axis=0)
    if bias_ptr is not None:
        added += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(shift_ptr + row, added)
    tl.store(sums_ptr + row, tl.sum(total, axis=0))


def fold_norm(
    weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`project` takes for a product behind a layer norm.

    Args:
        weight: Dense ``(out, in)``.
        bias: Dense ``(out,)`` or None.
        gamma: The norm's dense weight ``(in,)`` or None.
        beta: The norm's dense bias ``(in,)`` or None.

    Returns:
        ``W'`` in the dtype of the weight; the bias with ``W beta``, and the sums of the rows of ``W'``, in fp32.
    """
    folded = torch.empty_like(weight)
    shift, sums = (torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device) for _ in range(2))
    launch(
        fold_norm_kernel, (weight.shape[0],), weight, bias, gamma, beta, folded, shift, sums,
        IN=weight.shape[1], BLOCK_K=FOLDED_AT_ONCE, num_warps=1,
    )  # fmt: skip
    return folded, shift, sums


def launch_product(
    kernel: object,
    tile: Tile,
    columns: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, float | None],
    *others: Tensor | None,
    **options: object,
) -> None:
    """Launches a kernel around :func:`project`.

    Args:
        kernel: Takes ``x``, weight, bias and sums of the weight, then ``others``.
        tile: The tile of one program.
        columns: Columns of the tiles of the first product.
        x: ``(rows, in)``.
        weight: ``(columns or 2*columns, in)`` in the dtype of ``x``.
        bias: One value for each row of the weight, or None.
        norm: Weight, bias and epsilon of the layer norm; an epsilon of None for no norm.
        *others: Dense.
        **options: Of the kernel.
    """
    gamma, beta, eps = norm
    x, weight, bias, gamma, beta = dense(x, weight, bias, gamma, beta)
    sums = None
    if eps is not None:
        weight, bias, sums = fold_norm(weight, bias, gamma, beta)
    rows, depth = x.shape
    row_tiles = cdiv(rows, tile.rows)
    launch(
        kernel, (row_tiles * cdiv(columns, tile.columns),), x, weight, bias, sums, *others, rows, row_tiles, eps or 0.0,
        IN=depth, OUT=columns, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, BAND=BAND,
        num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip


def norm_rows(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normed rows in the widest of the dtypes, and their means and reciprocal deviations: for a backward pass."""
    x, gamma, beta = alike(x, gamma, beta)
    return torch.native_layer_norm(x, x.shape[-1:], gamma, beta, eps)


def differentiate_norm(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    moments: tuple[Tensor, Tensor],
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the rows, the norm's weight and its bias, each in its dtype, from that of the normed rows.

    Args:
        grad: Gradient of the normed rows.
        x: The rows.
        gamma: The norm's weight or None.
        beta: The norm's bias or None.
        moments: Means and reciprocal deviations, as :func:`norm_rows` returns them.
        needed: Whose gradients are needed.
    """
    operands = x, gamma, beta
    wide_x, wide_gamma, wide_beta = alike(*operands)
    gradients = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide_x.dtype), wide_x, wide_x.shape[-1:], *moments, wide_gamma, wide_beta, list(needed)
    )
    return tuple(
        value.to(operand.dtype) if wanted else None
        for value, operand, wanted in zip(gradients, operands, needed, strict=True)
    )


def alike(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The tensors in the widest of their dtypes: under autocast a norm's parameters are wider than its rows."""
    dtype = x.dtype
    for other in others:
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return [None if value is None else value.to(dtype) for value in (x, *others)]


def dense(*operands: Tensor | None) -> list[Tensor | None]:
    """The operands in contiguous memory."""
    return [None if value is None else value.contiguous() for value in operands]


def empty_rows(x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """A result of ``columns`` columns for the rows of ``x``."""
    return torch.empty(x.shape[0], columns, dtype=dtype, device=x.device)
