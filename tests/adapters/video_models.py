"""Tiny video models of diffusers with random weights, and their tensors under the names their authors gave.

The tables of names are written out by hand for these very models, from the published checkpoints' names, and know
nothing of how the library maps them.
"""

import re

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import nn

SMALL = {"sample_size": 8, "layers_per_block": 1, "cross_attention_dim": 12}
LEVELS = {"block_out_channels": (32, 64), "norm_num_groups": 8}
SDXL = {
    "block_out_channels": (16, 16, 32),
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "use_linear_projection": True,
}


def types(cross, plain, levels, suffix):
    """Block types with attention on all levels but the first (SDXL) or the last (SD)."""
    down = (
        [f"{cross}Down{suffix}", f"Down{suffix}"] if levels == 2 else [f"Down{suffix}", *[f"{cross}Down{suffix}"] * 2]
    )
    up = [f"{cross}Up{suffix}", f"Up{suffix}"] if levels == 2 else [f"Up{suffix}", *[f"{cross}Up{suffix}"] * 2]
    return {"down_block_types": tuple(down), "up_block_types": tuple(reversed(up))}


def randomised(model, dtype=torch.float32):
    """The model with weights on which every branch counts, small enough that float32 rounds to less than 1e-6."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            if "mix_factor" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return nn.Module.to(model, dtype).eval()


def animatediff(version="v2", dtype=torch.float32):
    levels = SDXL if version == "sdxl" else LEVELS
    motion = {
        "motion_max_seq_length": 24 if version == "v1" else 32,
        "use_motion_mid_block": version == "v2",
        "motion_num_attention_heads": 8,
        "num_attention_heads": 2,
    }
    blocks = types("CrossAttn", "", len(levels["block_out_channels"]), "BlockMotion")
    return randomised(UNetMotionModel(**SMALL, **levels, **motion, **blocks), dtype)


def image_unet_of(motion):
    """The image model of an AnimateDiff model."""
    levels = SDXL if len(motion.config.block_out_channels) == 3 else LEVELS
    blocks = types("CrossAttn", "", len(levels["block_out_channels"]), "Block2D")
    model = UNet2DConditionModel(**SMALL, **levels, **blocks, attention_head_dim=2)
    nn.Module.to(model, motion.dtype)
    model.load_state_dict({k: v for k, v in motion.state_dict().items() if "motion_modules" not in k})
    return model.eval()


def motion_part(motion):
    return {key: value for key, value in motion.state_dict().items() if "motion_modules" in key}


def animatediff_original(tensors):
    """diffusers' motion modules under the authors' names, which have a table of positions in each attention."""
    renamed = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(.*motion_modules\.\d+)\.(.*)", key)
        module, rest = f"{match[1]}.temporal_transformer", match[2]
        if rest == "transformer_blocks.0.pos_embed.pe":
            for attention in "01":
                renamed[f"{module}.transformer_blocks.0.attention_blocks.{attention}.pos_encoder.pe"] = value.clone()
            continue
        for old, new in (
            ("blocks.0.attn1.", "blocks.0.attention_blocks.0."),
            ("blocks.0.attn2.", "blocks.0.attention_blocks.1."),
            ("blocks.0.norm1.", "blocks.0.norms.0."),
            ("blocks.0.norm2.", "blocks.0.norms.1."),
            ("blocks.0.norm3.", "blocks.0.ff_norm."),
        ):
            rest = rest.replace(old, new)
        renamed[f"{module}.{rest}"] = value
    return renamed


class PerFrameNorm(nn.Module):
    """AnimateDiff's own norm in front of a motion module: group norm of each frame of ``(b, c, f, h, w)`` by itself."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, clips):
        return torch.stack([self.norm(clips[:, :, frame]) for frame in range(clips.shape[2])], dim=2)


def svd(dtype=torch.float32, depth=1):
    return randomised(
        UNetSpatioTemporalConditionModel(
            **SMALL,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2,
            up_block_types=("CrossAttnUpBlockSpatioTemporal",) * 2,
            num_attention_heads=(2, 4),
            in_channels=8,
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=48,
            transformer_layers_per_block=depth,
        ),
        dtype,
    )


def svd_plain_level(dtype=torch.float32):
    """With a level that has no attention, whose norms have another epsilon."""
    return randomised(
        UNetSpatioTemporalConditionModel(
            **SMALL,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            num_attention_heads=(2, 4),
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=48,
        ),
        dtype,
    )


def svd_decoder(dtype=torch.float32):
    return randomised(
        AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=2
        ),
        dtype,
    )


def modelscope(dtype=torch.float32):
    return randomised(
        UNet3DConditionModel(
            **SMALL,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock3D",) * 2,
            up_block_types=("CrossAttnUpBlock3D",) * 2,
            attention_head_dim=8,
        ),
        dtype,
    )


RESBLOCK = (
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
)
TOP = (
    ("conv_in.", "input_blocks.0.0."),
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
)


def with_prefixes(rows, parts):
    return tuple((old + a, new + b) for old, new in rows for a, b in parts)


SVD_RESNETS = (
    ("down_blocks.0.resnets.0.", "input_blocks.1.0."),
    ("down_blocks.1.resnets.0.", "input_blocks.3.0."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.resnets.1.", "middle_block.2."),
    ("up_blocks.0.resnets.0.", "output_blocks.0.0."),
    ("up_blocks.0.resnets.1.", "output_blocks.1.0."),
    ("up_blocks.1.resnets.0.", "output_blocks.2.0."),
    ("up_blocks.1.resnets.1.", "output_blocks.3.0."),
)
SVD_ATTENTIONS = (
    ("down_blocks.0.attentions.0.", "input_blocks.1.1."),
    ("down_blocks.1.attentions.0.", "input_blocks.3.1."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("up_blocks.0.attentions.0.", "output_blocks.0.1."),
    ("up_blocks.0.attentions.1.", "output_blocks.1.1."),
    ("up_blocks.1.attentions.0.", "output_blocks.2.1."),
    ("up_blocks.1.attentions.1.", "output_blocks.3.1."),
)
SVD_SGM = (
    *TOP,
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("down_blocks.0.downsamplers.0.conv.", "input_blocks.2.0.op."),
    ("up_blocks.0.upsamplers.0.conv.", "output_blocks.1.2.conv."),
    *with_prefixes(SVD_RESNETS, [("spatial_res_block." + a, b) for a, b in RESBLOCK]),
    *with_prefixes(SVD_RESNETS, [("temporal_res_block." + a, "time_stack." + b) for a, b in RESBLOCK]),
    *with_prefixes(SVD_RESNETS, [("time_mixer.", "time_mixer.")]),
    *with_prefixes(
        SVD_ATTENTIONS,
        [
            ("temporal_transformer_blocks.", "time_stack."),
            ("time_pos_embed.linear_1.", "time_pos_embed.0."),
            ("time_pos_embed.linear_2.", "time_pos_embed.2."),
            ("", ""),
        ],
    ),
)
VAE_RESNETS = (
    ("encoder.down_blocks.0.resnets.0.", "encoder.down.0.block.0."),
    ("encoder.down_blocks.0.resnets.1.", "encoder.down.0.block.1."),
    ("encoder.down_blocks.1.resnets.0.", "encoder.down.1.block.0."),
    ("encoder.down_blocks.1.resnets.1.", "encoder.down.1.block.1."),
    ("encoder.mid_block.resnets.0.", "encoder.mid.block_1."),
    ("encoder.mid_block.resnets.1.", "encoder.mid.block_2."),
    ("decoder.mid_block.resnets.0.", "decoder.mid.block_1."),
    ("decoder.mid_block.resnets.1.", "decoder.mid.block_2."),
    ("decoder.up_blocks.0.resnets.0.", "decoder.up.1.block.0."),
    ("decoder.up_blocks.0.resnets.1.", "decoder.up.1.block.1."),
    ("decoder.up_blocks.0.resnets.2.", "decoder.up.1.block.2."),
    ("decoder.up_blocks.1.resnets.0.", "decoder.up.0.block.0."),
    ("decoder.up_blocks.1.resnets.1.", "decoder.up.0.block.1."),
    ("decoder.up_blocks.1.resnets.2.", "decoder.up.0.block.2."),
)
VAE_PARTS = (
    *((f"temporal_res_block.{a}", f"time_stack.{b}") for a, b in RESBLOCK),
    ("time_mixer.mix_factor", "mix_factor"),
    ("spatial_res_block.conv_shortcut.", "nin_shortcut."),
    ("spatial_res_block.", ""),
    ("conv_shortcut.", "nin_shortcut."),
    ("", ""),
)
VAE_ATTENTION = (
    ("group_norm.", "norm."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "proj_out."),
)
VAE_SGM = (
    ("encoder.conv_in.", "encoder.conv_in."),
    ("decoder.conv_in.", "decoder.conv_in."),
    ("encoder.conv_norm_out.", "encoder.norm_out."),
    ("decoder.conv_norm_out.", "decoder.norm_out."),
    ("encoder.conv_out.", "encoder.conv_out."),
    ("decoder.conv_out.", "decoder.conv_out."),
    ("decoder.time_conv_out.", "decoder.conv_out.time_mix_conv."),
    ("quant_conv.", "quant_conv."),
    ("encoder.down_blocks.0.downsamplers.0.conv.", "encoder.down.0.downsample.conv."),
    ("decoder.up_blocks.0.upsamplers.0.conv.", "decoder.up.1.upsample.conv."),
    *with_prefixes(
        (
            ("encoder.mid_block.attentions.0.", "encoder.mid.attn_1."),
            ("decoder.mid_block.attentions.0.", "decoder.mid.attn_1."),
        ),
        VAE_ATTENTION,
    ),
    *with_prefixes(VAE_RESNETS, VAE_PARTS),
)
MODELSCOPE_PLACES = (  # place, and how many modules stand in it: residual block, attention, attention over frames
    ("down_blocks.0.{}.0.", "input_blocks.1.", 0),
    ("down_blocks.1.{}.0.", "input_blocks.3.", 0),
    ("mid_block.{}.0.", "middle_block.", 0),
    ("mid_block.{}.1.", "middle_block.", 3),
    ("up_blocks.0.{}.0.", "output_blocks.0.", 0),
    ("up_blocks.0.{}.1.", "output_blocks.1.", 0),
    ("up_blocks.1.{}.0.", "output_blocks.2.", 0),
    ("up_blocks.1.{}.1.", "output_blocks.3.", 0),
)
MODELSCOPE = (
    *TOP,
    ("transformer_in.", "input_blocks.0.1."),
    ("down_blocks.0.downsamplers.0.conv.", "input_blocks.2.op."),
    ("up_blocks.0.upsamplers.0.conv.", "output_blocks.1.3.conv."),
    *(
        (place.format("resnets") + a, f"{row}{start}.{b}")
        for place, row, start in MODELSCOPE_PLACES
        for a, b in RESBLOCK
    ),
    *((place.format("temp_convs"), f"{row}{start}.temopral_conv.") for place, row, start in MODELSCOPE_PLACES),
    *((place.format("attentions"), f"{row}{start + 1}.") for place, row, start in MODELSCOPE_PLACES),
    *((place.format("temp_attentions"), f"{row}{start + 2}.") for place, row, start in MODELSCOPE_PLACES),
)


def under(table, tensors, prefix=""):
    """Tensors under the names of a table, whose first fitting row counts."""
    renamed = {}
    for key, value in tensors.items():
        old, new = next(row for row in table if key.startswith(row[0]))
        renamed[prefix + new + key.removeprefix(old)] = value
    assert len(renamed) == len(tensors)
    return renamed


def svd_sgm(model):
    return under(SVD_SGM, model.state_dict(), "model.diffusion_model.")


def svd_decoder_sgm(model):
    """With the attention's projections as 1x1 convolutions, as the authors have them."""
    tensors = under(VAE_SGM, model.state_dict(), "first_stage_model.")
    convs = re.compile(r".*attn_1\.(q|k|v|proj_out)\.weight")
    return {key: value[:, :, None, None] if convs.fullmatch(key) else value for key, value in tensors.items()}


def modelscope_original(model):
    """With the projections around attention over frames as 1-D convolutions, as the authors have them."""
    tensors = {}
    for key, value in model.state_dict().items():
        temporal = key.startswith("transformer_in.") or ".temp_attentions." in key
        conv = temporal and key.endswith(("proj_in.weight", "proj_out.weight"))
        tensors[key] = value[:, :, None] if conv else value
    return under(MODELSCOPE, tensors)
