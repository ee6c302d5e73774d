"""Decode windows of videos into bytes for training: scaled, cut out, at the rate asked for.

Two decoders do the same: PyAV, which is always there, and torchcodec, if it is installed. They pick the same frames;
their pixels differ by the filter with which they scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from temporal_layers.recipes.data.items import DrivingFile, Reference, VideoBytes, VideoFile, as_reference
from temporal_layers.recipes.data.opening import (
    ANIMATION_SUFFIXES,
    SLACK,
    OpenVideo,
    VideoInfo,
    check_rate,
    open_video,
    sample_frames,
)

DecoderName = Literal["pyav", "torchcodec"]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which frames of a video to decode, and to what size.

    Attributes:
        num_frames: How many; None for all from the start on.
        least: How many are enough where the video has no more; ``num_frames``, or one, if None.
        size: Height and width. Frames are scaled until they just cover it, then cut.
        fps: Rate; at most the video's own, which None keeps.
        stride: Or: every ``stride``-th frame.
        start: First frame, in seconds.
        share: Or: where in the room that the video leaves, from 0 (its beginning) to 1 (its end).
        crop: Where to cut, along height and width, from 0 (top, left) to 1.
    """

    num_frames: int | None
    least: int | None = None
    size: tuple[int, int]
    fps: float | None = None
    stride: int = 1
    start: float = 0.0
    share: float | None = None
    crop: tuple[float, float] = (0.5, 0.5)

    def __post_init__(self) -> None:
        if (self.num_frames is not None and self.num_frames < 1) or min(self.size) < 1 or self.stride < 1:
            raise ValueError(
                "Window: expected num_frames, size and stride of 1 or more, got "
                f"num_frames={self.num_frames}, size={self.size}, stride={self.stride}"
            )
        if self.fps is not None and (self.fps <= 0 or self.stride != 1):
            raise ValueError(
                f"Window: expected fps above 0 without a stride, got fps={self.fps}, stride={self.stride}; drop one"
            )
        shares = (*self.crop, 0.0 if self.share is None else self.share)
        if self.start < 0 or not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"Window: expected start of 0 or more, share and crop from 0 to 1, got start={self.start}, "
                f"share={self.share}, crop={self.crop}"
            )

    @property
    def needed(self) -> int:
        """The least number of frames."""
        return self.least or self.num_frames or 1

    def seconds(self, native: float) -> float:
        """How much of a video of a ``native`` rate the window takes, from the first frame to the end of the last."""
        rate = native / self.stride if self.fps is None else self.fps
        return (self.needed - 1) / rate + 1 / native

    def begin(self, info: VideoInfo) -> float:
        """Second at which the window begins in a video."""
        if self.share is None:
            return self.start
        return self.share * max(0.0, info.duration - self.seconds(info.fps))


class Decoder(Protocol):
    """Reads references; a small object that can be sent to worker processes."""

    def probe(self, file: Reference | str | Path | bytes) -> VideoInfo:
        """Size, rate and length of a video, of which one frame is decoded.

        Raises:
            ValueError: If that cannot be done, with the reason.
        """

    def window(
        self, file: Reference | str | Path | bytes, window: Window
    ) -> tuple[UInt8[Tensor, "3 frames height width"], float]:
        """Frames and their rate.

        Raises:
            ValueError: If the video cannot be read or has not enough frames, with the reason.
        """


def covering(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of a frame, its proportions kept to a pixel, that covers a size."""
    scale = max(size[0] / shape[0], size[1] / shape[1])
    return max(size[0], round(shape[0] * scale)), max(size[1], round(shape[1] * scale))


def cut(shape: tuple[int, int], window: Window) -> tuple[slice, slice]:
    """Rows and columns of a scaled frame that a window keeps."""
    top, left = (
        round(share * (have - want)) for share, have, want in zip(window.crop, shape, window.size, strict=True)
    )
    return slice(top, top + window.size[0]), slice(left, left + window.size[1])


def _too_few(file: Reference, window: Window, rate: float, got: int) -> ValueError:
    return ValueError(
        f"decode: {file.name}: expected at least {window.needed} frames at {rate:.6g} fps, got {got}; ask "
        "for fewer frames or a higher rate"
    )


@dataclass(frozen=True)
class PyAvDecoder:
    """Decodes by PyAV.

    Attributes:
        threads: Of FFmpeg for one video. With worker processes 1 is best; 0 lets FFmpeg choose.
    """

    threads: int = 1

    def probe(self, file: Reference | str | Path | bytes) -> VideoInfo:
        """As in `Decoder`."""
        file = as_reference(file)
        with open_video(file, threads=self.threads) as video:
            for _, _, frame in video.frames(0.0):
                return VideoInfo(*video.shape(frame), video.info.fps, video.info.duration)
        raise ValueError(f"decode: {file.name}: expected at least one frame, got none; copy the file again")

    def window(
        self, file: Reference | str | Path | bytes, window: Window
    ) -> tuple[UInt8[Tensor, "3 frames height width"], float]:
        """As in `Decoder`; seeks to the key frame before the window instead of decoding from the beginning."""
        file = as_reference(file)
        with open_video(file, threads=self.threads) as video:
            rate = check_rate(f"decode: {file.name}", video.info.fps, window.fps, window.stride)
            begin = window.begin(video.info)
            frames = self._read(video, window, begin)
            if window.share and frames.shape[1] < window.needed:
                # The file promised to be longer than it is; the room it really leaves is unknown, its beginning is not.
                frames = self._read(video, window, 0.0)
        if frames.shape[1] < window.needed:
            raise _too_few(file, window, rate, frames.shape[1])
        return torch.from_numpy(np.ascontiguousarray(frames)), rate

    def _read(self, video: OpenVideo, window: Window, begin: float) -> np.ndarray:
        """Frames ``(3, frames, height, width)``; what is cut out of each is copied once, into its place."""
        size = area = None
        # Without a number of frames there is room for some, and for twice as many each time that it is full.
        frames = np.empty((3, window.num_frames or 16, *window.size), np.uint8)
        count = 0
        for frame in sample_frames(video, start=begin, fps=window.fps, stride=window.stride):
            if size is None:
                size = covering(video.shape(frame), window.size)
                area = cut(size, window)
            if count == frames.shape[1]:
                frames = np.concatenate([frames, np.empty_like(frames)], axis=1)
            frames[:, count] = video.render(frame, size)[area].transpose(2, 0, 1)
            count += 1
            if count == window.num_frames:
                break
        return frames[:, :count]


class TorchCodecDecoder:
    """Decodes by torchcodec, which finds FFmpeg's libraries on the system; animated images and generated clips by PyAV.

    Args:
        threads: Of FFmpeg for one video.

    Raises:
        ValueError: If torchcodec is not installed or does not load.
    """

    def __init__(self, threads: int = 1) -> None:
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"TorchCodecDecoder: expected the package torchcodec and FFmpeg's libraries, got {reason!r}; install "
                "both, or use the decoder 'pyav'"
            ) from error
        self.threads = threads
        self._other = PyAvDecoder(threads)

    def _open(self, file: VideoFile | VideoBytes) -> Any:
        from torchcodec.decoders import VideoDecoder

        if isinstance(file, VideoFile) and file.fault:
            raise ValueError(f"decode: {file.name}: {file.fault}")
        whole = isinstance(file, VideoFile) and file.size is None
        content = file.path if whole else file.data if isinstance(file, VideoBytes) else file.read()
        return VideoDecoder(content, num_ffmpeg_threads=self.threads)

    @staticmethod
    def _is_stream(file: Reference) -> bool:
        return not isinstance(file, DrivingFile) and Path(file.name).suffix.lower() not in ANIMATION_SUFFIXES

    def probe(self, file: Reference | str | Path | bytes) -> VideoInfo:
        """As in `Decoder`."""
        file = as_reference(file)
        if not self._is_stream(file):
            return self._other.probe(file)
        with _named(file):
            video = self._open(file)
            return VideoInfo(*video[0].shape[1:], video.metadata.average_fps, video.metadata.duration_seconds)

    def window(
        self, file: Reference | str | Path | bytes, window: Window
    ) -> tuple[UInt8[Tensor, "3 frames height width"], float]:
        """As in `Decoder`."""
        file = as_reference(file)
        if not self._is_stream(file):
            return self._other.window(file, window)
        with _named(file):
            video = self._open(file)
            native = video.metadata.average_fps
            rate = check_rate(f"decode: {file.name}", native, window.fps, window.stride)
            info = VideoInfo(*window.size, native, video.metadata.duration_seconds)
            begin = window.begin(info)
            count = self._count(window, begin, info)
            if count < window.needed:
                raise _too_few(file, window, rate, count)
            frames = self._frames(video, window, begin, count)
        return _scale(frames, window), rate

    @staticmethod
    def _count(window: Window, begin: float, info: VideoInfo) -> int:
        """How many frames of the window the video has, at most those asked for."""
        if window.fps is None:
            left = math.ceil((round(info.duration * info.fps) - _first(begin, info.fps)) / window.stride)
        else:
            left = math.ceil((info.duration - begin - SLACK / info.fps) * window.fps)
        return max(0, left if window.num_frames is None else min(left, window.num_frames))

    @staticmethod
    def _frames(video: Any, window: Window, begin: float, count: int) -> UInt8[Tensor, "frames 3 height width"]:
        native, origin = video.metadata.average_fps, video.metadata.begin_stream_seconds
        if window.fps is None:
            first = _first(begin, native)
            return video.get_frames_at([first + index * window.stride for index in range(count)]).data
        # The same slack as in sample_frames: a frame that begins a little late is on screen already.
        times = [origin + begin + index / window.fps + SLACK / native for index in range(count)]
        return video.get_frames_played_at(times).data


def _first(begin: float, native: float) -> int:
    return max(0, math.floor(begin * native - 0.5) + 1)


def _scale(frames: UInt8[Tensor, "frames 3 h w"], window: Window) -> UInt8[Tensor, "3 frames height width"]:
    size = covering(tuple(frames.shape[2:]), window.size)
    if size != tuple(frames.shape[2:]):
        frames = F.interpolate(frames, size=size, mode="bicubic", antialias=True)
    rows, columns = cut(size, window)
    return frames[:, :, rows, columns].transpose(0, 1).contiguous()


@contextmanager
def _named(file: Reference) -> Iterator[None]:
    """Errors of torchcodec as ours, with the name of the file."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("decode: "):
            raise
        raise _damaged(file, error) from error
    except (RuntimeError, IndexError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Reference, error: Exception) -> ValueError:
    return ValueError(
        f"decode: {file.name}: expected a readable video, got damaged data ({error}); copy the file again"
    )


def make_decoder(name: DecoderName = "pyav", *, threads: int = 1) -> Decoder:
    """The decoder of a name.

    Args:
        name: ``pyav``, or ``torchcodec`` if that is installed.
        threads: Of FFmpeg for one video.

    Raises:
        ValueError: An unknown name, or torchcodec does not load.
    """
    if name == "pyav":
        return PyAvDecoder(threads)
    if name == "torchcodec":
        return TorchCodecDecoder(threads)
    raise ValueError(f"make_decoder: expected 'pyav' or 'torchcodec', got {name!r}")
