"""Fused gated projection: launchers, custom operators, autograd.

Nothing but the operands is kept for the backward pass, which computes values and gates again. They are eight times the
activation of a transformer block, and PyTorch keeps twelve with the GELU: 1 GB at 64x64 pixels, 320 channels and two
clips of 16 frames in 16 bits. By the rates of an H100, writing and reading eight would take longer than the product at
320 channels, two thirds of its time at 640 and a third at 1280.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from temporal_layers.kernels.checks import is_autocast
from temporal_layers.kernels.geglu import fused_kernels as kernels
from temporal_layers.kernels.geglu.tiles import tile_for
from temporal_layers.kernels.launch import target_of
from temporal_layers.kernels.product import differentiate_norm, empty_rows, launch_product, norm_rows
from temporal_layers.kernels.vmap import register_looped_vmap


def on_tokens(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
) -> Tensor:
    """The operator as the public function takes it; under autocast in the low dtype, as a linear layer is."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if is_autocast(kind) else x.dtype
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    out = geglu(rows, weight.to(dtype), bias, norm_weight, norm_bias, norm_eps)
    return out.view(*x.shape[:-1], weight.shape[0] // 2)


def launch_projection(
    kernel: object,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, float | None],
    *others: Tensor,
) -> None:
    """Launches one of the two kernels; both walk over the values and gates."""
    inner = weight.shape[0] // 2
    tile = tile_for(target_of(x), x.shape[0], inner, x.shape[1], x.dtype)
    launch_product(kernel, tile, inner, x, weight, bias, norm, *others)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
) -> Tensor:
    """Launches the forward pass.

    Args:
        x: ``(rows, channels)``.
        weight: ``(2*inner, channels)`` in the dtype of ``x``.
        bias: ``(2*inner,)`` or None.
        norm_weight: ``(channels,)`` or None.
        norm_bias: ``(channels,)`` or None.
        norm_eps: Epsilon of the layer norm, or None for none.

    Returns:
        ``(rows, inner)``.
    """
    out = empty_rows(x, weight.shape[0] // 2, x.dtype)
    if out.numel() > 0:
        launch_projection(kernels.geglu_kernel, x, weight, bias, (norm_weight, norm_bias, norm_eps), out)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
) -> Tensor:
    """Launches the backward pass up to the projection.

    Returns:
        Gradient ``(rows, 2*inner)`` of the values and the gates.
    """
    out = empty_rows(x, weight.shape[0], x.dtype)
    if out.numel() > 0:
        norm = norm_weight, norm_bias, norm_eps
        launch_projection(kernels.geglu_backward_kernel, x, weight, bias, norm, grad.contiguous(), out)
    return out


geglu = torch.library.custom_op("temporal_layers::geglu", forward, mutates_args=())


@geglu.register_fake
def _(x, weight, bias, norm_weight, norm_bias, norm_eps):
    return empty_rows(x, weight.shape[0] // 2, x.dtype)


geglu_backward = torch.library.custom_op("temporal_layers::geglu_backward", backward, mutates_args=())


@geglu_backward.register_fake
def _(grad, x, weight, bias, norm_weight, norm_bias, norm_eps):
    return empty_rows(x, weight.shape[0], x.dtype)


def keep_for_backward(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Saves the operands."""
    *operands, ctx.norm_eps = inputs
    ctx.save_for_backward(*operands)


def differentiate(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, by two products with the gradient of values and gates."""
    x, weight, bias, norm_weight, norm_bias = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *needs_norm, _ = ctx.needs_input_grad
    through = geglu_backward(grad, x, weight, bias, norm_weight, norm_bias, ctx.norm_eps)
    rows, moments, to_norm = x, None, (None, None)
    if ctx.norm_eps is not None:
        rows, *moments = norm_rows(x, norm_weight, norm_bias, ctx.norm_eps)
    to_x = through @ weight if needs_x or any(needs_norm) else None
    if moments is not None and to_x is not None:
        to_x, *to_norm = differentiate_norm(to_x, x, norm_weight, norm_bias, moments, (needs_x, *needs_norm))
    to_weight = through.t() @ rows.to(x.dtype) if needs_weight else None
    to_bias = through.sum(0, dtype=torch.float32).to(bias.dtype) if needs_bias else None
    return to_x, to_weight, to_bias, *to_norm, None


geglu.register_autograd(differentiate, setup_context=keep_for_backward)
register_looped_vmap(geglu)
register_looped_vmap(geglu_backward)
