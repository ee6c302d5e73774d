"""Eager reference of the blend: the specification and the CPU product."""

import torch
from torch import Tensor


def alpha_blend(
    spatial: Tensor, temporal: Tensor, alpha: Tensor, num_frames: int, channel_dim: int, image_only: Tensor | None
) -> Tensor:
    """``alpha * spatial + (1 - alpha) * temporal``; see the public function for the contract."""
    weight = broadcastable(spatial, alpha, num_frames, channel_dim)
    if image_only is not None:
        rows = rowwise(image_only, spatial)
        temporal = torch.where(rows, spatial, temporal)
        weight = torch.where(rows, 1.0, weight)
    wide = weight.dtype
    return torch.lerp(temporal.to(wide), spatial.to(wide), weight).to(spatial.dtype)


def alpha_residual(
    hidden: Tensor, update: Tensor, alpha: Tensor, num_frames: int, channel_dim: int, image_only: Tensor | None
) -> Tensor:
    """``hidden + (1 - alpha) * update``; see the public function for the contract."""
    weight = 1 - broadcastable(hidden, alpha, num_frames, channel_dim)
    if image_only is not None:
        update = update.masked_fill(rowwise(image_only, hidden), 0)
    wide = weight.dtype
    return torch.addcmul(hidden.to(wide), update.to(wide), weight).to(hidden.dtype)


def broadcastable(x: Tensor, alpha: Tensor, num_frames: int, channel_dim: int) -> Tensor:
    """Alpha in the dtype of the arithmetic, in a shape that broadcasts against ``x``."""
    alpha = alpha.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if alpha.dim() == 0:
        return alpha
    frames, channels = alpha.shape
    if frames != 1:
        alpha = alpha.repeat(x.shape[0] // num_frames, 1)
    inner = x.dim() - 2
    return alpha.reshape(-1, *(1,) * inner, channels) if channel_dim == -1 else alpha.reshape(-1, channels, *(1,) * inner)


def rowwise(image_only: Tensor, x: Tensor) -> Tensor:
    """``image_only`` in a shape that broadcasts against ``x``."""
    return image_only.reshape(-1, *(1,) * (x.dim() - 1))
