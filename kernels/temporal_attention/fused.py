"""Fused attention over frames as PyTorch operators with gradients, over the Triton launchers.

Gradients are recomputed from query, key and value: nothing else is saved. There is no gradient of gradients.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from temporal_layers.kernels.temporal_attention.call import Call
from temporal_layers.kernels.temporal_attention.fused_backward import launch_backward
from temporal_layers.kernels.temporal_attention.fused_forward import launch_forward
from temporal_layers.kernels.vmap import register_looped_vmap


@torch.library.custom_op("temporal_layers::temporal_attention", mutates_args=())
def temporal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    frame_mask: Tensor | None,
    num_frames: int,
    key_frames: int,
    num_heads: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention over frames in the dtype of ``query``; see the public function for the contract."""
    out = new_contiguous(query)
    call = Call.of(query, bias, frame_mask, num_frames, key_frames, num_heads, causal, window, scale)
    launch_forward(query, key, value, out, call)
    return out


@temporal_attention.register_fake
def _(query, key, value, bias, frame_mask, num_frames, key_frames, num_heads, causal, window, scale):
    return new_contiguous(query)


@torch.library.custom_op("temporal_layers::temporal_attention_backward", mutates_args=())
def temporal_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    frame_mask: Tensor | None,
    num_frames: int,
    key_frames: int,
    num_heads: int,
    causal: bool,
    window: int | None,
    scale: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and, if ``with_bias``, bias (else an empty tensor)."""
    dq, dk, dv = (new_contiguous(x) for x in (query, key, value))
    call = Call.of(query, bias, frame_mask, num_frames, key_frames, num_heads, causal, window, scale)
    dbias = launch_backward(grad, query, key, value, dq, dk, dv, call, with_bias=with_bias)
    return dq, dk, dv, query.new_empty(0) if dbias is None else dbias.to(bias.dtype, copy=True)


@temporal_attention_backward.register_fake
def _(grad, query, key, value, bias, *options):
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if options[-1] else query.new_empty(0)
    return new_contiguous(query), new_contiguous(key), new_contiguous(value), dbias


def new_contiguous(x: Tensor) -> Tensor:
    """Uninitialised contiguous tensor with shape, dtype and device of ``x``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def keep_for_backward(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Saves the operands and the options."""
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def differentiate(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of ``temporal_attention``."""
    query, key, value, bias, frame_mask = ctx.saved_tensors
    with_bias = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = temporal_attention_backward(grad, query, key, value, bias, frame_mask, *ctx.options, with_bias)
    return dq, dk, dv, dbias if with_bias else None, *[None] * (1 + len(ctx.options))


temporal_attention.register_autograd(differentiate, setup_context=keep_for_backward)
register_looped_vmap(temporal_attention)
register_looped_vmap(temporal_attention_backward)
