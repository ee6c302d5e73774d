"""A fresh layer is the identity, bit for bit, and every one of its parameters learns from the second step on."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from temporal_layers import (
    AlphaConfig,
    TemporalResBlock,
    TemporalResBlockConfig,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
)

BATCH, FRAMES, CHANNELS, GROUPS, TEMB, CONTEXT, HEIGHT, WIDTH = 2, 3, 8, 4, 6, 5, 2, 3


@st.composite
def alphas(draw):
    shape = draw(st.sampled_from(["scalar", "frame", "channel"]))
    learned = draw(st.booleans())
    init = draw(st.floats(0.01, 0.99) if learned else st.floats(0.0, 1.0))
    return AlphaConfig(init=init, learned=learned, shape=shape, num_frames=FRAMES if shape == "frame" else None)


@st.composite
def resblocks(draw):
    causal = draw(st.booleans())
    config = TemporalResBlockConfig(
        num_convs=draw(st.integers(1, 4)),
        kernel_size=draw(st.sampled_from([1, 3, 5])),
        spatial_kernel_size=draw(st.sampled_from([1, 1, 3])),
        timestep_embedding=draw(st.booleans()),
        norm="frame" if causal else draw(st.sampled_from(["clip", "frame"])),
        dropout=draw(st.sampled_from([0.0, 0.2])),
        causal=causal,
        alpha=draw(alphas()),
    )
    temb_channels = draw(st.sampled_from([None, TEMB]))
    return TemporalResBlock(CHANNELS, temb_channels=temb_channels, num_groups=GROUPS, config=config)


@st.composite
def transformers(draw, windows=(None, 0, 1, 5)):
    projection, causal = draw(st.booleans()), draw(st.booleans())
    norms = ["none", "frame", "clip"][: 1 if not projection else 2 if causal else 3]
    attentions = draw(st.lists(st.sampled_from(["self", "cross"]), max_size=2))
    attentions.insert(draw(st.integers(0, len(attentions))), "self")
    config = TemporalTransformerConfig(
        attentions=tuple(attentions),
        ff_in=draw(st.booleans()),
        ff=draw(st.booleans()),
        position=draw(st.sampled_from(["none", "sinusoidal", "sinusoidal_mlp", "rotary", "relative"])),
        in_norm=draw(st.sampled_from(norms)),
        projection=projection,
        causal=causal,
        window=draw(st.sampled_from(windows)),
        alpha=draw(alphas()),
    )
    context_dim = draw(st.sampled_from([None, CONTEXT]))
    return TemporalTransformerBlock(CHANNELS, num_heads=2, context_dim=context_dim, num_groups=GROUPS, config=config)


def inputs(layer, dtype):
    """Feature maps and what the layer takes along: a timestep embedding, or a text."""
    maps = torch.randn(BATCH * FRAMES, CHANNELS, HEIGHT, WIDTH, dtype=dtype)
    if isinstance(layer, TemporalResBlock):
        return maps, torch.randn(BATCH * FRAMES, TEMB, dtype=dtype)
    return maps, torch.randn(BATCH, 4, CONTEXT, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@given(layer=st.one_of(resblocks(), transformers()))
def test_a_fresh_layer_is_the_identity(dtype, layer):
    layer.to(dtype)
    maps, extra = inputs(layer, dtype)
    got = layer(maps, extra, num_frames=FRAMES)
    assert torch.equal(got, maps) and got.dtype == dtype and got.is_contiguous()

    channels_last = maps.to(memory_format=torch.channels_last)
    got = layer(channels_last, extra, num_frames=FRAMES)
    assert torch.equal(got, maps) and got.is_contiguous(memory_format=torch.channels_last)

    if isinstance(layer, TemporalTransformerBlock) and layer.in_norm is None:
        tokens = maps.flatten(2).transpose(1, 2)
        assert torch.equal(layer(tokens, extra, num_frames=FRAMES), tokens)


def step(layer, maps, extra, direction):
    """One step of gradient descent on a random linear function of the output; returns the gradients before it."""
    parameters = dict(layer.named_parameters())
    loss = (layer(maps, extra, num_frames=FRAMES) * direction).sum()
    gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter -= 0.1 * gradients[name]
    return gradients


@given(layer=st.one_of(resblocks(), transformers(windows=(None, 1, 5))))
def test_every_parameter_learns_from_the_second_step_on(layer):
    assume(layer.config.alpha.init < 1.0)  # 1 is the image model for good: an update weighed by zero cannot learn
    layer.double()
    maps, extra = inputs(layer, torch.float64)
    direction = torch.randn_like(maps)
    step(layer, maps, extra, direction)
    for name, gradient in step(layer, maps, extra, direction).items():
        assert gradient.abs().max() > 1e-10, name
        if name == "blend.logit":
            assert (gradient != 0).all()  # each frame's and each channel's own alpha


@pytest.mark.parametrize(("num_frames", "window"), [(1, None), (3, 0)])
def test_queries_keys_and_biases_learn_only_where_a_frame_sees_another(num_frames, window):
    # A softmax over one frame is 1 whatever its score: the one exception to the rule above.
    config = TemporalTransformerConfig(position="relative", window=window)
    layer = TemporalTransformerBlock(CHANNELS, num_heads=2, config=config).double()
    maps = torch.randn(3, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    for _ in range(2):
        layer.zero_grad()
        (layer(maps, num_frames=num_frames) * maps).sum().backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.1 * parameter.grad
    still = {name for name, parameter in layer.named_parameters() if parameter.grad.abs().max() < 1e-15}
    expected = {f"attentions.0.{name}" for name in ("to_q.weight", "to_k.weight", "relative.table")}
    assert still == expected


def test_only_distances_that_occur_train_the_relative_bias(randomised):
    config = TemporalTransformerConfig(position="relative")
    layer = randomised(TemporalTransformerBlock(CHANNELS, num_heads=2, config=config))
    maps = torch.randn(BATCH * FRAMES, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    (layer(maps, num_frames=FRAMES) * torch.randn_like(maps)).sum().backward()
    relative = layer.attentions[0].relative
    occurs = (torch.arange(2 * relative.max_distance + 1) - relative.max_distance).abs() < FRAMES
    assert torch.equal((relative.table.grad != 0).all(dim=0), occurs)


@given(layer=st.one_of(resblocks(), transformers()))
def test_image_only_frames_pass_bit_for_bit_through_a_trained_layer(layer):
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    maps, extra = inputs(layer, torch.float32)
    flags = torch.tensor([[True, False, False], [False, True, True]])
    got = layer(maps, extra, num_frames=FRAMES, image_only=flags)
    free = layer.eval()(maps, extra, num_frames=FRAMES)
    assert torch.equal(got[flags.flatten()], maps[flags.flatten()])
    if layer.config.alpha.init < 1.0:
        assert not torch.equal(free[flags.flatten()], maps[flags.flatten()])


def test_without_zero_init_a_fresh_layer_is_not_the_identity():
    maps = torch.randn(FRAMES, CHANNELS, HEIGHT, WIDTH)
    for layer in (
        TemporalResBlock(CHANNELS, num_groups=GROUPS, config=TemporalResBlockConfig(zero_init=False)),
        TemporalTransformerBlock(CHANNELS, num_heads=2, config=TemporalTransformerConfig(zero_init=False)),
        TemporalTransformerBlock(
            CHANNELS, num_heads=2, config=TemporalTransformerConfig(zero_init=False, projection=True)
        ),
    ):
        assert not torch.allclose(layer(maps, num_frames=FRAMES), maps, atol=1e-3)
