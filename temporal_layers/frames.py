"""Folding frames into the batch and back: the one place that knows the axis order.

A clip batch at the boundary is ``(batch, channels, frames, height, width)``, diffusers' order for video. Inside a
model it is ``(batch * frames, channels, height, width)`` with frames innermost, so that an image layer sees a plain
batch, and concatenating unconditional and conditional halves along the batch keeps every clip's frames together.
"""

from jaxtyping import Shaped
from torch import Tensor

__all__ = ["check_divisible", "fold_frames", "frames_to_height", "height_to_frames", "unfold_frames"]


def fold_frames(
    clips: Shaped[Tensor, "batch channels frames height width"],
) -> Shaped[Tensor, "n channels height width"]:
    """Fold the frames of a clip batch into the batch axis, frames innermost.

    Args:
        clips: ``(batch, channels, frames, height, width)``, any dtype.

    Returns:
        ``(batch * frames, channels, height, width)``.

    Raises:
        ValueError: if ``clips`` is not 5-D.
    """
    if clips.ndim != 5:
        raise ValueError(
            "fold_frames: clips: expected 5 axes (batch, channels, frames, height, width), "
            f"got shape {tuple(clips.shape)}; add the missing axis or pass images to the image model directly"
        )
    return clips.transpose(1, 2).flatten(0, 1)


def unfold_frames(
    images: Shaped[Tensor, "n channels height width"], num_frames: int
) -> Shaped[Tensor, "batch channels frames height width"]:
    """Undo :func:`fold_frames`.

    Args:
        images: ``(batch * num_frames, channels, height, width)``, any dtype.
        num_frames: frames of each clip.

    Returns:
        ``(batch, channels, num_frames, height, width)``, a view of ``images``.

    Raises:
        ValueError: if ``images`` is not 4-D or its first axis is no multiple of ``num_frames``.
    """
    if images.ndim != 4:
        raise ValueError(
            "unfold_frames: images: expected 4 axes (batch * frames, channels, height, width), "
            f"got shape {tuple(images.shape)}"
        )
    check_divisible("unfold_frames", images.shape[0], num_frames)
    return images.unflatten(0, (-1, num_frames)).transpose(1, 2)


def frames_to_height(
    images: Shaped[Tensor, "n channels height width"], num_frames: int
) -> Shaped[Tensor, "batch channels frames pixels"]:
    """View ``(b*f, c, h, w)`` as ``(b, c, f, h*w)``, on which a layer over frames is a 2-D layer over the height axis.

    No copy is made when ``images`` is channels-last in memory; otherwise one channels-last copy is.
    """
    tokens = images.permute(0, 2, 3, 1).flatten(1, 2)  # (b*f, h*w, c): a view if channels-last
    return tokens.contiguous().unflatten(0, (-1, num_frames)).permute(0, 3, 1, 2)


def height_to_frames(
    maps: Shaped[Tensor, "batch channels frames pixels"], height: int, width: int
) -> Shaped[Tensor, "n channels height width"]:
    """Undo :func:`frames_to_height`: ``(b, c, f, h*w)`` to ``(b*f, c, h, w)``, a view if channels-last in memory."""
    return maps.permute(0, 2, 3, 1).flatten(0, 1).unflatten(1, (height, width)).permute(0, 3, 1, 2)


def check_divisible(who: str, batch: int, num_frames: int) -> None:
    """Raise a ``ValueError`` unless ``batch`` images are whole clips of ``num_frames`` frames."""
    if num_frames < 1:
        raise ValueError(f"{who}: num_frames: expected at least 1, got {num_frames}")
    if batch % num_frames != 0:
        raise ValueError(
            f"{who}: expected a batch that is a multiple of num_frames={num_frames} (frames folded into the batch, "
            f"frames innermost), got {batch} images; set num_frames to the clip length or fix the batch"
        )
