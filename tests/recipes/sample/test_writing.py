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


def test_what_stands_where_a_clip_is_to_go_is_refused_before_anything_is_sampled(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=r"--out: expected a folder, or a new name, got .*file, which is a file; give"):
        check_out(tmp_path / "file")
    with pytest.raises(ValueError, match=r"--out: expected a file, or a new name, got .*mp4, which is a folder; give"):
        check_out(tmp_path / "folder.mp4")
    with pytest.raises(ValueError, match=r"--out: expected a place in a folder, got .*, but .*file is a file"):
        check_out(tmp_path / "file" / "clip.mp4")


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"--out: expected a place .* may not be written to; name another place"):
        check_out(tmp_path / "deep" / "clip.mp4")


def test_a_folder_of_somebody_elses_images_is_refused_and_one_of_ours_is_replaced(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    check_out(photos)
    (photos / "0000.png").write_text("")
    with pytest.raises(ValueError, match=r"--out: expected a new or an empty folder, .* got .*photos, with others'"):
        check_out(photos)
    out = tmp_path / "frames"
    for count in (5, 2):
        check_out(out)
        frames = torch.rand(3, count, 8, 8)
        write_clip(out, frames, 4.0, command="", settings=Settings(out), seed=0)
        assert sorted(path.name for path in out.iterdir()) == [f"{index:04d}.png" for index in range(count)]


def test_an_unknown_format_is_refused_before_anything_is_sampled():
    with pytest.raises(ValueError, match=r"--out: expected .mp4, .*no suffix .* got '.avi' in x.avi"):
        check_out(Path("x.avi"))
