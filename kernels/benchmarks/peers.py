"""What people use today, operator by operator, each on the memory layout it likes best.

``eager`` is the straightforward PyTorch that diffusers' modules are written in, kept here so that it can be measured
where diffusers is not installed; the tests hold it to diffusers' own results. Clips are ``(batch, channels, frames,
height, width)``, sequences ``(batch*positions, frames, channels)``.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Sequences as ``(batch*positions, heads, frames, head_dim)``, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def sdpa(heads: int, backend: str | None = None) -> Callable[..., Tensor]:
    """PyTorch's attention on sequences, by its own choice of backend or by one."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (split_heads(x, heads) for x in (q, k, v))
        if backend is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            refuse_corruption(q, backend)
            with sdpa_kernel(BACKENDS[backend]):
                out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    return attend


def refuse_corruption(q: Tensor, backend: str) -> None:
    """Raises where flash attention's backward pass would end the process's CUDA context.

    It addresses ``batch*heads*round_up(frames, 128)*head_dim`` elements with 32 bits. What it overwrites beyond them
    takes every later measurement with it.
    """
    batch, heads, frames, head_dim = q.shape
    padded = batch * heads * 128 * math.ceil(frames / 128) * max(head_dim, 32)
    if backend == "flash" and q.is_cuda and q.requires_grad and padded > 2**31:
        raise RuntimeError(f"not run: the backward pass would address {padded / 2**31:.2f} x 2**31 elements")


def bmm(heads: int) -> Callable[..., Tensor]:
    """Attention on sequences as two batched matrix products."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (split_heads(x, heads).flatten(0, 1) for x in (q, k, v))
        scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
        mixed = torch.bmm(scores.softmax(-1), v)
        return mixed.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)

    return attend


def xformers_attention(heads: int) -> Callable[..., Tensor]:
    """xformers' attention on sequences.

    Raises:
        ImportError: xformers is not installed.
    """
    from xformers.ops import memory_efficient_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return memory_efficient_attention(*(x.unflatten(-1, (heads, -1)) for x in (q, k, v))).flatten(2)

    return attend


def group_norm(clips: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Group norm and SiLU on clips."""
    return F.silu(F.group_norm(clips, 32, weight, bias, 1e-5))


def group_norm_by_moments(maps: Tensor, weight: Tensor, bias: Tensor, *, frames: int) -> Tensor:
    """Group norm and SiLU on channels-last maps by ``var_mean``, which keeps the layout on a GPU."""
    x = maps.unflatten(0, (-1, frames)).unflatten(2, (32, -1))
    variance, mean = torch.var_mean(x.float(), dim=(1, 3, 4, 5), keepdim=True, correction=0)
    scale = torch.rsqrt(variance + 1e-5) * weight.float().view(32, -1, 1, 1)
    shift = bias.float().view(32, -1, 1, 1) - mean * scale
    return F.silu(torch.addcmul(shift, x.float(), scale).to(maps.dtype)).flatten(2, 3).flatten(0, 1)


def blend(spatial: Tensor, temporal: Tensor, alpha: Tensor) -> Tensor:
    """The blend in the dtype of the branches."""
    alpha = alpha.to(spatial.dtype)
    return alpha * spatial + (1.0 - alpha) * temporal


def residual(hidden: Tensor, update: Tensor, alpha: Tensor) -> Tensor:
    """A temporal branch with its skip connection, then the blend."""
    return blend(hidden, hidden + update, alpha)


def diffusers_blend(spatial: Tensor, temporal: Tensor, alpha: Tensor, *, is_update: bool = False) -> Tensor:
    """diffusers' AlphaBlender; its alpha is handed in from outside, so that it has a gradient like everybody's."""
    from diffusers.models.resnet import AlphaBlender

    if is_update:
        temporal = spatial + temporal
    blender = AlphaBlender(0.5, merge_strategy="fixed").to(spatial.device)
    return torch.func.functional_call(blender, {"mix_factor": alpha[None]}, (spatial, temporal))


def conv(clips: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution over frames as a 3-D convolution."""
    return F.conv3d(clips, weight.unsqueeze(-1), bias, padding=(1, 0, 0))


def conv_residual(clips: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    """A 3-D convolution, the timestep embedding if there is one, the skip connection and the blend."""
    *temb, alpha = rest
    y = conv(clips, weight, bias)
    if temb:
        y = y + temb[0].unflatten(0, (-1, clips.shape[2])).transpose(1, 2)[..., None, None]
    return blend(residual, residual + y, alpha)


def linear_norm(x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    """A layer norm, then a product."""
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), weight)


def linear_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
    """A product, the skip connection and the blend."""
    return blend(residual, residual + F.linear(x, weight, bias), alpha)


def geglu(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    """The gated projection as diffusers writes it, behind a layer norm if one is given."""
    if norm:
        x = F.layer_norm(x, x.shape[-1:], *norm)
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def diffusers_geglu(channels: int) -> Callable[..., Tensor]:
    """diffusers' GEGLU; its parameters are handed in from outside, so that they have gradients like everybody's.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers.models.activations import GEGLU

    with torch.device("meta"):
        module = GEGLU(channels, 4 * channels)

    def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"proj.weight": weight, "proj.bias": bias}, (x,))

    return project


def res_block(maps: Tensor, temb: Tensor | None, p: dict[str, Tensor], *, frames: int) -> Tensor:
    """SVD's temporal residual block and its blend, on frames like diffusers' block."""
    clips = maps.unflatten(0, (-1, frames)).transpose(1, 2)
    y = group_norm(clips, p["norm1.weight"], p["norm1.bias"])
    y = F.conv3d(y, p["conv1.weight"], p["conv1.bias"], padding=(1, 0, 0))
    if temb is not None:
        projected = F.linear(F.silu(temb), p["time_emb_proj.weight"], p["time_emb_proj.bias"])
        y = y + projected.unflatten(0, (-1, frames)).transpose(1, 2)[..., None, None]
    y = group_norm(y, p["norm2.weight"], p["norm2.bias"])
    y = F.conv3d(y, p["conv2.weight"], p["conv2.bias"], padding=(1, 0, 0))
    return blend(clips, clips + y, torch.sigmoid(p["mix_factor"])).transpose(1, 2).flatten(0, 1)


def transformer(maps: Tensor, p: dict[str, Tensor], *, frames: int, heads: int) -> Tensor:
    """ModelScope's temporal transformer, on frames like diffusers' module."""
    clips = maps.unflatten(0, (-1, frames)).transpose(1, 2)
    normed = F.group_norm(clips, 32, p["norm.weight"], p["norm.bias"], 1e-6)
    x = F.linear(normed.permute(0, 3, 4, 2, 1).flatten(0, 2), p["proj_in.weight"], p["proj_in.bias"])
    block = {name.removeprefix("transformer_blocks.0."): value for name, value in p.items()}
    attend = sdpa(heads)

    def norm(name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], block[f"{name}.weight"], block[f"{name}.bias"])

    for index in (1, 2):
        y, name = norm(f"norm{index}"), f"attn{index}"
        mixed = attend(*(F.linear(y, block[f"{name}.to_{which}.weight"]) for which in "qkv"))
        x = x + F.linear(mixed, block[f"{name}.to_out.0.weight"], block[f"{name}.to_out.0.bias"])
    value, gate = F.linear(norm("norm3"), block["ff.net.0.proj.weight"], block["ff.net.0.proj.bias"]).chunk(2, dim=-1)
    x = x + F.linear(value * F.gelu(gate), block["ff.net.2.weight"], block["ff.net.2.bias"])
    out = F.linear(x, p["proj_out.weight"], p["proj_out.bias"])
    batch, (height, width) = clips.shape[0], maps.shape[2:]
    out = out.view(batch, height, width, frames, -1).permute(0, 3, 4, 1, 2)
    return maps + out.reshape(maps.shape)
