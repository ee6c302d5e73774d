"""Conditioning on given frames: how a frame context enters a model (Video LDM, sections 3.2 and 3.3, figure 4)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from temporal_layers.autocast import autocast_to
from temporal_layers.config import ContextConfig, TemporalTransformerConfig
from temporal_layers.frames import check_divisible
from temporal_layers.positions import zero_
from temporal_layers.streaming import FrameCache
from temporal_layers.transformer import TemporalTransformerBlock

__all__ = ["ContextInput", "ContextTransformer", "context_conv", "enter_context"]


def context_conv(context: ContextConfig, channels: int, **factory) -> nn.Conv2d:
    """The learned convolution that a frame context enters through: zero at the start, and without a bias."""
    size = context.kernel_size
    conv = nn.Conv2d(context.channels, channels, size, padding=size // 2, bias=False, **factory)
    zero_(conv)
    return conv


def enter_context(
    who: str,
    conv: nn.Conv2d | None,
    hidden_states: Float[Tensor, "n channels height width"],
    frame_context: Float[Tensor, "n planes context_height context_width"],
) -> Float[Tensor, "n channels height width"]:
    """What a frame context adds to feature maps: its area average at their resolution, through ``conv``.

    A mask is averaged like everything else, so that a pixel knows the share of it that is given.

    Args:
        who: name of the caller, for the error texts.
        conv: made by :func:`context_conv`; ``None`` in a layer that was built without.
        hidden_states: the maps that it is for.
        frame_context: planes of every frame, in the order of ``hidden_states``.

    Raises:
        ValueError: if the layer takes no context, or one of another shape.
    """
    if conv is None:
        raise ValueError(
            f"{who}: frame_context: expected None, got shape {tuple(frame_context.shape)}; build the layer with a "
            "ContextConfig"
        )
    # The convolution's own count would be that of a low-rank factor where PEFT wraps it.
    planes = getattr(conv, "base_layer", conv).in_channels
    if frame_context.ndim != 4 or tuple(frame_context.shape[:2]) != (hidden_states.shape[0], planes):
        raise ValueError(
            f"{who}: frame_context: expected ({hidden_states.shape[0]}, {planes}, height, width), one for each frame, "
            f"got {tuple(frame_context.shape)}; fold the frames into the batch with fold_frames"
        )
    size = hidden_states.shape[-2:]
    if frame_context.shape[-2:] != size:
        frame_context = F.adaptive_avg_pool2d(frame_context, size)
    return conv(autocast_to(frame_context, hidden_states.dtype))


class ContextInput(nn.Module):
    """Adds a frame context to the output of a model's first convolution.

    Together the two are that convolution with more input channels, where the kernels are of one size; the image
    model's weights stay as they are. Alpha has no part in it: a frame context is not there in the image model.

    Attributes:
        scale: strength, set at run time and saved nowhere: the result is ``hidden_states + scale * added``.

    Args:
        channels: channels of the feature map, in and out.
        config: planes and kernel size.
    """

    scale: float = 1.0

    def __init__(
        self,
        channels: int,
        *,
        config: ContextConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.config = config
        self.context_in = context_conv(config, channels, device=device, dtype=dtype)

    def forward(
        self,
        hidden_states: Float[Tensor, "n channels height width"],
        frame_context: Float[Tensor, "n planes context_height context_width"] | None = None,
        *,
        num_frames: int,
        image_only: Bool[Tensor, "batch frames"] | None = None,
    ) -> Float[Tensor, "n channels height width"]:
        """Add the context, if there is one.

        Args:
            hidden_states: ``(batch * num_frames, channels, height, width)``, frames innermost.
            frame_context: ``(batch * num_frames, planes, height, width)``, likewise, of any resolution; ``None`` for
                none.
            num_frames: frames of a clip.
            image_only: ``(batch, num_frames)``, true for frames that pass unchanged.

        Returns:
            The shape and dtype of ``hidden_states``.

        Raises:
            ValueError: if the batch is no multiple of ``num_frames``, or a tensor has another shape.
        """
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.channels:
            raise ValueError(
                f"ContextInput: hidden_states: expected (batch * num_frames, {self.channels}, height, width), "
                f"got {tuple(hidden_states.shape)}; fold the frames into the batch with fold_frames"
            )
        check_divisible("ContextInput", hidden_states.shape[0], num_frames)
        if frame_context is None:
            return hidden_states
        added = enter_context("ContextInput", self.context_in, hidden_states, frame_context)
        return _add(hidden_states, added, self.scale, image_only)

    def extra_repr(self) -> str:
        return f"{self.channels}" if self.scale == 1 else f"{self.channels}, scale={self.scale}"


class ContextTransformer(TemporalTransformerBlock):
    """A :class:`ContextInput` and, behind it, a transformer over frames: for models that have both at one place.

    Args:
        dim: channels of the feature map.
        num_heads: attention heads.
        head_dim: channels of a head.
        context_dim: width of the text.
        num_groups: groups of the norm in front, if any.
        config: options of the transformer.
        frame_context: planes and kernel size of the context.
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
        frame_context: ContextConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            context_dim=context_dim,
            num_groups=num_groups,
            config=config,
            device=device,
            dtype=dtype,
        )
        self.context_in = context_conv(frame_context, dim, device=device, dtype=dtype)

    def forward(
        self,
        hidden_states: Float[Tensor, "n dim height width"],
        context: Float[Tensor, "batch tokens context_dim"] | None = None,
        frame_context: Float[Tensor, "n planes context_height context_width"] | None = None,
        *,
        num_frames: int,
        image_only: Bool[Tensor, "batch frames"] | None = None,
        cache: FrameCache | None = None,
        memory_budget: int | None = None,
    ) -> Float[Tensor, "n dim height width"]:
        """Add the frame context, if there is one, and mix frames.

        Args:
            hidden_states: ``(batch * num_frames, dim, height, width)``, frames innermost.
            context: text of each clip.
            frame_context: ``(batch * num_frames, planes, height, width)``, of any resolution; ``None`` for none.
            num_frames: frames of a clip.
            image_only: ``(batch, num_frames)``, true for frames that pass unchanged.
            cache: earlier frames of the clip, for causal blocks; see :class:`~temporal_layers.FrameCache`.
            memory_budget: bytes to work on at a time, as in :class:`TemporalTransformerBlock`.

        Returns:
            The shape and dtype of ``hidden_states``.

        Raises:
            ValueError: if the batch is no multiple of ``num_frames``, a tensor has another shape, or ``cache`` does not
                fit, as in :class:`TemporalTransformerBlock`.
        """
        if frame_context is not None:
            added = enter_context("ContextTransformer", self.context_in, hidden_states, frame_context)
            hidden_states = _add(hidden_states, added, self.blend.scale, image_only)
        return super().forward(
            hidden_states,
            context,
            num_frames=num_frames,
            image_only=image_only,
            cache=cache,
            memory_budget=memory_budget,
        )


def _add(hidden_states: Tensor, added: Tensor, scale: float, image_only: Tensor | None) -> Tensor:
    if scale != 1:
        added = scale * added
    together = hidden_states + autocast_to(added, hidden_states.dtype)
    if image_only is None:
        return together
    return torch.where(image_only.reshape(-1, 1, 1, 1), hidden_states, together)
