"""The convolutions of the layers: over frames, or over frames, height and width."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from temporal_layers.autocast import autocast_to
from temporal_layers.config import TemporalConvConfig, TemporalResBlockConfig
from temporal_layers.frames import fold_frames, unfold_frames
from temporal_layers.kernels.temporal_conv import spatial, temporal_conv
from temporal_layers.streaming import FrameCache

__all__ = ["CausalClipConv", "CausalFrameConv", "ClipConv", "FrameConv", "convolve", "frame_conv"]


class FrameConv(nn.Conv2d):
    """Convolution over frames on ``(batch, channels, frames, pixels)`` with a 4-D weight ``(out, in, k, 1)``.

    It is an ordinary ``nn.Conv2d`` on that view, so adapters for convolutions (LoRA) and offload hooks fit it; a 5-D
    weight would make ``model.to(memory_format=torch.channels_last)`` fail. The constructor is the one of its base:
    PEFT calls it to build the low-rank factors, and causality is a class because PEFT copies nothing but the class.
    """

    causal = False

    def taps(self, channels: int) -> int:
        """Frames that a result sees, on maps with ``channels``."""
        return self.kernel_size[0]

    def forward(
        self,
        maps: Float[Tensor, "batch channels frames pixels"],
        *,
        temb: Float[Tensor, "n out"] | None = None,
        residual: Float[Tensor, "n out height width"] | None = None,
        alpha: Float[Tensor, "..."] | None = None,
        padded: bool = False,
    ) -> Float[Tensor, "batch out out_frames pixels"]:
        """Convolve, and end a branch: ``residual + (1 - alpha) * (convolution + temb)``.

        With ``padded`` the first ``k - 1`` frames are there to be seen only and have no output.
        """
        maps = autocast_to(maps, self.weight.dtype)
        if padded:
            return F.conv2d(maps, self.weight, self.bias)
        num_frames = maps.shape[2]
        folded = temporal_conv(
            maps.transpose(1, 2).flatten(0, 1).unsqueeze(-1),
            self.weight,
            self.bias,
            num_frames=num_frames,
            temb=temb,
            residual=None if residual is None else residual.flatten(2).unsqueeze(-1),
            alpha=alpha,
            causal=self.causal,
        )
        return folded.squeeze(-1).unflatten(0, (-1, num_frames)).transpose(1, 2)


class CausalFrameConv(FrameConv):
    """A :class:`FrameConv` that sees the same and earlier frames only."""

    causal = True


class ClipConv(FrameConv):
    """Convolution over frames, height and width on ``(batch, channels, frames, height, width)``.

    Its weight is that of ``nn.Conv3d``, ``(out, in, k, height, width)``, with the second and third dimension in one:
    that of an ordinary ``nn.Conv2d`` with ``in * k`` channels. So PEFT can build its low-rank factors; over how many
    frames one of those goes follows from the channels that it meets.
    """

    def taps(self, channels: int) -> int:
        """Frames that a result sees, on maps with ``channels``."""
        return self.in_channels // channels

    def forward(
        self,
        clips: Float[Tensor, "batch channels frames height width"],
        *,
        temb: Float[Tensor, "n out"] | None = None,
        residual: Float[Tensor, "n out height width"] | None = None,
        alpha: Float[Tensor, "..."] | None = None,
        padded: bool = False,
    ) -> Float[Tensor, "batch out out_frames height width"]:
        """Convolve, and end a branch, as :meth:`FrameConv.forward`."""
        clips = autocast_to(clips, self.weight.dtype)
        weight = self.weight.unflatten(1, (clips.shape[1], -1))
        if padded:
            return spatial.convolve(clips, weight, self.bias, 0, 0)
        num_frames = clips.shape[2]
        folded = temporal_conv(
            fold_frames(clips),
            weight,
            self.bias,
            num_frames=num_frames,
            temb=temb,
            residual=residual,
            alpha=alpha,
            causal=self.causal,
        )
        return unfold_frames(folded, num_frames)


class CausalClipConv(ClipConv):
    """A :class:`ClipConv` that sees the same and earlier frames only."""

    causal = True


def frame_conv(channels: int, config: TemporalResBlockConfig | TemporalConvConfig, **factory) -> FrameConv:
    """The convolution that a layer's options ask for."""
    size, space = config.kernel_size, config.spatial_kernel_size
    if space == 1:
        conv = CausalFrameConv if config.causal else FrameConv
        return conv(channels, channels, (size, 1), padding=(size // 2, 0), **factory)
    conv = CausalClipConv if config.causal else ClipConv
    return conv(channels * size, channels, space, padding=space // 2, **factory)


def convolve(
    conv: nn.Module,
    maps: Float[Tensor, "batch channels frames pixels"],
    size: tuple[int, int],
    *,
    temb: Float[Tensor, "n out"] | None = None,
    residual: Float[Tensor, "n out height width"] | None = None,
    alpha: Float[Tensor, "..."] | None = None,
    cache: FrameCache | None = None,
) -> Float[Tensor, "batch out frames pixels"]:
    """Run a convolution, or PEFT's wrapper of one, with the frames before those at hand if there is a cache.

    Args:
        conv: the convolution.
        maps: of the frames at hand.
        size: height and width, ``pixels`` together.
        temb: added to the result, one row a frame.
        residual: with ``alpha`` what the convolution ends, as in :meth:`FrameConv.forward`; neither for a wrapper, nor
            with a cache.
        alpha: weight of the residual.
        cache: the frames before.

    Raises:
        ValueError: if ``conv`` wraps a causal convolution, or one over space, by a method that would compute another.
    """
    base = conv if isinstance(conv, FrameConv) else _inside(conv)
    over_space = isinstance(base, ClipConv)
    if over_space:
        maps = maps.unflatten(3, size)
    if cache is None and base is conv:
        maps = conv(maps, temb=temb, residual=residual, alpha=alpha)
        return maps.flatten(3) if over_space else maps
    assert residual is None
    num_frames = maps.shape[2]
    if cache is None:
        maps = conv(maps).flatten(3)
    else:
        maps = _behind_others(conv, maps, cache, base.taps(maps.shape[1]) - 1).flatten(3)
    return maps if temb is None else maps + temb.unflatten(0, (-1, num_frames)).transpose(1, 2).unsqueeze(-1)


def _inside(wrapper: nn.Module) -> FrameConv:
    """The convolution that a wrapper holds: as PEFT's adapters do, or its trained copies of whole layers."""
    base = getattr(wrapper, "base_layer", None) or getattr(wrapper, "original_module", None)
    if not isinstance(base, FrameConv):
        raise ValueError(
            f"TemporalResBlock: convs: expected a FrameConv or PEFT's wrapper of one, got {type(wrapper).__name__}; "
            "wrap the block instead"
        )
    # PEFT's other methods call PyTorch's convolution with the weight that they make.
    calls_factors = hasattr(wrapper, "lora_A") and not len(getattr(wrapper, "lora_magnitude_vector", ()))
    if (base.causal or isinstance(base, ClipConv)) and not calls_factors and hasattr(wrapper, "base_layer"):
        raise ValueError(
            f"TemporalResBlock: convs: expected LoRA without DoRA around a {type(base).__name__}, got "
            f"{type(wrapper).__module__}.{type(wrapper).__name__}; it would convolve without regard to causality or "
            "space: choose LoRA, or leave the convolutions out of target_modules"
        )
    return base


def _behind_others(conv: nn.Module, maps: Tensor, cache: FrameCache, reach: int) -> Tensor:
    (frames,) = cache.extend(conv, (maps.movedim(1, -1),), keep=reach)
    missing = reach + maps.shape[2] - frames.shape[1]  # at the start of a stream; zero there, as in front of a clip
    extended = F.pad(frames, (*(0, 0) * (frames.ndim - 2), missing, 0)).movedim(-1, 1)
    if isinstance(conv, FrameConv):
        return conv(extended, padded=True)
    return conv(extended)[:, :, reach:]  # a wrapper hands no option to its low-rank factors
