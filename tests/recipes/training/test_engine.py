"""The training engine: schedules, averaged weights, run folder, and what ``fit`` does with them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import nn

from temporal_layers.recipes.training.engine import AveragedWeights, OptimConfig, RunFolder, fit, learning_rate


class Quadratic(nn.Module):
    """Loss ``|w - batch|^2``; its minimum over many batches is their mean."""

    def __init__(self, size=3):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, target):
        distance = (self.w - target).square().mean()
        return {"loss": distance, "size": self.w.abs().mean()}


class Constant:
    """A stream of one value."""

    def __init__(self, value):
        self.value = value

    def batches(self, first, *, batch_size, rank=0, world_size=1):
        while True:
            yield (torch.full((3,), float(self.value)),)


def options(**changes):
    return OptimConfig(**{"steps": 60, "batch_size": 1, "lr": 0.1, "weight_decay": 0.0, **changes})


def test_one_cycle_is_torchs_with_the_same_end_points():
    config = options(steps=50, warmup=0.2, lr=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    # torch's cycle reaches its peak one step before the warm-up's end: total_steps counts intervals, not steps.
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.3, total_steps=51, pct_start=11 / 51, cycle_momentum=False, final_div_factor=1e9
    )
    for step in range(50):
        assert learning_rate(config, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-4, abs=1e-6)
        optimizer.step()
        reference.step()


def test_cosine_is_diffusers_after_the_warm_up_and_constant_stays():
    config = options(steps=40, warmup=0.25, schedule="cosine", lr=0.2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    reference = get_cosine_schedule_with_warmup(optimizer, 10, 40)
    for step in range(40):
        expected = optimizer.param_groups[0]["lr"] if step >= 10 else 0.2 * (step + 1) / 10
        assert learning_rate(config, step) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        reference.step()
    flat = options(steps=40, warmup=0.25, schedule="constant", lr=0.2)
    assert [learning_rate(flat, step) for step in (0, 4, 9, 10, 39)] == pytest.approx([0.02, 0.1, 0.2, 0.2, 0.2])
    assert learning_rate(options(warmup=0.0, schedule="constant"), 0) == pytest.approx(0.1)


def test_averaged_weights_are_diffusers_ema_and_can_be_tried_on():
    module = nn.Linear(3, 2)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    both = nn.Sequential(module, frozen)
    reference = EMAModel(module.parameters(), decay=0.9)
    average = AveragedWeights(both, decay=0.9)
    assert len(average.averages) == 2
    # Both warm up as (1 + n) / (10 + n), but diffusers' very first update copies instead of averaging.
    reference.optimization_step = average.updates = 1
    for _ in range(25):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        reference.step(module.parameters())
    current = [parameter.detach().clone() for parameter in module.parameters()]
    with average.applied():
        for parameter, value, now in zip(module.parameters(), reference.shadow_params, current, strict=True):
            assert not torch.equal(parameter, now)
            torch.testing.assert_close(parameter.detach(), value)
    for parameter, now in zip(module.parameters(), current, strict=True):
        assert torch.equal(parameter, now)


def test_averaged_weights_follow_the_written_recursion():
    module = nn.Linear(1, 1, bias=False)
    average = AveragedWeights(module, decay=0.8)
    expected = module.weight.item()
    for update in range(60):
        with torch.no_grad():
            module.weight.fill_(math.sin(update))
        average.update()
        decay = min(0.8, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * math.sin(update)
    assert average.averages[0].item() == pytest.approx(expected, abs=1e-6)
    average.store()
    assert module.weight.item() == pytest.approx(expected, abs=1e-6)


def test_averages_return_even_when_the_block_raises():
    module = nn.Linear(2, 2)
    average = AveragedWeights(module, decay=0.5)
    before = module.weight.detach().clone()
    average.averages[0].zero_()
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert torch.equal(module.weight, before)


def test_fit_reaches_the_minimum_and_leaves_frozen_parameters_alone():
    objective = Quadratic()
    history = fit(objective, Constant(2), options(steps=150), name="quadratic", progress=False)
    assert len(history) == 150
    assert history[0] == pytest.approx(4.0)
    torch.testing.assert_close(objective.w.detach(), torch.full((3,), 2.0), atol=0.02, rtol=0)
    assert objective.frozen.item() == 1.0


def test_fit_gives_each_group_its_share_of_the_schedule():
    first, second = Quadratic(), Quadratic()
    objective = nn.ModuleDict({"first": first, "second": second})
    objective.forward = lambda target: {"loss": first(target)["loss"] + second(target)["loss"]}
    groups = [{"params": [first.w], "lr": 0.1}, {"params": [second.w], "lr": 0.01, "weight_decay": 0.0}]
    config = options(steps=1, schedule="constant", warmup=0.0)
    fit(objective, Constant(5), config, name="two", groups=groups, progress=False)
    # The first step of Adam is the learning rate itself.
    torch.testing.assert_close(first.w.detach(), torch.full((3,), 0.1))
    torch.testing.assert_close(second.w.detach(), torch.full((3,), 0.01))


def test_fit_clips_the_gradient():
    objective = Quadratic(1)
    seen = []
    objective.w.register_hook(lambda gradient: seen.append(gradient.item()))
    optimizer_steps = []
    original = torch.optim.AdamW.step

    def step(self, *arguments, **keywords):
        optimizer_steps.append(objective.w.grad.item())
        return original(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        fit(objective, Constant(100), options(steps=1, grad_clip=0.5), name="clipped", progress=False)
    assert seen == [pytest.approx(-200)]
    assert optimizer_steps == [pytest.approx(-0.5, rel=1e-4)]


def test_fit_shows_averaged_weights_at_checkpoints_and_leaves_them_in_the_end():
    objective = Quadratic()
    config = options(steps=20, ema_decay=0.9, checkpoint_every=10, schedule="constant", warmup=0.0)
    seen = []
    fit(
        objective,
        Constant(10),
        config,
        name="averaged",
        progress=False,
        on_checkpoint=lambda step: seen.append((step, objective.w[0].item())),
    )
    raw = Quadratic()
    fit(raw, Constant(10), options(steps=20, schedule="constant", warmup=0.0), name="raw", progress=False)
    assert [step for step, _ in seen] == [10, 20]
    assert seen[1][1] == pytest.approx(objective.w[0].item())
    assert seen[0][1] < objective.w[0].item() < raw.w[0].item()


@dataclass
class Settings:
    lr: float = 0.5
    out: Path = Path("somewhere")


def test_a_run_folder_holds_what_is_needed_to_repeat_a_run(tmp_path):
    run = RunFolder(tmp_path / "a" / "b", Settings())
    fit(Quadratic(), Constant(1), options(steps=3), name="logged", run=run, progress=False)
    assert json.loads((run.path / "config.json").read_text()) == {"lr": 0.5, "out": "somewhere"}
    assert json.loads((run.path / "versions.json").read_text())["torch"] == torch.__version__
    records = [json.loads(line) for line in (run.path / "losses.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert {record["stage"] for record in records} == {"logged"}
    assert records[0]["loss"] == pytest.approx(1.0) and records[0]["size"] == 0.0


def test_the_progress_bar_names_the_stage(capsys):
    fit(Quadratic(), Constant(1), options(steps=2), name="stage of the test", progress=True)
    output = capsys.readouterr().out
    assert "stage of the test" in output and "2/2" in output
    fit(Quadratic(), Constant(1), options(steps=2), name="silent", progress=False)
    assert capsys.readouterr().out == ""


def test_fit_refuses_frozen_objectives_and_infinite_losses():
    with pytest.raises(ValueError, match="expected a trainable parameter in the objective of 'cold', got none"):
        fit(Quadratic().requires_grad_(False), Constant(1), options(), name="cold", progress=False)
    with pytest.raises(RuntimeError, match=r"fit: the loss of 'wild' is inf at step 0; lower lr=0\.1"):
        fit(Quadratic(), Constant(1e30), options(), name="wild", progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "expected steps and batch_size of at least 1, got steps=0 and batch_size=1"),
        ({"batch_size": 0}, "got steps=60 and batch_size=0"),
        ({"ema_decay": 1.0}, r"expected ema_decay in \[0, 1\), got 1\.0; 0 turns averaging off"),
        ({"warmup": 1.0}, r"expected warmup, a share of the steps, in \[0, 1\), got 1\.0"),
        ({"schedule": "linear"}, "expected schedule 'one-cycle', 'cosine' or 'constant', got 'linear'"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)
