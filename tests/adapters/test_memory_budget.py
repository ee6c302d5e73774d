"""A memory budget of a whole model: spatial modules on a few frames, transformers over frames on a few positions."""

import copy
import re
from functools import partial

import pytest
import torch

from temporal_layers import FrameCache, TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalConfig, adapter_of, inject


def assert_same(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def rows(monkeypatch):
    """Rows that a spatial module got in each call, for a module of a model."""

    def rows(module):
        calls, forward = [], type(module).spatial_class.forward

        def counting(self, hidden_states, *args, **kwargs):
            if self is module:
                calls.append(len(hidden_states))
            return forward(self, hidden_states, *args, **kwargs)

        monkeypatch.setattr(type(module).spatial_class, "forward", counting)
        return calls

    return rows


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 50_000, 10**12])
@pytest.mark.parametrize("policy", ["after_transformer_block", "after_attention"])
def test_unets(make_unet, randomise, rows, policy, budget):
    model = make_unet().double()
    adapter = randomise(inject(model, TemporalConfig(transformer_policy=policy)))
    sample, text = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)
    expected = model(sample, 7, text).sample
    adapter.memory_budget = budget
    calls = rows(model.mid_block.resnets[0])
    assert_same(model(sample, 7, text).sample, expected)
    assert calls == {1: [1] * 6, 10**12: [6]}.get(budget, calls) and sum(calls) == 6
    adapter.memory_budget = None
    calls.clear()
    assert torch.equal(model(sample, 7, text).sample, expected) and calls == [6]


@torch.no_grad()
def test_unconditional_unets(make_unconditional, randomise):
    model = make_unconditional().double()
    adapter = randomise(inject(model))
    sample = torch.randn(1, 4, 3, 8, 8, dtype=torch.float64)
    expected = model(sample, 7).sample
    adapter.memory_budget = 1
    assert_same(model(sample, 7).sample, expected)


@torch.no_grad()
def test_a_module_around_another_temporal_layer_stays_whole(make_unet, randomise):
    """Its frames have to meet in the layer inside; a user's model may have such a module."""
    model = make_unet().double()
    adapter = randomise(inject(model))
    outer, inner = (model.mid_block.resnets[index] for index in (0, 1))
    maps, temb = torch.randn(3, 16, 4, 4, dtype=torch.float64), torch.randn(3, 32, dtype=torch.float64)
    outer.nonlinearity = torch.nn.Sequential(outer.nonlinearity, inner_of(inner, temb))
    with model._temporal_state.during(3, None):
        expected = outer(maps, temb)
        adapter.memory_budget = 1
        assert_same(outer(maps, temb), expected)


def inner_of(module, temb):
    class Inside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, maps):
            return self.module(maps, temb) if maps.ndim == 4 else maps

    return Inside()


@torch.no_grad()
def test_the_image_model_is_untouched(make_unet, rows):
    model = make_unet()
    adapter = inject(model)
    adapter.memory_budget = 1
    sample, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 3, 12)
    calls = rows(model.mid_block.resnets[0])
    with adapter.disabled():
        model(sample, 7, text)
    model(sample[:, :, 0], 7, text)
    assert calls == [6, 2]


def test_memory_of_a_unet_grows_with_its_maps_only(make_unet, peak):
    """From 16 to 64 frames the modules' own memory stays, and with it most of what a pass needs."""
    model = make_unet(block_out_channels=(16, 16))
    adapter = inject(model, TemporalConfig(resblock=None))
    text = torch.randn(1, 3, 12)

    def grows():
        return peak(lambda: model(torch.randn(1, 4, 64, 8, 8), 7, text)) - peak(
            lambda: model(torch.randn(1, 4, 16, 8, 8), 7, text)
        )

    unlimited = grows()
    adapter.memory_budget = 200_000
    assert grows() < 0.8 * unlimited


def test_checkpointing_and_a_budget(make_unet, randomise):
    model = make_unet().double()
    randomise(inject(model))
    sample, text = torch.randn(1, 4, 3, 8, 8, dtype=torch.float64), torch.randn(1, 3, 12, dtype=torch.float64)

    def gradients(unet):
        unet.zero_grad()
        unet(sample, 7, text).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in unet.parameters() if parameter.grad is not None]

    expected = gradients(model)
    for function in (None, torch.utils.checkpoint.checkpoint):
        twin = copy.deepcopy(model).train()
        adapter_of(twin).memory_budget = 1
        if function is None:
            twin.enable_gradient_checkpointing()
        else:  # this kind runs forward without gradients, and so in pieces
            twin.enable_gradient_checkpointing(partial(function, use_reentrant=True))
            sample.requires_grad_()
        for got, value in zip(gradients(twin), expected, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_streams_and_a_budget(make_unet, randomise):
    model = make_unet().double()
    config = TemporalConfig(
        resblock=TemporalResBlockConfig(norm="frame", causal=True),
        transformer=TemporalTransformerConfig(causal=True, window=2),
    )
    adapter = randomise(inject(model, config))
    sample, text = torch.randn(1, 4, 5, 8, 8, dtype=torch.float64), torch.randn(1, 3, 12, dtype=torch.float64)
    expected = model(sample, 7, text).sample
    adapter.memory_budget = 20_000
    cache, blocks = FrameCache(), []
    for block in sample.split([1, 3, 1], dim=2):
        with adapter.streaming(cache):
            blocks.append(model(block, 7, text).sample)
    assert_same(torch.cat(blocks, dim=2), expected)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_mistakes(make_unet, value):
    message = f"TemporalAdapter.memory_budget: expected a whole number of at least 1, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        inject(make_unet()).memory_budget = value
