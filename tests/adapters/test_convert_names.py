"""Names of converted weights at the sizes that were published, on the meta device."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    MotionAdapter,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)

from temporal_layers.adapters import plan
from temporal_layers.adapters.attach import build_layers
from temporal_layers.adapters.convert import Source, detect, image_model_of
from temporal_layers.adapters.convert.layouts import layout
from temporal_layers.adapters.convert.names import to_foreign
from temporal_layers.adapters.convert.original import original_names
from temporal_layers.adapters.convert.table import make_table, spatial_part

NAMES = {  # in the published files of the full-size models
    "svd": (
        UNetSpatioTemporalConditionModel,
        {
            "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
            "down_blocks.2.attentions.1.temporal_transformer_blocks.0.ff_in.net.2.bias": (
                "input_blocks.8.1.time_stack.0.ff_in.net.2.bias"
            ),
            "down_blocks.3.resnets.1.time_mixer.mix_factor": "input_blocks.11.0.time_mixer.mix_factor",
            "mid_block.resnets.1.temporal_res_block.time_emb_proj.weight": (
                "middle_block.2.time_stack.emb_layers.1.weight"
            ),
            "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
            "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
            "up_blocks.3.attentions.2.time_pos_embed.linear_2.weight": "output_blocks.11.1.time_pos_embed.2.weight",
        },
    ),
    "modelscope": (
        UNet3DConditionModel,
        {
            "transformer_in.proj_in.weight": "input_blocks.0.1.proj_in.weight",
            "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.op.weight",
            "down_blocks.3.temp_convs.1.conv4.3.weight": "input_blocks.11.0.temopral_conv.conv4.3.weight",
            "mid_block.temp_attentions.0.norm.bias": "middle_block.2.norm.bias",
            "mid_block.resnets.1.conv1.weight": "middle_block.3.in_layers.2.weight",
            "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
            "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.3.conv.weight",
            "up_blocks.3.temp_attentions.2.proj_out.bias": "output_blocks.11.2.proj_out.bias",
        },
    ),
}


@pytest.mark.parametrize("family", NAMES)
def test_names_of_the_published_sizes(family):
    cls, expected = NAMES[family]
    with torch.device("meta"):
        keys = list(cls().state_dict())
    renamed = original_names(family, keys)
    assert len(set(renamed.values())) == len(keys)
    assert {key: renamed[key] for key in expected} == expected


def shapes_in_a_file(source, model, **options):
    """Names and shapes that the library expects in a file for ``model``."""
    config = layout(source, **options)
    sites = plan(model, config)
    layers = build_layers(model, config, sites, meta=True)
    spatial = spatial_part(model) if source.whole else {}
    table = make_table(source, sites, layers, spatial)
    values = {f"{name}.temporal.{key}": v for name, layer in layers.items() for key, v in layer.state_dict().items()}
    values |= spatial
    found = {entry.name: tuple(to_foreign(values[entry.target], entry.change).shape) for entry in table.entries}
    return found | {name: (1, source.max_frames, width) for name, width in table.positions.items()}


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


@pytest.mark.parametrize(("version", "millions"), [("v1", 417.1), ("v2", 453.2), ("v3", 417.1)])
def test_animatediff_for_stable_diffusion_1(version, millions):
    frames = 24 if version == "v1" else 32
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        motion = MotionAdapter(motion_max_seq_length=frames, use_motion_mid_block=version == "v2")
    source = Source(family="animatediff", version=version, max_frames=frames)
    assert detect(motion.state_dict()) == source
    exclude = () if version == "v2" else ("^mid_block",)
    assert shapes_in_a_file(source, unet, exclude=exclude) == shapes(motion.state_dict())
    counted = sum(value.numel() for value in motion.parameters())
    assert round(counted / 1e6, 1) == millions  # as published


def test_animatediff_for_sdxl():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
        motion = MotionAdapter(block_out_channels=(320, 640, 1280), use_motion_mid_block=False)
    source = Source(family="animatediff", version="sdxl", max_frames=32)
    assert detect(motion.state_dict()) == source
    assert shapes_in_a_file(source, unet, exclude=("^mid_block",)) == shapes(motion.state_dict())


@pytest.mark.parametrize(
    ("family", "make", "image_class"),
    [
        ("svd", lambda: UNetSpatioTemporalConditionModel(), UNet2DConditionModel),
        ("modelscope", lambda: UNet3DConditionModel(), UNet2DConditionModel),
        (
            "svd-decoder",
            lambda: AutoencoderKLTemporalDecoder(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            AutoencoderKL,
        ),
    ],
)
def test_whole_models(family, make, image_class):
    with torch.device("meta"):
        video = make()
        image = image_model_of(video.state_dict())
    assert type(image) is image_class
    source = Source(family=family, whole=True)
    assert detect(video.state_dict()) == source
    assert shapes_in_a_file(source, image) == shapes(video.state_dict())
