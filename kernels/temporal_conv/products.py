"""The convolution over frames as one matrix product for each tap, for bf16 on a processor that has them in hardware.

The frames of a clip are rows of one matrix, so a tap adds the product of some of them to the results of as many others.
A sum over channels is fp32 and rounded when it is added: for three taps the error is 1.35 times that of one long sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from temporal_layers.kernels.checks import is_autocast
from temporal_layers.kernels.processor import has_bf16_tiles

# Where the form was measured to be faster than oneDNN's conv2d: by 1.2 to 1.7 times, with so many channels and pixels.
# The gradients of conv2d are as fast, so that where any is needed its forward pass is taken as well.
LEAST_CHANNELS = 256
LEAST_PIXELS = 1024


def is_faster(x: Tensor, weight: Tensor, num_frames: int) -> bool:
    """Whether the form was measured to beat oneDNN's ``conv2d``, and may take its place."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.compiler.is_compiling() or is_autocast("cpu"):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if min(weight.shape[:2]) < LEAST_CHANNELS or x[:, 0].numel() < LEAST_PIXELS:
        return False
    return weight.shape[2] > 1 and num_frames > 1 and has_bf16_tiles()


def convolve(clips: Tensor, weight: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """The convolution.

    Args:
        clips: ``(batch, in, frames, positions)``, channels-last in memory.
        weight: ``(out, in, kernel, 1)``.
        bias: ``(out,)`` or None.
        causal: Whether a result sees its own frame and earlier ones only.

    Returns:
        ``(batch, out, frames, positions)``, channels-last in memory.
    """
    batch, _, num_frames, positions = clips.shape
    taps = weight.squeeze(3).permute(2, 0, 1).contiguous()
    own = len(taps) - 1 if causal else len(taps) // 2  # the tap that meets the frame of the result
    rows = clips.permute(0, 2, 3, 1).flatten(1, 2)
    results = F.linear(rows, taps[own], bias)
    for tap, filters in enumerate(taps):
        shift = (tap - own) * positions  # result row r sees row r + shift
        kept = rows.shape[1] - abs(shift)
        if shift == 0 or kept <= 0:
            continue
        for seen, result in zip(rows, results, strict=True):
            result.narrow(0, max(0, -shift), kept).addmm_(seen.narrow(0, max(0, shift), kept), filters.t())
    return results.view(batch, num_frames, positions, -1).permute(0, 3, 1, 2)
