"""Averaged weights: the written recursion, diffusers' class, and weights that come back."""

import math

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from temporal_layers.recipes.training.average import AveragedWeights


def test_they_are_diffusers_ema_and_can_be_tried_on():
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


def test_diffusers_takes_over_their_state():
    module = nn.Linear(3, 2)
    average = AveragedWeights(module, decay=0.9)
    reference = EMAModel(module.parameters(), decay=0.5)
    for _ in range(3):
        nn.init.normal_(module.weight)
        average.update()
    reference.load_state_dict(average.state_dict())
    for _ in range(20):
        nn.init.normal_(module.weight)
        average.update()
        reference.step(module.parameters())
    for own, other in zip(average.averages, reference.shadow_params, strict=True):
        torch.testing.assert_close(own, other)


def test_they_follow_the_written_recursion():
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


def test_weights_of_16_bits_are_averaged_in_32():
    module = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(module.weight)
    average = AveragedWeights(module, decay=0.999)
    average.updates = 100_000
    nn.init.ones_(module.weight)
    for _ in range(1000):
        average.update()
    # In bf16 the average would stop at the value from which a thousandth of the way rounds to nothing.
    assert average.averages[0].item() == pytest.approx(1 - 0.999**1000, rel=1e-4)
    with average.applied():
        assert module.weight.dtype == torch.bfloat16 and 0.62 < module.weight.item() < 0.64


def test_weights_return_even_when_the_block_raises():
    module = nn.Linear(2, 2)
    average = AveragedWeights(module, decay=0.5)
    before = module.weight.detach().clone()
    average.averages[0].zero_()
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert torch.equal(module.weight, before)
