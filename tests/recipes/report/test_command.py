"""The report of a run: what a training left in its folder is on the page."""

import json

import pytest

from temporal_layers.recipes.cli import main
from temporal_layers.recipes.report.command import ReportConfig, flat, run_report


def write_run(folder, records, **files):
    folder.mkdir()
    (folder / "losses.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"stage": "cut')
    for name, value in {"config": {"seed": 3, "optim": {"lr": 0.5}}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


RECORDS = [
    {"stage": "layers", "step": step, "loss": 1 / (step + 1), "grad_norm/temporal": 0.25, "alpha/unet.mid": 0.5}
    for step in range(4)
] + [{"stage": "layers", "step": 3, "validation/frame_difference": 0.125}]


def test_what_a_run_left_is_on_the_page(tmp_path):
    run = write_run(
        tmp_path / "run",
        RECORDS,
        result={
            "seconds": 12.5,
            "held_out": {"1 given": {"given": 0.25, "none": 0.5}, "2 given": {"given": 1, "none": 2}},
        },
        metrics={"table": {"real": {"distance": None}}, "seconds": {"load": 3.25}},
        alphas={"mid": 0.75},
        versions={"torch": "2.13"},
    )
    html = run_report(ReportConfig(run=run, samples=0)).read_text()
    for text in ("run: layers", "4 steps", "unet.mid", "12.5", "1 given", "held_out", "-", "3.25", "mid", "2.13"):
        assert text in html, text
    for text in (
        "optim.lr",
        "norm of the gradient: temporal",
        "validation: frame_difference",
        "temporal-layers report",
    ):
        assert text in html, text


def test_a_run_that_has_not_begun_has_a_report(tmp_path):
    assert "no step taken yet" in run_report(ReportConfig(run=write_run(tmp_path / "run", []))).read_text()


def test_settings_by_dotted_names():
    assert flat({"a": 1, "b": {"c": [1], "d": {"e": None}}}) == {"a": 1, "b.c": [1], "b.d.e": None}


def test_refusals(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"report: run: expected the folder of a run, .* got .*nowhere"):
        run_report(ReportConfig(run=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"report: expected samples of at least 0 .* got samples=-1"):
        ReportConfig(run=tmp_path, samples=-1)
    assert main(["report", str(tmp_path)]) == 1
    assert "temporal-layers report: report: run: expected" in capsys.readouterr().err


def test_a_trained_run_is_sampled_before_and_after(tmp_path):
    """The whole way: train for two steps, report on it."""
    from temporal_layers.recipes.stages.video import main as train

    options = "--clips.data.clips 2 --clips.data.clip-frames 4 --num-frames 4 --optim.steps 2 --optim.batch-size 1"
    assert train(["--out", str(tmp_path / "run"), *options.split()]) == 0
    path = run_report(ReportConfig(run=tmp_path / "run", samples=1, sampling_steps=1, out=tmp_path / "r.html"))
    html = path.read_text()
    assert html.count("<video") == 2 and "0: frame by frame" in html and "0: with temporal layers" in html
    assert html.count('class="maps"') == 1 and "at 0.70 of the height" in html
    assert (tmp_path / "r.sheet.png").is_file()
