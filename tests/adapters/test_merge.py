"""Interpolation of adapters: the weighted mean of weights and alphas, exact at its ends, of equals only."""

import pytest
import torch

from temporal_layers import AlphaConfig, TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters import AdapterWeights, TemporalAdapter, TemporalConfig, inject, merge


@pytest.fixture
def make_adapter(make_unet, randomise):
    """Adapters with random weights, on one image model each."""

    def make(config=None, *, seed=0, **changes):
        torch.manual_seed(1)
        model = make_unet(**changes)
        torch.manual_seed(seed)
        return randomise(inject(model, config), std=0.5)

    return make


def test_every_tensor_is_the_mean(make_adapter):
    one, two, three = (make_adapter(seed=seed) for seed in range(3))
    merged = merge([one, two, three], weights=[0.5, 0.3, 0.2])
    tensors = [adapter.state_dict() for adapter in (one, two, three)]
    assert merged.weights.keys() == tensors[0].keys()
    for key, value in merged.weights.items():
        first, second, third = (state[key].double() for state in tensors)
        if key.endswith("logit"):
            alpha = 0.5 * first.sigmoid() + 0.3 * second.sigmoid() + 0.2 * third.sigmoid()
            torch.testing.assert_close(value.double().sigmoid(), alpha, rtol=0, atol=1e-7)
        else:
            torch.testing.assert_close(value.double(), 0.5 * first + 0.3 * second + 0.2 * third, rtol=1e-6, atol=1e-7)
        assert value.dtype == torch.float32
    assert (
        merged.weights["mid_block.resnets.0.temporal.convs.0.weight"].data_ptr()
        != one.state_dict()["mid_block.resnets.0.temporal.convs.0.weight"].data_ptr()
    )


def test_layers_that_differ_in_alpha_only_give_the_mean_of_their_outputs(make_adapter):
    config = TemporalConfig(transformer=None, include=("mid_block.resnets.1",))
    one, two = make_adapter(config), make_adapter(config)
    with torch.no_grad():
        for adapter, logit in ((one, -2.0), (two, 3.0)):
            (layer,) = adapter.layers.values()
            layer.blend.logit.fill_(logit)
    both = make_adapter(config)
    both.remove()
    adapter = TemporalAdapter.from_pretrained(both.model, merge([one, two], weights=[0.3, 0.7]))
    (layers,) = zip(*(entry.layers.values() for entry in (one, two, adapter)), strict=True)
    maps, temb = torch.randn(3, 16, 4, 4), torch.randn(3, 32)
    first, second, mean = (layer(maps, temb, num_frames=3) for layer in layers)
    torch.testing.assert_close(mean, 0.3 * first + 0.7 * second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", [0, 1])
def test_the_ends_are_exact(make_adapter, end):
    adapters = [make_adapter(seed=seed) for seed in range(2)]
    with torch.no_grad():
        next(iter(adapters[1 - end].state_dict().values())).fill_(torch.inf)  # times 0 it would be NaN
    merged = merge(adapters, weights=[1.0 - end, float(end)])
    expected = adapters[end].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in merged.weights.items())


def test_alphas_that_round_to_one_are_kept(make_adapter):
    adapters = [make_adapter(), make_adapter()]
    logits = [40.0, 30.0]  # both alphas are 1 in fp32
    for adapter, logit in zip(adapters, logits, strict=True):
        with torch.no_grad():
            for _, parameter in adapter.named_parameters("alpha"):
                parameter.fill_(logit)
    merged = merge(adapters, weights=[0.5, 0.5])
    expected = 30.0 + torch.log(torch.tensor(2.0))  # of e**-40 and e**-30 the mean is half of the latter
    for key, value in merged.weights.items():
        if key.endswith("logit"):
            torch.testing.assert_close(value, expected.expand_as(value), rtol=1e-4, atol=0)


def test_sources_of_every_kind_and_the_widest_dtype(make_adapter, tmp_path):
    one, two = make_adapter(seed=0), make_adapter(seed=1)
    one.save_pretrained(tmp_path / "one", dtype=torch.float16)
    expected = merge([one, two], weights=[0.25, 0.75])
    sources = [tmp_path / "one", str(tmp_path / "one"), AdapterWeights.load(tmp_path / "one")]
    for source in sources:
        merged = merge([source, two.snapshot()], weights=[0.25, 0.75])
        assert merged.weights.keys() == expected.weights.keys()
        for key, value in merged.weights.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected.weights[key], rtol=1e-3, atol=1e-3)
    half = merge([tmp_path / "one"] * 2, weights=[0.5, 0.5])
    stored = AdapterWeights.load(tmp_path / "one").weights
    assert all(torch.equal(value, stored[key]) for key, value in half.weights.items() if not key.endswith("logit"))


def test_what_is_merged_can_be_saved_and_put_in(make_adapter, make_unet, tmp_path):
    one, two = make_adapter(seed=0), make_adapter(seed=1)
    merged = merge([one, two], weights=[0.5, 0.5])
    merged.save_pretrained(tmp_path)
    loaded = TemporalAdapter.from_pretrained(make_unet(), tmp_path)
    direct = TemporalAdapter.from_pretrained(one.model, merged, name="both")
    assert direct.names == ("default", "both") and loaded.config == one.config
    found, expected = loaded.state_dict(), direct.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_two_adapters_of_one_model(make_adapter):
    adapter = make_adapter(seed=0)
    inject(adapter.model, name="other")
    merged = merge([adapter.snapshot("default"), adapter.snapshot("other")], weights=[0.5, 0.5])
    default, other = adapter.snapshot("default").weights, adapter.snapshot("other").weights
    key = next(key for key in default if "logit" not in key)
    torch.testing.assert_close(merged.weights[key], (default[key] + other[key]).detach() / 2)


def test_metadata(make_adapter):
    one, two = make_adapter(), make_adapter()
    one.metadata.update(licence="MIT", notes="city", base_model="a/b", title="City")
    two.metadata.update(licence="CC0", notes="city", base_model="a/b", title="Sea", extra="x")
    assert merge([one, two], weights=[0.5, 0.5]).metadata == {
        "licence": "MIT; CC0",
        "notes": "city",
        "base_model": "a/b",
    }


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1.0], "weights: expected one for each of at least one adapter, got 1 for 2 adapters"),
        ([0.5, 0.6], r"expected numbers from 0 to 1 with a sum of 1, got \[0.5, 0.6\] with a sum of 1.1; set the stre"),
        ([1.5, -0.5], r"expected numbers from 0 to 1 with a sum of 1, got \[1.5, -0.5\] with a sum of 1;"),
        ([float("nan"), 1.0], r"expected numbers from 0 to 1 with a sum of 1, got \[nan, 1.0\]"),
    ],
)
def test_weights_that_are_no_mean(make_adapter, weights, match):
    adapter = make_adapter()
    with pytest.raises(ValueError, match=f"merge: .*{match}"):
        merge([adapter, adapter], weights=weights)


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="merge: weights: expected one for each of at least one adapter, got 0 for 0"):
        merge([], weights=[])


@pytest.mark.parametrize(
    ("adapters", "weights", "match"),
    [
        ("motion", [1.0], "merge: adapters: expected a list, got 'motion'; pass one of each for every adapter"),
        (["motion"], None, "merge: weights: expected a list, got None; pass one of each for every adapter"),
        (["motion"], 1.0, "merge: weights: expected a list, got 1.0"),
    ],
)
def test_what_is_no_list(adapters, weights, match):
    with pytest.raises(ValueError, match=match):
        merge(adapters, weights)


@pytest.mark.parametrize(
    ("config", "changes", "match"),
    [
        (
            TemporalConfig(resblock=TemporalResBlockConfig(num_convs=4)),
            {},
            r"adapters\[1\]: TemporalConfig.resblock.num_convs: expected 2 as in the first, got 4; only adapters with",
        ),
        (TemporalConfig(transformer=None), {}, r"TemporalConfig.transformer: expected {.*} as in the first, got None"),
        (
            TemporalConfig(exclude=("mid",)),
            {},
            r"TemporalConfig.exclude: expected \(\) as in the first, got \('mid',\)",
        ),
        (
            TemporalConfig(transformer=TemporalTransformerConfig(attentions=("self", "self"))),
            {},
            r"TemporalConfig.transformer.attentions\[1\]: expected 'cross' as in the first, got 'self'",
        ),
        (
            TemporalConfig(resblock=TemporalResBlockConfig(alpha=AlphaConfig(init=0.9))),
            {},
            r"TemporalConfig.resblock.alpha.init: expected 0.5 as in the first, got 0.9",
        ),
        (
            None,
            {"cross_attention_dim": 8},
            r"sites\[0\].context_dim: expected 12 as in the first, got 8; only adapters",
        ),
    ],
)
def test_unequal_adapters(make_adapter, config, changes, match):
    with pytest.raises(ValueError, match=f"merge: .*{match}"):
        merge([make_adapter(), make_adapter(config, **changes)], weights=[0.5, 0.5])
