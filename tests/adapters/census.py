"""Tiny random models of every class that can be injected, with what a call of them takes.

Each entry makes a model and names its image-shaped input and the conditioning of a batch; the sites are counted by hand
from the structure of the model: residual blocks that keep the resolution, attentions, and residual blocks inside
resamplers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from torch import nn


@dataclass(frozen=True)
class Entry:
    make: Callable[[], nn.Module]
    sample: tuple[int, ...]  # channels, height, width
    resnets: int
    attentions: int
    resamplers: int = 0
    conditioning: Callable[[int], dict] = field(default=lambda batch: {})


def text(batch, width=12, tokens=3):
    return {"encoder_hidden_states": torch.randn(batch, tokens, width)}


def unet2d(down, up, **changes):
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 4, "down_block_types": down, "up_block_types": up,
    }  # fmt: skip
    return lambda: diffusers.UNet2DModel(**{**config, **changes})


def conditional(**changes):
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return lambda: diffusers.UNet2DConditionModel(**{**config, **changes})


UNETS = {
    "ddpm": Entry(unet2d(("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")), (4, 8, 8), 8, 4),
    "ncsnpp": Entry(
        unet2d(
            ("SkipDownBlock2D", "AttnSkipDownBlock2D"), ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            block_out_channels=(32, 64), in_channels=3, out_channels=3,
        ),
        (3, 8, 8), 8, 3, 2,
    ),
    "consistency model": Entry(
        unet2d(
            ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
        ),
        (4, 8, 8), 8, 4, 2,
    ),
    "sd": Entry(conditional(), (4, 8, 8), 8, 4, conditioning=text),
    "inpaint": Entry(conditional(in_channels=9), (9, 8, 8), 8, 4, conditioning=text),
    "odd channels": Entry(
        conditional(block_out_channels=(6, 12), norm_num_groups=2), (4, 9, 7), 8, 4, conditioning=text
    ),
    "sdxl": Entry(
        conditional(
            transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=60,
        ),
        (4, 8, 8), 8, 4,
        conditioning=lambda batch: text(batch)
        | {"added_cond_kwargs": {"text_embeds": torch.randn(batch, 12), "time_ids": torch.rand(batch, 6)}},
    ),
    "x4 upscaler": Entry(
        conditional(in_channels=7, num_class_embeds=10, only_cross_attention=(True, False)), (7, 8, 8), 8, 4,
        conditioning=lambda batch: text(batch) | {"class_labels": torch.randint(10, (batch,))},
    ),
    "latent upscaler": Entry(
        conditional(
            block_out_channels=(32, 32, 64, 64), in_channels=8, out_channels=5, attention_head_dim=8, act_fn="gelu",
            down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
            up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
            mid_block_type=None, conv_in_kernel=1, conv_out_kernel=1, norm_num_groups=None, timestep_post_act="gelu",
            resnet_time_scale_shift="scale_shift", time_embedding_type="fourier", time_cond_proj_dim=16,
            only_cross_attention=False,
        ),
        (8, 16, 16), 8, 6,
        conditioning=lambda batch: text(batch) | {"timestep_cond": torch.randn(batch, 16)},
    ),
    "deepfloyd if": Entry(
        conditional(
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift", attention_head_dim=4,
            encoder_hid_dim=10, cross_attention_dim=32, addition_embed_type="text", addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm", act_fn="gelu",
        ),
        (4, 8, 8), 8, 4, 2, conditioning=lambda batch: text(batch, width=10),
    ),
    "kandinsky 2.2": Entry(
        conditional(
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift", attention_head_dim=4,
            encoder_hid_dim=10, encoder_hid_dim_type="image_proj", addition_embed_type="image",
        ),
        (4, 8, 8), 8, 4, 2,
        conditioning=lambda batch: {
            "encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": torch.randn(batch, 10)},
        },
    ),
    "dreamlite": Entry(
        lambda: diffusers.DreamLiteUNetModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=12, attention_head_dim=2, transformer_layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        (4, 8, 8), 8, 4, conditioning=text,
    ),
    "kandinsky 3": Entry(
        lambda: diffusers.Kandinsky3UNet(
            in_channels=4, time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=2,
            block_out_channels=(8, 16), cross_attention_dim=12, encoder_hid_dim=12,
        ),
        (4, 8, 8), 16, 9,
        conditioning=lambda batch: text(batch) | {"encoder_attention_mask": torch.ones(batch, 3)},
    ),
    "stable cascade": Entry(
        lambda: diffusers.StableCascadeUNet(
            in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, patch_size=1, conditioning_dim=8,
            block_out_channels=(8, 16), num_attention_heads=(2, 4), down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(2, 1),
            block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            clip_text_in_channels=12, clip_text_pooled_in_channels=12, clip_image_in_channels=12, clip_seq=2,
            self_attn=True, switch_level=(False,), timestep_conditioning_type=("sca", "crp"),
        ),
        (4, 8, 8), 4, 4,
        conditioning=lambda batch: {
            "clip_text_pooled": torch.randn(batch, 1, 12), "clip_text": torch.randn(batch, 3, 12),
            "clip_img": torch.randn(batch, 1, 12),
        },
    ),
    "audioldm2": Entry(
        lambda: AudioLDM2UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=((None, 12, 10), (None, 12, 10)), attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        (4, 8, 8), 8, 12,
        conditioning=lambda batch: text(batch) | {"encoder_hidden_states_1": torch.randn(batch, 4, 10)},
    ),
}  # fmt: skip


def kl(cls, **changes):
    config = {
        "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
    }  # fmt: skip
    return lambda: cls(**{**config, **changes})


AUTOENCODERS = {
    "kl": Entry(kl(diffusers.AutoencoderKL), (4, 4, 4), 6, 1),
    "kl without attention": Entry(kl(diffusers.AutoencoderKL, mid_block_add_attention=False), (4, 4, 4), 6, 0),
    "flux2": Entry(kl(diffusers.AutoencoderKLFlux2), (4, 4, 4), 6, 1),
    "vq": Entry(kl(diffusers.VQModel, num_vq_embeddings=16), (4, 4, 4), 6, 1),
    "movq": Entry(
        kl(
            diffusers.VQModel, num_vq_embeddings=16, norm_type="spatial", vq_embed_dim=4,
            block_out_channels=(32, 32), norm_num_groups=32,
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        ),
        (4, 4, 4), 6, 3,
    ),
    "asymmetric": Entry(
        lambda: diffusers.AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(8, 16), layers_per_down_block=1,
            up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(8, 16), layers_per_up_block=1,
            latent_channels=4, norm_num_groups=4, sample_size=8,
        ),
        (4, 4, 4), 6, 1,
    ),
    "tiny": Entry(
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=4,
        ),
        (4, 4, 4), 2, 0,
    ),
    "consistency decoder": Entry(
        lambda: diffusers.ConsistencyDecoderVAE(
            latent_channels=4, encoder_act_fn="silu", encoder_block_out_channels=(32, 32),
            encoder_double_z=True, encoder_down_block_types=("DownEncoderBlock2D",) * 2, encoder_in_channels=3,
            encoder_layers_per_block=1, encoder_norm_num_groups=4, encoder_out_channels=4, decoder_add_attention=False,
            decoder_block_out_channels=(8, 16), decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
            decoder_downsample_padding=1, decoder_in_channels=7, decoder_layers_per_block=1,
            decoder_norm_eps=1e-5, decoder_norm_num_groups=4, decoder_num_train_timesteps=1024, decoder_out_channels=6,
            decoder_resnet_time_scale_shift="scale_shift", decoder_time_embedding_type="learned",
            decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2, scaling_factor=1.0,
        ),
        (4, 4, 4), 8, 0, 2,
    ),
    "dc": Entry(
        lambda: diffusers.AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), upsample_block_type="interpolate",
            downsample_block_type="stride_conv", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        ),
        (4, 4, 4), 1, 1,
    ),
    "hunyuan image": Entry(
        lambda: diffusers.AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(32, 32), layers_per_block=1,
            spatial_compression_ratio=2, sample_size=16, scaling_factor=1.0,
        ),
        (8, 4, 4), 6, 1,
    ),
    "kvae": Entry(
        lambda: diffusers.AutoencoderKLKVAE(
            channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1), sample_size=16
        ),
        (4, 4, 4), 6, 0,
    ),
    "paella": Entry(
        lambda: PaellaVQModel(bottleneck_blocks=2, embed_dim=16, num_vq_embeddings=16), (4, 4, 4), 3, 0
    ),
}  # fmt: skip
