"""A bare convolution over frames."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from temporal_layers.autocast import autocast_to
from temporal_layers.config import TemporalConvConfig
from temporal_layers.frame_conv import convolve, frame_conv
from temporal_layers.frames import check_divisible, frames_to_height, height_to_frames
from temporal_layers.streaming import FrameCache, check_streams

__all__ = ["TemporalConv"]


class TemporalConv(nn.Module):
    """Convolution ``(k, 1, 1)`` over frames and nothing else: what SVD puts behind the last layer of its decoder.

    It has neither a residual nor a blend; it starts as the identity, bit for bit: the middle tap is the unit matrix
    and the rest is zero. With ``spatial_kernel_size=s`` it is ``(k, s, s)``; its weight is that of an ``nn.Conv3d`` in
    four dimensions, as in :class:`~temporal_layers.TemporalResBlock`.

    Attributes:
        scale: strength of the layer, set at run time and saved nowhere: the result is
            ``hidden_states + scale * (mixed - hidden_states)``.

    Args:
        channels: channels of the feature map, in and out.
        config: everything else.
    """

    scale: float = 1.0

    def __init__(
        self,
        channels: int,
        *,
        config: TemporalConvConfig | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = config or TemporalConvConfig()
        self.channels = channels
        self.config = config
        self.conv = frame_conv(channels, config, device=device, dtype=dtype)
        if not self.conv.weight.is_meta:
            size, space = config.kernel_size, config.spatial_kernel_size
            now, here = size - 1 if config.causal else size // 2, space // 2
            with torch.no_grad():
                self.conv.weight.zero_()
                kernel = self.conv.weight.view(channels, channels, size, space, space)
                kernel[:, :, now, here, here] = torch.eye(channels, device=device, dtype=dtype)
                self.conv.bias.zero_()

    def forward(
        self,
        hidden_states: Float[Tensor, "n channels height width"],
        *,
        num_frames: int,
        image_only: Bool[Tensor, "batch frames"] | None = None,
        cache: FrameCache | None = None,
    ) -> Float[Tensor, "n channels height width"]:
        """Mix frames.

        Args:
            hidden_states: ``(batch * num_frames, channels, height, width)``, frames innermost.
            num_frames: frames of a clip.
            image_only: ``(batch, num_frames)``, true for frames that pass unchanged.
            cache: earlier frames of the clip; see :class:`FrameCache`.

        Returns:
            The shape and dtype of ``hidden_states``.

        Raises:
            ValueError: if the batch is no multiple of ``num_frames``, ``hidden_states`` has another shape, or ``cache``
                comes to a layer that is not causal or gets frames that do not go on where it ends.
        """
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.channels:
            raise ValueError(
                f"TemporalConv: hidden_states: expected (batch * num_frames, {self.channels}, height, width), "
                f"got {tuple(hidden_states.shape)}; fold the frames into the batch with fold_frames"
            )
        check_divisible("TemporalConv", hidden_states.shape[0], num_frames)
        if cache is not None:
            check_streams("TemporalConv", self.config)
        size = hidden_states.shape[-2:]
        maps = convolve(self.conv, frames_to_height(hidden_states, num_frames), size, cache=cache)
        mixed = height_to_frames(maps, *size)
        if self.scale != 1:
            mixed = torch.lerp(hidden_states, autocast_to(mixed, hidden_states.dtype), self.scale)
        if image_only is None:
            return mixed
        return torch.where(image_only.reshape(-1, 1, 1, 1), hidden_states, mixed)

    def extra_repr(self) -> str:
        return f"{self.channels}" if self.scale == 1 else f"{self.channels}, scale={self.scale}"
