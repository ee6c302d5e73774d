"""Eager reference of attention over frames: the specification and the CPU product.

Tokens ``(b*f, s, heads*dim)`` are, without a copy, the ``(b, s*heads, f, dim)`` operands of PyTorch's attention:
positions join the heads instead of the batch. Its result lies in memory as ``(b*f, s, heads*dim)`` again.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

# A GPU grid takes 65,535 blocks in its second and third dimension, and PyTorch's attention kernels put the batch and
# the heads there (pytorch issue 142228). Half of that also keeps the backward pass of flash attention, which pads
# every sequence to 128 rows, within 2**31 elements up to a head size of 512.
MAX_SEQUENCES = 32_768

# Elements of the query that are converted to fp32 at a time on a CPU: three such operands stay in the cache.
CONVERTED_ELEMENTS = 1 << 18


def temporal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_frames: int,
    num_key_frames: int | None,
    num_heads: int,
    bias: Tensor | None,
    frame_mask: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    attend: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Attention over frames; see the public function for the contract.

    ``attend`` computes attention of ``(b, f, s*heads, dim)`` operands over ``f``; PyTorch's if None.
    """
    attend = attend_sdpa if attend is None else attend
    if query.numel() == 0:
        return query.clone()  # PyTorch 2.11's attention on a CPU divides by the number of heads, here positions*heads
    batch_frames, positions, channels = query.shape
    batch, head_dim = batch_frames // num_frames, channels // num_heads
    key_frames = num_frames if num_key_frames is None else num_key_frames

    def fold_heads(x: Tensor, frames: int) -> Tensor:
        return x.reshape(batch, frames, positions * num_heads, head_dim)

    q, k, v = fold_heads(query, num_frames), fold_heads(key, key_frames), fold_heads(value, key_frames)
    plain_causal = causal and window is None and bias is None and frame_mask is None and num_key_frames is None
    allowed = None if plain_causal else allowed_pairs(query, num_frames, key_frames, frame_mask, causal, window)
    # A frame always reaches itself, so only absent keys can leave a query without any. PyTorch's attention kernels
    # differ in what they return then: such a query attends to everything, and its result is overwritten.
    some_dead = allowed is not None and (frame_mask is not None or num_key_frames is not None)
    alive = allowed.any(-1, keepdim=True) if some_dead else None
    if alive is not None:
        allowed = allowed | ~alive

    def attend_positions(start: int, end: int) -> Tensor:
        part = slice(start * num_heads, end * num_heads)
        mask = score_mask(allowed, bias, end - start)
        return attend(q[:, :, part], k[:, :, part], v[:, :, part], mask, plain_causal, scale)

    step = positions_per_launch(q, num_heads)
    if positions <= step:
        out = attend_positions(0, positions)
    else:
        starts = range(0, positions, step)
        out = torch.cat([attend_positions(start, min(start + step, positions)) for start in starts], dim=2)
    if alive is not None:
        out = torch.where(alive.unsqueeze(-1), out, 0)
    return out.reshape(batch_frames, positions, channels)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """Attention of ``(b, f, s*heads, dim)`` operands over ``f``, in the layout and dtype of ``q``."""
    dtype = q.dtype
    autocast = nullcontext()
    if q.device.type == "cpu":
        # PyTorch's 16-bit attention on a CPU rounds the probabilities, and its backward pass takes two to seven
        # times as long as in fp32. Autocast would bring it back.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        mask = mask.to(wide) if mask is not None and mask.is_floating_point() else mask
        autocast = torch.autocast("cpu", enabled=False)
    with autocast:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal, scale=scale
        )
    return out.transpose(1, 2).to(dtype)


def allowed_pairs(
    query: Tensor, num_frames: int, key_frames: int, frame_mask: Tensor | None, causal: bool, window: int | None
) -> Tensor | None:
    """True where a query frame may attend to a key frame, ``(b or 1, f, key_frames)``; None if everywhere."""
    allowed = None
    if causal or window is not None:
        frames = torch.arange(num_frames, device=query.device) + (key_frames - num_frames)
        lag = frames[:, None] - torch.arange(key_frames, device=query.device)
        allowed = lag >= 0 if causal else torch.ones_like(lag, dtype=torch.bool)
        if window is not None:
            allowed = allowed & (lag.abs() <= window)
        allowed = allowed[None]
    if frame_mask is not None:
        present = frame_mask[:, None].expand(-1, num_frames, -1)
        allowed = present if allowed is None else allowed & present
    return allowed


def score_mask(allowed: Tensor | None, bias: Tensor | None, positions: int) -> Tensor | None:
    """Mask for the scores ``(b, s*heads, f, key_frames)``: boolean without a bias, additive with one."""
    if bias is None:
        return None if allowed is None else allowed[:, None]
    if allowed is None:
        return bias.repeat(positions, 1, 1)[None]
    return torch.where(allowed[:, None], bias, -torch.inf).repeat(1, positions, 1, 1)


def positions_per_launch(q: Tensor, num_heads: int) -> int:
    """Largest number of positions for one launch on operands ``(b, f, s*heads, dim)``."""
    batch, num_frames, _, head_dim = q.shape
    sequences = MAX_SEQUENCES
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling():
        sequences = min(sequences, CONVERTED_ELEMENTS // (num_frames * head_dim))
    return max(sequences // (batch * num_heads), 1)
