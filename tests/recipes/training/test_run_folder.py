"""The folder of a run: what it says of the run, and a log without lost or doubled steps."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from temporal_layers.recipes.training.files import replace_text
from temporal_layers.recipes.training.run_folder import RunFolder, versions


@dataclass
class Part:
    lr: float = 0.5


@dataclass
class Settings:
    part: Part = field(default_factory=Part)
    out: Path = Path("somewhere")
    seed: int = 3


def test_settings_and_versions_are_written(tmp_path):
    run = RunFolder(tmp_path / "a" / "b", Settings())
    assert json.loads((run.path / "config.json").read_text()) == run.config
    assert run.config == {"part": {"lr": 0.5}, "out": "somewhere", "seed": 3}
    written = json.loads((run.path / "versions.json").read_text())
    assert written == versions() and written["torch"] == torch.__version__ and written["accelerate"]
    assert sorted(os.listdir(run.path)) == ["config.json", "losses.jsonl", "versions.json"]


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert versions()["temporal-layers"] == "not installed"


def test_rewinding_drops_the_steps_to_come_of_one_stage_and_half_a_line(tmp_path):
    run = RunFolder(tmp_path, Settings())
    for stage in ("a", "b"):
        for step in range(4):
            run.log(stage=stage, step=step, loss=0.1 + step)
    with run.losses.open("a") as stream:
        stream.write('{"stage": "b", "st')
    again = RunFolder(tmp_path, Settings())
    assert len(again.records()) == 8
    again.rewind("b", 2)
    again.log(stage="b", step=2, loss=9.0)
    assert [(r["stage"], r["step"], r["loss"]) for r in again.records()] == [
        *(("a", step, 0.1 + step) for step in range(4)),
        ("b", 0, 0.1),
        ("b", 1, 1.1),
        ("b", 2, 9.0),
    ]
    again.sync()


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    replace_text(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
