"""Convolution over frames, height and width by the libraries: the specification and the product on every device.

On a CPU it is ``conv3d`` on the view of channels-last maps as channels-last clips: of the forms tried (contiguous
clips, stacked frames, a sum over frames of 2-D convolutions, frames as output channels) the fastest in 16 bits, and in
fp32 within a tenth of it. Elsewhere it is a 2-D convolution over the frames that a result sees, stacked along the
channels: for three frames three times the input in memory, but none of what befell ``conv3d`` on GPUs, which was wrong
in bf16 with cuDNN 9.8 to 9.10 (pytorch #163539) and takes a multiple of its memory in torch 2.9 (#166643). No form was
timed on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from temporal_layers.kernels.alpha_blend.reference import alpha_residual
from temporal_layers.kernels.layout import from_clips, to_clips


def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temb: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    num_frames: int,
    causal: bool,
) -> Tensor:
    """Convolution with a weight ``(out, in, kernel, kernel_height, kernel_width)`` and what is added to it."""
    height, width = x.shape[2:]
    reach = weight.shape[2] - 1
    before = reach if causal else reach // 2
    clips = to_clips(x, num_frames).unflatten(3, (height, width))
    update = from_clips(convolve(clips, weight, bias, before, reach - before).flatten(3), height, width)
    if temb is not None:
        per_frame = temb if temb.shape[0] == x.shape[0] else temb.repeat_interleave(num_frames, 0)
        update = update + per_frame.to(update.dtype)[:, :, None, None]
    if residual is None:
        return update
    residual = residual.contiguous(memory_format=torch.channels_last)
    if alpha is None:
        return residual + update.to(residual.dtype)
    return alpha_residual(residual, update.to(residual.dtype), alpha, num_frames, 1, None)


def convolve(clips: Tensor, weight: Tensor, bias: Tensor | None, before: int, behind: int) -> Tensor:
    """The convolution alone.

    Args:
        clips: ``(batch, in, frames, height, width)``, channels-last in memory.
        weight: ``(out, in, kernel, kernel_height, kernel_width)``, odd in space.
        bias: ``(out,)`` or None.
        before: Frames of zeros in front of a clip.
        behind: Likewise behind it. Without any the result has ``kernel - 1`` frames less than the clip.

    Returns:
        Channels-last ``(batch, out, frames', height, width)``.
    """
    form = on_clips if clips.device.type == "cpu" else on_stacked_frames
    return form(clips, weight, bias, before, behind)


def on_clips(clips: Tensor, weight: Tensor, bias: Tensor | None, before: int, behind: int) -> Tensor:
    """As one 3-D convolution."""
    padding = min(before, behind)
    if before != behind:
        clips = F.pad(clips, (0, 0, 0, 0, before - padding, behind - padding))
    return F.conv3d(clips, weight, bias, padding=(padding, *(size // 2 for size in weight.shape[3:])))


def on_stacked_frames(clips: Tensor, weight: Tensor, bias: Tensor | None, before: int, behind: int) -> Tensor:
    """As one 2-D convolution, whose input channels are those of all frames that a result sees."""
    kernel = weight.shape[2]
    rows = F.pad(clips, (0, 0, 0, 0, before, behind)).permute(0, 2, 3, 4, 1)  # (b, f, h, w, c)
    num_frames = rows.shape[1] - kernel + 1
    stacked = torch.cat([rows[:, tap : tap + num_frames] for tap in range(kernel)], dim=-1)
    maps = stacked.flatten(0, 1).permute(0, 3, 1, 2)
    weight = weight.transpose(1, 2).flatten(1, 2)  # (out, kernel * in, kernel_height, kernel_width)
    y = F.conv2d(maps, weight, bias, padding=[size // 2 for size in weight.shape[2:]])
    return y.unflatten(0, (-1, num_frames)).transpose(1, 2)
