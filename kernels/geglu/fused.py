"""Fused gated projection: launchers, custom operators, autograd.

Nothing but the operands is kept for the backward pass, which computes values and gates again. They are eight times the
activation of a transformer block, and PyTorch keeps twelve with the GELU: 1 GB at 64x64 pixels, 320 channels and two
clips of 16 frames in 16 bits. By the rates of an H100, writing and reading eight would take longer than the product at
320 channels, two thirds of its time at 640 and a third at 1280.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from triton import cdiv

from temporal_layers.kernels.checks import is_autocast
from temporal_layers.kernels.geglu import fused_kernels as kernels
from temporal_layers.kernels.geglu.tiles import tile_for
from temporal_layers.kernels.launch import launch, target_of
from temporal_layers.kernels.vmap import register_looped_vmap

BAND = 8  # row tiles whose programs run together


def on_tokens(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The operator as the public function takes it; under autocast in the low dtype, as a linear layer is."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if is_autocast(kind) else x.dtype
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    return geglu(rows, weight.to(dtype), bias).view(*x.shape[:-1], weight.shape[0] // 2)


def empty_rows(x: Tensor, columns: int) -> Tensor:
    """A result of ``columns`` columns for the rows of ``x``."""
    return torch.empty(x.shape[0], columns, dtype=x.dtype, device=x.device)


def launch_projection(
    kernel: object, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *first: Tensor
) -> None:
    """Launches one of the two kernels; both walk over the values and gates of dense ``x``."""
    rows, depth = x.shape
    inner = weight.shape[0] // 2
    tile = tile_for(target_of(x), rows, inner, depth, x.dtype)
    row_tiles = cdiv(rows, tile.rows)
    launch(
        kernel, (row_tiles * cdiv(inner, tile.columns),), *first, x, weight, bias, out, rows, row_tiles,
        IN=depth, INNER=inner, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, BAND=BAND,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Launches the forward pass.

    Args:
        x: ``(rows, channels)``.
        weight: ``(2*inner, channels)`` in the dtype of ``x``.
        bias: ``(2*inner,)`` or None.

    Returns:
        ``(rows, inner)``.
    """
    out = empty_rows(x, weight.shape[0] // 2)
    if out.numel() > 0:
        x, weight, bias = dense(x, weight, bias)
        launch_projection(kernels.geglu_kernel, out, x, weight, bias)
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Launches the backward pass up to the projection.

    Returns:
        Gradient ``(rows, 2*inner)`` of the values and the gates.
    """
    out = empty_rows(x, weight.shape[0])
    if out.numel() > 0:
        x, weight, bias = dense(x, weight, bias)
        launch_projection(kernels.geglu_backward_kernel, out, x, weight, bias, grad.contiguous())
    return out


def dense(*operands: Tensor | None) -> list[Tensor | None]:
    """The operands in contiguous memory."""
    return [None if value is None else value.contiguous() for value in operands]


geglu = torch.library.custom_op("temporal_layers::geglu", forward, mutates_args=())


@geglu.register_fake
def _(x, weight, bias):
    return empty_rows(x, weight.shape[0] // 2)


geglu_backward = torch.library.custom_op("temporal_layers::geglu_backward", backward, mutates_args=())


@geglu_backward.register_fake
def _(grad, x, weight, bias):
    return empty_rows(x, weight.shape[0])


def keep_for_backward(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Saves the operands."""
    ctx.save_for_backward(*inputs)


def differentiate(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the operands, by two products with the gradient of values and gates."""
    x, weight, bias = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    through = geglu_backward(grad, x, weight, bias)
    to_x = through @ weight if needs_x else None
    to_weight = through.t() @ x if needs_weight else None
    to_bias = through.sum(0, dtype=torch.float32).to(bias.dtype) if needs_bias else None
    return to_x, to_weight, to_bias


geglu.register_autograd(differentiate, setup_context=keep_for_backward)
register_looped_vmap(geglu)
register_looped_vmap(geglu_backward)
