"""Alpha: its value, its gradient, its precision, its shapes, and what a frame marked as an image gets."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers import AlphaBlend, AlphaConfig, TemporalResBlock, TemporalTransformerBlock

SHAPES = {
    "scalar": (AlphaConfig(init=0.25), ()),
    "frame": (AlphaConfig(init=0.25, shape="frame", num_frames=3), (3, 1)),
    "channel": (AlphaConfig(init=0.25, shape="channel"), (1, 4)),
}


def branches(dtype=torch.float64, shape=(6, 4, 2, 3)):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


@given(init=st.floats(1e-4, 1 - 1e-4), learned=st.booleans())
def test_alpha_starts_at_init(init, learned):
    blend = AlphaBlend(AlphaConfig(init=init, learned=learned))
    assert blend.alpha.dtype == torch.float32
    # A logit of 9 is rounded to 5e-7, which the sigmoid's slope of at most 1/4 brings below 1.2e-7.
    assert blend.alpha.item() == pytest.approx(init, abs=2e-7)


@pytest.mark.parametrize("init", [0.0, 1.0])
def test_a_fixed_alpha_picks_one_branch_exactly(init):
    spatial, temporal = branches(torch.float32)
    blend = AlphaBlend(AlphaConfig(init=init, learned=False))
    assert list(blend.parameters()) == [] and blend.state_dict() == {}
    assert torch.equal(blend(spatial, temporal, num_frames=3), spatial if init else temporal)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, randomised):
    config, shape = SHAPES[name]
    blend = randomised(AlphaBlend(config, channels=4))
    assert blend.alpha.shape == shape and blend.logit.shape == (shape or (1,))
    spatial, temporal = branches()
    alpha = blend.logit.detach().sigmoid()
    # (frames or 1, channels or 1) over the clips of (batch, frames, channels, height, width)
    alpha = alpha.expand(3, 4)[None, :, :, None, None].expand(2, 3, 4, 1, 1).flatten(0, 1)
    expected = alpha * spatial + (1 - alpha) * temporal
    got = blend(spatial, temporal, num_frames=3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    residual = blend.residual(spatial, temporal - spatial, num_frames=3)
    torch.testing.assert_close(residual, expected, rtol=1e-12, atol=1e-12)

    tokens = [x.flatten(2).transpose(1, 2) for x in (spatial, temporal)]
    got = blend(*tokens, num_frames=3, channel_dim=-1)
    torch.testing.assert_close(got, expected.flatten(2).transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_a_fixed_alpha_of_every_shape_equals_a_scalar_one(name):
    config, _ = SHAPES[name]
    fixed = AlphaConfig(init=0.3, learned=False, shape=config.shape, num_frames=config.num_frames)
    spatial, temporal = branches()
    got = AlphaBlend(fixed, channels=4)(spatial, temporal, num_frames=3)
    torch.testing.assert_close(got, 0.3 * spatial + 0.7 * temporal, rtol=1e-12, atol=1e-12)


@given(init=st.floats(0.01, 0.99))
def test_the_gradient_is_that_of_the_sigmoid(init):
    blend = AlphaBlend(AlphaConfig(init=init)).double()
    spatial, temporal = branches()
    upstream = torch.randn_like(spatial)
    (blend(spatial, temporal, num_frames=3) * upstream).sum().backward()
    alpha = 1 / (1 + math.exp(-blend.logit.item()))
    expected = alpha * (1 - alpha) * ((spatial - temporal) * upstream).sum()
    assert blend.logit.grad.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize(
    ("cast", "expected"),
    [
        (lambda layer: layer.to(torch.bfloat16), torch.float32),
        (lambda layer: layer.half(), torch.float32),
        (lambda layer: layer.double(), torch.float64),
        (lambda layer: layer.double().bfloat16(), torch.float64),
        (lambda layer: layer.double().float(), torch.float32),
        (lambda layer: layer.to("cpu", torch.float16), torch.float32),
    ],
    ids=["to(bf16)", "half", "double", "double,bf16", "double,float", "to(cpu,f16)"],
)
def test_casts_never_narrow_alpha_below_fp32(cast, expected):
    layer = TemporalResBlock(8, num_groups=4)
    layer.blend.logit.grad = torch.ones_like(layer.blend.logit)
    torch.nn.init.constant_(layer.blend.logit, 6.9)
    layer = cast(layer)
    assert layer.blend.logit.dtype == layer.blend.logit.grad.dtype == expected
    assert layer.blend.logit.item() == pytest.approx(6.9, abs=1e-6)  # in bf16 it would be 6.90625
    assert layer.blend.alpha.dtype == expected


def test_built_in_bf16_and_moved_to_meta_and_back():
    layer = TemporalResBlock(8, num_groups=4, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in layer.convs.parameters()} == {torch.bfloat16}
    assert layer.blend.logit.dtype == torch.float32
    layer = layer.to("meta")
    assert layer.blend.logit.is_meta
    layer = layer.to_empty(device="cpu")
    assert layer.blend.logit.dtype == torch.float32 and layer.convs[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SHAPES)
def test_state_dict_round_trip(name, randomised):
    config, shape = SHAPES[name]
    trained = randomised(AlphaBlend(config, channels=4), torch.float32)
    fresh = AlphaBlend(config, channels=4)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.logit, trained.logit) and fresh.logit.shape == (shape or (1,))
    fresh.load_state_dict({"logit": trained.logit.reshape(shape).bfloat16()})
    assert fresh.logit.dtype == torch.float32


@pytest.mark.parametrize("kind", ["resblock", "transformer"])
def test_a_learning_rate_of_1e_4_moves_alpha_in_a_bf16_model(kind):
    if kind == "resblock":
        layer = TemporalResBlock(8, num_groups=4, dtype=torch.bfloat16)
    else:
        layer = TemporalTransformerBlock(8, num_heads=2, dtype=torch.bfloat16)
    for name, parameter in layer.named_parameters():
        if "blend" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    optimiser = torch.optim.AdamW([layer.blend.logit], lr=1e-4, weight_decay=0.0)
    maps = torch.randn(4, 8, 2, 2, dtype=torch.bfloat16)
    for _ in range(100):
        optimiser.zero_grad()
        layer(maps, num_frames=4).float().square().mean().backward()
        optimiser.step()
    # Adam moves by the learning rate a step while the sign of the gradient stays; bf16 would round each step away.
    assert abs(layer.blend.logit.item()) == pytest.approx(100 * 1e-4, rel=0.05)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_image_only_frames_keep_the_spatial_branch_exactly(name, residual):
    blend = AlphaBlend(SHAPES[name][0], channels=4)
    spatial, temporal = branches(torch.float32)
    flags = torch.tensor([[True, False, False], [False, False, True]])
    temporal[flags.flatten()] = torch.nan  # whatever the temporal branch made of an image must not matter
    temporal.requires_grad_()
    merge = blend.residual if residual else blend
    got = merge(spatial, temporal, num_frames=3, image_only=flags)
    assert torch.equal(got[flags.flatten()], spatial[flags.flatten()])
    free = ~flags.flatten()
    expected = merge(spatial.where(free[:, None, None, None], 0), temporal.detach().nan_to_num(), num_frames=3)
    assert torch.equal(got[free], expected[free])
    got.sum().backward()
    assert torch.equal(temporal.grad[~free], torch.zeros_like(temporal.grad[~free]))
    assert torch.isfinite(blend.logit.grad).all() and (blend.logit.grad != 0).any()


def test_an_alpha_near_one_is_not_one_in_bf16():
    blend = AlphaBlend(AlphaConfig(init=0.999)).bfloat16()
    spatial = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)
    temporal = torch.full_like(spatial, 1000.0)
    assert (blend(spatial, temporal, num_frames=1) == 1.0).all()  # 0 if 1 - alpha were rounded to bf16


def test_it_tells_what_it_is():
    assert "learned, shape=scalar, init=0.5" in repr(AlphaBlend())
    assert "fixed, shape=channel, init=0.0" in repr(
        AlphaBlend(AlphaConfig(init=0.0, learned=False, shape="channel"), channels=4)
    )
