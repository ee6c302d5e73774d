"""What ``fit`` does with an objective, a stream and settings; test_resume.py is about stopping and going on."""

import gc
import json
import math
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from torch import nn

from temporal_layers.adapters import inject
from temporal_layers.recipes.training.engine import (
    EngineConfig,
    OptimConfig,
    RunFolder,
    fit,
    learning_rate,
    make_accelerator,
)
from temporal_layers.recipes.training.streams import SampleStream, generator_at


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


class Regression(nn.Module):
    """A small network; the batch is inputs, targets and names, which are no tensors."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2)).double()

    def forward(self, x, y):
        return {"loss": (self.net(x) - y).square().mean()}


def pairs(position):
    return tuple(torch.randn(2, 4, generator=generator_at(0, position), dtype=torch.float64).split([1, 1])[i][0, :n]
                 for i, n in ((0, 4), (1, 2)))  # fmt: skip


def test_accumulated_batches_are_one_large_batch():
    def weights(batch_size, accumulation):
        objective = Regression()
        config = options(steps=7, batch_size=batch_size, weight_decay=0.1)
        engine = EngineConfig(accumulation=accumulation)
        history = fit(objective, SampleStream(pairs), config, name="accumulated", engine=engine, progress=False)
        return history, list(objective.parameters())

    (whole, expected), (parts, found) = weights(6, 1), weights(2, 3)
    assert parts == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_a_step_is_torchs_own():
    """The loop written out with torch alone comes to the same weights, bit for bit."""
    objective, reference = Regression(), Regression()
    config = options(steps=6, batch_size=3, weight_decay=0.1, grad_clip=0.05, lr=0.03, betas=(0.8, 0.95))
    history = fit(objective, SampleStream(pairs), config, name="by hand", progress=False)
    optimizer = torch.optim.AdamW(reference.parameters(), betas=(0.8, 0.95), weight_decay=0.1)
    clipped = []
    for step, batch in zip(range(6), SampleStream(pairs).batches(0, batch_size=3), strict=False):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        loss = reference(*batch)["loss"]
        assert history[step] == loss.item()
        loss.backward()
        clipped.append(nn.utils.clip_grad_norm_(reference.parameters(), 0.05).item() > 0.05)
        optimizer.step()
        optimizer.zero_grad()
    assert any(clipped)
    torch.testing.assert_close(list(objective.parameters()), list(reference.parameters()), rtol=1e-13, atol=0)


def test_what_an_objective_draws_is_a_function_of_seed_and_step_and_the_callers_generator_goes_on():
    def losses(seed, before):
        objective = Regression(dropout=0.5)
        torch.manual_seed(before)
        found = fit(objective, SampleStream(pairs), options(steps=3), name="drawn", seed=seed, progress=False)
        return found, torch.rand(1).item()

    (first, after), (again, other), (seeded, _) = losses(0, 5), losses(0, 6), losses(1, 5)
    assert first == again and first != seeded
    torch.manual_seed(5)
    assert after == torch.rand(1).item() != other


class Turns(nn.Module):
    """A generator moves towards what the discriminator says, the discriminator away from it."""

    turns = ("generator", "discriminator")

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((1,), 3.0))
        self.calls = []

    def forward(self, target, *, turn):
        self.calls.append((turn, self.generator.item(), self.discriminator.item()))
        assert self.generator.grad is None and self.discriminator.grad is None
        distance = (self.generator - self.discriminator).square().sum()
        return {"loss": distance if turn == "generator" else -distance, "gap": distance.sqrt()}


def turn_groups(objective):
    return {
        "discriminator": [{"params": [objective.discriminator], "lr": 0.01}],
        "generator": [{"params": [objective.generator], "lr": 0.1, "name": "alone"}],
    }


def test_turns_step_their_own_parameters_one_after_the_other(tmp_path):
    objective = Turns()
    run = RunFolder(tmp_path, Settings())
    config = options(steps=2, schedule="constant", warmup=0.0, checkpoint_every=1)
    history = fit(objective, Constant(0), config, name="turns", groups=turn_groups(objective), run=run, progress=False)
    # Adam's first step is the learning rate: the generator goes up by 0.1, then the discriminator up by 0.01.
    expected = [("generator", 1.0, 3.0), ("discriminator", 1.1, 3.0), ("generator", 1.1, 3.01)]
    assert objective.calls[:3] == [(turn, pytest.approx(g), pytest.approx(d)) for turn, g, d in expected]
    assert [turn for turn, _, _ in objective.calls] == ["generator", "discriminator"] * 2
    [first, _] = run.records()
    assert first["loss"] == first["generator/loss"] == history[0] == pytest.approx(4.0)
    assert first["discriminator/loss"] == pytest.approx(-(1.9**2))
    assert first["grad_norm/generator alone"] == pytest.approx(4.0)
    assert first["grad_norm/discriminator"] == pytest.approx(3.8)


@pytest.mark.parametrize(
    ("make", "groups", "message"),
    [
        (Turns, None, r"a dictionary from the turns \('generator', 'discriminator'\) of 'wrong' to .* got NoneType"),
        (Turns, lambda o: {"generator": []}, r"got \['generator'\]"),
        (
            Regression,
            lambda o: {"a": []},
            r"expected a list of parameter groups, as 'wrong' has no turns, got .*\['a'\]",
        ),
        (
            Regression,
            lambda o: [{"params": o.net[0].parameters()}],
            r"expected every trainable parameter of 'wrong' in one, got 2 in none, the first of them 'net\.3\.weight'",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(make, groups, message):
    objective = make()
    with pytest.raises(ValueError, match=message):
        fit(objective, Constant(0), options(), name="wrong", groups=groups and groups(objective), progress=False)


def tiny_unet():
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=8,
    )
    return unet, inject(unet).freeze()


class Still(nn.Module):
    """A loss that a UNet's output has no part in: all gradients are zero, only weight decay moves anything."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, clip, text):
        return {"loss": 0 * self.unet(clip, 7, text).sample.sum()}


def test_alpha_is_not_decayed_and_its_mean_is_logged(tmp_path):
    unet, adapter = tiny_unet()
    with torch.no_grad():
        for _, parameter in adapter.named_parameters("alpha"):
            parameter.fill_(2.0)
    before = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    config = options(steps=4, weight_decay=0.5, schedule="constant", warmup=0.0)
    fit(
        Still(unet),
        SampleStream(lambda position: (torch.zeros(3, 2, 8, 8), torch.zeros(2, 8))),
        config,
        name="still",
        groups=adapter.parameter_groups(lr=config.lr, weight_decay=config.weight_decay),
        run=(run := RunFolder(tmp_path, Settings())),
        progress=False,
    )
    for _, parameter in adapter.named_parameters("alpha"):
        assert (parameter == 2.0).all()
    for name, parameter in adapter.named_parameters("spatial"):
        assert torch.equal(parameter, before[name])
    for name, parameter in adapter.named_parameters("temporal"):
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * 0.5) ** 4)
    for record in run.records():
        assert record["alpha"] == pytest.approx(1 / (1 + math.exp(-2)))
        assert record["grad_norm/temporal"] == record["grad_norm/alpha"] == 0
        layers = {key: value for key, value in record.items() if key.startswith("alpha/")}
        assert layers == pytest.approx(
            dict.fromkeys((f"alpha/unet.{site.name}" for site in adapter.sites), record["alpha"])
        )


def test_gradient_checkpointing_computes_the_same_with_fewer_tensors_kept():
    def losses(checkpointing):
        torch.manual_seed(0)
        unet, adapter = tiny_unet()
        objective = Still(unet)
        kept = []

        def forward(clip, text):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
                return {"loss": (unet(clip, 7, text).sample - 1).square().mean()}

        objective.forward = forward
        draw = lambda position: (torch.randn(3, 2, 8, 8, generator=generator_at(0, position)), torch.ones(2, 8))  # noqa: E731
        history = fit(
            objective.train(),
            SampleStream(draw),
            options(steps=3),
            name="checkpointing",
            groups=adapter.parameter_groups(lr=0.1),
            engine=EngineConfig(gradient_checkpointing=checkpointing),
            progress=False,
        )
        return history, sum(kept), unet.is_gradient_checkpointing

    (plain, much, off), (same, less, on) = losses(False), losses(True)
    assert (off, on) == (False, True)
    assert same == pytest.approx(plain, rel=1e-6)
    assert less < much / 2


@pytest.fixture
def fresh_accelerate():
    """Precision is a setting of the whole process in accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_computes_in_bf16_and_keeps_weights_in_fp32(fresh_accelerate):
    objective = nn.Linear(4, 4)
    seen = []

    def forward(x):
        output = nn.functional.linear(x, objective.weight, objective.bias)
        seen.append(output.dtype)
        return {"loss": output.float().square().mean()}

    objective.forward = forward
    stream = SampleStream(lambda position: (torch.ones(4),))
    engine = EngineConfig(precision="bf16")
    history = fit(objective, stream, options(steps=30), name="bf16", engine=engine, progress=False)
    assert set(seen) == {torch.bfloat16}
    assert objective.weight.dtype == torch.float32 and history[-1] < history[0] / 10
    assert objective.forward is forward  # what accelerate wraps around it is gone
    with pytest.raises(ValueError, match=r"fit: accelerator: expected precision 'no', got 'bf16'; make it with make_a"):
        fit(
            objective, stream, options(), name="x", accelerator=Accelerator(), engine=EngineConfig(precision="no"),
            progress=False,
        )  # fmt: skip


def test_validation_sees_averaged_weights_and_is_logged(tmp_path):
    objective = Quadratic()
    run = RunFolder(tmp_path, Settings())
    config = options(steps=6, ema_decay=0.9, schedule="constant", warmup=0.0)
    seen = []

    def validate(step):
        seen.append((step, objective.w[0].item()))
        return {"distance": 0.25 * step}

    fit(
        objective,
        Constant(10),
        config,
        name="validated",
        run=run,
        engine=EngineConfig(validate_every=3),
        progress=False,
        validate=validate,
    )
    assert [step for step, _ in seen] == [3, 6]
    assert seen[1][1] == objective.w[0].item()  # the average is what is left in the end
    found = [(r["step"], r["validation/distance"]) for r in run.records() if "validation/distance" in r]
    assert found == [(2, 0.75), (5, 1.5)]
    assert len(run.records()) == 8


def test_fit_forgets_its_optimisers():
    accelerator = make_accelerator()
    kept = accelerator.prepare(nn.Linear(1, 1))
    for _ in range(2):
        objective = Quadratic()
        fit(objective, Constant(1), options(steps=1), name="gone", accelerator=accelerator, progress=False)
    assert accelerator._optimizers == [] and accelerator._models == [kept]
    alive = weakref.ref(objective)
    del objective
    gc.collect()
    assert alive() is None
