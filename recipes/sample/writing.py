"""What a sampling command leaves behind: the clip, a contact sheet of it, and a record of how it was made."""

from __future__ import annotations

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
    """Raise a ValueError unless clips can be written in the format that the suffix asks for: before hours of sampling.

    Args:
        out: File or folder.
    """
    if out.suffix.lower() not in SUFFIXES:
        known = ", ".join(suffix or "no suffix (a folder of PNG files)" for suffix in SUFFIXES)
        raise ValueError(f"--out: expected {known}, got {out.suffix!r} in {out}")


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
    path = out.with_name(f"{out.stem}.json")
    replace_text(path, as_json(record))
    return Written(out, drawn, path)


def _scale(width: int) -> int:
    """Small frames are enlarged to be seen at all."""
    return max(1, min(4, 192 // width))
