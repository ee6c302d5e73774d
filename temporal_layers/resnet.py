"""Residual convolution over frames."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from temporal_layers.autocast import autocast_to
from temporal_layers.blend import AlphaBlend
from temporal_layers.config import ContextConfig, TemporalResBlockConfig
from temporal_layers.context import context_conv, enter_context
from temporal_layers.frame_conv import FrameConv, convolve, frame_conv
from temporal_layers.frames import check_divisible, frames_to_height, height_to_frames
from temporal_layers.kernels.group_norm import group_norm
from temporal_layers.kernels.layout import is_channels_last
from temporal_layers.positions import zero_
from temporal_layers.streaming import FrameCache, check_streams

__all__ = ["TemporalResBlock"]


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm and SiLU on ``(batch, channels, frames, pixels)``, over the clip or each frame.

    A module of its own, rather than a call with its parameters, so that offload hooks find them.
    """

    def __init__(self, num_groups: int, channels: int, *, eps: float, over: str, **factory) -> None:
        super().__init__(num_groups, channels, eps=eps, **factory)
        self.over = over

    def forward(
        self, maps: Float[Tensor, "batch channels frames pixels"]
    ) -> Float[Tensor, "batch channels frames pixels"]:
        maps = autocast_to(maps, self.weight.dtype)
        if self.over == "clip":
            return group_norm(maps, self.num_groups, self.weight, self.bias, eps=self.eps, activation="silu")
        num_frames = maps.shape[2]
        folded = maps.transpose(1, 2).flatten(0, 1).unsqueeze(-1)  # (b*f, c, p, 1)
        folded = group_norm(folded, self.num_groups, self.weight, self.bias, eps=self.eps, activation="silu")
        return folded.squeeze(-1).unflatten(0, (-1, num_frames)).transpose(1, 2)


class TemporalResBlock(nn.Module):
    """Residual block of convolutions over frames, blended with its input (Video LDM, figure 4; SVD's temporal block).

    ``update`` is a chain of (GroupNorm, SiLU, dropout, convolution ``(k, 1, 1)``) with the timestep embedding added
    after the first; the output is ``x + (1 - alpha) * update``, which equals the blend of ``x`` with ``x + update``.
    With ``zero_init`` it starts as the identity, bit for bit.

    With ``spatial_kernel_size=s`` the convolutions are ``(k, s, s)``. The weight of one is that of an ``nn.Conv3d``
    in four dimensions, either way: ``layer.convs[0].weight.copy_(conv3d.weight.reshape_as(layer.convs[0].weight))``.

    A frame context is merged with ``x`` in front of the convolutions, and the blend still takes ``x`` from before that:
    with ``c`` for what enters, ``x + (1 - alpha) * (c + update(x + c))``.

    Args:
        channels: channels of the feature map, in and out.
        temb_channels: width of the host's timestep embedding; ``None`` for none.
        num_groups: groups of the norms; must divide ``channels``.
        eps: epsilon of the norms; that of the config, if it has one, takes precedence.
        config: everything else.
        context: the frame context that the block takes; ``None`` for none.

    Raises:
        ValueError: if ``num_groups`` does not divide ``channels``.
    """

    def __init__(
        self,
        channels: int,
        *,
        temb_channels: int | None = None,
        num_groups: int = 32,
        eps: float = 1e-5,
        config: TemporalResBlockConfig | None = None,
        context: ContextConfig | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = config or TemporalResBlockConfig()
        factory = {"device": device, "dtype": dtype}
        if num_groups < 1 or channels % num_groups != 0:
            raise ValueError(
                f"TemporalResBlock: num_groups: expected a divisor of channels={channels}, got {num_groups}"
            )
        eps = eps if config.eps is None else config.eps
        self.channels = channels
        self.config = config
        self.norms = nn.ModuleList(
            FrameGroupNorm(num_groups, channels, eps=eps, over=config.norm, **factory) for _ in range(config.num_convs)
        )
        self.convs = nn.ModuleList(frame_conv(channels, config, **factory) for _ in range(config.num_convs))
        self.temb_channels = temb_channels if config.timestep_embedding else None
        self.temb_proj = None
        if self.temb_channels is not None:
            self.temb_proj = nn.Linear(self.temb_channels, channels, **factory)
        self.dropout = nn.Dropout(config.dropout)
        self.context_in = None if context is None else context_conv(context, channels, **factory)
        self.blend = AlphaBlend(config.alpha, channels=channels, device=device)
        if config.zero_init:
            zero_(self.convs[-1])
            if config.num_convs == 1 and self.temb_proj is not None:
                zero_(self.temb_proj)  # nothing follows it that is zero

    def forward(
        self,
        hidden_states: Float[Tensor, "n channels height width"],
        temb: Float[Tensor, "n temb_channels"] | None = None,
        *,
        num_frames: int,
        image_only: Bool[Tensor, "batch frames"] | None = None,
        frame_context: Float[Tensor, "n planes context_height context_width"] | None = None,
        cache: FrameCache | None = None,
    ) -> Float[Tensor, "n channels height width"]:
        """Mix frames by convolution.

        Args:
            hidden_states: ``(batch * num_frames, channels, height, width)``, frames innermost.
            temb: ``(batch * num_frames, temb_channels)`` timestep embedding before its activation, one a frame; needed
                if the block has a projection for it, ignored otherwise.
            num_frames: frames of a clip.
            image_only: ``(batch, num_frames)``, true for frames that pass unchanged.
            frame_context: ``(batch * num_frames, planes, height, width)`` planes of a frame context, of any
                resolution; ``None`` for none.
            cache: earlier frames of the clip; see :class:`FrameCache`.

        Returns:
            The shape, dtype and memory format of ``hidden_states``.

        Raises:
            ValueError: if the batch is no multiple of ``num_frames``, ``hidden_states``, ``temb`` or ``frame_context``
                has another shape, the block takes no ``frame_context``, or ``cache`` comes to a block that is not
                causal, has an alpha per frame, or gets frames that do not go on where the cache ends.
        """
        self._check(hidden_states, temb, num_frames)
        if cache is not None:
            check_streams("TemporalResBlock", self.config)
        size = hidden_states.shape[-2:]
        entered = None
        if frame_context is not None:
            entered = enter_context("TemporalResBlock", self.context_in, hidden_states, frame_context)
        maps = frames_to_height(hidden_states if entered is None else hidden_states + entered, num_frames)
        last = len(self.convs) - 1
        for index in range(last):
            maps = self._normed(index, maps)
            maps = convolve(self.convs[index], maps, size, temb=self._projected(index, temb), cache=cache)
        maps, projected = self._normed(last, maps), self._projected(last, temb)
        if entered is None and image_only is None and cache is None and self._ends_itself(hidden_states):

            def end(alpha: Tensor) -> Tensor:
                ended = convolve(self.convs[last], maps, size, temb=projected, residual=hidden_states, alpha=alpha)
                return height_to_frames(ended, *size)

            return self.blend.ended_by(hidden_states, end, num_frames=num_frames)
        update = height_to_frames(convolve(self.convs[last], maps, size, temb=projected, cache=cache), *size)
        if entered is not None:
            update = update + entered
        return self.blend.residual(hidden_states, update, num_frames=num_frames, image_only=image_only)

    def _normed(self, index: int, maps: Tensor) -> Tensor:
        maps = self.norms[index](maps)
        return maps if index == 0 else self.dropout(maps)

    def _projected(self, index: int, temb: Tensor | None) -> Tensor | None:
        """What the timestep embedding adds behind a convolution."""
        return self.temb_proj(F.silu(temb)) if index == 0 and self.temb_proj is not None else None

    def _ends_itself(self, hidden_states: Tensor) -> bool:
        """Whether the last convolution may add its input: it is no wrapper, and returns the memory format at hand."""
        return isinstance(self.convs[-1], FrameConv) and is_channels_last(hidden_states)

    def _check(self, hidden_states: Tensor, temb: Tensor | None, num_frames: int) -> None:
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.channels:
            raise ValueError(
                f"TemporalResBlock: hidden_states: expected (batch * num_frames, {self.channels}, height, width), "
                f"got {tuple(hidden_states.shape)}; fold the frames into the batch with fold_frames"
            )
        check_divisible("TemporalResBlock", hidden_states.shape[0], num_frames)
        if self.temb_channels is None:
            return
        expected = (hidden_states.shape[0], self.temb_channels)
        if temb is None or tuple(temb.shape) != expected:
            got = None if temb is None else tuple(temb.shape)
            raise ValueError(
                f"TemporalResBlock: temb: expected {expected}, one embedding a frame, got {got}; repeat it for the "
                "frames of a clip, or build the block without temb_channels"
            )

    def extra_repr(self) -> str:
        return f"{self.channels}"
