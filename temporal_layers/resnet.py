"""Residual convolution over frames."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from temporal_layers.blend import AlphaBlend
from temporal_layers.config import TemporalResBlockConfig
from temporal_layers.frames import check_divisible, frames_to_height, height_to_frames
from temporal_layers.kernels.group_norm import group_norm
from temporal_layers.kernels.temporal_conv import temporal_conv
from temporal_layers.positions import zero_

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
        if self.over == "clip":
            return group_norm(maps, self.num_groups, self.weight, self.bias, eps=self.eps, activation="silu")
        num_frames = maps.shape[2]
        folded = maps.transpose(1, 2).flatten(0, 1).unsqueeze(-1)  # (b*f, c, p, 1)
        folded = group_norm(folded, self.num_groups, self.weight, self.bias, eps=self.eps, activation="silu")
        return folded.squeeze(-1).unflatten(0, (-1, num_frames)).transpose(1, 2)


class FrameConv(nn.Conv2d):
    """Convolution over frames on ``(batch, channels, frames, pixels)`` with a 4-D weight ``(out, in, k, 1)``.

    It is an ordinary ``nn.Conv2d`` on that view, so adapters for convolutions (LoRA) and offload hooks fit it; a 5-D
    weight would make ``model.to(memory_format=torch.channels_last)`` fail.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, causal: bool, **factory) -> None:
        padding = (0, 0) if causal else (kernel_size // 2, 0)
        super().__init__(in_channels, out_channels, (kernel_size, 1), padding=padding, **factory)
        self.causal = causal

    def forward(self, maps: Float[Tensor, "batch channels frames pixels"]) -> Float[Tensor, "batch out frames pixels"]:
        num_frames = maps.shape[2]
        folded = maps.transpose(1, 2).flatten(0, 1).unsqueeze(-1)
        folded = temporal_conv(folded, self.weight, self.bias, num_frames=num_frames, causal=self.causal)
        return folded.squeeze(-1).unflatten(0, (-1, num_frames)).transpose(1, 2)


class TemporalResBlock(nn.Module):
    """Residual block of convolutions over frames, blended with its input (Video LDM, figure 4; SVD's temporal block).

    ``update`` is a chain of (GroupNorm, SiLU, dropout, convolution ``(k, 1, 1)``) with the timestep embedding added
    after the first; the output is ``x + (1 - alpha) * update``, which equals the blend of ``x`` with ``x + update``.
    With ``zero_init`` it starts as the identity, bit for bit.

    Args:
        channels: channels of the feature map, in and out.
        temb_channels: width of the host's timestep embedding; ``None`` for none.
        num_groups: groups of the norms; must divide ``channels``.
        eps: epsilon of the norms.
        config: everything else.

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
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = config or TemporalResBlockConfig()
        factory = {"device": device, "dtype": dtype}
        if channels % num_groups != 0:
            raise ValueError(
                f"TemporalResBlock: num_groups: expected a divisor of channels={channels}, got {num_groups}"
            )
        self.channels = channels
        self.config = config
        self.norms = nn.ModuleList(
            FrameGroupNorm(num_groups, channels, eps=eps, over=config.norm, **factory) for _ in range(config.num_convs)
        )
        self.convs = nn.ModuleList(
            FrameConv(channels, channels, config.kernel_size, causal=config.causal, **factory)
            for _ in range(config.num_convs)
        )
        use_temb = config.timestep_embedding and temb_channels is not None
        self.temb_proj = nn.Linear(temb_channels, channels, **factory) if use_temb else None
        self.dropout = nn.Dropout(config.dropout)
        self.blend = AlphaBlend(config.alpha, channels=channels, device=device)
        if config.zero_init:
            zero_(self.convs[-1])

    def forward(
        self,
        hidden_states: Float[Tensor, "n channels height width"],
        temb: Float[Tensor, "n temb_channels"] | None = None,
        *,
        num_frames: int,
        image_only: Bool[Tensor, "batch frames"] | None = None,
    ) -> Float[Tensor, "n channels height width"]:
        """Mix frames by convolution.

        Args:
            hidden_states: ``(batch * num_frames, channels, height, width)``, frames innermost.
            temb: ``(batch * num_frames, temb_channels)`` timestep embedding before its activation; needed if the
                block has a projection for it.
            num_frames: frames of a clip.
            image_only: ``(batch, num_frames)``, true for frames that pass unchanged.

        Returns:
            The shape, dtype and memory format of ``hidden_states``.

        Raises:
            ValueError: if the batch is no multiple of ``num_frames``, or ``temb`` is missing.
        """
        check_divisible("TemporalResBlock", hidden_states.shape[0], num_frames)
        if self.temb_proj is not None and temb is None:
            raise ValueError(
                "TemporalResBlock: temb: expected (batch * num_frames, temb_channels), got None; "
                "the block was built with temb_channels"
            )
        height, width = hidden_states.shape[-2:]
        maps = frames_to_height(hidden_states, num_frames)
        for index, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            maps = norm(maps)
            if index > 0:
                maps = self.dropout(maps)
            maps = conv(maps)
            if index == 0 and self.temb_proj is not None:
                projected = self.temb_proj(F.silu(temb))
                maps = maps + projected.unflatten(0, (-1, num_frames)).transpose(1, 2).unsqueeze(-1)
        update = height_to_frames(maps, height, width)
        return self.blend.residual(hidden_states, update, num_frames=num_frames, image_only=image_only)

    def extra_repr(self) -> str:
        return f"{self.channels}"
