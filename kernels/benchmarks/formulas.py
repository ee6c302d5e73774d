"""The operators and layers as formulas in plain PyTorch, in any dtype: run in float64 they are the oracles.

Maps are ``(batch*frames, channels, height, width)`` and tokens ``(batch*frames, positions, channels)``. Nothing here is
fast, and nothing is shared with the library under test.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def over_clips(x: Tensor, frames: int) -> Tensor:
    """Maps as clips ``(batch, channels, frames, positions)``."""
    return x.unflatten(0, (-1, frames)).flatten(3).transpose(1, 2)


def over_frames(clips: Tensor, size: tuple[int, int]) -> Tensor:
    """Clips ``(batch, channels, frames, positions)`` as maps."""
    return clips.transpose(1, 2).flatten(0, 1).unflatten(2, size)


def attention(q: Tensor, k: Tensor, v: Tensor, *, frames: int, heads: int) -> Tensor:
    """Attention over frames at every position."""
    q, k, v = (x.unflatten(0, (-1, frames)).unflatten(-1, (heads, -1)) for x in (q, k, v))
    scores = torch.einsum("bishd,bjshd->bshij", q, k) * q.shape[-1] ** -0.5
    mixed = torch.einsum("bshij,bjshd->bishd", scores.softmax(-1), v)
    return mixed.flatten(-2).flatten(0, 1)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, frames: int, groups: int = 32, eps: float = 1e-5, silu: bool = True
) -> Tensor:
    """Group norm over the frames and positions of a clip, then SiLU."""
    grouped = over_clips(x, frames).unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), keepdim=True, correction=0)
    normed = ((grouped - mean) * torch.rsqrt(variance + eps)).flatten(1, 2)
    normed = normed * weight[:, None, None] + bias[:, None, None]
    return over_frames(F.silu(normed) if silu else normed, x.shape[2:])


def blend(spatial: Tensor, temporal: Tensor, alpha: Tensor) -> Tensor:
    """The blend of two branches."""
    return alpha * spatial + (1 - alpha) * temporal


def residual(hidden: Tensor, update: Tensor, alpha: Tensor) -> Tensor:
    """The blend of ``hidden`` with ``hidden + update``."""
    return hidden + (1 - alpha) * update


def conv(x: Tensor, weight: Tensor, bias: Tensor, *, frames: int) -> Tensor:
    """Convolution ``(3, 1, 1)``: three matrix products on shifted frames."""
    clips = F.pad(over_clips(x, frames), (0, 0, 1, 1))
    taps = [torch.einsum("oc,bcfp->bofp", weight[:, :, k, 0], clips[:, :, k : k + frames]) for k in range(3)]
    return over_frames(sum(taps) + bias[:, None, None], x.shape[2:])


def conv_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor, frames: int) -> Tensor:
    """The convolution that ends a residual block: with an embedding for each frame, if any, blended with its input."""
    *temb, alpha = rest
    return blend(residual, residual + conv_update(x, weight, bias, *temb, frames=frames), alpha)


def conv_update(x: Tensor, weight: Tensor, bias: Tensor, temb: Tensor | None = None, *, frames: int) -> Tensor:
    """The convolution with bias and embedding."""
    y = conv(x, weight, bias, frames=frames)
    return y if temb is None else y + temb[:, :, None, None]


def linear_norm(x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    """A product of normed rows, with PyTorch's epsilon."""
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm_weight + norm_bias
    return normed @ weight.t()


def linear_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
    """The product that ends a residual branch, blended with its input."""
    return blend(residual, residual + x @ weight.t() + bias, alpha)


def geglu(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    """Values times the GELU of their gates, both from one projection, of normed rows if the norm is given."""
    value, gate = ((linear_norm(x, weight, *norm) if norm else x @ weight.t()) + bias).chunk(2, dim=-1)
    return value * gate * (1 + torch.erf(gate * 0.5**0.5)) / 2


def res_block(x: Tensor, temb: Tensor | None, p: dict[str, Tensor], *, frames: int) -> Tensor:
    """SVD's temporal residual block, blended with its input. Parameters by diffusers' names."""
    y = group_norm(x, p["norm1.weight"], p["norm1.bias"], frames=frames)
    y = conv(y, p["conv1.weight"].squeeze(-1), p["conv1.bias"], frames=frames)
    if temb is not None:
        y = y + F.linear(F.silu(temb), p["time_emb_proj.weight"], p["time_emb_proj.bias"])[:, :, None, None]
    y = group_norm(y, p["norm2.weight"], p["norm2.bias"], frames=frames)
    y = conv(y, p["conv2.weight"].squeeze(-1), p["conv2.bias"], frames=frames)
    return blend(x, x + y, torch.sigmoid(p["mix_factor"]).to(x.dtype))


def transformer(x: Tensor, p: dict[str, Tensor], *, frames: int, heads: int) -> Tensor:
    """ModelScope's temporal transformer: two attentions over frames and a feed-forward, added to the input."""
    normed = group_norm(x, p["norm.weight"], p["norm.bias"], frames=frames, eps=1e-6, silu=False)
    tokens = F.linear(normed.flatten(2).transpose(1, 2), p["proj_in.weight"], p["proj_in.bias"])
    block = {name.removeprefix("transformer_blocks.0."): value for name, value in p.items()}

    def norm(name: str) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:], block[f"{name}.weight"], block[f"{name}.bias"])

    for index in (1, 2):
        y, name = norm(f"norm{index}"), f"attn{index}"
        q, k, v = (F.linear(y, block[f"{name}.to_{which}.weight"]) for which in "qkv")
        mixed = attention(q, k, v, frames=frames, heads=heads)
        tokens = tokens + F.linear(mixed, block[f"{name}.to_out.0.weight"], block[f"{name}.to_out.0.bias"])
    value, gate = F.linear(norm("norm3"), block["ff.net.0.proj.weight"], block["ff.net.0.proj.bias"]).chunk(2, dim=-1)
    tokens = tokens + F.linear(value * F.gelu(gate), block["ff.net.2.weight"], block["ff.net.2.bias"])
    out = F.linear(tokens, p["proj_out.weight"], p["proj_out.bias"])
    return x + out.transpose(1, 2).unflatten(2, x.shape[2:])
