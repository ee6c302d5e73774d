"""Fused group norm over frames: launchers, custom operators, autograd."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from triton import cdiv, next_power_of_2

from temporal_layers.kernels import walk as walks
from temporal_layers.kernels.group_norm import fused_kernels as kernels
from temporal_layers.kernels.launch import launch
from temporal_layers.kernels.layout import is_channels_last
from temporal_layers.kernels.vmap import register_looped_vmap
from temporal_layers.kernels.walk import Walk, compute_dtype, triton_dtype, walk, with_pixels

FOLD_TILE = 1024  # partial results that a folding program holds at once


def launch_fold(kernel: object, walked: Walk, num_groups: int, *arguments: object, **options: object) -> None:
    """Launches a kernel that folds the chunks of each clip and group."""
    width = next_power_of_2(walked.channels // num_groups)
    rows = min(next_power_of_2(walked.parts), max(FOLD_TILE // width, 1))
    # The number of loops is part of the kernel: powers of two keep the number of kernels small.
    loops = next_power_of_2(cdiv(walked.parts, rows))
    launch(
        kernel, (walked.clips * num_groups,), *arguments, CHANNELS=walked.channels, GROUPS=num_groups, BLOCK_R=rows,
        BLOCK_G=width, LOOPS=loops, num_warps=4, **options,
    )  # fmt: skip


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    num_frames: int,
    eps: float,
    silu: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the three kernels of the forward pass.

    Args:
        x: ``(batch*num_frames, channels, height, width)``.
        num_groups: Groups of channels.
        weight: ``(channels,)`` or None.
        bias: ``(channels,)`` or None.
        num_frames: Frames that share statistics.
        eps: Added to the variance.
        silu: Whether SiLU follows.
        channels_last: Memory format of the result.

    Returns:
        The result; mean and reciprocal deviation ``(batch, num_groups)`` of each clip and group, fp32 or fp64.
    """
    y = walks.empty_map(x, channels_last)
    clips = x.shape[0] // num_frames
    mean, rstd = (x.new_empty(clips, num_groups, dtype=compute_dtype(x)) for _ in range(2))
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    x = with_pixels(x)
    weight, bias = (None if value is None else value.contiguous() for value in (weight, bias))
    compute = triton_dtype(x)
    reading, both = walk(num_frames, x), walk(num_frames, x, y)
    part_mean, part_m2 = (mean.new_empty(clips, reading.parts, x.shape[1]) for _ in range(2))
    reading.launch(kernels.moments_kernel, x, part_mean, part_m2, COMPUTE=compute)
    size = float(x.shape[1:].numel() // num_groups * num_frames)
    launch_fold(
        kernels.fold_moments_kernel, reading, num_groups, part_mean, part_m2, mean, rstd, reading.parts, reading.chunks,
        reading.pixels, size, eps, CHUNK=reading.block_p * reading.tiles, COMPUTE=compute,
    )  # fmt: skip
    both.launch(kernels.normalise_kernel, x, y, mean, rstd, weight, bias, COMPUTE=compute, GROUPS=num_groups, SILU=silu)
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_frames: int,
    silu: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the three kernels of the backward pass; the last only if ``x`` needs a gradient.

    Returns:
        Gradients of ``x`` (empty if not needed), of the weight and of the bias, the latter ``(channels,)`` in fp32 or
        fp64 whether or not there are such parameters.
    """
    to_x = walks.empty_map(x, is_channels_last(x)) if needs_x else x.new_empty(0)
    num_groups, channels = mean.shape[1], x.shape[1]
    to_weight, to_bias = (mean.new_empty(mean.shape[0], channels) for _ in range(2))
    if x.numel() == 0:
        return to_x, mean.new_zeros(channels), mean.new_zeros(channels)
    grad, x = with_pixels(grad), with_pixels(x)
    weight, bias = (None if value is None else value.contiguous() for value in (weight, bias))
    options = {"COMPUTE": triton_dtype(x)}
    per_map = options | {"GROUPS": num_groups, "SILU": silu}
    reading = walk(num_frames, x, grad, tile_elements=walks.BACKWARD_TILE)
    part_weight, part_bias = (mean.new_empty(mean.shape[0], reading.parts, channels) for _ in range(2))
    reading.launch(
        kernels.gradient_sums_kernel, x, grad, mean, rstd, weight, bias, part_bias, part_weight, **per_map
    )  # fmt: skip
    to_mean, to_rstd = (torch.empty_like(mean) for _ in range(2))
    size = float(x.shape[1:].numel() // num_groups * num_frames)
    launch_fold(
        kernels.fold_gradient_sums_kernel, reading, num_groups, part_bias, part_weight, weight, to_bias, to_weight,
        to_mean, to_rstd, reading.parts, size, **options,
    )  # fmt: skip
    if needs_x:
        all_three = walk(num_frames, x, grad, to_x, tile_elements=walks.BACKWARD_TILE)
        all_three.launch(
            kernels.input_gradient_kernel, x, grad, to_x, mean, rstd, weight, bias, to_mean, to_rstd, **per_map
        )  # fmt: skip
    return to_x, to_weight.sum(0), to_bias.sum(0)


group_norm = torch.library.custom_op("temporal_layers::group_norm", forward, mutates_args=())


@group_norm.register_fake
def _(x, num_groups, weight, bias, num_frames, eps, silu, channels_last):
    moments = x.new_empty(x.shape[0] // num_frames, num_groups, dtype=compute_dtype(x))
    return walks.empty_map(x, channels_last), moments, torch.empty_like(moments)


group_norm_backward = torch.library.custom_op("temporal_layers::group_norm_backward", backward, mutates_args=())


@group_norm_backward.register_fake
def _(grad, x, mean, rstd, weight, bias, num_frames, silu, needs_x):
    to_x = walks.empty_map(x, is_channels_last(x)) if needs_x else x.new_empty(0)
    return to_x, mean.new_empty(x.shape[1]), mean.new_empty(x.shape[1])


def keep_for_backward(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Saves what the backward pass reads: the input as it came and the statistics."""
    x, _, weight, bias, ctx.num_frames, _, ctx.silu, _ = inputs
    ctx.save_for_backward(x, output[1], output[2], weight, bias)


def differentiate(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the operator's arguments; none flow through the statistics, which are not handed on."""
    x, mean, rstd, weight, bias = ctx.saved_tensors
    to_x, to_weight, to_bias = group_norm_backward(
        grad, x, mean, rstd, weight, bias, ctx.num_frames, ctx.silu, ctx.needs_input_grad[0]
    )
    to_x = to_x if ctx.needs_input_grad[0] else None
    to_weight = to_weight.to(weight.dtype) if ctx.needs_input_grad[2] else None
    to_bias = to_bias.to(bias.dtype) if ctx.needs_input_grad[3] else None
    return to_x, None, to_weight, to_bias, None, None, None, None


group_norm.register_autograd(differentiate, setup_context=keep_for_backward)
register_looped_vmap(group_norm)
register_looped_vmap(group_norm_backward)
