"""Tiny pipelines with random weights, made offline."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from temporal_layers.adapters import TemporalConfig, inject
from temporal_layers.recipes.bases import LabelBase
from temporal_layers.recipes.conditioning import ContextPlanes
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm
from temporal_layers.recipes.pipelines.interpolation import VideoInterpolationPipeline
from temporal_layers.recipes.pipelines.prediction import VideoPredictionPipeline
from temporal_layers.recipes.pipelines.upscaling import VideoUpscalePipeline
from temporal_layers.recipes.stages.context import with_context
from temporal_layers.recipes.upscaler import UpscalerConfig, build_upscaler

CASCADE_SIZES = ImageLDMConfig(
    height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 16), num_heads=2, context_dim=8
)
WORDS = ("a", "video", "day", "night", "road", "clear", "rain", "fog", "snow", "dusk")


def make_tokenizer(folder):
    folder.mkdir(exist_ok=True)
    tokens = [f"{word}</w>" for word in WORDS] + [chr(97 + i) for i in range(26)]
    tokens += [f"{chr(97 + i)}</w>" for i in range(1, 26)] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12), len(vocabulary)


@pytest.fixture(scope="session")
def tokenizer_in():
    """`make_tokenizer`, for tests in other files."""
    return make_tokenizer


def make_text_encoder(cls, size):
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    return cls(config).eval()


def make_unet(**options):
    return UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
            **options,
        }
    ).eval()


def make_vae():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


@pytest.fixture(scope="session")
def text_unet():
    """`make_unet`, for tests in other files."""
    return make_unet


@pytest.fixture
def stable_diffusion(tmp_path):
    tokenizer, size = make_tokenizer(tmp_path / "tokenizer")
    return StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(CLIPTextModel, size),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def stable_diffusion_xl(tmp_path):
    tokenizer, size = make_tokenizer(tmp_path / "tokenizer")
    return StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(CLIPTextModel, size),
        text_encoder_2=make_text_encoder(CLIPTextModelWithProjection, size),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=make_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
    )


@pytest.fixture
def unconditional():
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=1000))


def stir(model):
    """Layers that start as the identity do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make_base(planes, seed):
    base = LabelBase(build_image_ldm(CASCADE_SIZES, ("day", "night"), seed=seed))
    with_context(base, planes, None, "both")
    stir(base.unet)
    return base.ldm


@pytest.fixture(scope="session")
def cascade_parts():
    keys, between = make_base(ContextPlanes(), 0), make_base(ContextPlanes(rate=True, max_noise_level=50), 0)
    inject(between.vae, TemporalConfig.for_decoder())
    stir(between.vae.decoder)
    upscaler = build_upscaler(UpscalerConfig(channels=(8, 16), norm_groups=4, head_dim=8, factor=2))
    inject(upscaler.unet)
    stir(upscaler.unet)
    return (
        VideoPredictionPipeline.from_image_pipeline(keys),
        VideoInterpolationPipeline.from_image_pipeline(between),
        VideoUpscalePipeline.from_image_pipeline(upscaler),
    )


@pytest.fixture
def stable_upscaler(stable_diffusion):
    """As Stable Diffusion x4: 4 + 3 channels in, noise levels from a table; here with an autoencoder of factor 2."""
    stable_diffusion.vae.register_to_config(scaling_factor=0.08333)
    return StableDiffusionUpscalePipeline(
        vae=stable_diffusion.vae,
        text_encoder=stable_diffusion.text_encoder,
        tokenizer=stable_diffusion.tokenizer,
        unet=make_unet(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.0001,
            beta_end=0.02,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        max_noise_level=350,
    )
