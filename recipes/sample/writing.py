"""What a sampling command leaves behind: the clip, a contact sheet of it, and a record of how it was made."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.data.opening import ANIMATION_SUFFIXES
from temporal_layers.recipes.data.video_io import write_video
from temporal_layers.recipes.sheets import contact_sheet
from temporal_layers.recipes.training.configs import plain
from temporal_layers.recipes.training.files import replace_text
from temporal_layers.recipes.training.run_folder import as_json, versions

SUFFIXES = (".mp4", *ANIMATION_SUFFIXES, "")


@dataclass(frozen=True)
class Written:
    """Files of a clip.

    Attributes:
        clip: The video, or the folder of its frames.
        sheet: Contact sheet; None if none was asked for.
        record: How it was made, as JSON.
    """

    clip: Path
    sheet: Path | None
    record: Path


def check_out(out: Path) -> None:
    """Raise a ValueError unless clips can be written there, in the format that the suffix asks for.

    It is for before hours of sampling. Files of an earlier clip are replaced; images that no command of this library
    wrote are not.

    Args:
        out: File or folder.
    """
    if out.suffix.lower() not in SUFFIXES:
        known = ", ".join(suffix or "no suffix (a folder of PNG files)" for suffix in SUFFIXES)
        raise ValueError(f"--out: expected {known}, got {out.suffix!r} in {out}")
    if out.is_dir() if out.suffix else out.is_file():
        expected, got = ("a file", "a folder") if out.suffix else ("a folder", "a file")
        raise ValueError(f"--out: expected {expected}, or a new name, got {out}, which is {got}; give another name")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "may not be written to" if above.is_dir() else "is a file"
        raise ValueError(f"--out: expected a place in a folder, got {out}, but {above} {reason}; name another place")
    if out.is_dir() and any(out.iterdir()) and not _record_of(out).is_file():
        raise ValueError(
            f"--out: expected a new or an empty folder, or one that a clip was written to, got {out}, with others' "
            "files; give another name"
        )


def numbered(out: Path, count: int) -> list[Path]:
    """Paths of ``count`` clips: ``clip.mp4``, or ``clip-0.mp4``, ``clip-1.mp4`` and so on."""
    return [out] if count == 1 else [out.with_name(f"{out.stem}-{index}{out.suffix}") for index in range(count)]


def write_clip(
    out: Path,
    frames: Float[Tensor, "3 frames height width"],
    fps: float,
    *,
    command: str,
    settings: Any,
    seed: int,
    sheet: bool = True,
    **facts: Any,
) -> Written:
    """Write a clip, its contact sheet and its record.

    Args:
        out: Of the clip; the suffix chooses the format. The others stand beside it: ``clip.sheet.png``, ``clip.json``.
        frames: In [0, 1].
        fps: Frames per second.
        command: What made it.
        settings: Of the command, a dataclass.
        seed: That this clip was drawn from.
        sheet: Whether to draw a contact sheet.
        **facts: Further entries of the record.
    """
    write_video(out, frames, fps)
    drawn = None
    if sheet:
        drawn = out.with_name(f"{out.stem}.sheet.png")
        contact_sheet({out.stem: frames}, drawn, num_columns=min(8, frames.shape[1]), scale=_scale(frames.shape[-1]))
    record: Mapping[str, Any] = {
        "command": command,
        "seed": seed,
        "frames": frames.shape[1],
        "size": list(frames.shape[2:]),
        "fps": fps,
        "settings": plain(settings),
        "versions": versions(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }
    path = _record_of(out)
    replace_text(path, as_json(record))
    return Written(out, drawn, path)


def _record_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}.json")


def _scale(width: int) -> int:
    """Small frames are enlarged to be seen at all."""
    return max(1, min(4, 192 // width))
