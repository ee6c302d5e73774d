"""Eager reference of the product: the specification and the CPU product."""

import torch.nn.functional as F
from torch import Tensor

from temporal_layers.kernels.alpha_blend.reference import alpha_residual


def linear(
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
    """The product and what stands around it; see the public function for the contract."""
    if norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    update = F.linear(x, weight, bias)
    if residual is None:
        return update
    update = update.to(residual.dtype)
    if alpha is None:
        return residual + update
    return alpha_residual(as_tokens(residual), as_tokens(update), alpha, num_frames, -1, None).view(residual.shape)


def as_tokens(x: Tensor) -> Tensor:
    """``(frames, ..., channels)`` as ``(frames, tokens, channels)``, which the blend takes."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
