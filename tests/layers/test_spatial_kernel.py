"""Layers whose convolutions have an extent in space as well, against PyTorch's and diffusers' 3-D convolutions."""

import itertools

import pytest
import torch
from diffusers.models.resnet import TemporalConvLayer, TemporalResnetBlock
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from temporal_layers import (
    AlphaConfig,
    ContextConfig,
    TemporalConv,
    TemporalConvConfig,
    TemporalResBlock,
    TemporalResBlockConfig,
    fold_frames,
    unfold_frames,
)

CHANNELS, TEMB, HEIGHT, WIDTH = 64, 24, 3, 5  # two channels a group: diffusers' block has 32 groups, whatever the width
DOUBLE = {"dtype": torch.float64}
UNWEIGHTED = AlphaConfig(init=0.0, learned=False)
odd = st.sampled_from([1, 3, 5])


def load(conv, source):
    """The key map: the weight of a 3-D convolution in four dimensions."""
    with torch.no_grad():
        conv.weight.copy_(source.weight.reshape_as(conv.weight))
        conv.bias.copy_(source.bias)


@given(
    kernel=odd, space=odd, causal=st.booleans(), channels_last=st.booleans(), batch=st.integers(1, 2),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4)),
)  # fmt: skip
def test_a_convolution_is_conv3d(kernel, space, causal, channels_last, batch, sizes):
    frames, height, width, channels = sizes
    config = TemporalConvConfig(kernel_size=kernel, spatial_kernel_size=space, causal=causal)
    theirs = nn.Conv3d(channels, channels, (kernel, space, space), **DOUBLE)
    ours = TemporalConv(channels, config=config, **DOUBLE)
    load(ours.conv, theirs)
    clips = torch.randn(batch, channels, frames, height, width, **DOUBLE)
    before, beside = kernel - 1 if causal else kernel // 2, space // 2
    padded = F.pad(clips, (beside, beside, beside, beside, before, kernel - 1 - before))
    folded = fold_frames(clips)
    if channels_last:
        folded = folded.contiguous(memory_format=torch.channels_last)
    got = unfold_frames(ours(folded, num_frames=frames), frames)
    torch.testing.assert_close(got, theirs(padded), rtol=1e-12, atol=1e-12)


def with_conv3d(module):
    """diffusers' module with convolutions of (3, 3, 3) in place of its (3, 1, 1)."""
    for name, conv in list(module.named_modules()):
        if isinstance(conv, nn.Conv3d):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, nn.Conv3d(conv.in_channels, conv.out_channels, 3, padding=1))
    return module


def resblock(channels=CHANNELS, context=None, temb_channels=TEMB, num_groups=32, **options):
    config = TemporalResBlockConfig(**{"spatial_kernel_size": 3} | options)
    return TemporalResBlock(
        channels, temb_channels=temb_channels, num_groups=num_groups, config=config, context=context, **DOUBLE
    )


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_block_of_svd_with_3d_convolutions(batch, frames, randomised, copy_weights, relative_error):
    theirs = randomised(with_conv3d(TemporalResnetBlock(CHANNELS, temb_channels=TEMB, eps=1e-5)))
    assert theirs.conv1.kernel_size == theirs.conv2.kernel_size == (3, 3, 3)
    ours = resblock(alpha=UNWEIGHTED)
    keys = {"norms.0.": "norm1.", "convs.0.": "conv1.", "temb_proj.": "time_emb_proj.", "norms.1.": "norm2."}
    copy_weights(ours, theirs, keys | {"convs.1.": "conv2."})  # reshaped, as in the key map
    x, temb = (
        torch.randn(batch * frames, CHANNELS, HEIGHT, WIDTH, **DOUBLE),
        torch.randn(batch * frames, TEMB, **DOUBLE),
    )
    expected = fold_frames(theirs(unfold_frames(x, frames), temb.unflatten(0, (batch, frames))))
    assert relative_error(ours(x, temb, num_frames=frames), expected) <= 1e-12
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert relative_error(ours(channels_last, temb, num_frames=frames), expected) <= 1e-12


def test_the_block_of_modelscope_with_3d_convolutions(randomised, copy_weights, relative_error):
    theirs = randomised(with_conv3d(TemporalConvLayer(CHANNELS, norm_num_groups=16)))
    ours = resblock(num_groups=16, num_convs=4, timestep_embedding=False, alpha=UNWEIGHTED).eval()
    keys = {f"norms.{i}.": f"conv{i + 1}.0." for i in range(4)}
    copy_weights(ours, theirs, keys | {f"convs.{i}.": f"conv{i + 1}.{2 if i == 0 else 3}." for i in range(4)})
    x = torch.randn(2 * 3, CHANNELS, HEIGHT, WIDTH, **DOUBLE)
    assert relative_error(ours(x, num_frames=3), theirs(x, num_frames=3)) <= 1e-12


@pytest.mark.parametrize("layer", [TemporalResBlock, TemporalConv])
def test_without_an_extent_in_space_the_layers_are_what_they_were(layer):
    options = TemporalResBlockConfig if layer is TemporalResBlock else TemporalConvConfig
    torch.manual_seed(1)
    plain = layer(CHANNELS)
    torch.manual_seed(1)
    same = layer(CHANNELS, config=options(spatial_kernel_size=1))
    assert str(same) == str(plain) and plain.state_dict().keys() == same.state_dict().keys()
    for key, value in same.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key])
        assert not is_kernel(key) or value.shape == (CHANNELS, CHANNELS, 3, 1)


def is_kernel(key):
    return "conv" in key and key.endswith("weight")


@given(kernel=odd, space=st.sampled_from([3, 5]), causal=st.booleans())
def test_parameters_have_the_names_of_before_and_four_dimensions(kernel, space, causal):
    options = {"kernel_size": kernel, "spatial_kernel_size": space, "causal": causal}
    block, conv = (
        resblock(8, num_groups=4, norm="frame", **options),
        TemporalConv(8, config=TemporalConvConfig(**options)),
    )
    assert block.state_dict().keys() == TemporalResBlock(8, temb_channels=TEMB, num_groups=4).state_dict().keys()
    weights = [value for layer in (block, conv) for key, value in layer.state_dict().items() if is_kernel(key)]
    assert [tuple(weight.shape) for weight in weights] == [(8, 8 * kernel, space, space)] * 3
    for layer in (block, conv):
        layer.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@given(
    kernel=odd, space=st.sampled_from([3, 5]), causal=st.booleans(), channels_last=st.booleans(),
    frames=st.sampled_from([1, 3, 6]),
)  # fmt: skip
def test_a_fresh_convolution_is_the_identity(dtype, kernel, space, causal, channels_last, frames):
    config = TemporalConvConfig(kernel_size=kernel, spatial_kernel_size=space, causal=causal)
    layer = TemporalConv(5, config=config).to(dtype)
    maps = torch.randn(6, 5, 3, 4).to(dtype)
    if channels_last:
        maps = maps.contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(maps, num_frames=frames), maps)


def influence(layer, frames=5, height=7, width=7):
    """``[frame, height, width]``: which pixels change when the one in the middle does."""
    maps = torch.randn(frames, layer.channels, height, width, **DOUBLE)
    other = maps.clone()
    other[frames // 2, :, height // 2, width // 2] += 1
    with torch.no_grad():
        return (layer(maps, num_frames=frames) != layer(other, num_frames=frames)).any(1)


@pytest.mark.parametrize("causal", [False, True])
def test_pixels_see_what_the_kernel_reaches(causal, randomised):
    seen = influence(randomised(TemporalConv(4, config=TemporalConvConfig(spatial_kernel_size=5, causal=causal))))
    expected = torch.zeros_like(seen)
    expected[2 if causal else 1 : 5 if causal else 4, 1:6, 1:6] = True
    assert torch.equal(seen, expected)


def test_inside_the_map_a_shifted_clip_gives_a_shifted_result(randomised):
    layer = randomised(TemporalConv(4, config=TemporalConvConfig(spatial_kernel_size=3)))
    maps = torch.randn(5, 4, 9, 8, **DOUBLE)
    moved = maps.roll((1, -2, 1), (0, 2, 3))
    first, second = layer(maps, num_frames=5).roll((1, -2, 1), (0, 2, 3)), layer(moved, num_frames=5)
    inside = (slice(2, 4), slice(None), slice(1, 6), slice(2, 7))  # away from what came in over the borders
    torch.testing.assert_close(second[inside], first[inside], rtol=1e-12, atol=1e-12)


def test_the_context_is_merged_in_front(randomised, relative_error):
    layer = randomised(resblock(8, ContextConfig(channels=3), temb_channels=None, num_groups=4))
    plain = resblock(8, temb_channels=None, num_groups=4, alpha=UNWEIGHTED)
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if key in plain.state_dict()})
    z, planes = torch.randn(6, 8, 4, 5, **DOUBLE), torch.randn(6, 3, 4, 5, **DOUBLE)
    merged = z + layer.context_in(planes)
    expected = layer.blend.alpha * z + (1 - layer.blend.alpha) * plain(merged, num_frames=3)
    assert relative_error(layer(z, num_frames=3, frame_context=planes), expected) <= 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_those_of_numbers(causal, channels_last, randomised):
    layer = randomised(
        resblock(2, temb_channels=3, num_groups=1, causal=causal, norm="frame", alpha=AlphaConfig(shape="channel"))
    )
    maps, temb = torch.randn(2, 2, 2, 3, **DOUBLE), torch.randn(2, 3, **DOUBLE)
    if channels_last:
        maps = maps.contiguous(memory_format=torch.channels_last)
    names = [name for name, _ in layer.named_parameters()]
    values = [parameter.detach().double().requires_grad_() for parameter in layer.parameters()]

    def run(maps, temb, *values):
        arguments = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer.double(), arguments, (maps, temb), {"num_frames": 2})

    assert torch.autograd.gradcheck(run, (maps.requires_grad_(), temb.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"spatial_kernel_size": 2}, "spatial_kernel_size: expected an odd number, got 2"),
        ({"spatial_kernel_size": 0}, "spatial_kernel_size: expected a whole number of at least 1, got 0"),
        ({"spatial_kernel_size": 3.0}, "spatial_kernel_size: expected a whole number of at least 1, got 3.0"),
    ],
)
def test_mistakes(options, text):
    for config in (TemporalResBlockConfig, TemporalConvConfig):
        with pytest.raises(ValueError, match=f"{config.__name__}.{text}"):
            config(**options)


def test_maps_of_one_pixel_and_one_frame(randomised):
    layer = randomised(resblock(8, num_groups=4))
    for frames, height, width in itertools.product([1, 2], [1, 2], [1, 3]):
        maps, temb = torch.randn(frames, 8, height, width, **DOUBLE), torch.randn(frames, TEMB, **DOUBLE)
        assert layer(maps, temb, num_frames=frames).shape == maps.shape
