"""Videos in tar archives in the WebDataset layout: an index of byte offsets, then every sample by seeking.

A sample is the members of an archive whose names agree up to the first dot: ``000123.mp4`` (or another video),
``000123.txt`` (caption), ``000123.cls`` (label), ``000123.json`` (both, and more). Archives are scanned once; the
index lies beside the archive, or in a folder of its own, and is made anew when the archive's size or time changes.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from temporal_layers.recipes.data.items import ItemTable, VideoFile, VideoItem
from temporal_layers.recipes.data.opening import ANIMATION_SUFFIXES, VIDEO_SUFFIXES

_FORMAT = 1
# Animated images are left out: beside a video they are its preview.
_SUFFIXES = tuple(suffix for suffix in VIDEO_SUFFIXES if suffix not in ANIMATION_SUFFIXES)
_BRACES = re.compile(r"\{([^{}]*)\}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardSample:
    """One sample of an archive.

    Attributes:
        key: Common part of the names of its members.
        member: Name of the video.
        offset: First byte of the video in the archive.
        size: Bytes of the video.
        caption: From .txt or .json; None if there is none.
        label: From .cls or .json; None if there is none.
        fault: If not empty, why there is no video.
    """

    key: str
    member: str = ""
    offset: int = 0
    size: int = 0
    caption: str | None = None
    label: int | None = None
    fault: str = ""


def expand(pattern: str) -> list[str]:
    """Paths of a pattern, in order: braces (``shard-{0000..0099}.tar``, ``{a,b}.tar``), then ``*`` and ``?``.

    Raises:
        ValueError: If no file matches a pattern with ``*`` or ``?``, or a range in braces is none.
    """
    paths = []
    for name in _expand_braces(pattern):
        if not glob.has_magic(name):
            paths.append(name)
            continue
        found = sorted(glob.glob(name))
        if not found:
            raise ValueError(f"expand: expected files that match {name!r}, got none; check the pattern")
        paths += found
    return paths


def _expand_braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    parts = match[1].split(",")
    if len(parts) == 1:
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", parts[0])
        if bounds is None or int(bounds[1]) > int(bounds[2]):
            raise ValueError(f"expand: expected {{first..last}} or {{a,b}} in {pattern!r}, got {match[0]!r}")
        parts = [f"{number:0{len(bounds[1])}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain.from_iterable(_expand_braces(head + part + tail) for part in parts))


def shard_source(
    paths: Sequence[str | Path], *, caption: str, label: int, index_folder: str | Path | None = None
) -> ItemTable:
    """The samples of archives as a source; an archive that cannot be scanned is one item, whose fault says why.

    Args:
        paths: Archives.
        caption: Of samples without one.
        label: Of samples without one.
        index_folder: Where the indices lie; beside the archives if None.
    """
    return ItemTable(_items(map(str, paths), caption, label, None if index_folder is None else Path(index_folder)))


def _items(paths: Iterator[str], caption: str, label: int, index_folder: Path | None) -> Iterator[VideoItem]:
    for path in paths:
        for sample in read_index(path, index_folder):
            file = VideoFile(path, sample.offset, sample.size, sample.member or sample.key, sample.fault)
            yield VideoItem(
                f"{Path(path).name}/{sample.key}",
                file,
                caption if sample.caption is None else sample.caption,
                label if sample.label is None else sample.label,
            )


def read_index(path: str, index_folder: Path | None = None) -> list[ShardSample]:
    """Samples of an archive, from its index if that is there and up to date; otherwise scanned, and the index written.

    Args:
        path: Archive.
        index_folder: Where the index lies; beside the archive if None.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        return [ShardSample("", fault=f"expected a tar archive, got none ({error.strerror}); check the path")]
    stamp = {"format": _FORMAT, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    place = _index_path(path, index_folder)
    try:
        stored = json.loads(place.read_text())
        if {name: stored[name] for name in stamp} == stamp:
            return [ShardSample(**sample) for sample in stored["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no index, or one that is cut off or of another format: scan
    samples = scan(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f"{place.name}.{os.getpid()}")
        partial.write_text(json.dumps({**stamp, "samples": [asdict(sample) for sample in samples]}))
        os.replace(partial, place)
    except OSError as error:
        logger.warning("shards: %s: the index was not stored (%s); set index_folder to keep it", path, error)
    return samples


def _index_path(path: str, index_folder: Path | None) -> Path:
    if index_folder is None:
        return Path(f"{path}.index.json")
    # Archives of one name from different folders must not share an index.
    digest = hashlib.blake2b(os.path.abspath(path).encode(), digest_size=6).hexdigest()
    return index_folder / f"{Path(path).name}.{digest}.index.json"


def scan(path: str) -> list[ShardSample]:
    """Samples of an archive by reading its headers; what is wrong with it is a sample with a fault."""
    samples: dict[str, dict[str, Any]] = {}
    fault, end = "", os.path.getsize(path)
    try:
        # "r:" takes no compressed archives: these cannot be read by seeking.
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if member.isfile() and not name.startswith((".", "__")) and "." in name:
                    stem, extension = name.split(".", 1)
                    key = os.path.join(os.path.dirname(member.name), stem)
                    _add(samples.setdefault(key, {}), archive, member, extension.lower())
                if member.offset_data + member.size > end:
                    fault = f"expected {member.offset_data + member.size} bytes or more, got {end}"
                    break
    except (tarfile.TarError, OSError, EOFError) as error:
        fault = f"got damaged data ({error})"
    found = [_sample(key, parts) for key, parts in samples.items()]
    if fault:
        found.append(ShardSample("", fault=f"expected a whole, uncompressed tar archive, {fault}; copy it again"))
    return found


def _add(parts: dict[str, Any], archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
    if f".{extension}" in _SUFFIXES:
        parts.setdefault("video", (member.name, member.offset_data, member.size))
    elif extension in ("txt", "cls", "json"):
        parts[extension] = archive.extractfile(member).read()


def _sample(key: str, parts: dict[str, Any]) -> ShardSample:
    fault, about = "", {}
    label = caption = None
    try:
        about = json.loads(parts.get("json", b"{}"))
        about = about if isinstance(about, dict) else {}
        caption = about.get("caption", about.get("text"))
        if "txt" in parts:
            caption = parts["txt"].decode().strip()
        label = int(parts["cls"]) if "cls" in parts else about.get("label")
        label = None if label is None else int(label)
    except (ValueError, TypeError) as error:
        fault = f"expected readable .txt, .cls and .json, got {error}; repair the sample"
    if "video" not in parts:
        fault = fault or f"expected a video ({' '.join(_SUFFIXES)}), got none for this key; download it again"
    member, offset, size = parts.get("video", ("", 0, 0))
    return ShardSample(key, member, offset, size, None if caption is None else str(caption), label, fault)
