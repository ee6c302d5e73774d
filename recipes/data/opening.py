"""Open a video, wherever it comes from: frames in display order with their times, from any second on.

FFmpeg (through PyAV) opens streams, Pillow animated images, whose per-frame durations it keeps exactly, and the
driving corpus is rendered. Everything that reads videos goes through `open_video`, and picks frames with
`sample_frames`, so a clip is the same frames whoever asks.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageSequence, UnidentifiedImageError

from temporal_layers.recipes.data.items import DrivingFile, Reference, VideoBytes, VideoFile, as_reference
from temporal_layers.recipes.driving import DrivingConfig, DrivingCorpus
from temporal_layers.recipes.driving_frame import Painter

ANIMATION_SUFFIXES = (".gif", ".png", ".webp")
VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".webp")

BT709 = 1
_UNSPECIFIED = 2

SLACK = 0.1
"""Frames may be this share of their duration late: containers round times, some to hundredths of a second."""

Frame = tuple[float, float, Any]
"""Seconds at which a frame appears and goes, and a handle to it."""


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video without decoding it.

    Attributes:
        height: Of the frames; as stored, while no frame has shown whether a phone wants it turned.
        width: Of the frames.
        fps: Frames per second, on average.
        duration: Length in seconds; 0 if the file does not say.
    """

    height: int
    width: int
    fps: float
    duration: float


@dataclass(frozen=True)
class OpenVideo:
    """An open video.

    Attributes:
        info: Size, rate and length.
        frames: All frames from a second on, perhaps after some earlier ones; not yet turned into pixels.
        shape: Height and width of a frame as shown.
        render: The pixels of a frame, uint8 ``(height, width, 3)``; scaled to a ``(height, width)`` unless that is
            None.
    """

    info: VideoInfo
    frames: Callable[[float], Iterator[Frame]]
    shape: Callable[[Any], tuple[int, int]]
    render: Callable[[Any, tuple[int, int] | None], np.ndarray]


def _stream_shape(frame: av.VideoFrame) -> tuple[int, int]:
    turned = frame.rotation // 90 % 2
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


class _StreamRenderer:
    """Frames of FFmpeg to pixels; conversion and scaling are one pass, set up once a file."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, size: tuple[int, int] | None) -> np.ndarray:
        turns = frame.rotation // 90
        height, width = size or (None, None)
        if turns % 2:
            height, width = width, height
        # Untagged HD files are BT.709 by the convention of every player; swscale alone would take them for BT.601.
        untagged_hd = frame.colorspace == _UNSPECIFIED and frame.height >= 720
        rgb = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=BT709 if untagged_hd else None,
            interpolation="BICUBIC",
            threads=1,
        )
        # The picture where it lies, whose rows may be padded: to_ndarray would copy it, and it is copied again anyway.
        plane = rgb.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        return np.rot90(rows[:, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3), k=turns)


def _check_whole(name: str, container: av.container.InputContainer, stream: av.VideoStream) -> None:
    index = stream.index_entries
    # A file cut short behind its index decodes without any error, only with fewer frames: compare index and size.
    if len(index) and index[-1].pos + index[-1].size > container.size:
        needed = index[-1].pos + index[-1].size
        raise ValueError(
            f"open_video: {name}: truncated: expected {needed} bytes, got {container.size}; copy the file again"
        )


def _rate(stream: av.VideoStream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 0)


def _seconds(stream: av.VideoStream, container: av.container.InputContainer, fps: float) -> float:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if stream.frames:
        return stream.frames / fps
    return (container.duration or 0) / av.time_base


@contextmanager
def _open_stream(file: VideoFile | VideoBytes, threads: int) -> Iterator[OpenVideo]:
    with av.open(file.url if isinstance(file, VideoFile) else io.BytesIO(file.data)) as container:
        if not container.streams.video:
            raise ValueError(
                f"open_video: {file.name}: expected a video stream, got none (an audio file?); pass a video file"
            )
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError(
                f"open_video: {file.name}: expected a codec that this FFmpeg decodes, got an unknown one; re-encode it"
            )
        if threads == 1:
            stream.codec_context.thread_count = 1
        else:
            stream.thread_type = "AUTO"
        _check_whole(file.name, container, stream)
        fps = _rate(stream)
        if fps <= 0:
            raise ValueError(
                f"open_video: {file.name}: expected a video with a frame rate, got none (a picture?); pass a video file"
            )
        origin = float((stream.start_time or 0) * stream.time_base)
        started = False

        def frames(start: float) -> Iterator[Frame]:
            nonlocal started
            # A bare stream (.h264) has no times to seek by: its frames are counted from the first one.
            if (start > 0 or started) and stream.start_time is not None:
                container.seek(int(start / stream.time_base) + stream.start_time, stream=stream)
            started = True
            for index, frame in enumerate(container.decode(stream)):
                time = index / fps if frame.time is None else frame.time - origin
                yield time, time + 1 / fps, frame

        info = VideoInfo(stream.height, stream.width, fps, _seconds(stream, container, fps))
        yield OpenVideo(info, frames, _stream_shape, _StreamRenderer())


@contextmanager
def _open_animation(file: VideoFile) -> Iterator[OpenVideo]:
    with Image.open(file.path if file.size is None else io.BytesIO(file.read())) as image:
        count = getattr(image, "n_frames", 1)
        durations = []
        for index in range(count):
            image.seek(index)
            image.load()
            durations.append(image.info.get("duration", 0) / 1000)
        if min(durations) <= 0:
            raise ValueError(
                f"open_video: {file.name}: expected an animation with a duration per frame, got a still image"
            )
        times = [sum(durations[:index]) for index in range(count + 1)]

        def frames(start: float) -> Iterator[Frame]:
            # The iterator hands out one object that changes with every step, hence the copies.
            copies = (frame.convert("RGB") for frame in ImageSequence.Iterator(image))
            return zip(times[:-1], times[1:], copies, strict=True)

        info = VideoInfo(image.height, image.width, count / times[-1], times[-1])
        yield OpenVideo(info, frames, lambda frame: (frame.height, frame.width), _render_image)


def _render_image(image: Image.Image, size: tuple[int, int] | None) -> np.ndarray:
    if size is not None and (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)


@functools.lru_cache(maxsize=8)
def _corpus(config: DrivingConfig, seed: int) -> DrivingCorpus:
    return DrivingCorpus(config, seed=seed)


@contextmanager
def _open_driving(file: DrivingFile) -> Iterator[OpenVideo]:
    corpus, fps = _corpus(file.config, file.seed), file.config.fps
    scene = corpus.scene(file.index)

    def frames(start: float) -> Iterator[Frame]:
        return ((index / fps, (index + 1) / fps, index / fps) for index in range(file.num_frames))

    def render(moment: float, size: tuple[int, int] | None) -> np.ndarray:
        pixels = Painter(scene, corpus.view, moment).frame()
        return _render_image(Image.fromarray((pixels * 255).round().astype(np.uint8)), size)

    shape = file.config.height, file.config.width
    yield OpenVideo(VideoInfo(*shape, fps, file.num_frames / fps), frames, lambda moment: shape, render)


def _check_there(file: VideoFile) -> None:
    if file.fault:
        raise ValueError(f"open_video: {file.name}: {file.fault}")
    if not Path(file.path).is_file():
        raise ValueError(f"open_video: {file.name}: expected a video file, got a path that is no file; check the name")
    # FFmpeg takes the length of a stretch for granted.
    if file.size is not None and file.offset + file.size > os.path.getsize(file.path):
        raise ValueError(
            f"open_video: {file.name}: truncated: expected {file.offset + file.size} bytes in {file.path}, got "
            f"{os.path.getsize(file.path)}; copy the file again"
        )


@contextmanager
def open_video(file: Reference | str | Path | bytes, *, threads: int = 0) -> Iterator[OpenVideo]:
    """Open a video for the duration of a ``with`` block.

    Args:
        file: Path, bytes or reference. Animated .gif, .png and .webp are opened by path, not as bytes.
        threads: 1 decodes in the calling thread, which suits worker processes; 0 lets FFmpeg choose.

    Raises:
        ValueError: No such file, no video stream, damaged or truncated data; also when it shows only inside the block.
    """
    file = as_reference(file)
    if isinstance(file, VideoFile):
        _check_there(file)
    if isinstance(file, DrivingFile):
        context = _open_driving(file)
    elif isinstance(file, VideoFile) and file.suffix in ANIMATION_SUFFIXES:
        context = _open_animation(file)
    else:
        context = _open_stream(file, threads)
    try:
        with context as video:
            yield video
    except (av.FFmpegError, UnidentifiedImageError, OSError, EOFError, SyntaxError) as error:
        raise ValueError(
            f"open_video: {file.name}: expected a readable video, got damaged data ({error}); copy the file again"
        ) from error


def sample_frames(video: OpenVideo, *, start: float = 0.0, fps: float | None = None, stride: int = 1) -> Iterator[Any]:
    """Frames from ``start`` (seconds) on: every ``stride``-th, or the one on screen at each multiple of ``1 / fps``.

    Yields:
        Handles for ``video.render``.
    """
    native = video.info.fps
    if fps is None:
        wanted = (frame for time, _, frame in video.frames(start) if time > start - 0.5 / native)
        for index, frame in enumerate(wanted):
            if index % stride == 0:
                yield frame
        return
    slack = SLACK / native
    taken, held, held_until = 0, None, 0.0
    for time, until, frame in video.frames(start):
        while held is not None and start + taken / fps < time - slack:
            yield held
            taken += 1
        held, held_until = frame, until
    while held is not None and start + taken / fps < held_until - slack:
        yield held
        taken += 1


def check_rate(who: str, native: float, fps: float | None, stride: int) -> float:
    """The rate of the sampled frames.

    Args:
        who: Caller and file, for the error text.
        native: The video's own rate.
        fps: As in `sample_frames`.
        stride: As in `sample_frames`.

    Raises:
        ValueError: A rate above the file's: frames would repeat, and a motion model would learn to stand still.
    """
    if fps is not None and fps > native * 1.01:
        raise ValueError(f"{who}: fps: expected at most the file's rate {native:.6g}, got {fps}; ask for less")
    return native / stride if fps is None else fps
