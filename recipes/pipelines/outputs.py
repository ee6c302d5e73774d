"""Frames in and out of pipelines: images, arrays or tensors to clips, and clips to any of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from jaxtyping import Float
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Frames = Any
"""Frames of clips, in [0, 1] where they are numbers.

One frame: an image of Pillow, an array ``(height, width, 3)`` or a tensor ``(3, height, width)``. One clip: a list of
these, or an array or tensor with an axis for frames in front. Several clips: a list of clips, or one axis more.
"""


@dataclass
class VideoOutput(BaseOutput):
    """What a pipeline made.

    Attributes:
        frames: By output type: ``pil``, a list of images for each clip; ``np``, an array ``(clips, frames, height,
            width, 3)``; ``pt``, a tensor ``(clips, frames, 3, height, width)``, both in [0, 1]; ``latent``, a tensor
            ``(clips, channels, frames, height, width)`` of unit scale.
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor


def check_output_type(who: str, output_type: str) -> None:
    """Raise a ``ValueError`` unless there is such an output type."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"{who}: output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")


def frames_of(clips: Float[Tensor, "b 3 f height width"], output_type: str) -> list | np.ndarray | Tensor:
    """The frames of clips in [0, 1] as an output type: ``pil``, ``np`` or ``pt``."""
    return VideoProcessor(do_normalize=False).postprocess_video(clips, output_type)


def clips_of(who: str, frames: Frames, size: tuple[int, int]) -> Float[Tensor, "b 3 f height width"]:
    """Clips in [0, 1] of whatever frames a pipeline was given.

    Args:
        who: Name of the pipeline and the argument, for the error texts.
        frames: Images of another size are resized to cover ``size``, and cropped in the middle.
        size: Height and width.

    Raises:
        ValueError: If these are no frames, or arrays or tensors of another size, or with values beyond [0, 1].
    """
    images = isinstance(_first(frames), Image.Image)
    processor = VideoProcessor(
        do_resize=images, do_normalize=False, do_convert_rgb=True, vae_scale_factor=1, vae_latent_channels=0
    )
    options = {"height": size[0], "width": size[1], "resize_mode": "crop"} if images else {}
    try:
        clips = processor.preprocess_video(_as_clips(frames), **options)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{who}: expected images, or arrays (..., height, width, 3) or tensors (..., 3, height, width), of "
            f"a frame, a clip or several clips of the same length, got {_described(frames)}: {error}"
        ) from error
    if clips.shape[1] != 3 or tuple(clips.shape[-2:]) != tuple(size):
        raise ValueError(
            f"{who}: expected frames of 3 channels, {size[0]} high and {size[1]} wide, got "
            f"{clips.shape[1]} channels, {clips.shape[-2]} high and {clips.shape[-1]} wide; resize them, or pass images"
        )
    if clips.numel() == 0:
        raise ValueError(f"{who}: expected a frame at least, got none, of {_described(frames)}")
    if not 0 <= clips.min() <= clips.max() <= 1:
        raise ValueError(
            f"{who}: expected values in [0, 1], got {clips.min():.3g} to {clips.max():.3g}; divide bytes by 255"
        )
    return clips.float()


def _first(frames: Frames) -> Any:
    """A frame, or an array or a tensor of several."""
    while isinstance(frames, list | tuple) and frames:
        frames = frames[0]
    return frames


def _as_clips(frames: Frames) -> Frames:
    """With the axes of a clip, which a single frame lacks."""
    if isinstance(frames, Image.Image):
        return [[frames]]
    if isinstance(frames, np.ndarray | Tensor):
        return frames[(None,) * (5 - frames.ndim)] if frames.ndim in (3, 4) else frames
    return [list(clip) if isinstance(clip, tuple) else clip for clip in frames]


def _described(frames: Frames) -> str:
    first = _first(frames)
    shape = getattr(first, "shape", None)
    inside = type(first).__name__ if shape is None else f"{type(first).__name__} {tuple(shape)}"
    return inside if first is frames else f"{type(frames).__name__} of {inside}"
