"""Convolution over frames, at every spatial position separately or with an extent in space as well."""

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.kernels.alpha_blend import alpha_residual, check_alpha
from temporal_layers.kernels.checks import check_alike, check_map, check_num_frames, check_shape, invalid
from temporal_layers.kernels.dispatch import Impl, resolve_impl
from temporal_layers.kernels.matmul import refusal
from temporal_layers.kernels.temporal_conv import reference, spatial
from temporal_layers.kernels.temporal_conv.tiles import is_faster

__all__ = ["temporal_conv"]


def temporal_conv(
    x: Float[Tensor, "batch_frames in_channels height width"],
    weight: Float[Tensor, "out_channels in_channels kernel *space"],
    bias: Float[Tensor, "out_channels"] | None = None,
    *,
    num_frames: int,
    temb: Float[Tensor, "rows out_channels"] | None = None,
    residual: Float[Tensor, "batch_frames out_channels height width"] | None = None,
    alpha: Float[Tensor, "*frames_channels"] | None = None,
    causal: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> Float[Tensor, "batch_frames out_channels height width"]:
    """Convolution ``(kernel, 1, 1)`` of the clips ``(batch, channels, num_frames, height, width)``, or one with space.

    ``conv(x) + bias + temb``, or with a residual ``residual + (1 - alpha) * (conv(x) + bias + temb)``.

    Frames beyond the ends of a clip are zero: ``kernel // 2`` on each side, or ``kernel - 1`` in front if causal,
    so the number of frames stays. A channels-last input is convolved without a copy: it is, as it lies in memory,
    the ``(batch, channels, num_frames, height*width)`` map on which this is a 2-D convolution.

    With a weight that has an extent in space as well, maps are zero beyond their borders too, and keep their size. On a
    CPU that is ``conv3d`` on a view of the maps, except for small clips in fp32; for these and elsewhere it is a 2-D
    convolution over stacked frames.

    On Intel's processors and from 256 channels on, the reference in fp32 is Winograd's form along frames (kernel 3, not
    causal): its root mean square error is 1.6 times that of ``conv3d``, and a value that is not finite spreads over all
    frames of its pixel. In bf16, where there are no gradients to record, it is one product for each tap, whose sum is
    rounded with each.

    Args:
        x: Maps with the frames folded innermost into the batch. Any strides, any floating dtype; channels-last
            is the fast layout, another one is copied to it first.
        weight: ``(out_channels, in_channels, kernel, 1)`` with an odd kernel: a ``(kernel, 1, 1)`` weight of
            ``Conv3d`` without its last dimension; or the weight of a ``Conv3d``, ``(out_channels, in_channels, kernel,
            kernel_height, kernel_width)``, odd in all three; dtype and device of ``x``.
        bias: ``(out_channels,)`` or None; dtype and device of ``x``.
        num_frames: Frames of one clip; divides the batch.
        temb: Added to every pixel: ``(batch*num_frames, out_channels)``, a row for each frame, or
            ``(batch, out_channels)``, one for each clip; dtype and device of ``x``.
        residual: Input of the residual branch that the convolution ends; shape of the result, dtype and device of
            ``x``.
        alpha: Weight of the residual as in :func:`alpha_residual`, with which the blend of ``residual`` and
            ``residual + update`` is folded into the sum: shape ``()`` or ``(1 or num_frames, 1 or out_channels)``,
            any floating dtype. None adds the whole update. Needs a residual.
        causal: Output frame ``i`` sees input frames ``i - kernel + 1`` to ``i`` only.
        impl: ``"reference"`` is cuDNN's or oneDNN's convolution and pointwise operators. ``"fused"`` is one Triton
            kernel, for weights without an extent in space: fp16, bf16 or fp32 (summed in fp32, without tf32), on a
            GPU; an ``alpha`` for each frame takes a second one. ``"auto"`` takes the kernel for sizes in which it was
            measured to be faster on that GPU, and as nothing has been measured, it is the reference. Gradients of
            gradients need the reference.

    Returns:
        ``(batch*num_frames, out_channels, height, width)``, channels-last whatever the layout of ``x``, in the dtype
        of ``x``; under autocast in that of the residual, or of a convolution where there is none.

    Raises:
        ValueError: a shape, dtype or device does not match, the kernel is even, ``num_frames`` does not divide the
            batch, ``alpha`` comes without a residual, or ``impl`` cannot run.

    Source: Align your Latents, section 3.1 (residual blocks of 3-D convolutions, ``z' <- alpha z + (1 - alpha) z'``
    with ``z' = z + f(z)``); kernels of (3, 1, 1) as in Stable Video Diffusion (2023).
    """
    op = "temporal_conv"
    check_convolution(op, x, weight, bias, num_frames)
    check_epilogue(op, x, weight, num_frames, temb, residual, alpha)
    preferred, library, refused = is_faster(x, weight.shape[0]), reference, refusal(x.dtype)
    if weight.dim() == 5 and weight.shape[3:].numel() == 1:
        weight = weight.squeeze(-1)
    elif weight.dim() == 5:
        library, refused = spatial, ("a (kernel, 1, 1) weight for 'fused'", f"one of {tuple(weight.shape[2:])}")
    if resolve_impl(op, impl, x, has_fused=True, refusal=refused, preferred=preferred) is Impl.FUSED:
        from temporal_layers.kernels.temporal_conv import fused  # imports triton

        return fused.on_maps(x, weight, bias, temb, residual, alpha, num_frames, causal)
    if impl != "auto" or alpha is None or x.device.type == "cpu":
        return library.temporal_conv(x, weight, bias, temb, residual, alpha, num_frames, causal)
    # A library's convolution may be the faster one where the fused blend is faster than its reference.
    update = library.temporal_conv(x, weight, bias, temb, None, None, num_frames, causal)
    residual = residual.contiguous(memory_format=torch.channels_last)
    return alpha_residual(residual, update.to(residual.dtype), alpha, num_frames=num_frames)


def check_convolution(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, num_frames: int) -> None:
    """Checks what every convolution has."""
    check_map(op, "x", x)
    check_num_frames(op, "x", x, num_frames)
    channels = x.shape[1]
    fits = weight.dim() == 5 or (weight.dim() == 4 and weight.shape[3] == 1)
    if not fits or weight.shape[1] != channels:
        raise invalid(
            op, "weight", f"(out_channels, {channels}, kernel, 1) or (out_channels, {channels}, kernel, kernel_height, "
            "kernel_width)", f"shape {tuple(weight.shape)}", "pass the weight of a Conv3d and match x's channels",
        )  # fmt: skip
    for name, size in zip(("kernel", "kernel height", "kernel width"), weight.shape[2:], strict=False):
        if size % 2 != 1:
            raise invalid(op, "weight", f"an odd {name}", f"{name} {size}", "choose 1, 3, 5, ...")
    check_alike(op, "weight", weight, x, "x")
    if bias is not None:
        check_shape(
            op, "bias", bias, (weight.shape[0],), "one value for each output channel", "size it by the weight's rows"
        )
        check_alike(op, "bias", bias, x, "x")


def check_epilogue(
    op: str,
    x: Tensor,
    weight: Tensor,
    num_frames: int,
    temb: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
) -> None:
    """Checks what is added to the convolution."""
    batch_frames, channels = x.shape[0], weight.shape[0]
    if temb is not None:
        clips = batch_frames // num_frames
        # Not `in`, which torch.compile takes for false where a size is symbolic.
        fits = temb.dim() == 2 and (temb.shape[0] == batch_frames or temb.shape[0] == clips)
        if not fits or temb.shape[1] != channels:
            raise invalid(
                op, "temb", f"shape ({batch_frames} or {clips}, {channels})", f"shape {tuple(temb.shape)}",
                "pass an embedding for each frame or clip, projected to the weight's rows",
            )  # fmt: skip
        check_alike(op, "temb", temb, x, "x")
    if residual is not None:
        shape = (batch_frames, channels, *x.shape[2:])
        check_shape(op, "residual", residual, shape, "the shape of the result", "pass the input of the residual branch")
        check_alike(op, "residual", residual, x, "x")
    if alpha is not None:
        if residual is None:
            raise invalid(op, "alpha", "a residual beside it", "none", "pass the residual that it weighs")
        check_alpha(op, alpha, x, "x", num_frames, channels)
