"""Group normalisation of folded frames, per frame or over a clip."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.kernels.checks import check_alike, check_map, check_num_frames, check_shape, invalid
from temporal_layers.kernels.dispatch import Impl, resolve_impl
from temporal_layers.kernels.group_norm import reference
from temporal_layers.kernels.layout import is_channels_last

__all__ = ["group_norm"]


def group_norm(
    x: Float[Tensor, "batch_frames channels height width"],
    num_groups: int,
    weight: Float[Tensor, "channels"] | None = None,
    bias: Float[Tensor, "channels"] | None = None,
    *,
    num_frames: int = 1,
    eps: float = 1e-5,
    activation: Literal["silu"] | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    impl: Impl | str = Impl.AUTO,
) -> Float[Tensor, "batch_frames channels height width"]:
    """Group norm whose statistics run over the frames, height and width of each clip, then an activation.

    With ``num_frames=F`` it is the group norm of the 5-D map ``(batch, channels, F, height, width)``; with
    ``num_frames=1`` it is the group norm of each frame. Statistics accumulate in fp32 (fp64 for fp64 input) and
    use the biased variance.

    Args:
        x: Maps with the frames folded innermost into the batch. Any strides, any floating dtype; channels-last
            is the fast layout.
        num_groups: Groups of adjacent channels that share statistics; divides the channels.
        weight: Scale per channel, or None for 1; dtype and device of ``x``.
        bias: Shift per channel, or None for 0; dtype and device of ``x``.
        num_frames: Frames that share statistics; divides the batch.
        eps: Added to the variance.
        activation: ``"silu"``, applied to the normalised map, or None.
        memory_format: Of the result: ``torch.channels_last``, ``torch.contiguous_format``, or
            ``torch.preserve_format``, which is channels-last if ``x`` is and contiguous otherwise. The fused kernels
            change it at no cost.
        impl: ``"auto"`` takes the fused kernels on a GPU with triton and the reference elsewhere, ``"fused"`` and
            ``"reference"`` insist on one. Gradients of gradients need the reference.

    Returns:
        The normalised maps; shape and dtype of ``x``.

    Raises:
        ValueError: a shape, dtype or device does not match, ``num_groups`` does not divide the channels,
            ``num_frames`` does not divide the batch, the activation or the memory format is unknown, or ``impl``
            cannot run.

    Source: Wu and He, Group Normalization (2018), section 3.1; over frames as in the residual blocks of 3-D
    convolutions of Align your Latents, section 3.1.
    """
    op = "group_norm"
    check_map(op, "x", x)
    check_num_frames(op, "x", x, num_frames)
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups != 0:
        raise invalid(
            op, "num_groups", f"a divisor of the {channels} channels", f"{num_groups}", "choose one that divides them"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_shape(op, name, parameter, (channels,), "one value for each channel", "size it by x's channels")
            check_alike(op, name, parameter, x, "x")
    if activation not in (None, "silu"):
        raise invalid(op, "activation", "'silu' or None", repr(activation), "apply another activation to the result")
    if memory_format not in (torch.preserve_format, torch.channels_last, torch.contiguous_format):
        raise invalid(
            op, "memory_format", "torch.preserve_format, torch.channels_last or torch.contiguous_format",
            repr(memory_format), "pass a memory format of maps",
        )  # fmt: skip
    kept = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    memory_format = kept if memory_format == torch.preserve_format else memory_format
    if resolve_impl(op, impl, x, has_fused=True) is Impl.FUSED:
        from temporal_layers.kernels.group_norm import fused  # imports triton

        arguments = num_frames, eps, activation == "silu", memory_format == torch.channels_last
        return fused.group_norm(x, num_groups, weight, bias, *arguments)[0]
    y = reference.group_norm(x, num_groups, weight, bias, num_frames, eps, activation)
    return y.contiguous(memory_format=memory_format)
