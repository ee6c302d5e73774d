"""Gradient of the convolution's weight, which the reference and the fused kernel share."""

import torch
from torch import Tensor


def weight_gradient(clips: Tensor, grad: Tensor, kernel: int, padding: int) -> Tensor:
    """Sums the products of input and gradient, one batched matrix product of shifted views for each tap.

    Args:
        clips: Input ``(batch, in, frames, positions)``; channels-last ones are not copied.
        grad: Gradient ``(batch, out, frames', positions)`` of the result, in the dtype of ``clips``.
        kernel: Taps.
        padding: Frames of zeros in front of a clip.

    Returns:
        ``(out, in, kernel, 1)`` in fp32 or wider: clips are added in it.
    """
    rows, grad_rows = clips.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)  # (b, f, p, c)
    wide = torch.promote_types(clips.dtype, torch.float32)
    taps = []
    for tap in range(kernel):
        shift = tap - padding  # output frame t meets input frame t + shift
        start, end = max(0, -shift), max(0, -shift, min(grad_rows.shape[1], rows.shape[1] - shift))
        left = grad_rows[:, start:end].flatten(1, 2)
        right = rows[:, start + shift : end + shift].flatten(1, 2)
        taps.append(torch.bmm(left.transpose(1, 2), right).sum(0, dtype=wide))
    return torch.stack(taps, dim=2).unsqueeze(-1)
