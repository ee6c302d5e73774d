"""Read and write short video clips as tensors.

A clip is a float tensor ``(3, frames, height, width)`` in [0, 1], RGB. FFmpeg (through PyAV) reads and writes streams,
Pillow the animated image formats. ``decoding`` reads bytes for training, faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from temporal_layers.recipes.data.opening import (
    ANIMATION_SUFFIXES,
    BT709,
    VIDEO_SUFFIXES,
    check_rate,
    open_video,
    sample_frames,
)

_LIMITED_RANGE = 1


@dataclass(frozen=True)
class VideoClip:
    """A decoded clip.

    Attributes:
        frames: float32 ``(3, frames, height, width)`` in [0, 1], RGB.
        fps: frames per second of ``frames``, after any resampling.
    """

    frames: Float[Tensor, "3 frames height width"]
    fps: float


def bunny_path() -> Path:
    """Path of the packaged footage: Big Buck Bunny (CC-BY), 66 frames of 96 x 54 at 12.5 frames per second."""
    return Path(__file__).parents[1] / "fixtures" / "bigbuckbunny_96x54.mp4"


def list_videos(folder: str | Path) -> list[Path]:
    """Video files below ``folder`` (any depth), sorted by path; names that start with a dot are left out.

    Raises:
        ValueError: ``folder`` is no folder, or holds no file with a suffix of `VIDEO_SUFFIXES`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"list_videos: expected a folder, got {str(folder)!r}; pass a folder that exists")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and not p.name.startswith("."))
    if not found:
        suffixes = " ".join(VIDEO_SUFFIXES)
        raise ValueError(f"list_videos: {folder}: expected at least one video file, got none; known are {suffixes}")
    return found


def _fit(pixels: np.ndarray, size: tuple[int, int] | None) -> Float[Tensor, "3 height width"]:
    """Scale with a Lanczos filter so that the shorter side fits, cut the rest off around the centre, to [0, 1]."""
    image = Image.fromarray(pixels)
    if size is not None and (image.height, image.width) != size:
        height, width = size
        scale = min(image.height / height, image.width / width)
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _check_sampling(num_frames: int | None, size: tuple[int, int] | None, fps: float | None, stride: int) -> None:
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"read_video: num_frames: expected 1 or more, got {num_frames}; pass None for all frames")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"read_video: size: expected (height, width), both 1 or more, got {size}")
    if fps is not None and not fps > 0:
        raise ValueError(f"read_video: fps: expected more than 0, got {fps}; pass None for the file's own rate")
    if stride < 1:
        raise ValueError(f"read_video: stride: expected 1 or more, got {stride}; 1 keeps every frame")
    if fps is not None and stride != 1:
        raise ValueError(f"read_video: expected fps or stride, got both (fps={fps}, stride={stride}); drop one of them")


def read_video(
    path: str | Path,
    *,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    stride: int = 1,
    start: float = 0.0,
) -> VideoClip:
    """Read a clip from a video file or an animated image.

    Rotation stored by phones is applied; colours are converted from the file's own colour matrix.

    Args:
        path: any file FFmpeg decodes, or an animated .gif, .png or .webp.
        num_frames: frames to return; None returns all from ``start`` on.
        size: ``(height, width)``: scale (Lanczos) until both sides cover it, then cut out the centre. None keeps the
            file's size.
        fps: resample to this rate by the frame on screen at each instant; at most the file's rate, which None keeps.
        stride: keep every ``stride``-th frame; the other way to lower the rate.
        start: first frame, in seconds from the beginning of the file.

    Returns:
        The clip, float32 ``(3, frames, height, width)`` in [0, 1], with its rate.

    Raises:
        ValueError: no such file, no video stream, damaged or truncated data, fewer frames than asked for, a rate above
            the file's, or a bad argument.
    """
    _check_sampling(num_frames, size, fps, stride)
    if start < 0:
        raise ValueError(f"read_video: start: expected 0 or more seconds, got {start}")
    images: list[Tensor] = []
    with open_video(path) as video:
        rate = check_rate(f"read_video: {path}", video.info.fps, fps, stride)
        for frame in sample_frames(video, start=start, fps=fps, stride=stride):
            images.append(_fit(video.render(frame, None), size))
            if len(images) == num_frames:
                break
    if not images or len(images) < (num_frames or 1):
        raise ValueError(
            f"read_video: {path}: expected at least {num_frames or 1} frames at {rate:.6g} fps from {start} s on, got "
            f"{len(images)}; ask for fewer frames, a higher rate or an earlier start"
        )
    return VideoClip(torch.stack(images, dim=1), rate)


def iterate_clips(
    path: str | Path,
    *,
    num_frames: int,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    stride: int = 1,
) -> Iterator[VideoClip]:
    """All clips of ``num_frames`` frames in one file, in order and without overlap, decoded as the iteration goes.

    Arguments are those of `read_video`. Frames behind the last whole clip are left out.

    Raises:
        ValueError: as `read_video`; at the place of the fault, so that clips before it have been handed out.
    """
    _check_sampling(num_frames, size, fps, stride)
    clips, images = 0, []
    with open_video(path) as video:
        rate = check_rate(f"read_video: {path}", video.info.fps, fps, stride)
        for frame in sample_frames(video, fps=fps, stride=stride):
            images.append(_fit(video.render(frame, None), size))
            if len(images) == num_frames:
                yield VideoClip(torch.stack(images, dim=1), rate)
                clips, images = clips + 1, []
    if clips == 0:
        raise ValueError(
            f"read_video: {path}: expected at least {num_frames} frames at {rate:.6g} fps, got {len(images)}; ask for "
            "fewer frames or a higher rate"
        )


def check_clip(who: str, frames: Tensor) -> Float[Tensor, "3 frames height width"]:
    """``frames`` as a float32 CPU clip clamped to [0, 1].

    Args:
        who: name for the error text.
        frames: floating tensor ``(3, frames, height, width)``; half a grey level beyond [0, 1] is accepted.

    Raises:
        ValueError: another shape or dtype, no frames, values out of range or not finite.
    """
    if frames.ndim != 4 or frames.shape[0] != 3 or 0 in frames.shape:
        raise ValueError(f"{who}: frames: expected shape (3, frames, height, width), got {tuple(frames.shape)}")
    if not frames.is_floating_point():
        raise ValueError(f"{who}: frames: expected a floating dtype, got {frames.dtype}; divide 8-bit values by 255")
    frames = frames.detach().to("cpu", torch.float32)
    low, high = frames.min().item(), frames.max().item()
    if not (low >= -0.5 / 255 and high <= 1 + 0.5 / 255):
        raise ValueError(f"{who}: frames: expected values in [0, 1], got [{low:.4g}, {high:.4g}]; scale or clamp them")
    return frames.clamp(0, 1)


def _save_stream(path: Path, frames: np.ndarray, fps: float) -> None:
    # Half-resolution colour needs even sizes; repeating the last row or column leaves the picture itself untouched.
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        codec = stream.codec_context
        # Untagged files are shown with another colour matrix by some players.
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = _LIMITED_RANGE
        for array in frames:
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            yuv = frame.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=_LIMITED_RANGE)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def _bayer(order: int) -> np.ndarray:
    matrix = np.zeros((1, 1))
    for _ in range(order):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return (matrix + 0.5) / matrix.size - 0.5


def _to_palette(frames: np.ndarray) -> list[Image.Image]:
    """256-colour images with one palette for the clip and a dither fixed in place: neither flickers."""
    count, height, width, _ = frames.shape
    sample = frames.reshape(count * height, width, 3)
    step = max(1, sample.shape[0] * width // 200_000)
    palette = Image.fromarray(sample[::step]).quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
    pattern = np.tile(_bayer(3), (height // 8 + 1, width // 8 + 1))[:height, :width, None]
    dithered = (frames + pattern * 12).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in dithered]


def _save_animation(path: Path, frames: np.ndarray, fps: float) -> None:
    # Whole units of time (1 ms, in a .gif 10 ms) that add up to the clip's length, whatever the rate.
    unit = 10 if path.suffix.lower() == ".gif" else 1
    ticks = [round(index * 1000 / fps / unit) * unit for index in range(len(frames) + 1)]
    durations = [max(unit, after - before) for before, after in pairwise(ticks)]
    if path.suffix.lower() == ".gif":
        images, options = _to_palette(frames), {"optimize": False}
    elif path.suffix.lower() == ".webp":
        images, options = [Image.fromarray(frame) for frame in frames], {"quality": 88, "method": 4}
    else:
        images, options = [Image.fromarray(frame) for frame in frames], {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, **options)


def write_video(path: str | Path, frames: Float[Tensor, "3 frames height width"], fps: float) -> Path:
    """Write a clip; the suffix of ``path`` chooses the format.

    ``.mp4``: H.264, yuv420p, crf 18, BT.709; odd sizes are padded to even by repeating the last row or column.
    ``.webp``: animated, lossy. ``.gif``: one palette for the clip. ``.png``: animated, lossless. No suffix: a folder of
    numbered PNG frames (which keeps no rate); those of a longer clip that was there are removed. Animated images hold
    repeated frames once, with a longer duration; if all frames are equal they are still images.

    Args:
        path: file or folder to write; parent folders are made.
        frames: floating ``(3, frames, height, width)`` in [0, 1], RGB.
        fps: frames per second.

    Returns:
        ``path`` as a `Path`.

    Raises:
        ValueError: an unknown suffix, a rate of 0 or less, or frames that `check_clip` refuses.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ("", ".mp4", *ANIMATION_SUFFIXES):
        raise ValueError(f"write_video: {path}: expected .mp4, .webp, .gif, .png or no suffix, got {suffix!r}")
    if not fps > 0:
        raise ValueError(f"write_video: fps: expected more than 0, got {fps}")
    arrays = check_clip("write_video", frames).mul(255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == "":
        path.mkdir(exist_ok=True)
        for index, array in enumerate(arrays):
            Image.fromarray(array).save(path / f"{index:04d}.png")
        for frame in path.glob("*.png"):
            if frame.stem.isdecimal() and int(frame.stem) >= len(arrays):
                frame.unlink()  # a clip of them all would be of two
    elif suffix == ".mp4":
        _save_stream(path, arrays, fps)
    else:
        _save_animation(path, arrays, fps)
    return path
