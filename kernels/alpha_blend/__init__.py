"""Blend of a spatial and a temporal branch, and its folded residual form."""

from jaxtyping import Bool, Float
from torch import Tensor

from temporal_layers.kernels.alpha_blend import reference
from temporal_layers.kernels.checks import (
    check_alike,
    check_bool,
    check_device,
    check_floating,
    check_num_frames,
    check_shape,
    invalid,
)
from temporal_layers.kernels.dispatch import Impl, resolve_impl

__all__ = ["alpha_blend", "alpha_residual"]


def alpha_blend(
    spatial: Float[Tensor, "batch_frames *rest"],
    temporal: Float[Tensor, "batch_frames *rest"],
    alpha: Float[Tensor, "*frames_channels"],
    *,
    num_frames: int = 1,
    channel_dim: int = 1,
    image_only: Bool[Tensor, "*batch_frames"] | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Float[Tensor, "batch_frames *rest"]:
    """``alpha * spatial + (1 - alpha) * temporal``, computed in fp32, returned in ``spatial.dtype``.

    ``alpha`` always weighs the spatial branch: 1 is the image model. The arithmetic is fp32 (fp64 for fp64
    branches) whatever the dtype of the branches, since an alpha of 0.999 rounds to 1 in bf16. The result equals
    ``spatial`` exactly where ``alpha == 1`` and where the branches agree, for finite values (the sign of a zero
    may change). The result is channels-last if ``spatial`` is, contiguous otherwise.

    Args:
        spatial: Output of the image layer: maps ``(batch*num_frames, channels, height, width)`` with
            ``channel_dim=1``, or tokens ``(batch*num_frames, tokens, channels)`` with ``channel_dim=-1``. Any
            strides, any floating dtype.
        temporal: Output of the temporal layer; shape, dtype and device of ``spatial``.
        alpha: Weight of ``spatial``: shape ``()``, or ``(num_frames or 1, channels or 1)`` for a weight per
            frame, per channel or both. Any floating dtype, device of ``spatial``; keep it in fp32 to train it.
        num_frames: Frames of one clip, folded innermost into the batch. Read only with an ``alpha`` per frame
            or an ``image_only`` of two dimensions.
        channel_dim: Dimension of the channels, 1 or -1.
        image_only: True for rows that return ``spatial`` bit for bit, even where ``temporal`` is NaN or
            infinite there, and that send no gradient to ``temporal`` and ``alpha``. Shape
            ``(batch, num_frames)`` or ``(batch*num_frames,)``.
        impl: ``"auto"`` takes the fused kernels on a GPU with triton and the reference elsewhere, ``"fused"`` and
            ``"reference"`` insist on one. Gradients of gradients need the reference.

    Returns:
        The blend; shape and dtype of ``spatial``.

    Raises:
        ValueError: a shape, dtype or device does not match, ``num_frames`` does not divide the batch, or
            ``impl`` cannot run.

    Source: Align your Latents, section 3.1, ``z' <- alpha z + (1 - alpha) z'``.
    """
    check_branches("alpha_blend", "spatial", spatial, "temporal", temporal, alpha, num_frames, channel_dim, image_only)
    if resolve_impl("alpha_blend", impl, spatial, has_fused=True) is Impl.FUSED:
        from temporal_layers.kernels.alpha_blend import fused  # imports triton

        return fused.on_maps(spatial, temporal, alpha, num_frames, channel_dim, image_only, False)
    return reference.alpha_blend(spatial, temporal, alpha, num_frames, channel_dim, image_only)


def alpha_residual(
    hidden: Float[Tensor, "batch_frames *rest"],
    update: Float[Tensor, "batch_frames *rest"],
    alpha: Float[Tensor, "*frames_channels"],
    *,
    num_frames: int = 1,
    channel_dim: int = 1,
    image_only: Bool[Tensor, "*batch_frames"] | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Float[Tensor, "batch_frames *rest"]:
    """``hidden + (1 - alpha) * update``, computed in fp32, returned in ``hidden.dtype``.

    The folded form of ``alpha_blend(hidden, hidden + update, alpha)`` for a temporal branch that is a residual:
    equal in exact arithmetic, one pass over memory less, and without the rounding of ``hidden + update``. The
    result equals ``hidden`` exactly where ``update`` is zero and where ``alpha == 1``, for finite values (the
    sign of a zero may change). The result is channels-last if ``hidden`` is, contiguous otherwise.

    Args:
        hidden: Input of the residual branch and output of the image layer: maps
            ``(batch*num_frames, channels, height, width)`` with ``channel_dim=1``, or tokens
            ``(batch*num_frames, tokens, channels)`` with ``channel_dim=-1``.
        update: The residual, without ``hidden``; shape, dtype and device of ``hidden``.
        alpha: Weight of the image model as in :func:`alpha_blend`: 1 drops the update, 0 adds it whole.
        num_frames: Frames of one clip, folded innermost into the batch. Read only with an ``alpha`` per frame
            or an ``image_only`` of two dimensions.
        channel_dim: Dimension of the channels, 1 or -1.
        image_only: True for rows that return ``hidden`` bit for bit, even where ``update`` is NaN or infinite
            there, and that send no gradient to ``update`` and ``alpha``. Shape ``(batch, num_frames)`` or
            ``(batch*num_frames,)``.
        impl: ``"auto"`` takes the fused kernels on a GPU with triton and the reference elsewhere, ``"fused"`` and
            ``"reference"`` insist on one. Gradients of gradients need the reference.

    Returns:
        The weighted sum; shape and dtype of ``hidden``.

    Raises:
        ValueError: a shape, dtype or device does not match, ``num_frames`` does not divide the batch, or
            ``impl`` cannot run.

    Source: Align your Latents, section 3.1, with ``z' = z + f(z)``.
    """
    check_branches("alpha_residual", "hidden", hidden, "update", update, alpha, num_frames, channel_dim, image_only)
    if resolve_impl("alpha_residual", impl, hidden, has_fused=True) is Impl.FUSED:
        from temporal_layers.kernels.alpha_blend import fused  # imports triton

        return fused.on_maps(hidden, update, alpha, num_frames, channel_dim, image_only, True)
    return reference.alpha_residual(hidden, update, alpha, num_frames, channel_dim, image_only)


def check_branches(
    op: str,
    first_name: str,
    first: Tensor,
    second_name: str,
    second: Tensor,
    alpha: Tensor,
    num_frames: int,
    channel_dim: int,
    image_only: Tensor | None,
) -> None:
    """Checks the arguments of both operators; the names are those of their branches."""
    if channel_dim not in (1, -1):
        raise invalid(op, "channel_dim", "1 (maps) or -1 (tokens)", f"{channel_dim}", "pass the dimension of channels")
    if first.dim() < 3:
        raise invalid(
            op, first_name, "a map (batch*num_frames, channels, height, width) or tokens (batch*num_frames, tokens, "
            "channels)", f"shape {tuple(first.shape)}", "fold the frames into the batch",
        )  # fmt: skip
    check_floating(op, first_name, first)
    check_shape(op, second_name, second, first.shape, f"the shape of {first_name}", "pass two branches of one layer")
    check_alike(op, second_name, second, first, first_name)
    check_num_frames(op, first_name, first, num_frames)
    check_alpha(op, alpha, first, first_name, num_frames, first.shape[channel_dim])
    if image_only is not None:
        check_image_only(op, image_only, first_name, first, num_frames)


def check_alpha(op: str, alpha: Tensor, like: Tensor, like_name: str, num_frames: int, channels: int) -> None:
    """Checks the dtype, device and shape of ``alpha``."""
    check_floating(op, "alpha", alpha)
    check_device(op, "alpha", alpha, like, like_name)
    # Not `in (1, num_frames)`, which torch.compile takes for false where num_frames is symbolic.
    fits = alpha.dim() == 2 and (alpha.shape[0] == 1 or alpha.shape[0] == num_frames)
    fits = fits and (alpha.shape[1] == 1 or alpha.shape[1] == channels)
    if alpha.dim() != 0 and not fits:
        raise invalid(
            op, "alpha", f"shape () or (1 or {num_frames}, 1 or {channels})", f"shape {tuple(alpha.shape)}",
            "pass one weight, or one for each frame and channel",
        )  # fmt: skip


def check_image_only(op: str, image_only: Tensor, first_name: str, first: Tensor, num_frames: int) -> None:
    """Checks the dtype, device and shape of ``image_only``."""
    check_bool(op, "image_only", image_only)
    check_device(op, "image_only", image_only, first, first_name)
    batch_frames = first.shape[0]
    flat = image_only.dim() == 1 and image_only.shape[0] == batch_frames
    folded = image_only.dim() == 2 and image_only.shape[1] == num_frames and image_only.numel() == batch_frames
    if not (flat or folded):
        raise invalid(
            op, "image_only", f"shape ({batch_frames},) or ({batch_frames // num_frames}, {num_frames})",
            f"shape {tuple(image_only.shape)}", "pass one flag for each frame of each clip",
        )  # fmt: skip
