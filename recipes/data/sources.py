"""Where clips come from: a folder, a CSV file, tar archives or the generated corpus, all as one kind of source.

A source is a sequence of `VideoItem`; nothing is decoded or even opened until a clip is read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from temporal_layers.recipes.data.items import DrivingFile, ItemTable, VideoFile, VideoItem
from temporal_layers.recipes.data.shards import expand, shard_source
from temporal_layers.recipes.data.video_io import list_videos
from temporal_layers.recipes.driving import DrivingConfig, DrivingCorpus, caption

Source = Sequence[VideoItem]

_PATH_COLUMNS = ("path", "file_name", "video")
_CAPTION_COLUMNS = ("caption", "text")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which videos to use.

    Attributes:
        path: A folder of videos; a .csv file; .tar archives in the WebDataset layout (a folder of them, ``*``, or
            ``{0000..0099}``); or ``driving``, the generated corpus.
        kind: What ``path`` is; ``auto`` tells by its name and content.
        root: Folder that the paths in a CSV file start from; its own folder if None (for WebVid's columns the folder
            ``videos`` in it, if there is one).
        caption: Of videos that bring none.
        label: Of videos that bring none.
        index_folder: Where indices of archives and results of probing are kept; beside the archives, and nowhere, if
            None.
        clips: Of the generated corpus: how many.
        first: Of the generated corpus: the first of them.
        clip_frames: Of the generated corpus: length of each.
        driving: Of the generated corpus: size and rate.
        driving_seed: Of the generated corpus.
    """

    path: str = "driving"
    kind: Literal["auto", "folder", "csv", "shards", "driving"] = "auto"
    root: Path | None = None
    caption: str = "a video"
    label: int = 0
    index_folder: Path | None = None
    clips: int = 1000
    first: int = 0
    clip_frames: int = 64
    driving: DrivingConfig = field(default_factory=DrivingConfig)
    driving_seed: int = 0

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                "DataConfig: path: expected a folder, a .csv file, .tar archives or 'driving', got an empty string"
            )
        if min(self.clips, self.clip_frames) < 1 or self.first < 0:
            raise ValueError(
                "DataConfig: expected clips and clip_frames of 1 or more and first of 0 or more, got "
                f"clips={self.clips}, clip_frames={self.clip_frames}, first={self.first}"
            )


def make_source(config: DataConfig) -> Source:
    """The source that a configuration describes.

    Raises:
        ValueError: If there is nothing at its path, or nothing in it.
    """
    kind = _kind(config) if config.kind == "auto" else config.kind
    if kind == "driving":
        return DrivingSource(config)
    if kind == "csv":
        source = csv_source(config.path, root=config.root, caption=config.caption, label=config.label)
    elif kind == "shards":
        folder = Path(config.path)
        paths = sorted(map(str, folder.rglob("*.tar"))) if folder.is_dir() else expand(config.path)
        source = shard_source(paths, caption=config.caption, label=config.label, index_folder=config.index_folder)
    elif kind == "folder":
        source = folder_source(config.path, caption=config.caption, label=config.label)
    else:
        raise ValueError(f"DataConfig: kind: expected auto, folder, csv, shards or driving, got {kind!r}")
    if not len(source):
        raise ValueError(f"make_source: {config.path}: expected at least one video, got none")
    return source


def _kind(config: DataConfig) -> str:
    path = config.path
    if path == "driving":
        return "driving"
    if path.lower().endswith(".csv"):
        return "csv"
    if path.lower().endswith(".tar"):
        return "shards"
    if not Path(path).is_dir():
        raise ValueError(
            f"make_source: expected a folder, a .csv file, .tar archives or 'driving', got {path!r}; check the path, "
            "or say what it is with kind"
        )
    return "shards" if any(Path(path).rglob("*.tar")) else "folder"


def folder_source(folder: str | Path, *, caption: str = "a video", label: int = 0) -> ItemTable:
    """Videos below a folder, in order of their paths.

    The caption of ``a/b.mp4`` is the text of ``a/b.txt``, or stands in ``captions.jsonl`` in the folder, one JSON
    object a line: ``{"path": "a/b.mp4", "caption": "...", "label": 3}``, the label optional.

    Args:
        folder: To be searched at any depth.
        caption: Of videos without one.
        label: Of videos without one.

    Raises:
        ValueError: No such folder, no videos, or a line of ``captions.jsonl`` that cannot be read.
    """
    folder = Path(folder)
    listed = _listed(folder / "captions.jsonl")

    def items() -> Iterator[VideoItem]:
        for path in list_videos(folder):
            key = path.relative_to(folder).as_posix()
            about = listed.get(key, {})
            text, sidecar = about.get("caption"), path.with_suffix(".txt")
            if text is None and sidecar.is_file():
                text = sidecar.read_text(encoding="utf-8").strip()
            yield VideoItem(
                key, VideoFile(str(path)), caption if text is None else text, int(about.get("label", label))
            )

    return ItemTable(items())


def _listed(path: Path) -> dict[str, dict]:
    if not path.is_file():
        return {}
    listed = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = (next(row[key] for key in keys if key in row) for keys in (_PATH_COLUMNS, _CAPTION_COLUMNS))
            listed[name] = {"caption": str(text), **({"label": int(row["label"])} if "label" in row else {})}
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"folder_source: {path}, line {number}: expected an object with path and caption, got {line!r}"
            ) from error
    return listed


def csv_source(
    path: str | Path, *, root: str | Path | None = None, caption: str = "a video", label: int = 0
) -> ItemTable:
    """Rows of a CSV file with a header.

    Columns: ``path`` and, if you have them, ``caption`` and ``label``; or WebVid's ``videoid``, ``page_dir`` and
    ``name``, which stand for the file ``page_dir/videoid.mp4`` and its caption.

    Args:
        path: The file.
        root: Folder that paths start from; if None that of the file, for WebVid's columns ``videos`` in it if there is
            one.
        caption: Of rows without one.
        label: Of rows without one.

    Raises:
        ValueError: No such file, other columns, or a label that is no number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"csv_source: expected a CSV file, got {str(path)!r}; pass a file that exists")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = csv.DictReader(stream)
        columns = rows.fieldnames or []
        webvid = "videoid" in columns
        name = "videoid" if webvid else next((column for column in _PATH_COLUMNS if column in columns), None)
        if name is None:
            raise ValueError(
                f"csv_source: {path}: expected the column path or videoid in the first line, got "
                f"{', '.join(columns) or 'nothing'}; name the columns in the first line"
            )
        base = path.parent if root is None else Path(root)
        if root is None and webvid and (base / "videos").is_dir():
            base = base / "videos"
        texts = ("name",) if webvid else _CAPTION_COLUMNS
        text = next((column for column in texts if column in columns), None)

        def items() -> Iterator[VideoItem]:
            for row in rows:
                file = f"{row.get('page_dir') or ''}/{row[name]}.mp4".lstrip("/") if webvid else row[name]
                try:
                    number = int(row.get("label") or label)
                except ValueError as error:
                    raise ValueError(
                        f"csv_source: {path}, line {rows.line_num}: label: expected a whole number, got "
                        f"{row['label']!r}"
                    ) from error
                yield VideoItem(row[name], VideoFile(str(base / file)), (text and row[text]) or caption, number)

        return ItemTable(items())


class DrivingSource(Sequence[VideoItem]):
    """Clips of the generated driving corpus.

    Args:
        config: Which clips, how long, at which size and rate.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._corpus = DrivingCorpus(config.driving, seed=config.driving_seed)

    def __len__(self) -> int:
        return self.config.clips

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        config, number = self.config, self.config.first + index
        file = DrivingFile(number, config.clip_frames, config.driving_seed, config.driving)
        return VideoItem(str(number), file, caption(self._corpus.scene(number)), self._corpus.label(number))
