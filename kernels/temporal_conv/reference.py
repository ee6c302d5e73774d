"""Eager reference of the convolution over frames: the specification and the CPU product."""

import torch
import torch.nn.functional as F
from torch import Tensor


def temporal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, num_frames: int, causal: bool) -> Tensor:
    """Convolution over frames; see the public function for the contract."""
    frames, channels, height, width = x.shape
    clips = (
        x.contiguous(memory_format=torch.channels_last)
        .permute(0, 2, 3, 1)
        .view(frames // num_frames, num_frames, height * width, channels)
        .permute(0, 3, 1, 2)
    )
    reach = weight.shape[2] - 1
    if causal:
        y = F.conv2d(F.pad(clips, (0, 0, reach, 0)), weight, bias)
    else:
        y = F.conv2d(clips, weight, bias, padding=(reach // 2, 0))
    return y.permute(0, 2, 3, 1).reshape(frames, height, width, weight.shape[0]).permute(0, 3, 1, 2)
