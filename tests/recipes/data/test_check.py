"""The command that looks at every video: counts that can be told by hand, and the exit code for scripts."""

import json

import pytest

from temporal_layers.recipes import cli
from temporal_layers.recipes.data import check
from temporal_layers.recipes.data.video_io import bunny_path

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


@pytest.fixture
def folder(grey_folder, tmp_path):
    for name in ("0.mp4", "1.mp4", "0.txt"):
        (tmp_path / name).write_bytes((grey_folder / name).read_bytes())
    (tmp_path / "bunny.mp4").write_bytes(bunny_path().read_bytes())
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "truncated.mp4").write_bytes(bunny_path().read_bytes()[:9000])
    return tmp_path


def test_the_facts_are_those_of_the_files(folder, capsys):
    assert check.main([str(folder), "--json", "--workers", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    bad = facts.pop("bad")
    assert facts == {
        "videos": 5,
        "readable": 3,
        "hours": pytest.approx((2 + 2 + 5.28) / 3600),
        "seconds": {"least": 2.0, "median": 2.0, "most": 5.28},
        "without_duration": 0,
        "sizes": {"32x48": 2, "54x96": 1},
        "fps": {"10": 2, "12.5": 1},
        "captions": 2,
        "labels": 1,
    }
    assert [name.rsplit("/", 1)[1] for name in bad] == ["empty.mp4", "truncated.mp4"]
    assert "truncated: expected 33357 bytes, got 9000" in bad[str(folder / "truncated.mp4")]


def test_the_table_names_bad_videos_and_strict_counts_them(folder, capsys):
    assert cli.main(["data", "check", str(folder), "--workers", "0", "--strict"]) == 1
    out = capsys.readouterr().out
    for text in (
        "3 of 5 readable",
        "2 to 5.28, median 2",
        "32x48: 2",
        "12.5 fps: 1",
        "2 bad:",
        "empty.mp4: expected a",
    ):
        assert text in out
    (folder / "empty.mp4").unlink()
    (folder / "truncated.mp4").unlink()
    assert check.main([str(folder), "--workers", "0", "--strict"]) == 0
    assert "bad" not in capsys.readouterr().out


def test_results_are_kept_for_training(folder, tmp_path, capsys):
    index = tmp_path / "index"
    assert check.main([str(folder), "--workers", "0", "--index-folder", str(index)]) == 0
    assert len((index / "probes.jsonl").read_text().splitlines()) == 5


def test_what_is_no_data_set_is_a_message(tmp_path, capsys):
    assert check.main([str(tmp_path / "nowhere")]) == 1
    assert "temporal-layers data check: make_source: expected a folder" in capsys.readouterr().err
