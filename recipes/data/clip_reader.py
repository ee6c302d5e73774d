"""Read training clips from many video files; report, never hide, the files that could not be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from temporal_layers.recipes.data.video_io import VideoClip, iterate_clips


@dataclass(frozen=True)
class SkippedVideo:
    """A file that could not be read, or only in part: ``clips`` clips came before the fault."""

    path: Path
    reason: str
    clips: int


@dataclass
class ReadReport:
    """What a `ClipReader` did on its latest pass: clips per file, and the files with a fault."""

    clips: dict[Path, int] = field(default_factory=dict)
    skipped: list[SkippedVideo] = field(default_factory=list)

    @property
    def num_clips(self) -> int:
        """Clips read from all files."""
        return sum(self.clips.values())

    def __str__(self) -> str:
        first = f"{self.num_clips} clips from {len(self.clips)} files, {len(self.skipped)} files with a fault"
        return "\n".join([first, *(f"  {skip.reason} ({skip.clips} clips kept)" for skip in self.skipped)])


class ClipReader:
    """Iterates over all clips of ``num_frames`` frames in a set of files, in order and without overlap.

    A file that cannot be read is skipped and named in `report` with the reason. Files are decoded as the iteration
    goes, so they need not fit into memory together.

    Args:
        paths: video files, for example from `list_videos`.
        num_frames: frames per clip.
        size: ``(height, width)`` of the clips; see `read_video`.
        fps: rate of the clips; see `read_video`.
        stride: or: every ``stride``-th frame of each file.
        max_clips_per_file: leave a file after this many clips; None reads it to the end.

    Attributes:
        report: `ReadReport` of the latest pass, filled while it runs.

    Raises:
        ValueError: at the end of a pass that found no clip at all, with the reason for each file.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        num_frames: int,
        size: tuple[int, int],
        fps: float | None = None,
        stride: int = 1,
        max_clips_per_file: int | None = None,
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self.num_frames, self.size, self.fps, self.stride = num_frames, size, fps, stride
        self.max_clips_per_file = max_clips_per_file
        self.report = ReadReport()

    def __iter__(self) -> Iterator[VideoClip]:
        self.report = report = ReadReport()
        for path in self.paths:
            clips = iterate_clips(path, num_frames=self.num_frames, size=self.size, fps=self.fps, stride=self.stride)
            try:
                for clip in islice(clips, self.max_clips_per_file):
                    report.clips[path] = report.clips.get(path, 0) + 1
                    yield clip
            except ValueError as error:
                report.skipped.append(SkippedVideo(path, str(error), report.clips.get(path, 0)))
        if not report.clips:
            raise ValueError(f"ClipReader: expected at least one clip, got none; {report}")
