"""Eager reference of the group norm: the specification and the CPU product."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    frames, channels, height, width = x.shape
    clips = (
        x.contiguous(memory_format=torch.channels_last)
        .permute(0, 2, 3, 1)
        .view(frames // num_frames, num_frames, height * width, channels)
        .permute(0, 3, 1, 2)
    )
    if _backward_crashes(clips, weight, bias):
        clips = clips + (weight if bias is None else weight + bias)[0] * 0  # the same values, with a gradient
    y = F.group_norm(clips, num_groups, weight, bias, eps)
    if activation == "silu":
        y = F.silu(y, inplace=True)
    return y.permute(0, 2, 3, 1).reshape(frames, height, width, channels).permute(0, 3, 1, 2)


def _backward_crashes(clips: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's CPU backward pass of a channels-last group norm would write through a null pointer.

    It does (torch 2.13: segmentation fault) when the input needs no gradient but weight or bias do, which is the first
    temporal layer of a frozen image model.
    """
    if clips.device.type != "cpu" or clips.requires_grad or not torch.is_grad_enabled() or weight is None:
        return False
    return weight.requires_grad or (bias is not None and bias.requires_grad)
