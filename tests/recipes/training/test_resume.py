"""Runs that stop, in whatever way, and go on: bit for bit where nothing changed, with a message where something did."""

import json
import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, fit
from temporal_layers.recipes.training.streams import SampleStream, generator_at

OPTIM = OptimConfig(steps=10, batch_size=2, lr=0.05, ema_decay=0.9, checkpoint_every=3, weight_decay=0.1)


class Net(nn.Module):
    """With dropout, which draws, and batch norm, which has buffers that change."""

    def __init__(self, width=6):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1))
        self.frozen = nn.Linear(1, 1).requires_grad_(False)

    def forward(self, x):
        return {"loss": (self.net(x) - x.sum(1, keepdim=True)).square().mean()}


class Interrupted(SampleStream):
    """Something happens before a batch is handed out."""

    def __init__(self, number=None, action=None):
        super().__init__(lambda position: (torch.randn(3, generator=generator_at(0, position)),))
        self.number, self.action = number, action
        self.first = None

    def batches(self, first, **options):
        self.first = first
        for number, batch in enumerate(super().batches(first, **options), start=first):
            if number == self.number:
                replaced = self.action()
                batch = batch if replaced is None else replaced
            yield batch


@dataclass(frozen=True)
class Config:
    out: Path
    optim: OptimConfig = OPTIM
    engine: EngineConfig = field(default_factory=EngineConfig)
    note: str = "a"


def run(folder, stream=None, *, objective=None, resume=None, optim=OPTIM, note="a", seed=0, **options):
    """A run; returns the losses it reports, its weights and averaged weights, its log."""
    objective = objective or Net()
    folder = RunFolder(folder, Config(folder, optim, note=note))
    engine = EngineConfig(resume=resume, **options)
    history = fit(
        objective, stream or Interrupted(), optim, name="a net", seed=seed, run=folder, engine=engine, progress=False
    )
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in folder.records()]
    return history, {k: v.clone() for k, v in objective.state_dict().items()}, records


def steps_in(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/a-net/step-*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(folder)


def assert_same(found, expected):
    (history, weights, records), (expected_history, expected_weights, expected_records) = found, expected
    assert history == expected_history
    assert records == expected_records and [r["step"] for r in records] == list(range(OPTIM.steps))
    assert weights.keys() == expected_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []


def crash():
    raise MemoryError


@pytest.mark.parametrize("number", range(1, 10))
def test_a_crash_at_any_step_costs_nothing_but_time(number, tmp_path, undisturbed, capsys):
    with pytest.raises(MemoryError):
        run(tmp_path, Interrupted(number, crash))
    done = number // 3 * 3
    assert steps_in(tmp_path) == [step for step in (3, 6, 9) if step <= done][-2:]
    stream = Interrupted()
    assert_same(run(tmp_path, stream, resume="auto"), undisturbed[1])
    assert stream.first == done
    assert (f"{done} steps are done, going on from" in capsys.readouterr().out) == (done > 0)
    assert steps_in(tmp_path) == [9, 10]


def test_a_finished_run_is_not_run_again(tmp_path, undisturbed):
    folder = shutil.copytree(undisturbed[0], tmp_path / "copy")
    assert_same(run(folder, Interrupted(10, crash), resume="auto"), undisturbed[1])


def test_ctrl_c_finishes_the_step_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, undisturbed, capsys):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted(4, lambda: signal.raise_signal(signal.SIGINT)))
    text = capsys.readouterr().out
    assert "a net: stopped after step 5; the last usable checkpoint is" in text and "--engine.resume auto" in text
    assert steps_in(tmp_path) == [3, 5]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert_same(run(tmp_path, resume="auto"), undisturbed[1])


def test_sigterm_stops_like_ctrl_c_with_the_exit_code_of_a_terminated_process(tmp_path, undisturbed):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, Interrupted(1, lambda: signal.raise_signal(signal.SIGTERM)))
    assert caught.value.code == 143
    assert steps_in(tmp_path) == [2]
    assert_same(run(tmp_path, resume="auto"), undisturbed[1])


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted(1, twice))
    assert steps_in(tmp_path) == []


def test_without_a_folder_ctrl_c_says_that_nothing_was_written(capsys):
    stream = Interrupted(1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        fit(Net(), stream, OPTIM, name="bare", progress=False)
    assert "bare: stopped after step 2; no checkpoint was written" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:300] + b"x" + data[301:]])
def test_a_damaged_checkpoint_is_passed_over_with_a_message(damage, tmp_path, undisturbed, capsys):
    with pytest.raises(MemoryError):
        run(tmp_path, Interrupted(8, crash))
    file = tmp_path / "checkpoints" / "a-net" / "step-00000006" / "state.pt"
    file.write_bytes(damage(file.read_bytes()))
    stream = Interrupted()
    assert_same(run(tmp_path, stream, resume="auto"), undisturbed[1])
    assert stream.first == 3
    assert f"a net: passing over a checkpoint {file.parent}: state.pt: expected" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"a readable manifest\.json"):
        run(tmp_path, resume=str(tmp_path / "nowhere"))


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path, undisturbed):
    objective = Net()
    inputs = (torch.full((2, 3), float("nan")),)
    message = (
        r"fit: the loss of 'a net' is nan at step 7; lower lr=0\.05; the last usable checkpoint is .*step-00000006"
    )
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path, Interrupted(7, lambda: inputs), objective=objective)
    assert all(parameter.isfinite().all() for parameter in objective.parameters())
    assert_same(run(tmp_path, resume="auto"), undisturbed[1])


def test_a_gradient_that_is_not_finite_stops_as_well():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return {"loss": self.w.abs().sqrt().sum()}  # 0, with an infinite slope

    objective = Root()
    with pytest.raises(
        RuntimeError, match=r"the gradient norm of 'all' in 'root' is (inf|nan) at step 0; lower lr=0\.05; no"
    ):
        fit(objective, Interrupted(), OPTIM, name="root", progress=False)
    assert objective.w.item() == 0


def test_a_full_disk_stops_with_the_last_checkpoint_usable(tmp_path, undisturbed, monkeypatch):
    """Files can no longer grow from step 7 on: the kernel refuses, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = len((undisturbed[0] / "checkpoints" / "a-net" / "step-00000009" / "state.pt").read_bytes())
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))  # noqa: E731
    message = r"fit: the disk is full after step 9 of 'a net' \(.*\); free some space; the last usable .*step-00000006"
    try:
        with pytest.raises(RuntimeError, match=message):
            run(tmp_path, Interrupted(7, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(os.listdir(tmp_path / "checkpoints" / "a-net")) == ["step-00000003", "step-00000006"]
    assert_same(run(tmp_path, resume="auto"), undisturbed[1])


def test_other_errors_of_the_file_system_are_not_called_a_full_disk(tmp_path):
    def missing():
        raise FileNotFoundError(2, "gone", "a clip")

    with pytest.raises(FileNotFoundError, match="a clip"):
        run(tmp_path, Interrupted(2, missing))


def test_an_old_folder_is_not_mixed_with_a_new_run(tmp_path, undisturbed):
    folder = shutil.copytree(undisturbed[0], tmp_path / "copy")
    with pytest.raises(ValueError, match=r"'a net': expected a run folder without checkpoints, got some in .*--engine"):
        run(folder)
    shutil.rmtree(folder / "checkpoints")
    assert_same(run(folder), undisturbed[1])  # its log is started afresh


def test_other_settings_are_refused_or_said(tmp_path, undisturbed, capsys):
    with pytest.raises(MemoryError):
        run(tmp_path, Interrupted(8, crash))
    longer = OptimConfig(**{**OPTIM.__dict__, "steps": 12})
    with pytest.raises(
        ValueError, match=r"expected the settings of the run that wrote .* optim\.steps was 10 and is 12"
    ):
        run(tmp_path, resume="auto", optim=longer)
    with pytest.raises(
        ValueError, match=r"seed was 0 and is 1; change them back, start in another folder, or go on nev"
    ):
        run(tmp_path, resume="auto", seed=1)
    with pytest.raises(ValueError, match=r"run\.note was a and is b"):
        run(tmp_path, resume="auto", note="b")
    with pytest.raises(ValueError, match=r"samples_per_step was 2 and is 4"):
        run(tmp_path, resume="auto", accumulation=2)
    capsys.readouterr()
    history, _, records = run(tmp_path, resume="auto", optim=longer, allow_changes=True)
    assert "a net: going on although optim.steps was 10 and is 12" in capsys.readouterr().out
    assert history[:6] == undisturbed[1][0][:6] and len(history) == 12 == len(records)


def test_samples_may_be_spread_otherwise_over_batches(tmp_path):
    """Two batches of one sample for one batch of two: settings that say how, not what."""
    plain = lambda: nn.Sequential(nn.Linear(3, 1))  # noqa: E731

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = plain()

        def forward(self, x):
            return {"loss": (self.net(x) - 1).square().mean()}

    with pytest.raises(MemoryError):
        run(tmp_path, Interrupted(5, crash), objective=Mean())
    single = OptimConfig(**{**OPTIM.__dict__, "batch_size": 1})
    history, _, _ = run(tmp_path, objective=Mean(), resume="auto", optim=single, accumulation=2)
    expected, _, _ = run(tmp_path / "undisturbed", objective=Mean())
    assert history == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    with pytest.raises(MemoryError):
        run(tmp_path, Interrupted(8, crash))
    with pytest.raises(
        ValueError,
        match=r"parameters: expected those that are trained here, got 5 other, the first of them 'net\.0\.bias': "
        r"\(6,\) in the checkpoint, \(7,\) here",
    ):
        run(tmp_path, objective=Net(width=7), resume="auto")
    raw = OptimConfig(**{**OPTIM.__dict__, "ema_decay": 0.0})
    with pytest.raises(
        ValueError, match=r"checkpoint: averaged weights: expected False, got True; go on with the conf"
    ):
        run(tmp_path, resume="auto", optim=raw, allow_changes=True)


def test_two_stages_share_a_folder(tmp_path):
    folder = RunFolder(tmp_path, Config(tmp_path))
    for name in ("first", "second"):
        fit(Net(), Interrupted(), OPTIM, name=name, run=folder, progress=False)
    records = folder.records()
    with pytest.raises(MemoryError):
        shutil.rmtree(tmp_path / "checkpoints" / "second")
        fit(Net(), Interrupted(7, crash), OPTIM, name="second", run=folder, progress=False)
    resumed = RunFolder(tmp_path, Config(tmp_path))
    for name in ("first", "second"):
        engine = EngineConfig(resume="auto")
        fit(Net(), Interrupted(), OPTIM, name=name, run=resumed, engine=engine, progress=False)
    strip = lambda found: [{k: v for k, v in r.items() if k != "seconds"} for r in found]  # noqa: E731
    assert strip(resumed.records()) == strip(records)


def test_a_checkpoint_says_in_plain_text_what_made_it(undisturbed):
    manifest = json.loads((undisturbed[0] / "checkpoints" / "a-net" / "step-00000009" / "manifest.json").read_text())
    about = manifest["about"]
    assert about["seed"] == 0 and about["samples_per_step"] == 2 and about["precision"] == "no"
    assert about["optim.lr"] == 0.05 and about["run.note"] == "a"
    assert not [key for key in about if "out" in key.split(".") or "batch_size" in key]
