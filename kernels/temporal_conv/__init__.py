"""Convolution over frames, separately at every spatial position."""

from jaxtyping import Float
from torch import Tensor

from temporal_layers.kernels.checks import check_alike, check_map, check_num_frames, check_shape, invalid
from temporal_layers.kernels.dispatch import Impl, resolve_impl
from temporal_layers.kernels.temporal_conv import reference

__all__ = ["temporal_conv"]


def temporal_conv(
    x: Float[Tensor, "batch_frames in_channels height width"],
    weight: Float[Tensor, "out_channels in_channels kernel 1"],
    bias: Float[Tensor, "out_channels"] | None = None,
    *,
    num_frames: int,
    causal: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> Float[Tensor, "batch_frames out_channels height width"]:
    """The ``(kernel, 1, 1)`` convolution of the clips ``(batch, channels, num_frames, height, width)``.

    Frames beyond the ends of a clip are zero: ``kernel // 2`` on each side, or ``kernel - 1`` in front if causal,
    so the number of frames stays. A channels-last input is convolved without a copy: it is, as it lies in memory,
    the ``(batch, channels, num_frames, height*width)`` map on which this is a 2-D convolution.

    Args:
        x: Maps with the frames folded innermost into the batch. Any strides, any floating dtype; channels-last
            is the fast layout, another one is copied to it first.
        weight: ``(out_channels, in_channels, kernel, 1)`` with an odd kernel: a ``(kernel, 1, 1)`` weight of
            ``Conv3d`` without its last dimension; dtype and device of ``x``.
        bias: ``(out_channels,)`` or None; dtype and device of ``x``.
        num_frames: Frames of one clip; divides the batch.
        causal: Output frame ``i`` sees input frames ``i - kernel + 1`` to ``i`` only.
        impl: ``"auto"``, ``"fused"`` or ``"reference"``. There is no fused kernel yet: ``"auto"`` is the
            reference and ``"fused"`` raises.

    Returns:
        ``(batch*num_frames, out_channels, height, width)`` in the dtype of ``x``, channels-last whatever the
        layout of ``x``.

    Raises:
        ValueError: a shape, dtype or device does not match, the kernel is even, ``num_frames`` does not divide the
            batch, or ``impl`` cannot run.

    Source: Align your Latents, section 3.1 (residual blocks of 3-D convolutions); kernels of (3, 1, 1) as in Stable
    Video Diffusion (2023).
    """
    op = "temporal_conv"
    check_map(op, "x", x)
    check_num_frames(op, "x", x, num_frames)
    channels = x.shape[1]
    if weight.dim() != 4 or weight.shape[1] != channels or weight.shape[3] != 1:
        raise invalid(
            op, "weight", f"(out_channels, {channels}, kernel, 1)", f"shape {tuple(weight.shape)}",
            "drop the last dimension of a (kernel, 1, 1) Conv3d weight and match x's channels",
        )  # fmt: skip
    if weight.shape[2] % 2 != 1:
        raise invalid(op, "weight", "an odd kernel", f"kernel {weight.shape[2]}", "choose 1, 3, 5, ...")
    check_alike(op, "weight", weight, x, "x")
    if bias is not None:
        check_shape(
            op, "bias", bias, (weight.shape[0],), "one value for each output channel", "size it by the weight's rows"
        )
        check_alike(op, "bias", bias, x, "x")
    resolve_impl(op, impl, x)
    return reference.temporal_conv(x, weight, bias, num_frames, causal)
