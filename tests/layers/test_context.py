"""Frame contexts in single layers: figure 4 of the Video LDM written out, identity at the start, and every error."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from temporal_layers import (
    AlphaConfig,
    ContextConfig,
    ContextInput,
    ContextTransformer,
    TemporalResBlock,
    TemporalResBlockConfig,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
)

BATCH, FRAMES, CHANNELS, PLANES = 2, 3, 8, 5
CONTEXT = ContextConfig(channels=PLANES)


def make_block(**options):
    config = TemporalResBlockConfig(timestep_embedding=False, **options)
    return TemporalResBlock(CHANNELS, num_groups=4, config=config, context=CONTEXT)


def maps(height=4, width=6, channels=CHANNELS, dtype=torch.float64):
    return torch.randn(BATCH * FRAMES, channels, height, width, dtype=dtype)


def area(planes, height, width):
    """Means over the pixels that each pixel of a smaller map covers; written out for whole factors."""
    tall, wide = planes.shape[-2] // height, planes.shape[-1] // width
    rows = [[planes[..., tall * i : tall * (i + 1), wide * j : wide * (j + 1)].mean((-2, -1)) for j in range(width)]
            for i in range(height)]  # fmt: skip
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@pytest.mark.parametrize("causal", [False, True])
def test_the_block_is_figure_4(randomised, relative_error, causal):
    """z enters the skip as it is, and the temporal branch with the context merged in front of its convolutions."""
    layer = randomised(make_block(causal=causal, norm="frame" if causal else "clip"))
    plain = TemporalResBlock(CHANNELS, num_groups=4, config=layer.config).double()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "context_in" not in name})
    z, context = maps(), maps(8, 12, PLANES)
    merged = z + F.conv2d(area(context, 4, 6), layer.context_in.weight, padding=1)
    alpha = layer.blend.alpha
    with torch.no_grad():
        plain.blend.logit.fill_(-1e9)  # alpha 0: the temporal branch alone
        temporal = plain.double()(merged, num_frames=FRAMES)
    expected = alpha * z + (1 - alpha) * temporal
    assert relative_error(layer(z, num_frames=FRAMES, frame_context=context), expected) < 1e-12


def test_the_input_is_a_convolution_with_more_channels(randomised, relative_error):
    wide = randomised(nn.Conv2d(4 + PLANES, CHANNELS, 3, padding=1))
    image = nn.Conv2d(4, CHANNELS, 3, padding=1).double()
    layer = ContextInput(CHANNELS, config=CONTEXT).double()
    with torch.no_grad():
        image.weight.copy_(wide.weight[:, :4])
        image.bias.copy_(wide.bias)
        layer.context_in.weight.copy_(wide.weight[:, 4:])
    latents, context = maps(channels=4), maps(channels=PLANES)
    got = layer(image(latents), context, num_frames=FRAMES)
    assert relative_error(got, wide(torch.cat([latents, context], 1))) < 1e-12
    layer.scale = 0.25
    weak = layer(image(latents), context, num_frames=FRAMES)
    assert relative_error(weak, image(latents) + 0.25 * (got - image(latents))) < 1e-12


@pytest.mark.parametrize("projection", [False, True])
def test_a_transformer_at_the_input_sees_the_context_added(randomised, projection):
    config = TemporalTransformerConfig(attentions=("self",), projection=projection)
    layer = randomised(ContextTransformer(CHANNELS, num_heads=2, config=config, frame_context=CONTEXT))
    plain = TemporalTransformerBlock(CHANNELS, num_heads=2, config=config).double()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "context_in" not in name})
    z, context = maps(), maps(8, 12, PLANES)
    merged = z + F.conv2d(area(context, 4, 6), layer.context_in.weight, padding=1)
    got = layer(z, frame_context=context, num_frames=FRAMES)
    torch.testing.assert_close(got, plain(merged, num_frames=FRAMES), rtol=1e-10, atol=1e-12)
    assert torch.equal(layer(z, num_frames=FRAMES), plain(z, num_frames=FRAMES))


def make_layers():
    transformer = TemporalTransformerConfig(attentions=("self",))
    return {
        "block": make_block(),
        "one convolution": make_block(num_convs=1),
        "causal": make_block(causal=True, norm="frame"),
        "input": ContextInput(CHANNELS, config=CONTEXT),
        "transformer": ContextTransformer(CHANNELS, num_heads=2, config=transformer, frame_context=CONTEXT),
    }


@pytest.mark.parametrize("name", make_layers())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_layer_is_the_identity_and_learns_from_the_first_step_on(name, dtype):
    layer = make_layers()[name].to(dtype)
    z, context = maps(dtype=dtype), maps(8, 12, PLANES, dtype)
    got = layer(z, frame_context=context, num_frames=FRAMES)
    assert torch.equal(got, z)
    (got * torch.randn_like(z)).sum().backward()
    assert (layer.context_in.weight.grad != 0).all()


@pytest.mark.parametrize("name", make_layers())
def test_zeros_are_no_context(randomised, name):
    layer = randomised(make_layers()[name])
    z, context = maps(), maps(8, 12, PLANES)
    without = layer(z, num_frames=FRAMES)
    assert torch.equal(layer(z, frame_context=torch.zeros_like(context), num_frames=FRAMES), without)
    assert not torch.allclose(layer(z, frame_context=context, num_frames=FRAMES), without, atol=1e-3)


@pytest.mark.parametrize("name", make_layers())
def test_image_only_frames_pass_bit_for_bit(randomised, name):
    layer = randomised(make_layers()[name])
    z, context = maps(), maps(8, 12, PLANES)
    flags = torch.tensor([[True, False, False], [False, True, True]])
    got = layer(z, frame_context=context, num_frames=FRAMES, image_only=flags)
    assert torch.equal(got[flags.flatten()], z[flags.flatten()])
    assert not torch.allclose(got[~flags.flatten()], z[~flags.flatten()], atol=1e-3)


def test_a_causal_block_lets_no_later_frame_in(randomised):
    layer = randomised(make_block(causal=True, norm="frame"))
    z, context = maps(), maps(8, 12, PLANES)
    changed = context.clone()
    changed.unflatten(0, (BATCH, FRAMES))[:, 2] += 1.0
    first, second = (
        layer(z, frame_context=value, num_frames=FRAMES).unflatten(0, (BATCH, FRAMES)) for value in (context, changed)
    )
    assert torch.equal(first[:, :2], second[:, :2]) and not torch.allclose(first[:, 2], second[:, 2], atol=1e-3)


@pytest.mark.parametrize("shape", ["scalar", "frame", "channel"])
def test_an_alpha_of_one_leaves_no_context(randomised, shape):
    alpha = AlphaConfig(init=1.0, learned=False, shape=shape, num_frames=FRAMES if shape == "frame" else None)
    layer = randomised(make_block(alpha=alpha))
    z = maps()
    assert torch.equal(layer(z, frame_context=maps(channels=PLANES), num_frames=FRAMES), z)


@pytest.mark.parametrize("size", [(5, 7), (3, 4), (9, 2)])
def test_any_resolution_is_resized_to_that_of_the_maps(randomised, size):
    """Against torch's own definition of the area mode, which pooling to uneven sizes is."""
    layer = randomised(ContextInput(CHANNELS, config=CONTEXT))
    z, context = maps(), maps(*size, PLANES)
    resized = F.interpolate(context, size=(4, 6), mode="area")
    expected = z + F.conv2d(resized, layer.context_in.weight, padding=1)
    torch.testing.assert_close(layer(z, context, num_frames=FRAMES), expected)


def test_autocast_takes_contexts_of_any_dtype():
    layer = make_block()
    nn.init.normal_(layer.context_in.weight)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(maps(dtype=torch.bfloat16), frame_context=maps(8, 12, PLANES, torch.float32), num_frames=FRAMES)
    assert got.dtype == torch.bfloat16 and got.isfinite().all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"channels": 0}, r"ContextConfig\.channels: expected a whole number of at least 1, got 0"),
        ({"channels": 5, "inject": "skip"}, r"ContextConfig\.inject: expected one of 'resblock', .* got 'skip'"),
        ({"channels": 5, "kernel_size": 0}, r"ContextConfig\.kernel_size: expected a whole number of at least 1, got"),
        ({"channels": 5, "kernel_size": 2}, r"ContextConfig\.kernel_size: expected an odd number, got 2"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        ContextConfig(**options)


def test_contexts_of_another_shape():
    layer = make_block()
    for wrong in (maps(channels=4), maps(channels=PLANES)[:-1], maps(channels=PLANES)[0]):
        with pytest.raises(
            ValueError, match=r"TemporalResBlock: frame_context: expected \(6, 5, height, width\), .* got"
        ):
            layer(maps(), num_frames=FRAMES, frame_context=wrong)
    with pytest.raises(
        ValueError, match=r"ContextInput: frame_context: expected \(6, 5, height, width\), .* fold_frames"
    ):
        ContextInput(CHANNELS, config=CONTEXT)(maps(), maps(channels=3), num_frames=FRAMES)


def test_a_block_without_a_context():
    layer = TemporalResBlock(CHANNELS, num_groups=4)
    text = r"TemporalResBlock: frame_context: expected None, got shape \(6, 5, 4, 6\); build the layer with a"
    with pytest.raises(ValueError, match=text):
        layer(maps(), num_frames=FRAMES, frame_context=maps(channels=PLANES))


def test_an_input_of_another_shape():
    layer = ContextInput(CHANNELS, config=CONTEXT)
    with pytest.raises(ValueError, match=r"ContextInput: hidden_states: expected \(batch \* num_frames, 8, .* got"):
        layer(maps(channels=4), num_frames=FRAMES)
    with pytest.raises(ValueError, match=r"ContextInput: expected a batch that is a multiple of num_frames=4"):
        layer(maps(), num_frames=4)
