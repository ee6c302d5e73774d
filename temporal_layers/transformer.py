"""Transformer block over frames."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from temporal_layers.attention import TemporalAttention, add_per_frame, resolve_head_dim
from temporal_layers.autocast import autocast_to
from temporal_layers.blend import AlphaBlend
from temporal_layers.config import TemporalTransformerConfig
from temporal_layers.frames import check_divisible
from temporal_layers.joined import joins, norm_parameters, project
from temporal_layers.kernels.geglu import geglu
from temporal_layers.kernels.group_norm import group_norm
from temporal_layers.kernels.layout import is_channels_last
from temporal_layers.kernels.linear import linear
from temporal_layers.memory import over_positions, rows_within
from temporal_layers.plain import has_plain_weight, is_plain, is_watched
from temporal_layers.positions import SinusoidalMLPPosition, zero_
from temporal_layers.streaming import FrameCache, check_streams

__all__ = ["TemporalTransformerBlock"]


class GatedLinear(nn.Linear):
    """A projection to value and gate which can give their product, value times exact GELU of gate, at once.

    An option of the call, so that hooks run; PEFT's wrapper, which knows nothing of it, gets the plain projection. The
    layer norm in front is another one.
    """

    def forward(
        self, hidden_states: Float[Tensor, "*rows dim"], *, gated: bool = False, norm: nn.LayerNorm | None = None
    ) -> Float[Tensor, "*rows out"]:
        if gated and has_plain_weight(self):
            return geglu(hidden_states, self.weight, self.bias, **norm_parameters(norm))
        projected = super().forward(hidden_states if norm is None else norm(hidden_states))
        return gate(projected) if gated else projected


def gate(projected: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows inner"]:
    """Value times exact GELU of gate."""
    value, gate = projected.chunk(2, dim=-1)
    return value * F.gelu(gate)


class GEGLUFeedForward(nn.Module):
    """``dim -> 2 * 4 dim``, value times exact GELU of gate, ``4 dim -> dim``: the feed-forward of diffusers' blocks."""

    def __init__(self, dim: int, *, zero_init: bool = False, **factory) -> None:
        super().__init__()
        self.proj_in = GatedLinear(dim, 8 * dim, **factory)
        self.proj_out = nn.Linear(4 * dim, dim, **factory)
        if zero_init:
            zero_(self.proj_out)

    def forward(
        self,
        hidden_states: Float[Tensor, "n positions dim"],
        *,
        norm: nn.Module | None = None,
        residual: Float[Tensor, "n positions dim"] | None = None,
    ) -> Float[Tensor, "n positions dim"]:
        gates_itself = isinstance(self.proj_in, GatedLinear)
        if norm is not None and not (gates_itself and joins(norm, self.proj_in)):
            hidden_states, norm = norm(hidden_states), None
        options = {"gated": True, "norm": norm} if gates_itself else {}
        projected = self.proj_in(hidden_states, **options)
        return project(self.proj_out, projected if gates_itself else gate(projected), residual=residual)


def added(
    tokens: Float[Tensor, "n positions dim"], norm: nn.Module, layer: nn.Module, *others: Tensor | None, **options
) -> Float[Tensor, "n positions dim"]:
    """``tokens + layer(norm(tokens), ...)``, which the layer does itself unless a hook expects the update alone."""
    if type(layer) in (TemporalAttention, GEGLUFeedForward) and not is_watched(layer):
        return layer(tokens, *others, norm=norm, residual=tokens, **options)
    return tokens + layer(norm(tokens), *others, **options)


def as_tokens(hidden_states: Float[Tensor, "n ..."]) -> Float[Tensor, "n positions dim"]:
    """Maps as tokens, and tokens as they are."""
    return hidden_states.permute(0, 2, 3, 1).flatten(1, 2) if hidden_states.ndim == 4 else hidden_states


def as_maps(tokens: Float[Tensor, "n positions dim"], like: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """Tokens as maps of the size of ``like``, if those are maps."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2) if like.ndim == 4 else tokens


class InputGroupNorm(nn.GroupNorm):
    """GroupNorm of feature maps over each clip or each frame, in front of the projection in."""

    def __init__(self, num_groups: int, dim: int, *, over: str, **factory) -> None:
        if num_groups < 1 or dim % num_groups != 0:
            raise ValueError(f"TemporalTransformerBlock: num_groups: expected a divisor of dim={dim}, got {num_groups}")
        super().__init__(num_groups, dim, eps=1e-6, **factory)
        self.over = over

    def forward(
        self, maps: Float[Tensor, "n dim height width"], *, num_frames: int
    ) -> Float[Tensor, "n dim height width"]:
        span = num_frames if self.over == "clip" else 1
        maps = autocast_to(maps, self.weight.dtype)
        # The order of tokens, whatever that of the maps: a norm turns it round at no cost.
        options = {"num_frames": span, "eps": self.eps, "memory_format": torch.channels_last}
        return group_norm(maps, self.num_groups, self.weight, self.bias, **options)


class TemporalTransformerBlock(nn.Module):
    """Pre-norm transformer over frames, blended with its input.

    The default is SVD's block, whose parameter count is the Video LDM's: frame positions through an MLP, GEGLU
    feed-forward, attention over frames, cross-attention to the clip's text, GEGLU feed-forward, blend with a learned
    alpha. The options of :class:`~temporal_layers.TemporalTransformerConfig` give AnimateDiff's, ModelScope's and
    smaller ones. With ``zero_init`` it starts as the identity, bit for bit.

    Takes tokens ``(n, positions, dim)`` or feature maps ``(n, dim, height, width)``.

    Args:
        dim: channels in and out.
        num_heads: attention heads; those of the config, if it has any, take precedence.
        head_dim: channels of a head; ``dim // num_heads`` if not given.
        context_dim: channels of the text; ``None`` drops the cross-attentions of the config.
        num_groups: groups of the input norm, if the config has one.
        config: everything else.

    Raises:
        ValueError: if ``num_heads`` is given nowhere, or does not divide ``dim`` and ``head_dim`` is not given, or
            ``num_groups`` does not divide ``dim`` where the config has an input norm.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        num_groups: int = 32,
        config: TemporalTransformerConfig | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = config or TemporalTransformerConfig()
        factory = {"device": device, "dtype": dtype}
        heads = config.heads(dim, num_heads, head_dim)
        if heads is None:
            raise ValueError(
                "TemporalTransformerBlock: num_heads: expected a number here or in the config, got None in both; "
                "set num_heads or head_dim of TemporalTransformerConfig"
            )
        num_heads, head_dim = heads[0], resolve_head_dim("TemporalTransformerBlock", dim, *heads)
        inner = num_heads * head_dim if config.projection else dim
        zero_updates = config.zero_init and not config.projection
        self.dim = dim
        self.config = config
        self.in_norm = None
        if config.in_norm != "none":
            self.in_norm = InputGroupNorm(num_groups, dim, over=config.in_norm, **factory)
        self.proj_in = nn.Linear(dim, inner, **factory) if config.projection else None
        self.position = None
        if config.position == "sinusoidal_mlp":
            self.position = SinusoidalMLPPosition(inner, zero_init=zero_updates, **factory)
        self.norm_in = nn.LayerNorm(inner, **factory) if config.ff_in else None
        self.ff_in = GEGLUFeedForward(inner, zero_init=zero_updates, **factory) if config.ff_in else None
        self.norms = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for kind in config.attentions:
            if kind == "cross" and context_dim is None:
                continue
            frames = {} if kind == "cross" else self._frame_options(config)
            self.norms.append(nn.LayerNorm(inner, **factory))
            self.attentions.append(
                TemporalAttention(
                    inner,
                    num_heads=num_heads,
                    head_dim=head_dim,
                    context_dim=context_dim if kind == "cross" else None,
                    zero_init=zero_updates,
                    **frames,
                    **factory,
                )
            )
        self.norm_out = nn.LayerNorm(inner, **factory) if config.ff else None
        self.ff_out = GEGLUFeedForward(inner, zero_init=zero_updates, **factory) if config.ff else None
        self.proj_out = nn.Linear(inner, dim, **factory) if config.projection else None
        if config.projection and config.zero_init:
            zero_(self.proj_out)
        self.blend = AlphaBlend(config.alpha, channels=dim, device=device)

    @staticmethod
    def _frame_options(config: TemporalTransformerConfig) -> dict:
        position = "none" if config.position == "sinusoidal_mlp" else config.position
        return {"position": position, "causal": config.causal, "window": config.window}

    @property
    def context_dim(self) -> int | None:
        """Channels of the text that the block attends to, or ``None``."""
        return next((layer.context_dim for layer in self.attentions if layer.context_dim is not None), None)

    def forward(
        self,
        hidden_states: Float[Tensor, "n ..."],
        context: Float[Tensor, "batch tokens context_dim"] | None = None,
        *,
        num_frames: int,
        frame_mask: Bool[Tensor, "batch frames"] | None = None,
        image_only: Bool[Tensor, "batch frames"] | None = None,
        cache: FrameCache | None = None,
        memory_budget: int | None = None,
    ) -> Float[Tensor, "n ..."]:
        """Mix frames by attention.

        Args:
            hidden_states: tokens ``(batch * num_frames, positions, dim)`` or maps
                ``(batch * num_frames, dim, height, width)``, frames innermost.
            context: ``(batch, tokens, context_dim)`` text, one a clip; needed if the block has cross-attention, ignored
                otherwise.
            num_frames: frames of a clip.
            frame_mask: ``(batch, num_frames)``, true for frames that may be attended to.
            image_only: ``(batch, num_frames)``, true for frames that pass unchanged.
            cache: earlier frames of the clip, for causal blocks; see :class:`FrameCache`. Excludes ``frame_mask``.
            memory_budget: bytes to work on at a time, beside the inputs and the results: a few positions after the
                other, with the same result up to rounding. Without effect while gradients are recorded, and at least
                one position is taken.

        Returns:
            The shape, dtype and, for maps, memory format of ``hidden_states``.

        Raises:
            ValueError: if the batch is no multiple of ``num_frames``, ``context`` is missing, ``hidden_states`` has
                another shape, tokens come where the block has an input norm, or ``cache`` comes to a block that is not
                causal, has an alpha per frame, or gets frames that do not go on where the cache ends.
        """
        self._check(hidden_states, num_frames)
        if cache is not None:
            check_streams("TemporalTransformerBlock", self.config)
        normed = hidden_states if self.in_norm is None else self.in_norm(hidden_states, num_frames=num_frames)
        tokens = as_tokens(normed)
        size = rows_within(memory_budget, self._position_bytes(tokens), tokens.shape[1])
        if cache is not None:
            size = cache.pieces(self, size)
        if image_only is None and size >= tokens.shape[1] and self._ends_itself(hidden_states):
            mixed = self._mix(tokens, context, num_frames, frame_mask, cache)
            return self._ended(hidden_states, mixed, num_frames)

        def branch(tokens: Tensor) -> Tensor:
            mixed = self._mix(tokens, context, num_frames, frame_mask, cache)
            return mixed if self.proj_out is None else self.proj_out(mixed)

        result = over_positions(branch, tokens, size)
        return self._merge(hidden_states, as_maps(result, hidden_states), num_frames, image_only)

    def _check(self, hidden_states: Tensor, num_frames: int) -> None:
        shape = tuple(hidden_states.shape)
        if len(shape) not in (3, 4) or shape[1 if len(shape) == 4 else -1] != self.dim:
            raise ValueError(
                f"TemporalTransformerBlock: hidden_states: expected tokens (n, positions, {self.dim}) or feature maps "
                f"(n, {self.dim}, height, width), got shape {shape}; fold the frames into the batch with fold_frames"
            )
        if self.in_norm is not None and len(shape) != 4:
            raise ValueError(
                "TemporalTransformerBlock: hidden_states: expected feature maps (n, dim, height, width) because the "
                f"block has an input GroupNorm, got shape {shape}; use in_norm='none' for tokens"
            )
        check_divisible("TemporalTransformerBlock", shape[0], num_frames)

    def _position_bytes(self, tokens: Tensor) -> int:
        widest = max([self.dim, *(layer.num_heads * layer.head_dim for layer in self.attentions)])
        return tokens.shape[0] * widest * tokens.element_size()

    def _mix(
        self,
        tokens: Tensor,
        context: Tensor | None,
        num_frames: int,
        frame_mask: Tensor | None,
        cache: FrameCache | None,
    ) -> Tensor:
        """The branch up to the projection out."""
        if self.proj_in is not None:
            tokens = self.proj_in(tokens)
        if self.position is not None:
            first_frame = 0 if cache is None else cache.num_frames
            place = {"device": tokens.device, "dtype": tokens.dtype, "first_frame": first_frame}
            tokens = add_per_frame(tokens, self.position(num_frames, **place))
        if self.ff_in is not None:
            tokens = added(tokens, self.norm_in, self.ff_in)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            tokens = added(
                tokens,
                norm,
                attention,
                None if attention.context_dim is None else context,
                num_frames=num_frames,
                frame_mask=None if attention.context_dim is not None else frame_mask,
                cache=cache,
            )
        return tokens if self.ff_out is None else added(tokens, self.norm_out, self.ff_out)

    def _ends_itself(self, hidden_states: Tensor) -> bool:
        """Whether the projection out may add the input: it is only its weights, and the input lies as tokens."""
        return (
            self.proj_out is not None
            and is_plain(self.proj_out)
            and (hidden_states.ndim == 3 or is_channels_last(hidden_states))
        )

    def _ended(self, hidden_states: Tensor, mixed: Tensor, num_frames: int) -> Tensor:
        def end(alpha: Tensor) -> Tensor:
            weight, bias, residual = self.proj_out.weight, self.proj_out.bias, as_tokens(hidden_states)
            ended = linear(mixed, weight, bias, residual=residual, alpha=alpha, num_frames=num_frames)
            return as_maps(ended, hidden_states)

        return self.blend.ended_by(hidden_states, end, num_frames=num_frames)

    def _merge(self, hidden_states: Tensor, result: Tensor, num_frames: int, image_only: Tensor | None) -> Tensor:
        # Behind a projection ``result`` is an update to the input; without one it is the whole temporal branch.
        merge = self.blend if self.proj_out is None else self.blend.residual
        channel_dim = 1 if hidden_states.ndim == 4 else -1
        return merge(hidden_states, result, num_frames=num_frames, channel_dim=channel_dim, image_only=image_only)

    def extra_repr(self) -> str:
        return f"{self.dim}"
