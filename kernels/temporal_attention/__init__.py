"""Attention over frames, separately at every spatial position."""

from jaxtyping import Bool, Float
from torch import Tensor

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
from temporal_layers.kernels.temporal_attention import reference, xformers
from temporal_layers.kernels.temporal_attention.tiles import refusal

__all__ = ["temporal_attention"]


def temporal_attention(
    query: Float[Tensor, "batch_frames positions channels"],
    key: Float[Tensor, "batch_key_frames positions channels"],
    value: Float[Tensor, "batch_key_frames positions channels"],
    *,
    num_frames: int,
    num_heads: int,
    num_key_frames: int | None = None,
    bias: Float[Tensor, "heads frames key_frames"] | None = None,
    frame_mask: Bool[Tensor, "batch key_frames"] | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Float[Tensor, "batch_frames positions channels"]:
    """``softmax(scale * q k^T + bias) v`` over the frames of a clip, at each spatial position and head.

    Works in place on the layout of the image model, frames folded innermost into the batch; nothing is permuted
    to ``(batch*positions, frames, channels)``. Query frame ``i`` stands at frame ``i + num_key_frames -
    num_frames`` of the keys, so extra key frames are earlier ones. The softmax is fp32 (fp64 for fp64 input). A
    query that may attend to no frame at all returns zero and sends no gradient.

    No call launches a kernel over more sequences than a GPU grid takes: large inputs run in chunks of positions.

    Args:
        query: ``(batch*num_frames, positions, num_heads*head_dim)``. Any strides, any floating dtype.
        key: ``(batch*num_key_frames, positions, num_heads*head_dim)``; dtype and device of ``query``.
        value: Shape, dtype and device of ``key``.
        num_frames: Frames of one clip of the query.
        num_heads: Heads, each of ``channels / num_heads`` adjacent channels.
        num_key_frames: Frames of one clip of ``key`` and ``value``; ``num_frames`` if None.
        bias: Added to the scaled scores, ``(num_heads, num_frames, num_key_frames)``; dtype and device of
            ``query``. Differentiable.
        frame_mask: True for key frames that may be attended, ``(batch, num_key_frames)``. Masked frames must
            still hold finite values.
        causal: Query frame ``i`` attends to key frames ``j <= i + num_key_frames - num_frames``.
        window: Query frame ``i`` attends to key frames with ``|i + num_key_frames - num_frames - j| <= window``.
        scale: Factor on the scores; ``head_dim ** -0.5`` if None.
        impl: ``"fused"``, the Triton kernels: up to 64 frames and key frames, ``head_dim`` a multiple of 8 up to
            160, fp16, bf16 or fp32, no gradient of gradients. ``"reference"``, also called ``"sdpa"``: PyTorch's
            ``scaled_dot_product_attention`` on views. ``"xformers"``: its ``memory_efficient_attention``, where it
            is installed, on a GPU. ``"auto"`` is the fused kernels for tensors on a GPU that they take, where triton
            is installed, and the reference everywhere else.

    Returns:
        Shape, dtype and device of ``query``, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not match, ``num_frames`` or ``num_key_frames`` does not divide
            its batch, ``num_heads`` does not divide the channels, ``window`` is negative, or ``impl`` cannot run.

    Source: Align your Latents, section 3.1 (temporal attention); Vaswani et al. (2017), equation 1.
    """
    op = "temporal_attention"
    key_frames = num_frames if num_key_frames is None else num_key_frames
    check_arguments(op, query, key, value, num_frames, key_frames, num_heads, bias, frame_mask, window)
    head_dim = query.shape[2] // num_heads
    chosen = resolve_impl(
        op, impl, query, has_fused=True, refusal=refusal(num_frames, key_frames, head_dim, query.dtype),
        others=(Impl.SDPA, Impl.XFORMERS),
    )  # fmt: skip
    if chosen is Impl.FUSED:
        from temporal_layers.kernels.temporal_attention import fused  # imports triton

        # Under autocast the operands may come in several dtypes.
        key, value = key.to(query.dtype), value.to(query.dtype)
        return fused.temporal_attention(
            query, key, value, bias, frame_mask, num_frames, key_frames, num_heads, causal, window,
            head_dim**-0.5 if scale is None else scale,
        )  # fmt: skip
    attend = None
    if chosen is Impl.XFORMERS:
        xformers.check_xformers(op, query)
        attend = xformers.attend
    return reference.temporal_attention(
        query, key, value, num_frames, num_key_frames, num_heads, bias, frame_mask, causal, window, scale, attend
    )


def check_arguments(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_frames: int,
    key_frames: int,
    num_heads: int,
    bias: Tensor | None,
    frame_mask: Tensor | None,
    window: int | None,
) -> None:
    """Requires what the public function says of its arguments.

    Raises:
        ValueError: it does not hold.
    """
    if query.dim() != 3:
        raise invalid(
            op, "query", "(batch*num_frames, positions, num_heads*head_dim)", f"shape {tuple(query.shape)}",
            "flatten height and width into positions",
        )  # fmt: skip
    check_floating(op, "query", query)
    check_num_frames(op, "query", query, num_frames)
    batch, (_, positions, channels) = query.shape[0] // num_frames, query.shape
    if num_heads < 1 or channels % num_heads != 0:
        raise invalid(
            op, "num_heads", f"a divisor of the {channels} channels", f"{num_heads}", "choose one that divides them"
        )
    if key_frames < 1:
        raise invalid(op, "num_key_frames", "at least 1", f"{key_frames}", "pass the number of frames of the keys")
    for name, tensor in (("key", key), ("value", value)):
        check_shape(
            op, name, tensor, (batch * key_frames, positions, channels),
            "(batch*num_key_frames, positions, channels) =", "match the query's clips, positions and channels",
        )  # fmt: skip
        check_alike(op, name, tensor, query, "query")
    if bias is not None:
        check_shape(
            op, "bias", bias, (num_heads, num_frames, key_frames), "(num_heads, num_frames, num_key_frames) =",
            "pass one bias for each head and pair of frames",
        )  # fmt: skip
        check_alike(op, "bias", bias, query, "query")
    if frame_mask is not None:
        check_bool(op, "frame_mask", frame_mask)
        check_device(op, "frame_mask", frame_mask, query, "query")
        check_shape(
            op, "frame_mask", frame_mask, (batch, key_frames), "(batch, num_key_frames) =",
            "pass one flag for each key frame of each clip",
        )  # fmt: skip
    if window is not None and window < 0:
        raise invalid(op, "window", "at least 0 or None", f"{window}", "pass the reach in frames")
