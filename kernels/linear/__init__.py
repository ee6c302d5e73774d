"""A linear layer with what stands in front of it and behind it in a transformer block: layer norm, residual, blend."""

from jaxtyping import Float
from torch import Tensor

from temporal_layers.kernels.alpha_blend import alpha_residual, check_alpha
from temporal_layers.kernels.checks import (
    check_alike,
    check_floating,
    check_norm,
    check_num_frames,
    check_shape,
    invalid,
)
from temporal_layers.kernels.dispatch import Impl, resolve_impl
from temporal_layers.kernels.linear import reference
from temporal_layers.kernels.linear.tiles import is_faster
from temporal_layers.kernels.matmul import refusal

__all__ = ["linear"]


def linear(
    x: Float[Tensor, "*rows in_channels"],
    weight: Float[Tensor, "out_channels in_channels"],
    bias: Float[Tensor, "out_channels"] | None = None,
    *,
    norm_weight: Float[Tensor, "in_channels"] | None = None,
    norm_bias: Float[Tensor, "in_channels"] | None = None,
    norm_eps: float | None = None,
    residual: Float[Tensor, "*rows out_channels"] | None = None,
    alpha: Float[Tensor, "*frames_channels"] | None = None,
    num_frames: int = 1,
    impl: Impl | str = Impl.AUTO,
) -> Float[Tensor, "*rows out_channels"]:
    """``y = norm(x) @ weight^T + bias``, or with a residual ``residual + (1 - alpha) * y``.

    Args:
        x: ``(..., in_channels)``, any strides, any floating dtype.
        weight: ``(out_channels, in_channels)``; dtype and device of ``x``.
        bias: ``(out_channels,)`` or None; dtype and device of ``x``.
        norm_weight: Weight ``(in_channels,)`` of the layer norm, or None for ones; dtype and device of ``x``.
        norm_bias: Its bias ``(in_channels,)``, or None for zeros; dtype and device of ``x``.
        norm_eps: Its epsilon. None for no norm: then neither of the two may be given.
        residual: Input of the residual branch that the product ends; shape of the result, dtype and device of ``x``.
        alpha: Weight of the residual as in :func:`alpha_residual`, with which the blend of ``residual`` and
            ``residual + y`` is folded into the sum: shape ``()`` or ``(1 or num_frames, 1 or out_channels)``, any
            floating dtype. None adds the whole ``y``. Needs a residual.
        num_frames: Frames of one clip, folded innermost into the first dimension of ``x``. Read only with an ``alpha``
            per frame.
        impl: ``"reference"`` is PyTorch's norm, product and pointwise operators. ``"fused"`` is one Triton kernel:
            fp16, bf16 or fp32 (summed in fp32, without tf32), on a GPU; before it a small one joins the norm's
            parameters to the weight, and an ``alpha`` for each frame takes a kernel more. Its backward pass norms
            the rows again and keeps only the operands. ``"auto"`` takes the kernel for sizes in which it was
            measured to be faster on that GPU, and as nothing has been measured, it is the reference. Gradients of
            gradients need the reference.

    Returns:
        ``(..., out_channels)`` in the dtype of ``x``; under autocast in that of the residual, or of a product where
        there is none.

    Raises:
        ValueError: a shape, dtype or device does not match, the norm has parameters and no epsilon, ``alpha`` comes
            without a residual, or ``impl`` cannot run.

    Source: Ba et al., Layer Normalization (2016); Align your Latents, section 3.1 (``z' <- alpha z + (1 - alpha) z'``
    with ``z' = z + f(z)``).
    """
    op = "linear"
    if x.dim() < 2:
        raise invalid(op, "x", "(..., channels)", f"shape {tuple(x.shape)}", "give it a dimension of rows")
    check_floating(op, "x", x)
    channels = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != channels:
        raise invalid(op, "weight", f"(out_channels, {channels})", f"shape {tuple(weight.shape)}", "match x's channels")
    check_alike(op, "weight", weight, x, "x")
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), "one value for each row of weight", "size it by the weight")
        check_alike(op, "bias", bias, x, "x")
    check_norm(op, x, norm_weight, norm_bias, norm_eps)
    check_residual(op, x, weight, residual, alpha, num_frames)
    operands = x, weight, bias, norm_weight, norm_bias, norm_eps
    preferred = is_faster(x, weight.shape[0])
    if resolve_impl(op, impl, x, has_fused=True, refusal=refusal(x.dtype), preferred=preferred) is Impl.FUSED:
        from temporal_layers.kernels.linear import fused  # imports triton

        return fused.on_tokens(*operands, residual, alpha, num_frames)
    if impl != "auto" or alpha is None:
        return reference.linear(*operands, residual, alpha, num_frames)
    # A library's product may be the faster one where the fused blend is faster than its reference.
    update = reference.linear(*operands, None, None, num_frames).to(residual.dtype)
    tokens = reference.as_tokens(residual), reference.as_tokens(update)
    return alpha_residual(*tokens, alpha, num_frames=num_frames, channel_dim=-1).view(update.shape)


def check_residual(
    op: str, x: Tensor, weight: Tensor, residual: Tensor | None, alpha: Tensor | None, num_frames: int
) -> None:
    """Checks what the product is added to."""
    channels = weight.shape[0]
    if residual is not None:
        shape = (*x.shape[:-1], channels)
        check_shape(op, "residual", residual, shape, "the shape of the result", "pass the input of the residual branch")
        check_alike(op, "residual", residual, x, "x")
    if alpha is not None:
        if residual is None:
            raise invalid(op, "alpha", "a residual beside it", "none", "pass the residual that it weighs")
        check_num_frames(op, "x", x, num_frames)
        check_alpha(op, alpha, x, "x", num_frames, channels)
