"""Attention over frames through xformers' ``memory_efficient_attention``.

xformers takes ``(batch, length, heads, dim)``, which the folded layout is without a copy: frames are the length, and
positions join the heads. How the calls are divided and what happens to a query without keys is the reference's.
"""

import importlib
import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from temporal_layers.kernels.checks import invalid

# xformers' kernels load the bias in pieces of 16 bytes.
BIAS_ALIGNMENT = 8


@cache
def has_xformers() -> bool:
    """Whether xformers is installed. Looks for it without importing it."""
    return importlib.util.find_spec("xformers") is not None


def check_xformers(op: str, tensor: Tensor) -> None:
    """Requires xformers and a tensor that it has kernels for.

    Raises:
        ValueError: xformers is not installed, or the tensor is not on a GPU.
    """
    advice = "pass impl='auto' or impl='sdpa'"
    if not has_xformers():
        raise invalid(op, "impl", "xformers for 'xformers'", "an environment without it", f"install it or {advice}")
    if not tensor.is_cuda:
        raise invalid(op, "impl", "tensors on a GPU for 'xformers'", f"tensors on {tensor.device}", advice)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """Attention of ``(b, f, s*heads, dim)`` operands over ``f``; arguments as in the reference's ``attend``."""
    ops = importlib.import_module("xformers.ops")
    bias = ops.LowerTriangularMask() if causal else None
    if mask is not None:
        bias = aligned_bias(mask, q)
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)


def aligned_bias(mask: Tensor, q: Tensor) -> Tensor:
    """Additive bias ``(b, heads, f, key_frames)`` in the dtype of ``q``, its rows at multiples of 8 elements.

    Args:
        mask: Boolean or additive, with any batch or heads of size 1.
        q: ``(b, f, heads, dim)``.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    key_frames = mask.shape[-1]
    padded = F.pad(mask.to(q.dtype), (0, -key_frames % BIAS_ALIGNMENT))
    return padded.expand(q.shape[0], q.shape[2], -1, -1)[..., :key_frames]
