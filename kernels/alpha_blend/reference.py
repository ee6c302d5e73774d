"""Eager reference of the blend: the specification and the CPU product.

A blend is bound by memory, and autograd's composition of it in fp32 moves and keeps fp32 copies of 16-bit branches.
So both operators are autograd functions: they keep the branches as they came, and on a CPU a single weight goes into
PyTorch's own kernels as a number, which compute in fp32 whatever the dtype; other weights are combined with the
branches block by block, in the cache. On a GPU, and where the backward pass is itself differentiated, a block is the
whole tensor. ``torch.compile`` gets the plain arithmetic, which it fuses and differentiates itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from temporal_layers.kernels.layout import is_channels_last

# Elements of one block: three fp32 operands stay in a core's cache, and the interpreter's cost disappears.
BLOCK_ELEMENTS = 1 << 18

# The same for a sum of products, whose operands are read twice.
SUM_ELEMENTS = 1 << 16


def alpha_blend(
    spatial: Tensor, temporal: Tensor, alpha: Tensor, num_frames: int, channel_dim: int, image_only: Tensor | None
) -> Tensor:
    """``alpha * spatial + (1 - alpha) * temporal``; see the public function for the contract."""
    weight = frame_weight(alpha, spatial, num_frames)
    if image_only is not None:
        temporal = torch.where(per_row(image_only, spatial), spatial, temporal)
        weight = torch.where(image_only.reshape(-1, 1), 1, weight)
    return on_rows(Blend, spatial, temporal, weight, channel_dim)


def alpha_residual(
    hidden: Tensor, update: Tensor, alpha: Tensor, num_frames: int, channel_dim: int, image_only: Tensor | None
) -> Tensor:
    """``hidden + (1 - alpha) * update``; see the public function for the contract."""
    weight = 1 - frame_weight(alpha, hidden, num_frames)
    if image_only is not None:
        update = update.masked_fill(per_row(image_only, hidden), 0)
    return on_rows(WeightedResidual, hidden, update, weight, channel_dim)


def frame_weight(alpha: Tensor, x: Tensor, num_frames: int) -> Tensor:
    """Alpha in the dtype of the arithmetic as ``(b*f or 1, channels or 1)``."""
    weight = alpha.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if weight.dim() == 0:
        return weight.reshape(1, 1)
    return weight if weight.shape[0] == 1 else weight.repeat(x.shape[0] // num_frames, 1)


def per_row(image_only: Tensor, x: Tensor) -> Tensor:
    """``image_only`` in a shape that broadcasts against ``x``."""
    return image_only.reshape(-1, *(1,) * (x.dim() - 1))


def on_rows(
    function: "type[Blend | WeightedResidual]", first: Tensor, second: Tensor, weight: Tensor, channel_dim: int
) -> Tensor:
    """Applies ``function`` to the branches as ``(rows, ., .)`` in the memory order of ``first``."""
    if channel_dim == 1 and first.dim() == 4 and is_channels_last(first):
        out = on_rows(function, first.permute(0, 2, 3, 1), second.permute(0, 2, 3, 1), weight, -1)
        return out.permute(0, 3, 1, 2)
    if channel_dim == 1:
        operands = first.flatten(2), second.flatten(2), weight.unsqueeze(-1)
    else:
        operands = first.flatten(1, -2), second.flatten(1, -2), weight.unsqueeze(1)
    plain = torch.compiler.is_compiling()
    out = function.combine(*operands).to(first.dtype) if plain else function.apply(*operands)
    return out.contiguous().view(first.shape)


class Blend(torch.autograd.Function):
    """``weight * spatial + (1 - weight) * temporal`` for 3-D branches and a broadcastable weight."""

    @staticmethod
    def combine(spatial: Tensor, temporal: Tensor, weight: Tensor) -> Tensor:
        """The blend in the dtype of the weight."""
        return torch.lerp(temporal.to(weight.dtype), spatial.to(weight.dtype), weight)

    @staticmethod
    def forward(ctx: FunctionCtx, spatial: Tensor, temporal: Tensor, weight: Tensor) -> Tensor:
        """Combines the branches; keeps them for the backward pass only where the weight is trained."""
        ctx.temporal_dtype = temporal.dtype
        ctx.save_for_backward(weight, *((spatial, temporal) if ctx.needs_input_grad[2] else ()))
        number = as_number(weight)
        if number is not None and spatial.dtype == temporal.dtype:
            return torch.lerp(temporal, spatial, number)
        return blockwise(Blend.combine, weight, spatial, temporal)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the branches and the weight."""
        weight, *branches = ctx.saved_tensors
        to_spatial, to_temporal, to_weight = ctx.needs_input_grad
        return (
            weighed(grad, weight) if to_spatial else None,
            weighed(grad, 1 - weight).to(ctx.temporal_dtype) if to_temporal else None,
            reduced(torch.sub, weight, grad, *branches) if to_weight else None,
        )


class WeightedResidual(torch.autograd.Function):
    """``hidden + weight * update`` for 3-D operands and a broadcastable weight."""

    @staticmethod
    def combine(hidden: Tensor, update: Tensor, weight: Tensor) -> Tensor:
        """The sum in the dtype of the weight."""
        return torch.addcmul(hidden.to(weight.dtype), update.to(weight.dtype), weight)

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, update: Tensor, weight: Tensor) -> Tensor:
        """Adds the weighted update; keeps it for the backward pass only where the weight is trained."""
        ctx.update_dtype = update.dtype
        ctx.save_for_backward(weight, *((update,) if ctx.needs_input_grad[2] else ()))
        number = as_number(weight)
        if number is not None and hidden.dtype == update.dtype:
            return torch.add(hidden, update, alpha=number)
        return blockwise(WeightedResidual.combine, weight, hidden, update)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both operands and the weight."""
        weight, *update = ctx.saved_tensors
        to_hidden, to_update, to_weight = ctx.needs_input_grad
        return (
            grad if to_hidden else None,
            weighed(grad, weight).to(ctx.update_dtype) if to_update else None,
            reduced(lambda u: u, weight, grad, *update) if to_weight else None,
        )


def as_number(weight: Tensor) -> float | None:
    """A single weight as a number, where reading it costs nothing and nothing is differentiated through it."""
    is_one = weight.numel() == 1 and weight.device.type == "cpu" and type(weight) is Tensor
    return weight.item() if is_one and not torch.is_grad_enabled() else None


def weighed(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad * weight`` in the dtype of ``grad``."""
    number = as_number(weight)
    return blockwise(lambda g, w: g * w, weight, grad) if number is None else grad * number


def blockwise(combine: Callable[..., Tensor], weight: Tensor, first: Tensor, *others: Tensor) -> Tensor:
    """``combine(first, *others, weight)`` in the dtype of ``first``, one block at a time."""
    blocks = cut(first, BLOCK_ELEMENTS)
    if len(blocks) == 1 or first.dtype == weight.dtype:
        return combine(first, *others, weight).to(first.dtype)
    out, weight = torch.empty_like(first), weight.expand(first.shape)
    for block in blocks:
        out[block] = combine(first[block], *(x[block] for x in others), weight[block])
    return out


def reduced(factor: Callable[..., Tensor], weight: Tensor, grad: Tensor, *others: Tensor) -> Tensor:
    """Sum of ``grad * factor(*others)`` in the dtype of ``weight``, over the dimensions along which it broadcasts."""
    blocks, wide = cut(grad, SUM_ELEMENTS), weight.dtype
    if len(blocks) == 1:
        return (grad.to(wide) * factor(*(x.to(wide) for x in others))).sum_to_size(weight.shape)
    total = torch.zeros_like(weight)
    spread = [dim for dim, size in enumerate(weight.shape) if size == 1]
    for block in blocks:
        left, right = grad[block].to(wide), factor(*(x[block].to(wide) for x in others))
        if weight.numel() == 1:
            total += torch.dot(left.flatten(), right.flatten())
        else:
            part = (left * right).sum(spread, keepdim=True)
            total[tuple(slice(None) if dim in spread else block[dim] for dim in range(2))] += part
    return total


def cut(x: Tensor, elements: int) -> list[tuple[slice, slice]]:
    """Blocks of rows and lines of a 3-D tensor, each within ``elements`` unless a single line is longer."""
    whole = [(slice(None), slice(None))]
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.numel() <= elements:
        return whole
    rows, lines, items = x.shape
    step_lines = min(max(elements // items, 1), lines)
    step_rows = max(elements // (items * lines), 1)
    return [
        (slice(row, row + step_rows), slice(line, line + step_lines))
        for row in range(0, rows, step_rows)
        for line in range(0, lines, step_lines)
    ]
