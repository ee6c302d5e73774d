"""Optimisers by name and learning rates over the steps."""

import sys
from types import ModuleType

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn

from temporal_layers.recipes.training.optim import OptimConfig, build_optimizer, learning_rate


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


def test_a_group_keeps_what_it_says_and_gets_the_rest():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [first], "lr": 0.5, "weight_decay": 0.0}, {"params": [second], "name": "rest"}]
    made = build_optimizer(groups, options(weight_decay=0.3, betas=(0.5, 0.6)))
    assert type(made) is torch.optim.AdamW
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in made.param_groups] == [
        (0.5, 0.0, (0.5, 0.6)),
        (0.1, 0.3, (0.5, 0.6)),
    ]


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_the_8_bit_optimiser_comes_from_the_package_that_is_there(package, monkeypatch):
    class Stand:
        def __init__(self, groups, **keywords):
            self.groups, self.keywords = groups, keywords

    for name in ("torchao", "torchao.optim", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    module = ModuleType(f"{package}.optim")
    module.AdamW8bit = Stand
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, f"{package}.optim", module)
    made = build_optimizer([{"params": []}], options(optimizer="adamw8bit", weight_decay=0.2))
    assert made.keywords == {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.2}
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(ValueError, match=r"expected the package torchao or bitsandbytes, got neither; pip install"):
        build_optimizer([{"params": []}], options(optimizer="adamw8bit"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "expected steps and batch_size of at least 1, got steps=0 and batch_size=1"),
        ({"batch_size": 0}, "got steps=60 and batch_size=0"),
        ({"lr": 0.0}, r"expected lr and grad_clip above 0, got lr=0\.0 and grad_clip=1\.0; grad_clip=inf turns"),
        ({"grad_clip": 0.0}, r"got lr=0\.1 and grad_clip=0\.0"),
        ({"weight_decay": -1.0}, r"expected weight_decay and checkpoint_every of at least 0, got weight_decay=-1\.0"),
        ({"checkpoint_every": -2}, "checkpoint_every=-2; 0 turns either off"),
        ({"betas": (0.9, 1.0)}, r"expected betas in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"ema_decay": 1.0}, r"expected ema_decay in \[0, 1\), got 1\.0; 0 turns averaging off"),
        ({"warmup": 1.0}, r"expected warmup, a share of the steps, in \[0, 1\), got 1\.0"),
        ({"schedule": "linear"}, "expected schedule 'one-cycle', 'cosine' or 'constant', got 'linear'"),
        ({"optimizer": "sgd"}, "expected optimizer 'adamw' or 'adamw8bit', got 'sgd'"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)
