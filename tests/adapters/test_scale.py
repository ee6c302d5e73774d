"""The strength of the temporal layers: 1 changes nothing, 0 is the image model, everything else is linear at a site."""

import copy
import math
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from temporal_layers import (
    AlphaBlend,
    AlphaConfig,
    TemporalConv,
    TemporalConvConfig,
    TemporalResBlock,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
)
from temporal_layers.adapters import TemporalConfig, adapter_of, inject

FRAMES = 3
LAYERS = {
    "resblock": lambda: TemporalResBlock(8, num_groups=4),
    "transformer": lambda: TemporalTransformerBlock(8, num_heads=2),
    "projected": lambda: TemporalTransformerBlock(
        8, num_heads=2, config=TemporalTransformerConfig(projection=True, alpha=AlphaConfig(shape="channel"))
    ),
    "conv": lambda: TemporalConv(8),
    "causal conv": lambda: TemporalConv(8, config=TemporalConvConfig(causal=True)),
}
EVERY_KIND = TemporalConfig(conv_in=TemporalTransformerConfig(num_heads=2), conv_out=TemporalConvConfig())


def carrier(layer):
    return getattr(layer, "blend", layer)


@pytest.fixture(params=LAYERS)
def layer(request):
    made = LAYERS[request.param]().double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


@pytest.fixture
def clips():
    return torch.randn(2, 4, FRAMES, 8, 8)


@pytest.fixture
def text():
    return torch.randn(2, 3, 12)


@pytest.fixture
def call(clips, text):
    """Calls a UNet on the same clips and text every time."""

    def call(model):
        with torch.no_grad():
            return model(clips, 7, text).sample

    return call


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 1.7, -0.5])
def test_a_layer_is_linear_in_its_scale(layer, scale):
    spatial = torch.randn(2 * FRAMES, 8, 2, 3, dtype=torch.float64)
    full = layer(spatial, num_frames=FRAMES)
    carrier(layer).scale = scale
    torch.testing.assert_close(
        layer(spatial, num_frames=FRAMES), spatial + scale * (full - spatial), rtol=0, atol=1e-12
    )


def test_frames_that_are_images_stay_exact(layer):
    spatial = torch.randn(2 * FRAMES, 8, 2, 3, dtype=torch.float64)
    image_only = torch.tensor([[True, False, False], [False, False, True]])
    carrier(layer).scale = 0.6
    scaled = layer(spatial, num_frames=FRAMES, image_only=image_only)
    assert torch.equal(scaled[image_only.flatten()], spatial[image_only.flatten()])
    assert not torch.allclose(scaled[~image_only.flatten()], spatial[~image_only.flatten()], atol=1e-3)


def test_the_gradient_is_that_of_the_formula(layer):
    spatial = torch.randn(FRAMES, 8, 2, 3, dtype=torch.float64)
    weight = torch.randn_like(spatial)
    (layer(spatial, num_frames=FRAMES) * weight).sum().mul(0.6).backward()
    expected = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    layer.zero_grad()
    carrier(layer).scale = 0.6
    (layer(spatial, num_frames=FRAMES) * weight).sum().backward()
    assert expected
    for name, grad in expected.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, grad, rtol=1e-9, atol=1e-12)


def test_half_precision_does_not_lose_a_small_scale():
    blend = AlphaBlend(AlphaConfig(init=0.0, learned=False))
    blend.scale = 0.001  # 1 - 0.001 is 1 in bfloat16
    spatial, temporal = torch.zeros(2, 4, 1, 1).bfloat16(), torch.ones(2, 4, 1, 1).bfloat16()
    expected = torch.full_like(spatial, 0.001)
    torch.testing.assert_close(blend(spatial, temporal, num_frames=2), expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(blend.residual(spatial, temporal, num_frames=2), expected, rtol=2e-3, atol=0)


def test_under_autocast_the_dtype_is_that_of_the_map():
    conv = TemporalConv(8)
    with torch.no_grad():
        conv.conv.weight.normal_()
    conv.scale = 0.5
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(FRAMES, 8, 2, 2), num_frames=FRAMES).dtype == torch.float32


def test_zero_is_the_image_model_whatever_the_weights_are(make_unet, fold, clips, text, call):
    model = make_unet()
    with torch.no_grad():
        images = model(fold(clips), 7, text.repeat_interleave(FRAMES, 0)).sample
    adapter = inject(model, EVERY_KIND)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters("temporal"):
            parameter.fill_(math.nan)
    assert call(model).isnan().any()
    adapter.scale = 0
    assert torch.equal(fold(call(model)), images)


def test_one_again_is_bit_identical(make_unet, randomise, call):
    model = make_unet()
    adapter = randomise(inject(model, EVERY_KIND))
    full = call(model)
    adapter.scale = 0.5
    assert not torch.equal(call(model), full)
    adapter.scale = 1
    assert torch.equal(call(model), full)


def test_scales_by_site(make_unet, randomise, call):
    model = make_unet()
    adapter = randomise(inject(model))
    names = [site.name for site in adapter.sites]
    adapter.scale = {"down_blocks.0.resnets.0": 0.25, r"^down": 0.5, "mid_block": 0}
    expected = {
        name: 0.25
        if name == "down_blocks.0.resnets.0"
        else 0.5
        if name.startswith("down")
        else float("mid" not in name)
        for name in names
    }
    assert adapter.scale == expected
    scaled = call(model)
    with torch.no_grad():  # by hand: the alpha that leaves that share of the temporal branch
        for name, layer in adapter.layers.items():
            layer.blend.scale = 1.0
            layer.blend.logit.copy_(torch.logit(1 - expected[name] * (1 - layer.blend.alpha)))
    torch.testing.assert_close(call(model), scaled, rtol=1e-4, atol=1e-5)


def test_what_was_read_can_be_set(make_unet):
    adapter = inject(make_unet())
    adapter.scale = {"up": 0.5}
    before = adapter.scale
    adapter.scale = before
    assert adapter.scale == before
    adapter.scale = {"mid_block": 2}
    assert set(adapter.scale.values()) == {1.0, 2.0}  # the last assignment says everything


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_it_and_have_their_own(make_unet, make_copy):
    model = make_unet()
    adapter = inject(model, EVERY_KIND)
    adapter.scale = 0.5
    twin = adapter_of(make_copy(model))
    assert twin.scale == 0.5
    twin.scale = 0.25
    assert adapter.scale == 0.5


def test_it_is_not_saved(make_unet, tmp_path):
    adapter = inject(make_unet())
    adapter.save_pretrained(tmp_path / "one")
    adapter.scale = 0.5
    adapter.save_pretrained(tmp_path / "other")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("1", r"TemporalAdapter.scale: expected a finite number, got '1'; 0 is the image model"),
        (True, r"TemporalAdapter.scale: expected a finite number, got True"),
        (math.nan, r"TemporalAdapter.scale: expected a finite number, got nan"),
        ({"up": None}, r"TemporalAdapter.scale\['up'\]: expected a finite number, got None"),
        ({"up_block.9": 1}, r"scale: expected a pattern that is found in the name of a site, got 'up_block.9', "),
        ({"(": 1}, r"scale: expected regular expressions as keys, got '\(': missing"),
        ({3: 1}, r"scale: expected regular expressions as keys, got 3: first argument"),
    ],
)
def test_refused_scales_change_nothing(make_unet, value, match):
    adapter = inject(make_unet())
    adapter.scale = 0.5
    with pytest.raises(ValueError, match=match):
        adapter.scale = value
    assert adapter.scale == 0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in diffusers
def test_a_compiled_model_follows(make_unet, randomise, clips, text, call):
    torch._dynamo.reset()
    small = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    model = make_unet(**small, mid_block_type=None)
    adapter = randomise(inject(model))
    backend = CompileCounterWithBackend("eager")
    model.compile(backend=backend, fullgraph=True)
    results = []
    for scale in (1.0, 0.5, 0.0, 0.8, 0.2, 0.9):
        adapter.scale = scale
        results.append(call(model))
        with torch.no_grad():
            torch.testing.assert_close(results[-1], model.forward(clips, 7, text).sample, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    assert backend.frame_count == 3  # for 1, for 0 and for all others
    torch._dynamo.reset()
