"""Eager reference of the group norm: the specification and the CPU product.

Each layout keeps to itself, since converting costs more than normalising. Channels-last frames are, as they lie,
the channels-last ``(b, c, f, h*w)`` map, for which PyTorch's CPU kernel has a path of its own. On a GPU PyTorch's
kernel copies channels-last input to contiguous memory and starts only one block of threads for each clip and group;
forms made of ``var_mean`` avoid both, but they are slower on a CPU and hold an fp32 copy of the input for the
backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from temporal_layers.kernels.layout import from_clips, is_channels_last, to_clips


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    num_frames: int,
    eps: float,
    activation: str | None,
) -> Tensor:
    """Group norm over the frames of a clip; see the public function for the contract."""
    batch_frames, channels, height, width = x.shape
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # PyTorch's backward pass fails on a bias alone in 16 bit
    channels_last = is_channels_last(x)
    if channels_last:
        clips = to_clips(x, num_frames)
    else:
        clips = x.reshape(batch_frames // num_frames, num_frames, channels, height * width).transpose(1, 2)
    if _backward_crashes(clips, weight, bias):
        clips = clips + (weight if bias is None else weight + bias)[0] * 0  # the same values, with a gradient
    y = F.group_norm(clips, num_groups, weight, bias, eps)
    if activation == "silu":
        # Under autograd an in-place SiLU would clone its input for the backward pass.
        y = F.silu(y, inplace=not torch.is_grad_enabled())
    if channels_last:
        return from_clips(y, height, width)
    return y.transpose(1, 2).reshape(x.shape)


def _backward_crashes(clips: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's CPU backward pass of a channels-last group norm would write through a null pointer.

    It does (torch 2.13: segmentation fault) when the input needs no gradient but weight or bias do, which is the first
    temporal layer of a frozen image model.
    """
    if clips.device.type != "cpu" or clips.requires_grad or not torch.is_grad_enabled() or weight is None:
        return False
    return weight.requires_grad or (bias is not None and bias.requires_grad)
