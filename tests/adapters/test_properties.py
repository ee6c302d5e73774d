"""Drawn models, inputs and configurations: what must hold for all of them."""

import copy
import tempfile

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from temporal_layers import AlphaConfig, TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalAdapter, TemporalConfig, inject, plan

sizes = st.integers(4, 9)  # odd ones too: the UNets round them up and down


@st.composite
def alphas(draw, frames):
    shape = draw(st.sampled_from(["scalar", "frame", "channel"]))
    return AlphaConfig(
        init=draw(st.sampled_from([0.1, 0.5, 0.9])),
        learned=draw(st.booleans()),
        shape=shape,
        num_frames=frames if shape == "frame" else None,
    )


@st.composite
def configs(draw, frames):
    norm = draw(st.sampled_from(["clip", "frame"]))
    resblock = TemporalResBlockConfig(
        num_convs=draw(st.integers(1, 4)),
        kernel_size=draw(st.sampled_from([1, 3, 5])),
        spatial_kernel_size=draw(st.sampled_from([1, 1, 3])),
        timestep_embedding=draw(st.booleans()),
        norm=norm,
        dropout=draw(st.sampled_from([0.0, 0.5])),
        causal=norm == "frame" and draw(st.booleans()),
        alpha=draw(alphas(frames)),
    )
    policy = draw(st.sampled_from(["after_transformer_block", "after_attention"]))
    projection, causal = draw(st.booleans()), draw(st.booleans())
    norms = ["none", "frame"] if causal else ["none", "frame", "clip"]
    transformer = TemporalTransformerConfig(
        attentions=draw(st.sampled_from([("self",), ("self", "cross"), ("cross", "self"), ("self", "self")])),
        ff_in=draw(st.booleans()),
        ff=draw(st.booleans()),
        position=draw(st.sampled_from(["none", "sinusoidal", "sinusoidal_mlp", "rotary", "relative"])),
        in_norm=draw(st.sampled_from(norms)) if projection and policy == "after_attention" else "none",
        projection=projection,
        causal=causal,
        window=draw(st.sampled_from([None, 0, 2])),
        alpha=draw(alphas(frames)),
    )
    which = draw(st.sampled_from(["both", "resblock", "transformer"]))
    return TemporalConfig(
        resblock=None if which == "transformer" else resblock,
        transformer=None if which == "resblock" else transformer,
        transformer_policy=policy,
    )


@st.composite
def conditional(draw):
    levels = draw(st.integers(1, 2))
    kinds = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    down = tuple("CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in kinds)
    up = tuple("CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(kinds))
    heads = draw(st.sampled_from([1, 2]))
    return UNet2DConditionModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16)[:levels],
        down_block_types=down,
        up_block_types=up,
        mid_block_type=draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])),
        layers_per_block=draw(st.integers(1, 2)),
        norm_num_groups=draw(st.sampled_from([2, 4])),
        attention_head_dim=heads,
        cross_attention_dim=6,
        transformer_layers_per_block=draw(st.integers(1, 2)),
        use_linear_projection=draw(st.booleans()),
        only_cross_attention=draw(st.booleans()),
    )


@st.composite
def unconditional(draw):
    attention = draw(st.booleans())
    return UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D" if attention else "ResnetDownsampleBlock2D"),
        up_block_types=("AttnUpBlock2D" if attention else "ResnetUpsampleBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=draw(st.sampled_from([2, 4])),
        attention_head_dim=draw(st.sampled_from([2, 8])),
        add_attention=draw(st.booleans()),
        resnet_time_scale_shift=draw(st.sampled_from(["default", "scale_shift"])),
    )


@st.composite
def autoencoders(draw):
    levels = draw(st.integers(1, 2))
    return AutoencoderKL(
        block_out_channels=(8, 16)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=draw(st.sampled_from([2, 4])),
        mid_block_add_attention=draw(st.booleans()),
        use_post_quant_conv=draw(st.booleans()),
    )


def fold(clips):
    return torch.stack([clip[:, frame] for clip in clips for frame in range(clips.shape[2])])


def call(model, x, text, **kwargs):
    if isinstance(model, AutoencoderKL):
        return model.decode(x, **kwargs).sample
    arguments = (text,) if isinstance(model, UNet2DConditionModel) else ()
    return model(x, 3, *arguments, **kwargs).sample


@given(data=st.data())
@settings(max_examples=16)
def test_any_model_with_any_configuration(data):
    model = data.draw(st.one_of(conditional(), unconditional(), autoencoders())).eval()
    batch, frames = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    config = data.draw(configs(frames))
    if not isinstance(model, UNet2DConditionModel) and config.resblock is None:
        config = TemporalConfig()  # a model of this kind may have no attention at all
    clips = torch.randn(batch, 3, frames, data.draw(sizes), data.draw(sizes))
    if isinstance(model, UNet2DModel):
        clips = clips[..., :4, :4]  # it does not take sizes that its levels do not divide
    text = torch.randn(batch, 2, 6)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    model, clips, text = model.to(dtype), clips.to(dtype), text.to(dtype)
    if config.resblock is None and not any(True for _ in sites_or_none(model, config)):
        return
    check(model, config, clips, text)


def sites_or_none(model, config):
    try:
        return plan(model, config)
    except ValueError as error:
        assert "expected at least one residual block or attention" in str(error)
        return ()


@torch.no_grad()
def check(model, config, clips, text):
    frames, plain = clips.shape[2], copy.deepcopy(model)
    image = call(plain, fold(clips), text.repeat_interleave(frames, 0))
    adapter = inject(model, config)
    fresh = call(model, clips, text)
    assert fresh.shape[:3] == (clips.shape[0], 3, frames) and fresh.dtype == clips.dtype
    assert torch.equal(fold(fresh), image)
    for layer in adapter.layers.values():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter, dtype=torch.float32) * 0.2)
    video = call(model, clips, text)
    assert video.shape == fresh.shape and video.isfinite().all()
    with adapter.disabled():
        assert torch.equal(fold(call(model, clips, text)), image)
    if not isinstance(model, AutoencoderKL):
        flags = torch.ones(clips.shape[0], frames, dtype=torch.bool)
        assert torch.equal(fold(call(model, clips, text, image_only=flags)), image)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        TemporalAdapter.from_pretrained(plain, folder)
    assert torch.equal(call(plain, clips, text), video)
    adapter.remove()
    assert torch.equal(call(model, fold(clips), text.repeat_interleave(frames, 0)), image)
