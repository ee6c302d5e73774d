"""Options of the temporal layers that do not depend on where a layer sits.

What depends on the place (channels, heads, context width, norm groups) is read from the host model by the adapters,
or passed by whoever builds a layer by hand. All classes here are frozen, comparable and made of plain values, so that
they go through JSON unchanged.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["AlphaConfig", "ContextConfig", "TemporalConvConfig", "TemporalResBlockConfig", "TemporalTransformerConfig"]

AlphaShape = Literal["scalar", "frame", "channel"]
NormOver = Literal["clip", "frame"]
Inject = Literal["resblock", "input", "both"]
Position = Literal["none", "sinusoidal", "sinusoidal_mlp", "rotary", "relative"]


def check_choice(who: str, value: object, choices: tuple) -> None:
    """Raise a ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{who}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_at_least(who: str, value: int, least: int) -> None:
    """Raise a ``ValueError`` unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{who}: expected a whole number of at least {least}, got {value!r}")


def check_kernel(who: str, size: int) -> None:
    """Raise a ``ValueError`` unless ``size`` is the extent of a kernel with a middle: a whole and odd number."""
    check_at_least(who, size, 1)
    if size % 2 == 0:
        raise ValueError(f"{who}: expected an odd number, got {size}")


@dataclass(frozen=True, kw_only=True)
class AlphaConfig:
    """The blend of both branches: ``alpha * spatial + (1 - alpha) * temporal`` (Video LDM, section 3.1).

    Args:
        init: alpha at the start, the weight of the spatial branch. The paper does not state it; 0.5 trains well
            together with zero-initialised temporal layers. A learned alpha must start strictly between 0 and 1.
        learned: train alpha through a sigmoid, or keep ``init`` fixed.
        shape: ``"scalar"`` (one number a layer: the paper's text-to-video models, clip length stays free),
            ``"frame"`` (one a frame: its driving models) or ``"channel"``.
        num_frames: clip length; required with ``shape="frame"``, forbidden otherwise.
    """

    init: float = 0.5
    learned: bool = True
    shape: AlphaShape = "scalar"
    num_frames: int | None = None

    def __post_init__(self) -> None:
        check_choice("AlphaConfig.shape", self.shape, ("scalar", "frame", "channel"))
        if self.learned and not 0.0 < self.init < 1.0:
            raise ValueError(
                f"AlphaConfig.init: expected a value strictly between 0 and 1 for a learned alpha, got {self.init}; "
                "at 0 or 1 the sigmoid has no gradient: use learned=False to keep it there"
            )
        if not 0.0 <= self.init <= 1.0:
            raise ValueError(f"AlphaConfig.init: expected a value from 0 to 1, got {self.init}")
        if (self.shape == "frame") != (self.num_frames is not None):
            raise ValueError(
                f"AlphaConfig.num_frames: expected a clip length with shape='frame' and None otherwise, "
                f"got shape={self.shape!r} and num_frames={self.num_frames!r}"
            )
        if self.num_frames is not None:
            check_at_least("AlphaConfig.num_frames", self.num_frames, 1)


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Conditioning on given frames, ``c_S`` of the Video LDM (sections 3.2 and 3.3, figure 4).

    The model then takes ``frame_context``: planes of the given frames' latents (zero elsewhere), of the mask that says
    which those are, and of whatever else there is to tell (their noise level, the frame rate).

    Every convolution that lets them in starts at zero and has no bias. So injection is the identity, and a context of
    zeros (no frame given: the unconditional branch of context guidance) is the same as none at all.

    Args:
        channels: planes of the context.
        inject: where it enters: ``"resblock"``, in front of the convolutions over frames of every temporal residual
            block, through a resize and a learned convolution (the paper); ``"input"``, added to the output of the
            model's first convolution, which equals that convolution with more input channels (SVD); ``"both"``.
        kernel_size: odd height and width of those convolutions; at the input, the first convolution's own counts.
    """

    channels: int
    inject: Inject = "resblock"
    kernel_size: int = 3

    def __post_init__(self) -> None:
        check_at_least("ContextConfig.channels", self.channels, 1)
        check_choice("ContextConfig.inject", self.inject, ("resblock", "input", "both"))
        check_kernel("ContextConfig.kernel_size", self.kernel_size)

    @property
    def in_resblocks(self) -> bool:
        """Whether the temporal residual blocks take the context."""
        return self.inject in ("resblock", "both")

    @property
    def at_input(self) -> bool:
        """Whether the model's first convolution takes the context."""
        return self.inject in ("input", "both")


@dataclass(frozen=True, kw_only=True)
class TemporalResBlockConfig:
    """Options of :class:`~temporal_layers.TemporalResBlock`. The defaults are the Video LDM / SVD block.

    Args:
        num_convs: stages of (GroupNorm, SiLU, convolution over frames): 2 as in SVD, 4 as in ModelScope.
        kernel_size: odd extent over frames of every convolution.
        spatial_kernel_size: odd height and width of every convolution. 1 is SVD's and ModelScope's (3, 1, 1); 3 is a
            full 3-D convolution, (3, 3, 3), with nine times the weights.
        timestep_embedding: add a projection of the host's timestep embedding after the first convolution. Ignored
            where the host block has none (autoencoder decoders).
        norm: GroupNorm statistics over the whole ``"clip"`` (frames, height, width) or over each ``"frame"``.
        eps: epsilon of the norms, whatever the place of the layer suggests (ModelScope and SVD's decoder: 1e-5).
        dropout: probability, in front of every convolution but the first.
        causal: let a frame see itself and earlier frames only; needs ``norm="frame"``.
        zero_init: start the last convolution at zero (with one convolution also the projection of the timestep
            embedding), so that the block starts as the identity.
        alpha: the blend with the spatial branch; ``AlphaConfig(init=0.0, learned=False)`` adds the update unweighted.
    """

    num_convs: int = 2
    kernel_size: int = 3
    spatial_kernel_size: int = 1
    timestep_embedding: bool = True
    norm: NormOver = "clip"
    eps: float | None = None
    dropout: float = 0.0
    causal: bool = False
    zero_init: bool = True
    alpha: AlphaConfig = AlphaConfig()

    def __post_init__(self) -> None:
        check_at_least("TemporalResBlockConfig.num_convs", self.num_convs, 1)
        check_kernel("TemporalResBlockConfig.kernel_size", self.kernel_size)
        check_kernel("TemporalResBlockConfig.spatial_kernel_size", self.spatial_kernel_size)
        check_choice("TemporalResBlockConfig.norm", self.norm, ("clip", "frame"))
        if self.causal and self.norm == "clip":
            raise ValueError(
                "TemporalResBlockConfig.norm: expected 'frame' with causal=True, got 'clip'; statistics over the clip "
                "would let a frame see later ones"
            )
        if self.eps is not None and not 0.0 < self.eps < 1.0:
            raise ValueError(f"TemporalResBlockConfig.eps: expected a value between 0 and 1 or None, got {self.eps}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"TemporalResBlockConfig.dropout: expected a value from 0 to below 1, got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class TemporalTransformerConfig:
    """Options of :class:`~temporal_layers.TemporalTransformerBlock`. The defaults are the Video LDM / SVD block.

    Args:
        attentions: the attention layers in order: ``"self"`` over frames, ``"cross"`` to the text of the clip.
            ``"cross"`` is left out where the host has no text.
        ff_in: a feed-forward in front of the attentions.
        ff: a feed-forward behind them.
        position: frame positions: ``"sinusoidal_mlp"`` (sinusoid through an MLP, added once: SVD), ``"sinusoidal"``
            (added in front of every self-attention: AnimateDiff), ``"rotary"``, ``"relative"`` (a learned bias per
            head and clipped distance), ``"none"``.
        in_norm: GroupNorm in front of ``proj_in``, over the ``"clip"`` (diffusers' AnimateDiff, ModelScope) or each
            ``"frame"`` (the original AnimateDiff); feature maps only, needs ``projection``. ``"none"`` for tokens.
        projection: wrap the block in linear projections (AnimateDiff, ModelScope).
        causal: let a frame see itself and earlier frames only; excludes ``in_norm="clip"``.
        window: largest frame distance attended to; ``None`` for all (the paper limits it to 8 on long clips).
        num_heads: attention heads, whatever the place of the layer suggests; see :meth:`heads`.
        head_dim: channels of a head, likewise.
        zero_init: start as the identity: the projection out if there is one, else the last linear of each update.
        alpha: the blend with the spatial branch; ``AlphaConfig(init=0.0, learned=False)`` adds the update unweighted.
    """

    attentions: tuple[str, ...] = ("self", "cross")
    ff_in: bool = True
    ff: bool = True
    position: Position = "sinusoidal_mlp"
    in_norm: Literal["none", "clip", "frame"] = "none"
    projection: bool = False
    causal: bool = False
    window: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    zero_init: bool = True
    alpha: AlphaConfig = AlphaConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "attentions", tuple(self.attentions))  # JSON has lists only
        for kind in self.attentions:
            check_choice("TemporalTransformerConfig.attentions", kind, ("self", "cross"))
        if "self" not in self.attentions:
            raise ValueError(
                f"TemporalTransformerConfig.attentions: expected at least one 'self' (attention over frames), "
                f"got {self.attentions!r}; without it frames never mix"
            )
        positions = ("none", "sinusoidal", "sinusoidal_mlp", "rotary", "relative")
        check_choice("TemporalTransformerConfig.position", self.position, positions)
        check_choice("TemporalTransformerConfig.in_norm", self.in_norm, ("none", "clip", "frame"))
        if self.in_norm != "none" and not self.projection:
            raise ValueError(
                f"TemporalTransformerConfig.in_norm: expected 'none' without projection, got {self.in_norm!r}; "
                "set projection=True, or the normalised input itself would be blended into the output"
            )
        if self.causal and self.in_norm == "clip":
            raise ValueError(
                "TemporalTransformerConfig.in_norm: expected 'none' or 'frame' with causal=True, got 'clip'; "
                "statistics over the clip would let a frame see later ones"
            )
        for name, least in (("window", 0), ("num_heads", 1), ("head_dim", 1)):
            if getattr(self, name) is not None:
                check_at_least(f"TemporalTransformerConfig.{name}", getattr(self, name), least)

    def heads(
        self, dim: int, num_heads: int | None = None, head_dim: int | None = None
    ) -> tuple[int, int | None] | None:
        """Heads and channels of a head of a layer: the options here, or what its place suggests.

        One of the two options is enough: ``num_heads=8`` makes heads of ``dim // 8`` channels (AnimateDiff), and
        ``head_dim=64`` makes ``dim // 64`` heads (ModelScope).

        Args:
            dim: channels of the layer.
            num_heads: what the place suggests.
            head_dim: likewise; ``None`` for ``dim // num_heads``.

        Returns:
            The two, or ``None`` if neither the options nor the place say anything.

        Raises:
            ValueError: if ``head_dim`` alone is set and does not divide ``dim``.
        """
        if self.num_heads is not None:
            return self.num_heads, self.head_dim
        if self.head_dim is None:
            return None if num_heads is None else (num_heads, head_dim)
        if dim % self.head_dim != 0:
            raise ValueError(
                f"TemporalTransformerConfig.head_dim: expected a divisor of dim={dim}, got {self.head_dim}; "
                "set num_heads as well"
            )
        return dim // self.head_dim, self.head_dim


@dataclass(frozen=True, kw_only=True)
class TemporalConvConfig:
    """Options of :class:`~temporal_layers.TemporalConv`.

    Args:
        kernel_size: odd extent over frames.
        spatial_kernel_size: odd height and width.
        causal: let a frame see itself and earlier frames only.
    """

    kernel_size: int = 3
    spatial_kernel_size: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        check_kernel("TemporalConvConfig.kernel_size", self.kernel_size)
        check_kernel("TemporalConvConfig.spatial_kernel_size", self.spatial_kernel_size)
