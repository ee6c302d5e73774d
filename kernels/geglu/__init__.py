"""The gated projection in front of a transformer's feed-forward."""

from jaxtyping import Float
from torch import Tensor

from temporal_layers.kernels.checks import check_alike, check_floating, check_norm, check_shape, invalid
from temporal_layers.kernels.dispatch import Impl, resolve_impl
from temporal_layers.kernels.geglu import reference
from temporal_layers.kernels.geglu.tiles import is_faster
from temporal_layers.kernels.matmul import refusal

__all__ = ["geglu"]


def geglu(
    x: Float[Tensor, "*rows channels"],
    weight: Float[Tensor, "two_inner channels"],
    bias: Float[Tensor, "two_inner"] | None = None,
    *,
    norm_weight: Float[Tensor, "channels"] | None = None,
    norm_bias: Float[Tensor, "channels"] | None = None,
    norm_eps: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Float[Tensor, "*rows inner"]:
    """``value * gelu(gate)`` with ``value, gate = (norm(x) @ weight^T + bias).chunk(2, dim=-1)`` and the exact GELU.

    Args:
        x: ``(..., channels)``, any strides, any floating dtype.
        weight: ``(2*inner, channels)``: the rows of the value, then those of the gate, as in diffusers' ``GEGLU``;
            dtype and device of ``x``.
        bias: ``(2*inner,)`` or None; dtype and device of ``x``.
        norm_weight: Weight ``(channels,)`` of a layer norm of ``x``, or None for ones; dtype and device of ``x``.
        norm_bias: Its bias ``(channels,)``, or None for zeros; dtype and device of ``x``.
        norm_eps: Its epsilon. None for no norm: then neither of the two may be given.
        impl: ``"reference"`` is PyTorch's products and pointwise operators. ``"fused"`` is one Triton kernel: fp16,
            bf16 or fp32 (summed in fp32, without tf32), on a GPU; its backward pass computes value and gate again
            and keeps neither. ``"auto"`` takes the kernel for sizes in which it was measured to be faster on that
            GPU, and as nothing has been measured, it is the reference. Gradients of gradients need the reference.

    Returns:
        ``(..., inner)`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not match, ``weight`` has an odd number of rows, the norm has
            parameters and no epsilon, or ``impl`` cannot run.

    Source: Shazeer, GLU Variants Improve Transformer (2020), section 2; the feed-forward of Stable Diffusion's blocks.
    """
    op = "geglu"
    if x.dim() < 2:
        raise invalid(op, "x", "(..., channels)", f"shape {tuple(x.shape)}", "give it a dimension of rows")
    check_floating(op, "x", x)
    channels = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != channels or weight.shape[0] % 2 != 0:
        raise invalid(
            op, "weight", f"(2*inner, {channels})", f"shape {tuple(weight.shape)}",
            "stack the rows of the value on those of the gate, and match x's channels",
        )  # fmt: skip
    check_alike(op, "weight", weight, x, "x")
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), "one value for each row of weight", "size it by the weight")
        check_alike(op, "bias", bias, x, "x")
    check_norm(op, x, norm_weight, norm_bias, norm_eps)
    operands = x, weight, bias, norm_weight, norm_bias, norm_eps
    chosen = resolve_impl(op, impl, x, has_fused=True, refusal=refusal(x.dtype), preferred=is_faster(x))
    if chosen is Impl.FUSED:
        from temporal_layers.kernels.geglu import fused  # imports triton

        return fused.on_tokens(*operands)
    return reference.geglu(*operands)
