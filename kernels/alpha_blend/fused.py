"""Fused blend and its folded form: launchers, custom operators, autograd.

Inside, every branch is a map ``(rows, channels, pixels, 1)`` and alpha a matrix ``(num_frames or 1, channels or 1)``.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from temporal_layers.kernels.alpha_blend import fused_kernels as kernels
from temporal_layers.kernels.layout import is_channels_last
from temporal_layers.kernels.vmap import register_looped_vmap
from temporal_layers.kernels.walk import (
    BACKWARD_TILE,
    Walk,
    compute_dtype,
    empty_map,
    triton_dtype,
    walk,
    with_pixels,
)


def on_maps(
    first: Tensor,
    second: Tensor,
    alpha: Tensor,
    num_frames: int,
    channel_dim: int,
    image_only: Tensor | None,
    residual: bool,
) -> Tensor:
    """The operator on maps or tokens, as the public functions take them; the result in their memory format."""
    if channel_dim == 1:
        as_map = (x.flatten(2).unsqueeze(-1) for x in (first, second))
        channels_last = first.dim() == 4 and is_channels_last(first)
    else:
        as_map = (x.flatten(1, -2).transpose(1, 2).unsqueeze(-1) for x in (first, second))
        channels_last = True
    alpha = alpha.reshape(1, 1) if alpha.dim() == 0 else alpha
    image_only = None if image_only is None else image_only.reshape(-1)
    out = alpha_blend(*as_map, alpha, num_frames, image_only, residual, channels_last).squeeze(-1)
    # Not view: the rows of an empty or one-pixel map have strides that say nothing.
    return out.reshape(first.shape) if channel_dim == 1 else out.transpose(1, 2).reshape(first.shape)


def plan(alpha: Tensor, image_only: Tensor | None, *maps: Tensor, tile: int) -> Walk:
    """A walk whose clips are the rows of the batch if a row matters, one clip of all rows otherwise."""
    per_row = alpha.shape[0] > 1 or image_only is not None
    return walk(1 if per_row else max(maps[0].shape[0], 1), *maps, tile_elements=tile)


def shape_of(alpha: Tensor) -> dict[str, bool]:
    """Along what alpha varies, for the kernels."""
    return {"PER_FRAME": alpha.shape[0] > 1, "PER_CHANNEL": alpha.shape[1] > 1}


def forward(
    first: Tensor,
    second: Tensor,
    alpha: Tensor,
    num_frames: int,
    image_only: Tensor | None,
    residual: bool,
    channels_last: bool,
) -> Tensor:
    """Launches the forward pass.

    Args:
        first: ``(rows, channels, pixels, 1)``.
        second: Same shape, any floating dtype.
        alpha: ``(num_frames or 1, channels or 1)``.
        num_frames: Frames of a clip.
        image_only: ``(rows,)`` bool or None.
        residual: Whether ``second`` is an update of ``first``.
        channels_last: Memory format of the result.

    Returns:
        The blend, in the dtype of ``first``.
    """
    out = empty_map(first, channels_last)
    if out.numel() == 0:
        return out
    first, second, alpha = with_pixels(first), with_pixels(second), alpha.contiguous()
    walked = plan(alpha, image_only, first, second, out, tile=BACKWARD_TILE)
    walked.launch(
        kernels.blend_kernel, first, second, alpha, image_only, out, num_frames=num_frames,
        COMPUTE=triton_dtype(first), RESIDUAL=residual, **shape_of(alpha),
    )  # fmt: skip
    return out


def branch_gradients(
    grad: Tensor,
    alpha: Tensor,
    num_frames: int,
    image_only: Tensor | None,
    needs_first: bool,
    needs_second: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Launches the pass that weighs the gradient for each branch.

    Returns:
        ``alpha * grad`` and ``(1 - alpha) * grad`` in the dtype of ``grad``, each empty if not needed.
    """
    to_first = empty_map(grad, channels_last) if needs_first else grad.new_empty(0)
    to_second = empty_map(grad, channels_last) if needs_second else grad.new_empty(0)
    if grad.numel() == 0:
        return to_first, to_second
    grad, alpha = with_pixels(grad), alpha.contiguous()
    walked = plan(alpha, image_only, grad, to_second if needs_second else to_first, tile=BACKWARD_TILE)
    walked.launch(
        kernels.branch_gradients_kernel, grad, alpha, image_only, to_first if needs_first else None,
        to_second if needs_second else None, num_frames=num_frames, COMPUTE=triton_dtype(grad), **shape_of(alpha),
    )  # fmt: skip
    return to_first, to_second


def alpha_gradient(
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    alpha: Tensor,
    num_frames: int,
    image_only: Tensor | None,
    residual: bool,
) -> Tensor:
    """Launches the partial sums of alpha's gradient and adds them.

    Returns:
        The gradient in shape and dtype of ``alpha``.
    """
    if grad.numel() == 0:
        return torch.zeros_like(alpha, memory_format=torch.contiguous_format)
    grad, first, second = with_pixels(grad), with_pixels(first), with_pixels(second)
    per_channel = alpha.shape[1] > 1
    walked = plan(alpha, image_only, grad, first, second, tile=BACKWARD_TILE)
    columns = walked.channels if per_channel else walked.channel_blocks
    parts = grad.new_empty(walked.clips, walked.parts, columns, dtype=compute_dtype(grad))
    walked.launch(
        kernels.alpha_gradient_kernel, grad, first, second, image_only, parts, COMPUTE=triton_dtype(grad),
        PER_CHANNEL=per_channel, RESIDUAL=residual,
    )  # fmt: skip
    frames = alpha.shape[0]
    of_frames = parts.view(-1, frames, walked.parts, columns) if frames > 1 else parts.view(-1, 1, 1, columns)
    total = of_frames.sum((0, 2)) if per_channel else of_frames.sum((0, 2, 3)).unsqueeze(1)
    return total.to(alpha.dtype)


alpha_blend = torch.library.custom_op("temporal_layers::alpha_blend", forward, mutates_args=())


@alpha_blend.register_fake
def _(first, second, alpha, num_frames, image_only, residual, channels_last):
    return empty_map(first, channels_last)


alpha_blend_branch_gradients = torch.library.custom_op(
    "temporal_layers::alpha_blend_branch_gradients", branch_gradients, mutates_args=()
)


@alpha_blend_branch_gradients.register_fake
def _(grad, alpha, num_frames, image_only, needs_first, needs_second, channels_last):
    return tuple(
        empty_map(grad, channels_last) if needed else grad.new_empty(0) for needed in (needs_first, needs_second)
    )


alpha_blend_alpha_gradient = torch.library.custom_op(
    "temporal_layers::alpha_blend_alpha_gradient", alpha_gradient, mutates_args=()
)


@alpha_blend_alpha_gradient.register_fake
def _(grad, first, second, alpha, num_frames, image_only, residual):
    return torch.empty_like(alpha, memory_format=torch.contiguous_format)


def keep_for_backward(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Saves the branches only if alpha is trained: their own gradients do not need them."""
    first, second, alpha, ctx.num_frames, image_only, ctx.residual, ctx.channels_last = inputs
    ctx.second_dtype = second.dtype
    branches = (first, second) if ctx.needs_input_grad[2] else (None, None)
    if ctx.residual and ctx.needs_input_grad[2]:
        branches = (None, second)
    ctx.save_for_backward(alpha, image_only, *branches)


def differentiate(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the branches and of alpha."""
    alpha, image_only, first, second = ctx.saved_tensors
    needs_first, needs_second, needs_alpha = ctx.needs_input_grad[:3]
    to_first = to_second = to_alpha = None
    if needs_alpha:
        first = second if ctx.residual else first  # not read by the folded form
        to_alpha = alpha_blend_alpha_gradient(grad, first, second, alpha, ctx.num_frames, image_only, ctx.residual)
    weighed = needs_first and not ctx.residual
    if weighed or needs_second:
        to_first, to_second = alpha_blend_branch_gradients(
            grad, alpha, ctx.num_frames, image_only, weighed, needs_second, ctx.channels_last
        )
    to_first = (grad if ctx.residual else to_first) if needs_first else None
    to_second = to_second.to(ctx.second_dtype) if needs_second else None
    return to_first, to_second, to_alpha, None, None, None, None


alpha_blend.register_autograd(differentiate, setup_context=keep_for_backward)
register_looped_vmap(alpha_blend)
register_looped_vmap(alpha_blend_branch_gradients)
register_looped_vmap(alpha_blend_alpha_gradient)
