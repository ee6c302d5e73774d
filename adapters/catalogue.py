"""diffusers' image models and the spatial modules they are made of, for the registry.

Classes are named, not imported: diffusers moves them between files, and a name costs no import. What is not here is
either a video model already (:data:`VIDEO_MODULES`) or has no residual feature-map blocks (token transformers).
"""

from typing import Any

from torch import nn

from temporal_layers.adapters.registry import register_attention, register_model, register_resnet

__all__ = ["VIDEO_MODULES"]

# A model that holds one of these mixes frames already.
VIDEO_MODULES = frozenset(
    {
        "AllegroTemporalConvLayer",
        "AnimateDiffTransformer3D",
        "Conv3d",
        "MotionModules",
        "QwenImage21CausalConv3d",
        "SpatioTemporalResBlock",
        "TemporalBasicTransformerBlock",
        "TemporalConvLayer",
        "TemporalResnetBlock",
        "TransformerSpatioTemporalModel",
        "TransformerTemporalModel",
    }
)


def _cross_attention_dim(*attentions: nn.Module | None) -> int | None:
    for attention in attentions:
        if attention is not None and attention.is_cross_attention:
            return attention.cross_attention_dim
    return None


def _head_dim(attention: nn.Module) -> int:
    return attention.inner_dim // attention.heads


def _attention_of(block: nn.Module) -> nn.Module:
    # A block without self-attention (DreamLite) has the cross-attention only.
    return block.attn2 if block.attn1 is None else block.attn1


def _first_block(transformer: nn.Module) -> nn.Module:
    return transformer.transformer_blocks[0]


def _block_context(block: nn.Module) -> int | None:
    return _cross_attention_dim(block.attn2, block.attn1)


def _wide_context(attention: nn.Module) -> int | None:
    # Kandinsky 3 makes self-attentions as cross-attentions to their own width; a text of just that width is missed.
    return None if attention.cross_attention_dim == attention.query_dim else attention.cross_attention_dim


def _norm(module: nn.Module, name: str, default: Any) -> Any:
    # A norm conditioned on the latents (MoVQ, KVAE) has neither groups nor an epsilon of its own.
    return getattr(module.norm2, name, default)


def _ada_temb(resnet: nn.Module) -> int | None:
    return resnet.norm2.linear.in_features if resnet.time_embedding_norm == "ada_group" else None


def _projected_temb(resnet: nn.Module) -> int | None:
    projection = getattr(resnet, "time_emb_proj", None)
    return None if projection is None else projection.in_features


for _name in ("ResnetBlock2D", "ResnetBlock2DDreamLite"):
    register_resnet(
        _name,
        channels="out_channels",
        num_groups=lambda resnet: _norm(resnet, "num_groups", None),
        eps=lambda resnet: _norm(resnet, "eps", 1e-5),
        temb="temb",
        temb_channels=_projected_temb,
    )
register_resnet(  # its out_channels is not what comes out: a K block narrows in the last convolution
    "ResnetBlockCondNorm2D",
    channels="conv2.out_channels",
    num_groups=lambda resnet: _norm(resnet, "num_groups", None),
    eps=lambda resnet: _norm(resnet, "eps", 1e-6),
    temb="temb",
    temb_channels=_ada_temb,
)
register_resnet(
    "Kandinsky3ResNetBlock",
    channels="resnet_blocks.3.projection.out_channels",
    num_groups="resnet_blocks.0.group_norm.norm.num_groups",
    temb="time_embed",
    temb_channels="resnet_blocks.0.group_norm.context_mlp.1.in_features",
)
register_resnet("SDCascadeResBlock", channels="depthwise.out_channels", eps=1e-6)
register_resnet("AutoencoderTinyBlock", channels="conv.4.out_channels")
register_resnet("ResBlock", channels="conv2.out_channels")  # AutoencoderDC
register_resnet("HunyuanImageResnetBlock", channels="conv2.out_channels", num_groups="norm2.num_groups", eps=1e-6)
register_resnet(
    "KVAEResnetBlock2D",
    channels="out_channels",
    num_groups=lambda resnet: _norm(resnet, "num_groups", None),
    eps=1e-6,
)
register_resnet("MixingResidualBlock", channels="channelwise.2.out_features", eps=1e-6)  # PaellaVQModel

for _name in ("Transformer2DModel", "DreamLiteTransformer2DModel"):
    register_attention(
        _name,
        channels="in_channels",
        num_heads=lambda transformer: _attention_of(_first_block(transformer)).heads,
        head_dim=lambda transformer: _head_dim(_attention_of(_first_block(transformer))),
        num_groups="norm.num_groups",
        context="encoder_hidden_states",
        context_dim=lambda transformer: _block_context(_first_block(transformer)),
        holds_blocks=True,
    )
for _name in ("BasicTransformerBlock", "BasicTransformerBlockDreamLite"):
    register_attention(
        _name,
        channels=lambda block: _attention_of(block).query_dim,
        # Read from the module, never from a model's config: attention_head_dim means heads there in SD 1.x.
        num_heads=lambda block: _attention_of(block).heads,
        head_dim=lambda block: _head_dim(_attention_of(block)),
        context="encoder_hidden_states",
        context_dim=_block_context,
        tokens=True,
    )
register_attention(  # in a list of this name it is a layer of the feature map; anywhere else a branch of a block
    "Attention",
    channels="query_dim",
    num_heads="heads",
    head_dim=_head_dim,
    num_groups=lambda attention: None if attention.group_norm is None else attention.group_norm.num_groups,
    context="encoder_hidden_states",
    context_dim="added_kv_proj_dim",
    only_in="attentions",
)
register_attention(
    "KAttentionBlock",
    channels="attn2.query_dim",
    num_heads="attn2.heads",
    head_dim=lambda block: _head_dim(block.attn2),
    num_groups="norm2.num_groups",
    context="encoder_hidden_states",
    context_dim=lambda block: _cross_attention_dim(block.attn2),
)
register_attention(
    "Kandinsky3AttentionBlock",
    channels="attention.query_dim",
    num_heads="attention.heads",
    head_dim=lambda block: _head_dim(block.attention),
    num_groups="in_norm.norm.num_groups",
    context="context",
    context_dim=lambda block: _wide_context(block.attention),
)
register_attention(
    "SDCascadeAttnBlock",
    channels="attention.query_dim",
    num_heads="attention.heads",
    head_dim=lambda block: _head_dim(block.attention),
    context="kv",
    context_dim="kv_mapper.1.in_features",
)
register_attention(
    "EfficientViTBlock",  # AutoencoderDC
    channels="attn.to_out.out_features",
    num_heads=lambda block: block.attn.to_q.out_features // block.attn.attention_head_dim,
    head_dim="attn.attention_head_dim",
)
register_attention(
    "HunyuanImageAttentionBlock", channels="proj.out_channels", num_heads=1, num_groups="norm.num_groups"
)

for _name in (
    "UNet2DModel",
    "UNet2DConditionModel",  # Stable Diffusion, DeepFloyd IF, Kandinsky 2, unCLIP, upscalers; DreamLite is a subclass
    "AudioLDM2UNet2DConditionModel",
    "Kandinsky3UNet",
    "StableCascadeUNet",
):
    register_model(_name)
for _name in (
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AsymmetricAutoencoderKL",
    "AutoencoderTiny",
    "AutoencoderDC",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLKVAE",
    "VQModel",
):
    register_model(_name, family="autoencoder", part="decoder")
register_model("ConsistencyDecoderVAE", family="autoencoder", part="decoder_unet")
register_model("PaellaVQModel", family="autoencoder", part="up_blocks")
