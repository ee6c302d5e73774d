"""The residual block against diffusers' own classes, with their weights copied."""

import pytest
import torch
from diffusers.models.resnet import SpatioTemporalResBlock, TemporalConvLayer, TemporalResnetBlock
from torch import nn

from temporal_layers import AlphaConfig, TemporalResBlock, TemporalResBlockConfig

CHANNELS, TEMB, HEIGHT, WIDTH = 64, 24, 3, 5  # two channels a group: diffusers' block has 32 groups, whatever the width
PRECISIONS = [pytest.param(torch.float64, 1e-12, id="float64"), pytest.param(torch.float32, 1e-6, id="float32")]
UNWEIGHTED = AlphaConfig(init=0.0, learned=False)

SVD_KEYS = {
    "norms.0.": "norm1.",
    "convs.0.": "conv1.",
    "temb_proj.": "time_emb_proj.",
    "norms.1.": "norm2.",
    "convs.1.": "conv2.",
}
MODELSCOPE_KEYS = {f"norms.{i}.": f"conv{i + 1}.0." for i in range(4)}
MODELSCOPE_KEYS |= {f"convs.{i}.": f"conv{i + 1}.{2 if i == 0 else 3}." for i in range(4)}


def maps_and_temb(batch, frames, dtype):
    n = batch * frames
    return torch.randn(n, CHANNELS, HEIGHT, WIDTH, dtype=dtype), torch.randn(n, TEMB, dtype=dtype)


@pytest.mark.parametrize("with_temb", [True, False], ids=["temb", "no_temb"])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_svd_temporal_resnet_block(batch, frames, with_temb, dtype, bound, randomised, copy_weights, relative_error):
    width = TEMB if with_temb else None
    theirs = randomised(TemporalResnetBlock(CHANNELS, temb_channels=width, eps=1e-6), dtype)
    config = TemporalResBlockConfig(alpha=UNWEIGHTED)
    ours = TemporalResBlock(CHANNELS, temb_channels=width, eps=1e-6, config=config).to(dtype)
    copy_weights(ours, theirs, SVD_KEYS)
    x, temb = maps_and_temb(batch, frames, dtype)

    clips = x.unflatten(0, (batch, frames)).transpose(1, 2)
    expected = theirs(clips, temb.unflatten(0, (batch, frames))).transpose(1, 2).flatten(0, 1)
    assert relative_error(ours(x, temb, num_frames=frames), expected) <= bound


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_modelscope_temporal_conv_layer(batch, frames, dtype, bound, randomised, copy_weights, relative_error):
    theirs = randomised(TemporalConvLayer(CHANNELS, dropout=0.1, norm_num_groups=16), dtype)
    config = TemporalResBlockConfig(num_convs=4, dropout=0.1, alpha=UNWEIGHTED)
    ours = TemporalResBlock(CHANNELS, num_groups=16, config=config).to(dtype).eval()
    copy_weights(ours, theirs, MODELSCOPE_KEYS)
    x, _ = maps_and_temb(batch, frames, dtype)
    assert relative_error(ours(x, num_frames=frames), theirs(x, num_frames=frames)) <= bound


def test_modelscope_dropout_stands_where_theirs_does(randomised, copy_weights, relative_error):
    theirs = randomised(TemporalConvLayer(CHANNELS, dropout=0.5), torch.float64).train()
    ours = TemporalResBlock(CHANNELS, config=TemporalResBlockConfig(num_convs=4, dropout=0.5, alpha=UNWEIGHTED))
    copy_weights(ours.double(), theirs, MODELSCOPE_KEYS)
    entered = {"ours": [], "theirs": []}
    # Masks differ between the two (they draw in different layouts), so the inputs of the first dropout are compared.
    ours.dropout.register_forward_pre_hook(lambda module, args: entered["ours"].append(args[0]))
    for stage in (theirs.conv2, theirs.conv3, theirs.conv4):
        stage[2].register_forward_pre_hook(lambda module, args: entered["theirs"].append(args[0]))
    x, _ = maps_and_temb(1, 3, torch.float64)
    ours(x, num_frames=3), theirs(x, num_frames=3)
    assert len(entered["ours"]) == len(entered["theirs"]) == 3
    assert relative_error(entered["ours"][0], entered["theirs"][0].flatten(3)) <= 1e-12


BLENDS = {  # merge_strategy, switch_spatial_to_temporal_mix, our alpha for their mix factor of 0.375
    "learned": ("learned", False, AlphaConfig()),
    "learned_with_images": ("learned_with_images", False, AlphaConfig()),
    "fixed": ("fixed", False, AlphaConfig(init=0.375, learned=False)),
    "learned_reversed": ("learned", True, AlphaConfig()),
    "fixed_reversed": ("fixed", True, AlphaConfig(init=0.625, learned=False)),
    "learned_with_images_reversed": ("learned_with_images", True, AlphaConfig()),
}


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_svd_blend_of_the_whole_block(name, batch, frames, dtype, bound, randomised, copy_weights, relative_error):
    strategy, switched, alpha = BLENDS[name]
    theirs = SpatioTemporalResBlock(
        CHANNELS, temb_channels=TEMB, eps=1e-6, temporal_eps=1e-5, merge_factor=0.375, merge_strategy=strategy,
        switch_spatial_to_temporal_mix=switched,
    )  # fmt: skip
    theirs.temporal_res_block = randomised(theirs.temporal_res_block, dtype)
    theirs = theirs.to(dtype).eval()
    ours = TemporalResBlock(
        CHANNELS, temb_channels=TEMB, eps=1e-5, config=TemporalResBlockConfig(alpha=alpha), dtype=dtype
    ).to(dtype)
    copy_weights(ours, theirs.temporal_res_block, SVD_KEYS)
    if alpha.learned:
        sign = -1 if switched else 1  # 1 - sigmoid(x) = sigmoid(-x)
        nn.init.constant_(ours.blend.logit, sign * theirs.time_mixer.mix_factor.item())

    x, temb = maps_and_temb(batch, frames, dtype)
    flags = torch.zeros(batch, frames, dtype=torch.bool)
    if strategy == "learned_with_images" and not switched:  # reversed, theirs would make images purely temporal
        flags[-1, 0] = True
    expected = theirs(x, temb, image_only_indicator=flags)
    spatial = theirs.spatial_res_block(x, temb)
    got = ours(spatial, temb, num_frames=frames, image_only=flags if strategy == "learned_with_images" else None)
    assert relative_error(got, expected) <= bound


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_svd_decoder_block(frames, dtype, bound, randomised, copy_weights, relative_error):
    # The decoder of SVD's VAE: no timestep embedding, alpha weighs the temporal branch, starts at sigmoid(0).
    theirs = SpatioTemporalResBlock(
        CHANNELS, temb_channels=None, eps=1e-6, temporal_eps=1e-5, merge_factor=0.0, merge_strategy="learned",
        switch_spatial_to_temporal_mix=True,
    )  # fmt: skip
    theirs = randomised(theirs, dtype)
    ours = TemporalResBlock(CHANNELS, config=TemporalResBlockConfig(timestep_embedding=False), dtype=dtype).to(dtype)
    copy_weights(ours, theirs.temporal_res_block, SVD_KEYS)
    nn.init.constant_(ours.blend.logit, -theirs.time_mixer.mix_factor.item())
    assert ours.blend.alpha.item() == pytest.approx(1 - theirs.time_mixer.mix_factor.sigmoid().item(), abs=1e-7)

    x, _ = maps_and_temb(2, frames, dtype)
    expected = theirs(x, None, image_only_indicator=torch.zeros(2, frames))
    assert relative_error(ours(theirs.spatial_res_block(x, None), num_frames=frames), expected) <= bound


def test_bf16_is_no_worse_than_diffusers(randomised, copy_weights, relative_error):
    theirs = randomised(TemporalResnetBlock(CHANNELS, temb_channels=TEMB, eps=1e-5), torch.bfloat16)
    config = TemporalResBlockConfig(alpha=UNWEIGHTED)
    ours = TemporalResBlock(CHANNELS, temb_channels=TEMB, config=config, dtype=torch.bfloat16)
    exact = TemporalResBlock(CHANNELS, temb_channels=TEMB, config=config, dtype=torch.float64)
    for layer in (ours, exact):
        copy_weights(layer, theirs, SVD_KEYS)
    x, temb = maps_and_temb(2, 5, torch.bfloat16)
    oracle = exact(x.double(), temb.double(), num_frames=5)
    clips = theirs(x.unflatten(0, (2, 5)).transpose(1, 2), temb.unflatten(0, (2, 5)))
    peer = relative_error(clips.transpose(1, 2).flatten(0, 1).double(), oracle)
    mine = relative_error(ours(x, temb, num_frames=5).double(), oracle)
    assert 0 < mine <= 2 * peer
