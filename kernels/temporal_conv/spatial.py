"""Convolution over frames, height and width by the libraries: the specification and the product on every device.

On a CPU it is ``conv3d`` on the view of channels-last maps as channels-last clips: of the forms tried (contiguous
clips, stacked frames, a sum over frames of 2-D convolutions, frames as output channels) the fastest in 16 bits, and in
fp32 within a tenth of it but for small clips. For these and elsewhere it is a 2-D convolution over the frames that a
result sees, stacked along the channels: for three frames three times the input in memory, but none of what befell
``conv3d`` on GPUs, which was wrong in bf16 with cuDNN 9.8 to 9.10 (pytorch #163539) and takes a multiple of its memory
in torch 2.9 (#166643). No form was timed on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from temporal_layers.kernels.temporal_conv.reference import finish


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
    reach = weight.shape[2] - 1
    before = reach if causal else reach // 2
    clips = x.permute(0, 2, 3, 1).unflatten(0, (-1, num_frames)).permute(0, 4, 1, 2, 3)
    rows = convolve(clips, weight, bias, before, reach - before).permute(0, 2, 3, 4, 1)
    return finish(rows.contiguous().flatten(0, 1).permute(0, 3, 1, 2), temb, residual, alpha, num_frames)


def convolve(clips: Tensor, weight: Tensor, bias: Tensor | None, before: int, behind: int) -> Tensor:
    """The convolution alone.

    Args:
        clips: ``(batch, in, frames, height, width)``; not copied if channels-last in memory.
        weight: ``(out, in, kernel, kernel_height, kernel_width)``, odd in space.
        bias: ``(out,)`` or None.
        before: Frames of zeros in front of a clip.
        behind: Likewise behind it. Without any the result has ``kernel - 1`` frames less than the clip.

    Returns:
        ``(batch, out, frames', height, width)``, channels-last in memory if the library's convolution leaves it so.
    """
    # One clip may come with any stride between clips, in which PyTorch would not see that it is channels-last.
    rows = clips.permute(0, 2, 3, 4, 1)
    clips = rows.reshape(-1).view(rows.shape).permute(0, 4, 1, 2, 3)
    if clips.shape[2] == 1 and before + behind == weight.shape[2] - 1:
        # One tap meets the only frame. With all of them, conv3d in bf16 of a few channels is wrong in torch 2.13: it
        # returns what was in memory.
        weight, before, behind = weight[:, :, before : before + 1], 0, 0
    form = on_stacked_frames if takes_stacked_frames(clips) else on_clips
    return form(clips, weight, bias, before, behind)


def takes_stacked_frames(clips: Tensor) -> bool:
    """Whether 2-D convolutions are the better ones.

    On a CPU they are where PyTorch leaves a small clip in fp32 to its own ``conv3d`` instead of oneDNN's, which goes by
    these dimensions and takes up to four times as long.
    """
    if clips.device.type != "cpu":
        return True
    if torch.compiler.is_compiling() or len(clips) > 1 or clips.dtype != torch.float32:
        return False
    return clips.shape[1:4].numel() <= 20_480


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
