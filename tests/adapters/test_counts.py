"""Sites and parameter counts on the configurations of published models, without weights (meta device)."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from temporal_layers import TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalConfig, inject, plan

CROSS = ("CrossAttnDownBlock2D",)
CROSS_UP = ("CrossAttnUpBlock2D",)
SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*CROSS * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *CROSS_UP * 3),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21 = {
    **SD15,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
X4_UPSCALER = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D", *CROSS * 3),
    "up_block_types": (*CROSS_UP * 3, "UpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": 8,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", *CROSS * 2),
    "up_block_types": (*CROSS_UP * 2, "UpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD_VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def on_meta(cls, config):
    with torch.device("meta"):
        return cls(**config)


def count(adapter, *groups):
    return sum(parameter.numel() for group in groups for _, parameter in adapter.named_parameters(group))


@pytest.mark.parametrize(
    ("config", "spatial", "temporal"),
    [
        pytest.param(SD15, 859_520_964, 649_687_078, id="SD 1.5: the paper's 649M"),
        pytest.param(SD21, 865_910_724, 656_076_838, id="SD 2.1: the paper's 656M"),
        pytest.param(X4_UPSCALER, 473_398_020, 437_853_990, id="SD x4 upscaler"),
    ],
)
def test_default_layout_has_the_published_counts(config, spatial, temporal):
    adapter = inject(on_meta(UNet2DConditionModel, config))
    kinds = [site.kind for site in adapter.sites]
    assert (len(kinds), kinds.count("resnet"), kinds.count("transformer_block")) == (38, 22, 16)
    assert count(adapter, "spatial") == spatial
    assert count(adapter, "temporal", "alpha") == temporal
    assert count(adapter, "alpha") == 38


def test_heads_are_read_from_the_modules():
    # attention_head_dim=8 in SD 1.5 means 8 heads; [5, 10, 20, 20] in SD 2.1 means heads of 64 channels.
    heads = {
        name: {(site.channels, site.num_heads, site.head_dim) for site in plan(on_meta(UNet2DConditionModel, config))}
        for name, config in (("1.5", SD15), ("2.1", SD21))
    }
    assert {entry for entry in heads["1.5"] if entry[1]} == {(320, 8, 40), (640, 8, 80), (1280, 8, 160)}
    assert {entry for entry in heads["2.1"] if entry[1]} == {(320, 5, 64), (640, 10, 64), (1280, 20, 64)}


@pytest.mark.parametrize(("policy", "attentions"), [("after_transformer_block", 70), ("after_attention", 11)])
def test_sdxl_sites_depend_on_the_policy(policy, attentions):
    kinds = [site.kind for site in plan(on_meta(UNet2DConditionModel, SDXL), TemporalConfig(transformer_policy=policy))]
    assert (kinds.count("resnet"), len(kinds) - kinds.count("resnet")) == (17, attentions)


def test_sdxl_parameters():
    model = on_meta(UNet2DConditionModel, SDXL)
    adapter = inject(model, TemporalConfig(transformer_policy="after_attention"))
    assert count(adapter, "spatial") == 2_567_463_684
    assert round(count(adapter, "temporal") / 1e6) == 598
    adapter.remove()
    # 3.61 billion with one position MLP a spatial transformer; the layers here have one a block, equal at depth 1.
    adapter = inject(model)
    repeated = sum(
        parameter.numel()
        for name, layer in adapter.layers.items()
        if "transformer_blocks" in name and not name.endswith(".0")
        for parameter in layer.position.parameters()
    )
    assert round((count(adapter, "temporal") - repeated) / 1e9, 2) == 3.61


def test_decoder_has_residual_blocks_only_and_no_timestep():
    adapter = inject(on_meta(AutoencoderKL, SD_VAE), TemporalConfig.for_decoder())
    assert {site.kind for site in adapter.sites} == {"resnet"}
    assert (len(adapter.sites), count(adapter, "temporal", "alpha")) == (14, 14_088_974)
    assert all(site.name.startswith("decoder.") for site in adapter.sites)
    assert count(adapter, "alpha") == 14


def test_default_layout_on_a_decoder_also_takes_its_attention():
    attentions = [site for site in plan(on_meta(AutoencoderKL, SD_VAE)) if site.kind == "attention"]
    assert [(site.name, site.num_heads, site.head_dim) for site in attentions] == [
        ("decoder.mid_block.attentions.0", 1, 512)
    ]


@pytest.mark.parametrize(
    ("resblock", "transformer", "millions"),
    [
        (TemporalResBlockConfig(timestep_embedding=False), None, 133.4),
        (TemporalResBlockConfig(timestep_embedding=False, num_convs=4), None, 266.9),
        (None, TemporalTransformerConfig(attentions=("self",), ff_in=False, ff=False, position="none"), 49.6),
        (None, TemporalTransformerConfig(attentions=("self",), ff_in=False, position="none"), 198.4),
    ],
    ids=["convolution", "ModelScope's four convolutions", "attention", "attention and feed-forward"],
)
def test_cheaper_layouts(resblock, transformer, millions):
    config = TemporalConfig(resblock=resblock, transformer=transformer)
    assert round(count(inject(on_meta(UNet2DConditionModel, SD15), config), "temporal") / 1e6, 1) == millions


def test_sites_come_in_the_order_of_named_modules():
    model = on_meta(UNet2DConditionModel, SD15)
    names = [name for name, _ in model.named_modules()]
    positions = [names.index(site.name) for site in plan(model)]
    assert positions == sorted(positions)


def test_plan_changes_nothing(make_unet, fingerprint):
    model = make_unet()
    before = fingerprint(model)
    assert plan(model) == plan(model)
    assert fingerprint(model) == before


def test_a_module_registered_twice_is_one_site(make_unet):
    model = make_unet()
    model.down_blocks[1].resnets.append(model.down_blocks[1].resnets[0])
    names = [site.name for site in plan(model) if site.name.startswith("down_blocks.1")]
    assert names == ["down_blocks.1.resnets.0"]
