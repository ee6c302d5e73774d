"""Fused product: launcher, custom operator, autograd.

Nothing but the operands is kept for the backward pass, which norms the rows again. As in the convolution over frames,
``1 - alpha`` goes into the small weight, and alpha's own gradient is that of the unweighed update's parameters times
those parameters, since the update is linear in them.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from temporal_layers.kernels.alpha_blend import fused as blends
from temporal_layers.kernels.checks import is_autocast
from temporal_layers.kernels.launch import target_of
from temporal_layers.kernels.linear import fused_kernels as kernels
from temporal_layers.kernels.linear.reference import as_tokens
from temporal_layers.kernels.linear.tiles import tile_for
from temporal_layers.kernels.product import dense, differentiate_norm, empty_rows, launch_product, norm_rows
from temporal_layers.kernels.vmap import register_looped_vmap


def on_tokens(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    num_frames: int,
) -> Tensor:
    """The operator as the public function takes it.

    Under autocast the product is one in the low dtype, as PyTorch's is. An alpha for each frame takes a second kernel:
    it is no factor of the weight.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if is_autocast(kind) else x.dtype
    rows, weight = x.to(dtype).reshape(-1, x.shape[-1]), weight.to(dtype)
    shape = *x.shape[:-1], weight.shape[0]
    if alpha is not None and alpha.dim() == 2 and alpha.shape[0] > 1:
        update = linear(rows, weight, bias, norm_weight, norm_bias, norm_eps, None, None).view(shape)
        return blends.on_maps(as_tokens(residual), as_tokens(update), alpha, num_frames, -1, None, True).view(shape)
    residual = None if residual is None else residual.reshape(-1, shape[-1])
    alpha = None if alpha is None else alpha.reshape(-1).float()
    return linear(rows, weight, bias, norm_weight, norm_bias, norm_eps, residual, alpha).view(shape)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    residual: Tensor | None,
    alpha: Tensor | None,
) -> Tensor:
    """Launches the product.

    Args:
        x: ``(rows, in)``.
        weight: ``(out, in)`` in the dtype of ``x``.
        bias: ``(out,)`` or None.
        norm_weight: ``(in,)`` or None.
        norm_bias: ``(in,)`` or None.
        norm_eps: Epsilon of the layer norm, or None for none.
        residual: ``(rows, out)`` or None.
        alpha: fp32 ``(1,)`` or ``(out,)``, or None.

    Returns:
        ``(rows, out)`` in the dtype of the residual, or of ``x``.
    """
    columns = weight.shape[0]
    out = empty_rows(x, columns, result_dtype(x, residual))
    if out.numel() > 0:
        launch_product(
            kernels.linear_kernel, tile_for(target_of(x), *x.shape[:1], columns, x.shape[1], x.dtype), columns,
            x, weight, bias, (norm_weight, norm_bias, norm_eps),
            *dense(residual, alpha), out,
            ALPHA_PER_CHANNEL=alpha is not None and alpha.shape[0] > 1,
        )  # fmt: skip
    return out


def result_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """Dtype of the result."""
    return x.dtype if residual is None else residual.dtype


linear = torch.library.custom_op("temporal_layers::linear", forward, mutates_args=())


@linear.register_fake
def _(x, weight, bias, norm_weight, norm_bias, norm_eps, residual, alpha):
    return empty_rows(x, weight.shape[0], result_dtype(x, residual))


def keep_for_backward(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Saves the input and the parameters; neither the update nor the residual is read again."""
    x, weight, bias, norm_weight, norm_bias, ctx.norm_eps, _, alpha = inputs
    ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, alpha)


def differentiate(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the operator's tensors."""
    x, weight, bias, norm_weight, norm_bias, alpha = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *needs_norm, _, needs_residual, needs_alpha = ctx.needs_input_grad
    to_residual = grad if needs_residual else None
    grad = grad.to(x.dtype)
    rows, moments = x, None
    if ctx.norm_eps is not None:
        rows, *moments = norm_rows(x, norm_weight, norm_bias, ctx.norm_eps)
    to_x = to_weight = to_bias = to_alpha = None
    to_norm = (None, None)
    if needs_x or any(needs_norm):
        to_x = grad @ weighed(weight, alpha)
    if moments is not None and to_x is not None:
        to_x, *to_norm = differentiate_norm(to_x, x, norm_weight, norm_bias, moments, (needs_x, *needs_norm))
    # First as if alpha were 0: the products with the parameters are what alpha weighs.
    if needs_weight or needs_alpha:
        to_weight = grad.t() @ rows.to(x.dtype)
    if bias is not None and (needs_bias or needs_alpha):
        to_bias = grad.sum(0, dtype=torch.float32)
    if needs_alpha:
        of_channels = (to_weight.float() * weight).sum(1)
        of_channels = of_channels if bias is None else of_channels + to_bias * bias
        to_alpha = -of_channels.sum_to_size(alpha.shape)
    to_weight = weighed(to_weight, alpha) if needs_weight else None
    to_bias = weighed(to_bias, alpha).to(bias.dtype) if needs_bias else None
    return to_x, to_weight, to_bias, *to_norm, None, to_residual, to_alpha


def weighed(parameter: Tensor, alpha: Tensor | None) -> Tensor:
    """A weight ``(out, in)`` or a bias ``(out,)`` times ``1 - alpha``."""
    if alpha is None:
        return parameter
    scale = 1 - alpha
    return (parameter * (scale.unsqueeze(1) if parameter.dim() == 2 else scale)).to(parameter.dtype)


linear.register_autograd(differentiate, setup_context=keep_for_backward)
register_looped_vmap(linear)
