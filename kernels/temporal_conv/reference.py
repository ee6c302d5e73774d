"""Eager reference of the convolution over frames: the specification and the CPU product.

A ``(k, 1, 1)`` convolution over clips is a 2-D convolution with kernel ``(k, 1)`` over maps whose height is the
frames and whose width is all positions. On channels-last frames that map is a view, and the 2-D kernels of
oneDNN and cuDNN are the fast ones: against ``conv3d`` on contiguous clips the forward pass takes a third to
four fifths of the time on a CPU. With many channels in fp32, half the multiplications do: see :mod:`.winograd`. In bf16
one product for each tap is faster where the processor has them in hardware: see :mod:`.products`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from temporal_layers.kernels.alpha_blend.reference import alpha_residual
from temporal_layers.kernels.checks import is_autocast
from temporal_layers.kernels.layout import from_clips, to_clips
from temporal_layers.kernels.temporal_conv import products, winograd
from temporal_layers.kernels.temporal_conv.gradients import weight_gradient


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
    """Convolution over frames and what is added to it; see the public function for the contract."""
    if (alpha is None or alpha.dim() == 0) and winograd.is_faster(x, weight, num_frames, causal):
        return by_winograd(x, weight, bias, temb, residual, alpha, num_frames)
    return finish(convolve(x, weight, bias, num_frames, causal), temb, residual, alpha, num_frames)


def finish(
    update: Tensor, temb: Tensor | None, residual: Tensor | None, alpha: Tensor | None, num_frames: int
) -> Tensor:
    """What stands behind a convolution: the embedding, and the blend of the residual with its sum with the update."""
    if temb is not None:
        per_frame = temb if temb.shape[0] == update.shape[0] else temb.repeat_interleave(num_frames, 0)
        update = update + per_frame.to(update.dtype)[:, :, None, None]
    if residual is None:
        return update
    residual = residual.contiguous(memory_format=torch.channels_last)
    if alpha is None:
        return residual + update.to(residual.dtype)
    return alpha_residual(residual, update.to(residual.dtype), alpha, num_frames, 1, None)


def by_winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temb: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    num_frames: int,
) -> Tensor:
    """The same with fewer multiplications, the sums included."""
    height, width = x.shape[2:]
    rows, base = (None if y is None else to_clips(y, num_frames).permute(0, 2, 3, 1) for y in (x, residual))
    added = None if bias is None else bias.view(1, 1, 1, -1)
    if temb is not None:
        per_frame = temb.view(rows.shape[0], -1, 1, temb.shape[1])
        added = per_frame if added is None else per_frame + added
    share = None if alpha is None else 1 - alpha.to(x.dtype)
    if added is not None and share is not None:
        added = added * share
    result = winograd.WinogradConv.apply(rows, weight.squeeze(3), added, base, share)
    return from_clips(result.permute(0, 3, 1, 2), height, width)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, num_frames: int, causal: bool) -> Tensor:
    """The convolution alone."""
    height, width = x.shape[2:]
    clips = to_clips(x, num_frames)
    if products.is_faster(x, weight, num_frames):
        return from_clips(products.convolve(clips, weight, bias, causal), height, width)
    reach, padding = weight.shape[2] - 1, weight.shape[2] // 2
    if causal:
        # Padding both ends by the reach and dropping the tail saves this copy, but its backward is twice as slow.
        clips, padding = F.pad(clips, (0, 0, reach, 0)), 0
    if trains_in_fp32_on_a_cpu(clips, weight):
        y = FrameConvolution.apply(clips, weight, bias, padding)
    else:
        y = F.conv2d(clips, weight, bias, padding=(padding, 0))
    return from_clips(y, height, width)


def trains_in_fp32_on_a_cpu(clips: Tensor, weight: Tensor) -> bool:
    """Whether the weight's gradient is better taken by :class:`FrameConvolution`."""
    return (
        clips.device.type == "cpu"
        and clips.dtype in (torch.float32, torch.float64)
        and weight.requires_grad
        and torch.is_grad_enabled()
        and clips.numel() > 0
        and not is_autocast("cpu")
        and not torch.compiler.is_compiling()
    )


class FrameConvolution(torch.autograd.Function):
    """``conv2d`` with a ``(k, 1)`` kernel whose weight gradient is a batched matrix product for each tap.

    oneDNN's own weight gradient takes three to seven times as long in fp32. In 16 bits it is the better one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(clips: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        """Convolves ``(b, c, f, p)`` maps, padded by ``padding`` frames at both ends."""
        return F.conv2d(clips, weight, bias, padding=(padding, 0))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        """Keeps the operands."""
        clips, weight, _, ctx.padding = inputs
        ctx.save_for_backward(clips, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the maps, the weight and the bias, in differentiable operations."""
        clips, weight = ctx.saved_tensors
        to_clips_, to_weight, to_bias, _ = ctx.needs_input_grad
        rest = weight.shape[2] - 1 - ctx.padding
        return (
            F.conv2d(grad, weight.flip(2).transpose(0, 1), padding=(rest, 0)) if to_clips_ else None,
            weight_gradient(clips, grad, weight.shape[2], ctx.padding) if to_weight else None,
            grad.sum((0, 2, 3)) if to_bias else None,
            None,
        )
