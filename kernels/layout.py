"""Views of folded frames that the operators' references share."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether a map ``(frames, channels, height, width)`` lies channels-last in memory, and not NCHW as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def to_clips(x: Tensor, num_frames: int) -> Tensor:
    """Maps ``(b*f, c, h, w)`` as channels-last clips ``(b, c, f, h*w)``: a view if ``x`` is channels-last."""
    batch_frames, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).contiguous()
    return rows.view(batch_frames // num_frames, num_frames, height * width, channels).permute(0, 3, 1, 2)


def from_clips(clips: Tensor, height: int, width: int) -> Tensor:
    """Clips ``(b, c, f, h*w)`` as channels-last maps ``(b*f, c, h, w)``: a view if the clips are channels-last."""
    batch, channels, num_frames, _ = clips.shape
    rows = clips.permute(0, 2, 3, 1).contiguous()
    return rows.view(batch * num_frames, height, width, channels).permute(0, 3, 1, 2)
