"""Triton kernels of the convolution over frames, as an implicit matrix product.

A clip is a matrix of ``frames * pixels`` rows and ``channels`` columns, in which a tap is the same matrix shifted by
``pixels`` rows. So a tile of the result is a sum over taps and chunks of channels of products of shifted tiles; rows
before the first frame and after the last are zero, and a tile may lie across frames. The taps of one chunk of channels
come one after another, as what one program reads of a neighbouring frame another one has just read. Bias, timestep
embedding, residual and blend are added to the tile before it is written.

There are two forms. The one with pointers runs on every GPU. The one with tensor descriptors leaves addresses, bounds
and zeros to the copy engine of Hopper and newer GPUs, which frees the registers for larger tiles.
"""

import triton
import triton.language as tl


@triton.jit
def place(row_tiles, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Clip, first row and first column of this program; columns vary fastest, so that neighbours share their input."""
    pid = tl.program_id(0)
    columns: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tile = pid // columns
    return tile // row_tiles, (tile % row_tiles) * BLOCK_M, (pid % columns) * BLOCK_N


@triton.jit
def add_embedding(
    update, temb_ptr, clip, row, column, rows, temb_rows,
    OUT: tl.constexpr, SHARED_TEMB: tl.constexpr,
):  # fmt: skip
    """Adds the timestep embedding; ``temb_rows`` consecutive rows of a clip have one row of it."""
    # Products of more than 2**31 are none here: embeddings are small.
    first = clip * (rows // temb_rows)
    if SHARED_TEMB:  # by all rows of the tile
        at = (first + tl.min(row, axis=0) // temb_rows) * OUT + column
        return update + tl.load(temb_ptr + at, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
    at = (first + row // temb_rows)[:, None] * OUT + column[None, :]
    inside = (row < rows)[:, None] & (column < OUT)[None, :]
    return update + tl.load(temb_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def finish(
    update, bias_ptr, temb_ptr, alpha_ptr, clip, row, column, rows, temb_rows,
    OUT: tl.constexpr, SHARED_TEMB: tl.constexpr, ALPHA_PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """The update as it is added to the residual: with bias and embedding, weighed."""
    if bias_ptr is not None:
        update += tl.load(bias_ptr + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
    if temb_ptr is not None:
        update = add_embedding(update, temb_ptr, clip, row, column, rows, temb_rows, OUT, SHARED_TEMB)
    if alpha_ptr is not None:
        if ALPHA_PER_CHANNEL:
            update *= (1.0 - tl.load(alpha_ptr + column, mask=column < OUT, other=0.0))[None, :]
        else:
            update *= 1.0 - tl.load(alpha_ptr)
    return update


@triton.jit(do_not_specialize=["row_tiles"])
def temporal_conv_kernel(
    x_ptr, weight_ptr, bias_ptr, temb_ptr, residual_ptr, alpha_ptr, out_ptr, rows, row_tiles, pixels, temb_rows,
    IN: tl.constexpr, OUT: tl.constexpr, TAPS: tl.constexpr, PADDING: tl.constexpr,
    SHARED_TEMB: tl.constexpr, ALPHA_PER_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The form with pointers, to dense ``(clips, rows, IN)``, ``(TAPS, OUT, IN)`` and ``(clips, rows, OUT)``."""
    clip, first, first_column = place(row_tiles, OUT, BLOCK_M, BLOCK_N)
    row, column = first + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    x_ptr += clip.to(tl.int64) * rows * IN
    update = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(TAPS * ((IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % TAPS
        k = step // TAPS * BLOCK_K + tl.arange(0, BLOCK_K)
        source = row + (tap - PADDING) * pixels
        x_inside = ((source >= 0) & (source < rows))[:, None]
        w_inside = (column < OUT)[:, None]
        if IN % BLOCK_K != 0:
            x_inside = x_inside & (k < IN)[None, :]
            w_inside = w_inside & (k < IN)[None, :]
        x = tl.load(x_ptr + source.to(tl.int64)[:, None] * IN + k[None, :], mask=x_inside, other=0.0)
        w = tl.load(weight_ptr + (tap * OUT + column)[:, None] * IN + k[None, :], mask=w_inside, other=0.0)
        update = tl.dot(x, tl.trans(w), update, input_precision="ieee")
    update = finish(
        update, bias_ptr, temb_ptr, alpha_ptr, clip, row, column, rows, temb_rows,
        OUT, SHARED_TEMB, ALPHA_PER_CHANNEL,
    )  # fmt: skip
    inside = (row < rows)[:, None] & (column < OUT)[None, :]
    at = (clip.to(tl.int64) * rows + row)[:, None] * OUT + column[None, :]
    if residual_ptr is not None:
        update += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, update.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["row_tiles"])
def temporal_conv_descriptor_kernel(
    x_desc, weight_desc, bias_ptr, temb_ptr, residual_desc, alpha_ptr, out_desc, rows, row_tiles, pixels, temb_rows,
    IN: tl.constexpr, OUT: tl.constexpr, TAPS: tl.constexpr, PADDING: tl.constexpr,
    SHARED_TEMB: tl.constexpr, ALPHA_PER_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The form with tensor descriptors, which read zeros before row 0 and from the last row of a clip on."""
    clip, first, first_column = place(row_tiles, OUT, BLOCK_M, BLOCK_N)
    update = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(TAPS * ((IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % TAPS
        k = step // TAPS * BLOCK_K
        x = x_desc.load([clip, first + (tap - PADDING) * pixels, k]).reshape(BLOCK_M, BLOCK_K)
        w = weight_desc.load([tap, first_column, k]).reshape(BLOCK_N, BLOCK_K)
        update = tl.dot(x, tl.trans(w), update)
    row, column = first + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    update = finish(
        update, bias_ptr, temb_ptr, alpha_ptr, clip, row, column, rows, temb_rows,
        OUT, SHARED_TEMB, ALPHA_PER_CHANNEL,
    )  # fmt: skip
    if residual_desc is not None:
        update += residual_desc.load([clip, first, first_column]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
    out_desc.store([clip, first, first_column], update.to(out_desc.dtype).reshape(1, BLOCK_M, BLOCK_N))
