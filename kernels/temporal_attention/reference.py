"""Eager reference of attention over frames: the specification and the CPU product."""

import torch
import torch.nn.functional as F
from torch import Tensor


def temporal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_frames: int,
    num_key_frames: int,
    num_heads: int,
    bias: Tensor | None,
    frame_mask: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Attention over frames; see the public function for the contract."""
    batch_frames, positions, channels = query.shape
    batch, head_dim = batch_frames // num_frames, channels // num_heads

    def split(x: Tensor, frames: int) -> Tensor:
        x = x.reshape(batch, frames, positions, num_heads, head_dim).permute(0, 2, 3, 1, 4)
        return x.reshape(batch * positions, num_heads, frames, head_dim)

    q, k, v = split(query, num_frames), split(key, num_key_frames), split(value, num_key_frames)
    offset = torch.arange(num_frames, device=query.device)[:, None] + num_key_frames - num_frames
    offset = offset - torch.arange(num_key_frames, device=query.device)
    allowed = torch.ones_like(offset, dtype=torch.bool)
    if causal:
        allowed = allowed & (offset >= 0)
    if window is not None:
        allowed = allowed & (offset.abs() <= window)
    if frame_mask is not None:
        allowed = allowed & frame_mask[:, None]
    allowed = allowed.expand(batch, num_frames, num_key_frames)
    alive = allowed.any(-1, keepdim=True)
    mask = (allowed | ~alive)[:, None, None]
    scores = torch.zeros(1, dtype=query.dtype, device=query.device) if bias is None else bias
    scores = scores.expand(num_heads, num_frames, num_key_frames)
    mask = torch.where(mask, scores, -torch.inf).expand(batch, positions, num_heads, num_frames, num_key_frames)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(0, 1), scale=scale)
    out = out.unflatten(0, (batch, positions)).permute(0, 3, 1, 2, 4)
    out = torch.where(alive[..., None, None], out, 0)
    return out.reshape(batch_frames, positions, channels)
