"""The benchmark of whole models: what it compares is the same, what it counts is there, what differs gets no time."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from temporal_layers.recipes import model_bench
from temporal_layers.recipes.model_bench import BenchConfig, Entry

ROOT = Path(__file__).resolve().parents[2]
TINY = BenchConfig(device="cpu", frames=2, width=32, size=8, rounds=2)


def entries(config, text, *, same=True):
    """Three small models in place of the UNets; the second has as much memory again as its input for a while."""
    image, ours = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    peer = copy.deepcopy(ours)
    if not same:
        nn.init.normal_(peer.weight)

    def call(model, clip):
        return torch.stack([model(frame) for frame in clip.transpose(1, 2)[0].split(1)], dim=2)[0]

    return [Entry(name=n, model=m, call=call) for n, m in (("image model", image), ("ours", ours), ("Peer", peer))]


def test_rows_and_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(model_bench, "PAIRS", {"Small": entries})
    assert model_bench.main(["--device", "cpu", "--frames", "2", "--rounds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    [path] = tmp_path.glob("models-*.json")
    assert str(path) in printed
    document = json.loads(path.read_text())
    assert document["shape"] == {"frames": 2, "width": 64, "size": 16, "dtype": "float32", "rounds": 2}
    rows = document["pairs"]["Small"]["rows"]
    names = ["image model", "image model, channels-last", "ours", "ours, channels-last", "Peer"]
    assert [row["model"] for row in rows] == names
    assert all(row["parameters"] == 20 and row["samples"] == 2 and row["seconds"] > 0 for row in rows)
    assert all(row["p20"] <= row["seconds"] <= row["p80"] for row in rows)
    assert all(row["peak_bytes"] >= 4 * 4 * 2 * 16 * 16 for row in rows)
    assert model_bench.table(document) in printed and printed.count("| Small |") == 5


def test_models_that_differ_get_no_time(monkeypatch):
    monkeypatch.setattr(model_bench, "PAIRS", {"Small": lambda *args: entries(*args, same=False)})
    monkeypatch.setattr(model_bench, "passes", lambda *args: pytest.fail("timed"))
    message = "model_bench: Small: expected the clip of Peer within 0.001, got a difference of"
    with pytest.raises(ValueError, match=re.escape(message)):
        model_bench.run(TINY)


def test_overhead_is_of_the_fastest_layout():
    seconds = {"image model": 2.0, "image model, channels-last": 1.0, "ours": 3.0, "ours, channels-last": 1.5, "P": 4.0}
    rows = [{"model": name, "seconds": value} for name, value in seconds.items()]
    assert model_bench.overhead(rows, "ours") == 0.5
    assert model_bench.overhead(rows, "P") == 3.0


def test_peak_counts_what_is_held_at_a_time():
    def call():
        first = torch.empty(1000)
        second = first.sum()
        del first
        return torch.empty(500), second

    assert 4000 <= model_bench.peak_bytes(call, "cpu") < 4000 + 500


@pytest.mark.parametrize("pair", model_bench.PAIRS)
def test_the_parts_of_a_pair_have_the_same_parameters(pair):
    with torch.device("cpu"):
        image, ours, peer = model_bench.PAIRS[pair](TINY, torch.randn(1, 77, 768))
    counts = [sum(parameter.numel() for parameter in entry.model.parameters()) for entry in (image, ours, peer)]
    assert counts[0] < counts[1]
    assert counts[1] == counts[2]


@pytest.mark.slow
def test_the_pairs_compute_the_same_and_run(capsys):
    arguments = ["--device", "cpu", "--width", "64", "--size", "8", "--frames", "2", "--rounds", "1"]
    assert model_bench.main(arguments) == 0
    assert "UNetSpatioTemporalConditionModel" in capsys.readouterr().out


def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "whole-models.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "docs" / "assets").glob("models-*.json"))
    assert files
    for path in files:
        assert model_bench.table(json.loads(path.read_text(encoding="utf-8"))) in page
