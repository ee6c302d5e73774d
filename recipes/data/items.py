"""What a data set is made of: items, each a reference to one video with what is said of it.

A reference is small and says only where the video is, so that it can be sent to worker processes by the million;
``opening.open_video`` turns it into frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from temporal_layers.recipes.driving import DrivingConfig


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A video file, or a stretch of a file that is one (a member of a tar archive).

    Attributes:
        path: File to open.
        offset: First byte of the stretch.
        size: Bytes of the stretch; None for the whole file.
        member: Name of the stretch inside the file.
        fault: If not empty, why there is no video here; opening it raises this.
    """

    path: str
    offset: int = 0
    size: int | None = None
    member: str = ""
    fault: str = ""

    @property
    def name(self) -> str:
        """What to call the video in messages."""
        return f"{self.path}:{self.member}" if self.member else self.path

    @property
    def suffix(self) -> str:
        """Suffix of the name, in lower case."""
        return Path(self.member or self.path).suffix.lower()

    @property
    def url(self) -> str:
        """What FFmpeg opens: a stretch is read by FFmpeg itself, without a call into Python per block."""
        if self.size is None:
            return self.path
        return f"subfile,,start,{self.offset},end,{self.offset + self.size},,:{self.path}"

    def read(self) -> bytes:
        """The bytes of the video."""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(-1 if self.size is None else self.size)


@dataclass(frozen=True, slots=True)
class VideoBytes:
    """A video file that lies in memory.

    Attributes:
        data: Content of the file.
        name: What to call it in messages.
    """

    data: bytes = field(repr=False)
    name: str = "bytes"


@dataclass(frozen=True, slots=True)
class DrivingFile:
    """A clip of the generated driving corpus, rendered when it is read.

    Attributes:
        index: Which clip.
        num_frames: Length of the clip.
        seed: Of the corpus.
        config: Size and rate.
    """

    index: int
    num_frames: int
    seed: int
    config: DrivingConfig

    @property
    def name(self) -> str:
        """What to call the video in messages."""
        return f"driving clip {self.index}"


Reference = VideoFile | VideoBytes | DrivingFile


def as_reference(file: Reference | str | Path | bytes) -> Reference:
    """Paths and bytes as references."""
    if isinstance(file, bytes):
        return VideoBytes(file)
    return VideoFile(str(file)) if isinstance(file, str | Path) else file


@dataclass(frozen=True, slots=True)
class VideoItem:
    """One item of a data set.

    Attributes:
        key: Its name within the data set.
        file: Where the video is.
        caption: What it shows.
        label: Its class.
    """

    key: str
    file: Reference
    caption: str
    label: int


class _Strings(Sequence[str]):
    """Immutable strings in two arrays: millions of small objects would be copied into every worker process."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode() for string in strings]
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        return self._text[self._ends[index] : self._ends[index + 1]].tobytes().decode()


class ItemTable(Sequence[VideoItem]):
    """Items with `VideoFile` references, packed into a few arrays.

    Args:
        items: To be packed, in order.
    """

    def __init__(self, items: Iterable[VideoItem]) -> None:
        columns: list[list] = [[] for _ in range(7)]
        paths: dict[str, int] = {}
        for item in items:
            file = item.file
            size = -1 if file.size is None else file.size
            row = (
                item.key,
                item.caption,
                file.member,
                file.fault,
                item.label,
                paths.setdefault(file.path, len(paths)),
                (file.offset, size),
            )
            for column, value in zip(columns, row, strict=True):
                column.append(value)
        self._keys, self._captions, self._members, self._faults = map(_Strings, columns[:4])
        self._labels, self._path_of = (np.array(column, dtype=np.int64) for column in columns[4:6])
        self._stretches = np.array(columns[6], dtype=np.int64).reshape(-1, 2)
        self._paths = _Strings(paths)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        offset, size = map(int, self._stretches[index])
        file = VideoFile(
            self._paths[self._path_of[index]],
            offset,
            None if size < 0 else size,
            self._members[index],
            self._faults[index],
        )
        return VideoItem(self._keys[index], file, self._captions[index], int(self._labels[index]))
