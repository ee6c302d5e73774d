"""Triton kernels of the group norm over frames.

PyTorch's CUDA kernel gives each clip and group one block of threads, a few hundred for a whole video. Here the pixels
of a clip are cut into chunks that fill the GPU: a first kernel writes a partial result of each chunk and channel, a
small second one folds them per group, a third walks over the map again. Nothing is atomic. Sums are taken around a
value near the mean, in fp32 (fp64 for fp64 maps).

Every kernel sees a map as ``(clips, frames, pixels, channels)`` with strides of its own for each tensor, so a change
of memory format between input and output costs no pass.
"""

import triton
import triton.language as tl

from temporal_layers.kernels.walk import place, tile_at


@triton.jit
def affine_of(ptr, channel, CHANNELS: tl.constexpr, DEFAULT: tl.constexpr, COMPUTE: tl.constexpr):
    """Weight or bias of the channels as a row; ``DEFAULT`` where there is none."""
    if ptr is None:
        value = tl.full([channel.shape[0]], DEFAULT, COMPUTE)
    else:
        value = tl.load(ptr + channel, mask=channel < CHANNELS, other=0.0).to(COMPUTE)
    return value[None, :]


@triton.jit
def per_group(ptr, clip, channel, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """A value of each group as a row over the channels."""
    group = clip * GROUPS + channel // (CHANNELS // GROUPS)
    return tl.load(ptr + group, mask=channel < CHANNELS, other=0.0)[None, :]


@triton.jit
def moments_kernel(
    x_ptr, mean_ptr, m2_ptr, frames, pixels, chunks, stride_x_clip, stride_x_frame, stride_x_channel, stride_x_pixel,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of one chunk, for each channel."""
    clip, frame, chunk, channel = place(frames, chunks, CHANNELS, BLOCK_C)
    x_ptr += clip * stride_x_clip + frame * stride_x_frame
    first = chunk * (BLOCK_P * TILES)
    # The mean of the first tile: near enough to the chunk's that its square does not swallow the variance.
    pixel = first + tl.arange(0, BLOCK_P)
    inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
    x = tl.load(tile_at(x_ptr, pixel, channel, stride_x_pixel, stride_x_channel), mask=inside, other=0.0).to(COMPUTE)
    centre = tl.sum(x, axis=0) / tl.minimum(pixels - first, BLOCK_P)
    total = tl.zeros([BLOCK_P, BLOCK_C], COMPUTE)
    square = tl.zeros([BLOCK_P, BLOCK_C], COMPUTE)
    for tile in range(TILES):
        pixel = first + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
        x_at = tile_at(x_ptr, pixel, channel, stride_x_pixel, stride_x_channel)
        x = tl.load(x_at, mask=inside, other=0.0).to(COMPUTE)
        deviation = tl.where(inside, x - centre[None, :], 0.0)
        total += deviation
        square += deviation * deviation
    shift = tl.sum(total, axis=0) / tl.minimum(pixels - first, BLOCK_P * TILES)
    m2 = tl.sum(square, axis=0) - shift * tl.sum(total, axis=0)
    at = ((clip * frames + frame) * chunks + chunk) * CHANNELS + channel
    tl.store(mean_ptr + at, centre + shift, mask=channel < CHANNELS)
    tl.store(m2_ptr + at, tl.maximum(m2, 0.0), mask=channel < CHANNELS)


@triton.jit
def fold_moments_kernel(
    part_mean_ptr, part_m2_ptr, mean_ptr, rstd_ptr, parts, chunks, pixels, group_size, eps, CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, LOOPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Mean and reciprocal deviation of one group from those of its chunks and channels (Chan's formula)."""
    pid = tl.program_id(0)
    width: tl.constexpr = CHANNELS // GROUPS
    base = (pid // GROUPS).to(tl.int64) * parts * CHANNELS + (pid % GROUPS) * width
    lane = tl.arange(0, BLOCK_G)
    centre = tl.load(part_mean_ptr + base)
    total = tl.zeros([BLOCK_R, BLOCK_G], COMPUTE)
    for loop in range(LOOPS):
        part = loop * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (part < parts)[:, None] & (lane < width)[None, :]
        count = tl.minimum(pixels - (part % chunks) * CHUNK, CHUNK)[:, None]
        at = base + part.to(tl.int64)[:, None] * CHANNELS + lane[None, :]
        mean = tl.load(part_mean_ptr + at, mask=inside, other=0.0)
        total += tl.where(inside, count * (mean - centre), 0.0)
    group_mean = centre + tl.sum(tl.sum(total, axis=0), axis=0) / group_size
    m2 = tl.zeros([BLOCK_R, BLOCK_G], COMPUTE)
    for loop in range(LOOPS):
        part = loop * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (part < parts)[:, None] & (lane < width)[None, :]
        count = tl.minimum(pixels - (part % chunks) * CHUNK, CHUNK)[:, None]
        at = base + part.to(tl.int64)[:, None] * CHANNELS + lane[None, :]
        deviation = tl.load(part_mean_ptr + at, mask=inside, other=0.0) - group_mean
        m2 += tl.load(part_m2_ptr + at, mask=inside, other=0.0)
        m2 += tl.where(inside, count * deviation * deviation, 0.0)
    variance = tl.sum(tl.sum(m2, axis=0), axis=0) / group_size
    tl.store(mean_ptr + pid, group_mean)
    tl.store(rstd_ptr + pid, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def normalise_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, frames, pixels, chunks,
    stride_x_clip, stride_x_frame, stride_x_channel, stride_x_pixel,
    stride_y_clip, stride_y_frame, stride_y_channel, stride_y_pixel,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, COMPUTE: tl.constexpr,
    GROUPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Normalises one chunk and applies weight, bias and activation."""
    clip, frame, chunk, channel = place(frames, chunks, CHANNELS, BLOCK_C)
    x_ptr += clip * stride_x_clip + frame * stride_x_frame
    y_ptr += clip * stride_y_clip + frame * stride_y_frame
    mean = per_group(mean_ptr, clip, channel, CHANNELS, GROUPS)
    scale = per_group(rstd_ptr, clip, channel, CHANNELS, GROUPS)
    scale *= affine_of(weight_ptr, channel, CHANNELS, 1.0, COMPUTE)
    bias = affine_of(bias_ptr, channel, CHANNELS, 0.0, COMPUTE)
    for tile in range(TILES):
        pixel = chunk * (BLOCK_P * TILES) + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
        x_at = tile_at(x_ptr, pixel, channel, stride_x_pixel, stride_x_channel)
        x = tl.load(x_at, mask=inside, other=0.0).to(COMPUTE)
        y = (x - mean) * scale + bias
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        y_at = tile_at(y_ptr, pixel, channel, stride_y_pixel, stride_y_channel)
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def through_activation(grad, normal, weight, bias, SILU: tl.constexpr):
    """Gradient of the affine map's output from that of the activation's."""
    if SILU:
        y = normal * weight + bias
        sigmoid = 1.0 / (1.0 + tl.exp(-y))
        grad = grad * sigmoid * (1.0 + y * (1.0 - sigmoid))
    return grad


@triton.jit
def gradient_sums_kernel(
    x_ptr, grad_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, to_bias_ptr, to_weight_ptr, frames, pixels, chunks,
    stride_x_clip, stride_x_frame, stride_x_channel, stride_x_pixel,
    stride_g_clip, stride_g_frame, stride_g_channel, stride_g_pixel,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, COMPUTE: tl.constexpr,
    GROUPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sums over one chunk, for each channel, of the gradient and of its product with the normalised map."""
    clip, frame, chunk, channel = place(frames, chunks, CHANNELS, BLOCK_C)
    x_ptr += clip * stride_x_clip + frame * stride_x_frame
    grad_ptr += clip * stride_g_clip + frame * stride_g_frame
    mean = per_group(mean_ptr, clip, channel, CHANNELS, GROUPS)
    rstd = per_group(rstd_ptr, clip, channel, CHANNELS, GROUPS)
    weight = affine_of(weight_ptr, channel, CHANNELS, 1.0, COMPUTE)
    bias = affine_of(bias_ptr, channel, CHANNELS, 0.0, COMPUTE)
    to_bias = tl.zeros([BLOCK_P, BLOCK_C], COMPUTE)
    to_weight = tl.zeros([BLOCK_P, BLOCK_C], COMPUTE)
    for tile in range(TILES):
        pixel = chunk * (BLOCK_P * TILES) + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
        x_at = tile_at(x_ptr, pixel, channel, stride_x_pixel, stride_x_channel)
        grad_at = tile_at(grad_ptr, pixel, channel, stride_g_pixel, stride_g_channel)
        normal = (tl.load(x_at, mask=inside, other=0.0).to(COMPUTE) - mean) * rstd
        grad = tl.load(grad_at, mask=inside, other=0.0).to(COMPUTE)
        grad = through_activation(grad, normal, weight, bias, SILU)
        to_bias += grad
        to_weight += tl.where(inside, grad * normal, 0.0)
    at = ((clip * frames + frame) * chunks + chunk) * CHANNELS + channel
    tl.store(to_bias_ptr + at, tl.sum(to_bias, axis=0), mask=channel < CHANNELS)
    tl.store(to_weight_ptr + at, tl.sum(to_weight, axis=0), mask=channel < CHANNELS)


@triton.jit
def fold_gradient_sums_kernel(
    part_bias_ptr, part_weight_ptr, weight_ptr, to_bias_ptr, to_weight_ptr, to_mean_ptr, to_rstd_ptr, parts, group_size,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, LOOPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sums of one group's channels over the chunks of a clip, and their means over the group."""
    pid = tl.program_id(0)
    width: tl.constexpr = CHANNELS // GROUPS
    clip = (pid // GROUPS).to(tl.int64)
    lane = tl.arange(0, BLOCK_G)
    channel = (pid % GROUPS) * width + lane
    to_bias = tl.zeros([BLOCK_R, BLOCK_G], COMPUTE)
    to_weight = tl.zeros([BLOCK_R, BLOCK_G], COMPUTE)
    for loop in range(LOOPS):
        part = loop * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (part < parts)[:, None] & (lane < width)[None, :]
        at = (clip * parts + part)[:, None] * CHANNELS + channel[None, :]
        to_bias += tl.load(part_bias_ptr + at, mask=inside, other=0.0)
        to_weight += tl.load(part_weight_ptr + at, mask=inside, other=0.0)
    bias_sum, weight_sum = tl.sum(to_bias, axis=0), tl.sum(to_weight, axis=0)
    tl.store(to_bias_ptr + clip * CHANNELS + channel, bias_sum, mask=lane < width)
    tl.store(to_weight_ptr + clip * CHANNELS + channel, weight_sum, mask=lane < width)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + channel, mask=lane < width, other=0.0).to(COMPUTE)
        bias_sum *= weight
        weight_sum *= weight
    tl.store(to_mean_ptr + pid, tl.sum(bias_sum, axis=0) / group_size)
    tl.store(to_rstd_ptr + pid, tl.sum(weight_sum, axis=0) / group_size)


@triton.jit
def input_gradient_kernel(
    x_ptr, grad_ptr, to_x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, to_mean_ptr, to_rstd_ptr,
    frames, pixels, chunks, stride_x_clip, stride_x_frame, stride_x_channel, stride_x_pixel,
    stride_g_clip, stride_g_frame, stride_g_channel, stride_g_pixel,
    stride_t_clip, stride_t_frame, stride_t_channel, stride_t_pixel,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, COMPUTE: tl.constexpr,
    GROUPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradient of one chunk of the input."""
    clip, frame, chunk, channel = place(frames, chunks, CHANNELS, BLOCK_C)
    x_ptr += clip * stride_x_clip + frame * stride_x_frame
    grad_ptr += clip * stride_g_clip + frame * stride_g_frame
    to_x_ptr += clip * stride_t_clip + frame * stride_t_frame
    mean = per_group(mean_ptr, clip, channel, CHANNELS, GROUPS)
    rstd = per_group(rstd_ptr, clip, channel, CHANNELS, GROUPS)
    to_mean = per_group(to_mean_ptr, clip, channel, CHANNELS, GROUPS)
    to_rstd = per_group(to_rstd_ptr, clip, channel, CHANNELS, GROUPS)
    weight = affine_of(weight_ptr, channel, CHANNELS, 1.0, COMPUTE)
    bias = affine_of(bias_ptr, channel, CHANNELS, 0.0, COMPUTE)
    for tile in range(TILES):
        pixel = chunk * (BLOCK_P * TILES) + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
        x_at = tile_at(x_ptr, pixel, channel, stride_x_pixel, stride_x_channel)
        grad_at = tile_at(grad_ptr, pixel, channel, stride_g_pixel, stride_g_channel)
        normal = (tl.load(x_at, mask=inside, other=0.0).to(COMPUTE) - mean) * rstd
        grad = tl.load(grad_at, mask=inside, other=0.0).to(COMPUTE)
        grad = through_activation(grad, normal, weight, bias, SILU)
        to_x = rstd * (grad * weight - to_mean - normal * to_rstd)
        to_x_at = tile_at(to_x_ptr, pixel, channel, stride_t_pixel, stride_t_channel)
        tl.store(to_x_at, to_x.to(to_x_ptr.dtype.element_ty), mask=inside)
