"""Pictures of clips for people: contact sheets, and clips side by side under captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from temporal_layers.recipes.data.video_io import check_clip

_PAPER = (22, 24, 29)
_INK = (229, 231, 235)
_FAINT = (156, 163, 175)
_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


def _check_scale(who: str, scale: int, resample: str) -> None:
    if scale < 1:
        raise ValueError(f"{who}: scale: expected 1 or more, got {scale}")
    if resample not in _FILTERS:
        raise ValueError(f"{who}: resample: expected 'lanczos' or 'nearest', got {resample!r}")


def _check_same_shape(who: str, clips: Mapping[str, Tensor]) -> None:
    shapes = {label: tuple(frames.shape) for label, frames in clips.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{who}: expected clips of one shape (3, frames, height, width), got {shapes}")


def _images(clip: Tensor, scale: int, resample: str) -> list[Image.Image]:
    arrays = rearrange(clip.mul(255).round().to(torch.uint8), "c f h w -> f h w c").numpy()
    size = (arrays.shape[2] * scale, arrays.shape[1] * scale)
    return [Image.fromarray(array).resize(size, _FILTERS[resample]) for array in arrays]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """``text`` in lines of at most ``width`` pixels, broken at spaces only."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def contact_sheet(
    clips: Mapping[str, Float[Tensor, "3 frames height width"]],
    path: str | Path,
    *,
    num_columns: int = 8,
    scale: int = 1,
    resample: Literal["lanczos", "nearest"] = "lanczos",
) -> Path:
    """Draw clips as rows and evenly spaced frames as columns, with labels, into one image.

    Args:
        clips: row label to clip; floating, in [0, 1], all of one shape.
        path: image to write, in any format Pillow writes; parent folders are made.
        num_columns: frames shown per clip, first and last among them; at most the number of frames.
        scale: whole-number enlargement.
        resample: filter of the enlargement; "nearest" shows the pixels.

    Returns:
        ``path`` as a `Path`.

    Raises:
        ValueError: no clips, clips of different shapes, or a bad argument.
    """
    _check_scale("contact_sheet", scale, resample)
    if not clips:
        raise ValueError("contact_sheet: clips: expected at least one labelled clip, got none")
    _check_same_shape("contact_sheet", clips)
    clips = {label: check_clip("contact_sheet", frames) for label, frames in clips.items()}
    _, num_frames, height, width = next(iter(clips.values())).shape
    if not 1 <= num_columns <= num_frames:
        raise ValueError(f"contact_sheet: num_columns: expected 1 to {num_frames} (the frames), got {num_columns}")
    shown = np.linspace(0, num_frames - 1, num_columns).round().astype(int).tolist()
    height, width = height * scale, width * scale
    gap, font = 4, _font(max(14, height // 7))
    widest = max(font.getlength(word) for label in clips for word in label.split() or [""])
    left = max(int(widest), int(6 * font.size)) + 4 * gap
    top = int(font.size) + 3 * gap
    sheet = Image.new("RGB", (left + num_columns * (width + gap), top + len(clips) * (height + gap)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, frame in enumerate(shown):
        x = left + column * (width + gap) + width // 2
        draw.text((x, top // 2), f"frame {frame}" if column == 0 else str(frame), fill=_FAINT, font=font, anchor="mm")
    for row, (label, clip) in enumerate(clips.items()):
        y = top + row * (height + gap)
        text = _wrapped(label, font, left - 4 * gap)
        draw.multiline_text((left - 2 * gap, y + height // 2), text, fill=_INK, font=font, anchor="rm", align="right")
        for column, image in enumerate(_images(clip[:, shown], scale, resample)):
            sheet.paste(image, (left + column * (width + gap), y))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def side_by_side(
    columns: Mapping[str, Float[Tensor, "3 frames height width"] | Sequence[Float[Tensor, "3 frames height width"]]],
    *,
    scale: int = 1,
    resample: Literal["lanczos", "nearest"] = "lanczos",
) -> Float[Tensor, "3 frames tall wide"]:
    """Clips next to each other, each column under its caption: one clip to animate.

    Args:
        columns: caption to a clip, or to several to stand below each other; floating, in [0, 1], all of one shape and
            as many in each column.
        scale: whole-number enlargement.
        resample: filter of the enlargement.

    Returns:
        float32 clip in [0, 1], clips ``scale`` times as large and 4 pixels apart under a bar with the captions.

    Raises:
        ValueError: no clips, clips of different shapes, columns of different length, or a bad argument.
    """
    _check_scale("side_by_side", scale, resample)
    stacks = {
        label: [clips] if isinstance(clips, Tensor) and clips.ndim == 4 else list(clips)
        for label, clips in columns.items()
    }
    counts = {label: len(stack) for label, stack in stacks.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"side_by_side: columns: expected as many clips in each, at least one, got {counts}")
    _check_same_shape(
        "side_by_side", {f"{label} {i}": c for label, stack in stacks.items() for i, c in enumerate(stack)}
    )
    images = [
        [_images(check_clip("side_by_side", clip), scale, resample) for clip in stack] for stack in stacks.values()
    ]
    (width, height), num_frames, gap = images[0][0][0].size, len(images[0][0]), 4
    font = _font(max(9, min(28, width // 13)))
    bar = int(font.size * 1.8)
    num_rows = len(images[0])
    canvas = Image.new("RGB", (len(images) * (width + gap) - gap, bar + num_rows * (height + gap) - gap), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(stacks):
        draw.text((column * (width + gap) + width // 2, bar // 2), label, fill=_INK, font=font, anchor="mm")
    arrays = []
    for frame in range(num_frames):
        for column, stack in enumerate(images):
            for row, clip in enumerate(stack):
                canvas.paste(clip[frame], (column * (width + gap), bar + row * (height + gap)))
        arrays.append(np.array(canvas))
    return rearrange(torch.from_numpy(np.stack(arrays)), "f h w c -> c f h w").float() / 255
