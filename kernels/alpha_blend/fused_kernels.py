"""Triton kernels of the blend and its folded form: one pass forward, one backward.

The gradient of alpha is a sum over all of the map. Each program leaves one partial sum, in fp32 (fp64 for fp64 maps),
for a second stage to add; nothing is atomic.
"""

import triton
import triton.language as tl

from temporal_layers.kernels.walk import place, tile_at


@triton.jit
def alpha_of(
    alpha_ptr, row, channel, num_frames, CHANNELS: tl.constexpr, PER_FRAME: tl.constexpr, PER_CHANNEL: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Alpha of a row of the batch as ``[1, channels]``."""
    at = channel * PER_CHANNEL
    if PER_FRAME:
        at += (row % num_frames) * (CHANNELS if PER_CHANNEL else 1)
    return tl.load(alpha_ptr + at, mask=channel < CHANNELS, other=0.0).to(COMPUTE)[None, :]


@triton.jit
def blend_kernel(
    first_ptr, second_ptr, alpha_ptr, image_only_ptr, out_ptr, frames, pixels, chunks,
    stride_first_clip, stride_first_frame, stride_first_channel, stride_first_pixel,
    stride_second_clip, stride_second_frame, stride_second_channel, stride_second_pixel,
    stride_out_clip, stride_out_frame, stride_out_channel, stride_out_pixel,
    num_frames, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
    COMPUTE: tl.constexpr, PER_FRAME: tl.constexpr, PER_CHANNEL: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """``a * first + (1 - a) * second``, or ``first + (1 - a) * second`` if ``RESIDUAL``."""
    clip, frame, chunk, channel = place(frames, chunks, CHANNELS, BLOCK_C)
    first_ptr += clip * stride_first_clip + frame * stride_first_frame
    second_ptr += clip * stride_second_clip + frame * stride_second_frame
    out_ptr += clip * stride_out_clip + frame * stride_out_frame
    alpha = alpha_of(alpha_ptr, clip, channel, num_frames, CHANNELS, PER_FRAME, PER_CHANNEL, COMPUTE)
    for tile in range(TILES):
        pixel = chunk * (BLOCK_P * TILES) + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
        first_at = tile_at(first_ptr, pixel, channel, stride_first_pixel, stride_first_channel)
        second_at = tile_at(second_ptr, pixel, channel, stride_second_pixel, stride_second_channel)
        first = tl.load(first_at, mask=inside, other=0.0).to(COMPUTE)
        second = tl.load(second_at, mask=inside, other=0.0).to(COMPUTE)
        if RESIDUAL:
            out = first + (1.0 - alpha) * second
        else:
            # Two forms, as in torch.lerp, so that an alpha of 0 or 1 gives a branch exactly.
            difference = first - second
            out = tl.where(alpha < 0.5, second + alpha * difference, first - (1.0 - alpha) * difference)
        if image_only_ptr is not None:
            out = tl.where(tl.load(image_only_ptr + clip) != 0, first, out)
        out_at = tile_at(out_ptr, pixel, channel, stride_out_pixel, stride_out_channel)
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def alpha_gradient_kernel(
    grad_ptr, first_ptr, second_ptr, image_only_ptr, part_ptr, frames, pixels, chunks,
    stride_grad_clip, stride_grad_frame, stride_grad_channel, stride_grad_pixel,
    stride_first_clip, stride_first_frame, stride_first_channel, stride_first_pixel,
    stride_second_clip, stride_second_frame, stride_second_channel, stride_second_pixel,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, COMPUTE: tl.constexpr,
    PER_CHANNEL: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sum over one chunk of the gradient times what alpha multiplies, for each channel or in all."""
    clip, frame, chunk, channel = place(frames, chunks, CHANNELS, BLOCK_C)
    grad_ptr += clip * stride_grad_clip + frame * stride_grad_frame
    first_ptr += clip * stride_first_clip + frame * stride_first_frame
    second_ptr += clip * stride_second_clip + frame * stride_second_frame
    total = tl.zeros([BLOCK_P, BLOCK_C], COMPUTE)
    for tile in range(TILES):
        pixel = chunk * (BLOCK_P * TILES) + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
        if image_only_ptr is not None:
            inside = inside & (tl.load(image_only_ptr + clip) == 0)
        grad_at = tile_at(grad_ptr, pixel, channel, stride_grad_pixel, stride_grad_channel)
        second_at = tile_at(second_ptr, pixel, channel, stride_second_pixel, stride_second_channel)
        factor = -tl.load(second_at, mask=inside, other=0.0).to(COMPUTE)
        if not RESIDUAL:
            first_at = tile_at(first_ptr, pixel, channel, stride_first_pixel, stride_first_channel)
            factor += tl.load(first_at, mask=inside, other=0.0).to(COMPUTE)
        total += tl.load(grad_at, mask=inside, other=0.0).to(COMPUTE) * factor
    part = (clip * frames + frame) * chunks + chunk
    if PER_CHANNEL:
        tl.store(part_ptr + part * CHANNELS + channel, tl.sum(total, axis=0), mask=channel < CHANNELS)
    else:
        blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
        tl.store(part_ptr + part * blocks + tl.program_id(0) % blocks, tl.sum(tl.sum(total, axis=0), axis=0))


@triton.jit
def branch_gradients_kernel(
    grad_ptr, alpha_ptr, image_only_ptr, to_first_ptr, to_second_ptr, frames, pixels, chunks,
    stride_grad_clip, stride_grad_frame, stride_grad_channel, stride_grad_pixel,
    stride_to_clip, stride_to_frame, stride_to_channel, stride_to_pixel,
    num_frames, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
    COMPUTE: tl.constexpr, PER_FRAME: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """``a * grad`` and ``(1 - a) * grad``, each only where its pointer is given."""
    clip, frame, chunk, channel = place(frames, chunks, CHANNELS, BLOCK_C)
    grad_ptr += clip * stride_grad_clip + frame * stride_grad_frame
    to_base = clip * stride_to_clip + frame * stride_to_frame
    alpha = alpha_of(alpha_ptr, clip, channel, num_frames, CHANNELS, PER_FRAME, PER_CHANNEL, COMPUTE)
    if image_only_ptr is not None:
        alpha = tl.where(tl.load(image_only_ptr + clip) != 0, 1.0, alpha)
    for tile in range(TILES):
        pixel = chunk * (BLOCK_P * TILES) + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
        grad_at = tile_at(grad_ptr, pixel, channel, stride_grad_pixel, stride_grad_channel)
        grad = tl.load(grad_at, mask=inside, other=0.0).to(COMPUTE)
        if to_first_ptr is not None:
            to_at = tile_at(to_first_ptr + to_base, pixel, channel, stride_to_pixel, stride_to_channel)
            tl.store(to_at, (grad * alpha).to(to_first_ptr.dtype.element_ty), mask=inside)
        if to_second_ptr is not None:
            to_at = tile_at(to_second_ptr + to_base, pixel, channel, stride_to_pixel, stride_to_channel)
            tl.store(to_at, (grad * (1.0 - alpha)).to(to_second_ptr.dtype.element_ty), mask=inside)
