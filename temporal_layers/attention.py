"""Attention over frames, or from a clip to its text."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from temporal_layers.config import check_at_least, check_choice
from temporal_layers.frames import check_divisible
from temporal_layers.joined import joins, norm_parameters, project
from temporal_layers.kernels.dispatch import Impl
from temporal_layers.kernels.linear import linear
from temporal_layers.kernels.temporal_attention import temporal_attention
from temporal_layers.plain import is_plain
from temporal_layers.positions import RelativePositionBias, RotaryPosition, SinusoidalPosition, zero_
from temporal_layers.streaming import FrameCache, check_streams

__all__ = ["TemporalAttention"]


class TemporalAttention(nn.Module):
    """Multi-head attention over the frames of a clip, separately at every position; or cross-attention to a context.

    Without ``context_dim``: position ``p`` of frame ``i`` attends to position ``p`` of the clip's frames. With it:
    every token attends to the clip's context (text), which all frames share. Linear names are the field's
    (``to_q to_k to_v to_out``), so LoRA targets find them.

    Args:
        dim: channels in and out.
        num_heads: attention heads.
        head_dim: channels of a head; ``dim // num_heads`` if not given.
        context_dim: channels of the context; ``None`` for attention over frames.
        position: ``"none"``, ``"sinusoidal"`` (added to the input), ``"rotary"`` or ``"relative"``; frames only.
        causal: attend to the same and earlier frames only.
        window: largest frame distance attended to.
        zero_init: start the output projection at zero.

    Attributes:
        impl: implementation of attention over frames, ``"auto"`` at first: see ``temporal_attention``. It may be set
            at any time; cross-attention does not use it.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim`` and ``head_dim`` is not given, if ``position`` is unknown,
            or if an option that concerns frames is set together with ``context_dim``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        context_dim: int | None = None,
        position: str = "none",
        causal: bool = False,
        window: int | None = None,
        zero_init: bool = False,
        **factory,
    ) -> None:
        super().__init__()
        check_choice("TemporalAttention: position", position, ("none", "sinusoidal", "rotary", "relative"))
        if context_dim is not None and (position != "none" or causal or window is not None):
            raise ValueError(
                "TemporalAttention: expected no position, causal or window with context_dim (cross-attention), "
                f"got position={position!r}, causal={causal}, window={window}"
            )
        self.num_heads = num_heads
        self.head_dim = resolve_head_dim("TemporalAttention", dim, num_heads, head_dim)
        self.context_dim = context_dim
        self.impl: Impl | str = Impl.AUTO
        self.causal = causal
        self.window = window
        inner = self.num_heads * self.head_dim
        key_dim = dim if context_dim is None else context_dim
        self.to_q = nn.Linear(dim, inner, bias=False, **factory)
        self.to_k = nn.Linear(key_dim, inner, bias=False, **factory)
        self.to_v = nn.Linear(key_dim, inner, bias=False, **factory)
        self.to_out = nn.Linear(inner, dim, **factory)
        self.position = SinusoidalPosition(dim) if position == "sinusoidal" else None
        self.rotary = RotaryPosition(self.head_dim) if position == "rotary" else None
        self.relative = RelativePositionBias(num_heads, **factory) if position == "relative" else None
        if zero_init:
            zero_(self.to_out)

    def forward(
        self,
        hidden_states: Float[Tensor, "n positions dim"],
        context: Float[Tensor, "batch tokens context_dim"] | None = None,
        *,
        num_frames: int,
        frame_mask: Bool[Tensor, "batch frames"] | None = None,
        cache: FrameCache | None = None,
        norm: nn.Module | None = None,
        residual: Float[Tensor, "n positions dim"] | None = None,
    ) -> Float[Tensor, "n positions dim"]:
        """Attend.

        Args:
            hidden_states: ``(batch * num_frames, positions, dim)``, frames innermost.
            context: ``(batch, tokens, context_dim)``, one context a clip; only with ``context_dim``.
            num_frames: frames of a clip.
            frame_mask: ``(batch, num_frames)``, true for frames that may be attended to; for padded clips.
            cache: earlier frames of the clip, which are attended to as well; see :class:`FrameCache`. Cross-attention
                has no use for it.
            norm: layer norm of ``hidden_states`` to begin with, which the projections can take in.
            residual: added to the result, which the last projection can do itself.

        Returns:
            ``(batch * num_frames, positions, dim)``.

        Raises:
            ValueError: if the batch is no multiple of ``num_frames``, ``context`` has another shape, ``context`` or
                ``frame_mask`` comes to a layer that has no use for it, or ``cache`` comes to a layer that is not
                causal, together with ``frame_mask``, or with frames that do not go on where it ends.
        """
        check_divisible("TemporalAttention", hidden_states.shape[0], num_frames)
        self._check_extras(context, frame_mask, hidden_states.shape[0] // num_frames)
        if self.context_dim is not None:
            query = project(self.to_q, hidden_states, norm=norm)
            return project(self.to_out, self._cross(query, context, num_frames), residual=residual)
        if cache is not None:
            self._check_cache(frame_mask)
        first_frame = 0 if cache is None else cache.num_frames
        if self.position is not None:
            hidden_states, norm = hidden_states if norm is None else norm(hidden_states), None
            place = {"device": hidden_states.device, "dtype": hidden_states.dtype, "first_frame": first_frame}
            hidden_states = add_per_frame(hidden_states, self.position(num_frames, **place))
        query, key, value = self._project(hidden_states, norm)
        if self.rotary is not None:
            query = self.rotary(query, num_frames=num_frames, first_frame=first_frame)
            key = self.rotary(key, num_frames=num_frames, first_frame=first_frame)
        key_frames = num_frames
        if cache is not None:
            clips = tuple(x.unflatten(0, (-1, num_frames)) for x in (key, value))
            clips = cache.extend(self, clips, keep=self.window)
            key_frames = clips[0].shape[1]
            key, value = (x.flatten(0, 1) for x in clips)
        attended = temporal_attention(
            query,
            key,
            value,
            num_frames=num_frames,
            num_key_frames=key_frames,
            num_heads=self.num_heads,
            bias=None if self.relative is None else self.relative(num_frames, key_frames).to(query.dtype),
            frame_mask=frame_mask,
            causal=self.causal,
            window=self.window,
            impl=self.impl,
        )
        return project(self.to_out, attended, residual=residual)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: object = None) -> None:
        """Switch attention over frames to xformers or back; diffusers calls it on every layer of a model that has it.

        ``pipe.enable_xformers_memory_efficient_attention()`` and its counterpart reach the layer by this name.

        Args:
            valid: xformers if true, ``impl="auto"`` if not.
            attention_op: must be ``None``: one choice of kernel for the image layers seldom fits 16 frames.

        Raises:
            ValueError: if ``attention_op`` is given.
        """
        if attention_op is not None:
            raise ValueError(
                f"TemporalAttention: attention_op: expected None, got {attention_op!r}; xformers chooses its kernel by "
                "the number of frames"
            )
        self.impl = Impl.XFORMERS if valid else Impl.AUTO

    def set_attention_backend(self, backend: str) -> None:
        """Follow diffusers' choice of attention backend.

        Args:
            backend: a name of diffusers: ``"native"`` and ``"_native_..."`` are PyTorch's attention (``impl="sdpa"``,
                which chooses its kernel itself), ``"xformers"`` is xformers, and any other, such as ``"flash"`` or
                ``"sage"``, has no form for attention over frames and leaves ``impl="auto"``.
        """
        if backend.startswith(("native", "_native")):
            self.impl = Impl.SDPA
        else:
            self.impl = Impl.XFORMERS if backend == "xformers" else Impl.AUTO

    def _project(self, hidden_states: Tensor, norm: nn.Module | None) -> tuple[Tensor, ...]:
        """Queries, keys and values, in one product where that pays."""
        layers = (self.to_q, self.to_k, self.to_v)
        packed = packing_pays(hidden_states, self.to_q) and all(map(is_plain, layers))
        if norm is not None and not (packed and joins(norm, self.to_q)):
            hidden_states, norm = norm(hidden_states), None
        if not packed:
            return tuple(layer(hidden_states) for layer in layers)
        weight = torch.cat([layer.weight for layer in layers])
        return linear(hidden_states, weight, **norm_parameters(norm)).chunk(3, dim=-1)

    def _check_cache(self, frame_mask: Tensor | None) -> None:
        check_streams("TemporalAttention", self)
        if frame_mask is not None:
            raise ValueError(
                f"TemporalAttention: frame_mask: expected None with a cache, got {tuple(frame_mask.shape)}; all clips "
                "of a stream have the same frames"
            )

    def _check_extras(self, context: Tensor | None, frame_mask: Tensor | None, batch: int) -> None:
        if self.context_dim is None:
            if context is not None:
                raise ValueError(
                    f"TemporalAttention: context: expected None for attention over frames, got {tuple(context.shape)}; "
                    "build the layer with context_dim for cross-attention"
                )
            return
        if frame_mask is not None:
            raise ValueError(
                f"TemporalAttention: frame_mask: expected None for cross-attention, got {tuple(frame_mask.shape)}; "
                "it masks frames, and the keys are the context's tokens"
            )
        shape = None if context is None else tuple(context.shape)
        if shape is None or len(shape) != 3 or (shape[0], shape[2]) != (batch, self.context_dim):
            raise ValueError(
                f"TemporalAttention: context: expected ({batch}, tokens, {self.context_dim}), one a clip, got {shape}; "
                "pass the text of each clip once, not once a frame"
            )

    def _cross(self, query: Tensor, context: Tensor, num_frames: int) -> Tensor:
        batch = query.shape[0] // num_frames

        # All positions of all frames of a clip share the context: one long query a clip, not one copy of the text each.
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        query = query.unflatten(0, (batch, num_frames)).flatten(1, 2)
        attended = F.scaled_dot_product_attention(heads(query), heads(self.to_k(context)), heads(self.to_v(context)))
        return attended.transpose(1, 2).flatten(2).unflatten(1, (num_frames, -1)).flatten(0, 1)

    def extra_repr(self) -> str:
        kind = "frames" if self.context_dim is None else f"context_dim={self.context_dim}"
        return (
            f"{kind}, num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}, "
            f"window={self.window}, impl={str(self.impl)!r}"
        )


def resolve_head_dim(who: str, dim: int, num_heads: int, head_dim: int | None) -> int:
    """``head_dim``, or ``dim // num_heads`` if it is ``None``; a ``ValueError`` that names ``who`` if neither works."""
    check_at_least(f"{who}: num_heads", num_heads, 1)
    if head_dim is not None:
        check_at_least(f"{who}: head_dim", head_dim, 1)
        return head_dim
    if dim % num_heads != 0:
        raise ValueError(f"{who}: num_heads: expected a divisor of dim={dim}, got {num_heads}; or pass head_dim")
    return dim // num_heads


def packing_pays(hidden_states: Tensor, linear: nn.Module) -> bool:
    """Whether reading the input once instead of three times is worth a copy of three weights.

    On a CPU it is not, whose products are bound by arithmetic.
    """
    if hidden_states.device.type == "cpu":
        return False
    # While compiling nobody may ask for a size that may be symbolic.
    return torch.compiler.is_compiling() or hidden_states.shape[:2].numel() > 3 * linear.weight.shape[0]


def add_per_frame(
    hidden_states: Float[Tensor, "n positions dim"], embedding: Float[Tensor, "frames dim"]
) -> Float[Tensor, "n positions dim"]:
    """Add one vector a frame to ``(batch * frames, positions, dim)`` tokens."""
    clips = hidden_states.unflatten(0, (-1, embedding.shape[0]))
    return (clips + embedding[:, None, :]).flatten(0, 1)
