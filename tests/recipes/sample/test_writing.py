"""What a sampling command leaves behind."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from temporal_layers.recipes.data.video_io import read_video
from temporal_layers.recipes.sample.writing import check_out, numbered, write_clip


@dataclass(frozen=True)
class Settings:
    out: Path
    steps: int = 3


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp", "clip.png", "clip"])
def test_a_clip_stands_beside_its_sheet_and_its_record(tmp_path, name):
    frames = torch.linspace(0, 1, 5)[None, :, None, None].expand(3, 5, 16, 24).contiguous()
    out = tmp_path / "folder" / name
    written = write_clip(out, frames, 10.0, command="sample x", settings=Settings(out), seed=4, model="shipped")
    assert written.clip == out and written.sheet == tmp_path / "folder" / "clip.sheet.png"
    if out.suffix:
        read = read_video(out).frames
        assert read.shape == frames.shape and (read - frames).abs().max() < 0.1
    else:
        assert len(list(out.glob("*.png"))) == 5
    with Image.open(written.sheet) as sheet:
        assert sheet.width > 5 * 24 * 4
    record = json.loads(written.record.read_text())
    assert record["settings"] == {"out": str(out), "steps": 3} and record["versions"]["torch"] == torch.__version__
    assert (record["seed"], record["frames"], record["size"], record["fps"]) == (4, 5, [16, 24], 10.0)
    assert record["command"] == "sample x" and record["model"] == "shipped"


def test_no_sheet_unless_asked_for(tmp_path):
    frames = torch.rand(3, 2, 8, 8)
    assert (
        write_clip(tmp_path / "a.png", frames, 4, command="", settings=Settings(Path()), seed=0, sheet=False).sheet
        is None
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_names_of_several_clips():
    assert numbered(Path("a/clip.mp4"), 1) == [Path("a/clip.mp4")]
    assert numbered(Path("a/clip.mp4"), 2) == [Path("a/clip-0.mp4"), Path("a/clip-1.mp4")]


def test_an_unknown_format_is_refused_before_anything_is_sampled():
    with pytest.raises(ValueError, match=r"--out: expected .mp4, .*no suffix .* got '.avi' in x.avi"):
        check_out(Path("x.avi"))
