"""Our tensors under diffusers' names for the published video models.

Everything runs in one direction, from our names to theirs. The names a file must have follow from the layers a model
would get, so that a file is compared with a complete list, and writing a file is the same table read backwards.
"""

import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from temporal_layers.adapters.sites import InjectionSite

__all__ = ["Change", "from_foreign", "spatial_name", "temporal_name", "to_foreign"]

Change = Literal["none", "conv3d", "conv2d", "conv1d", "scalar", "negated"]
"""How a foreign tensor differs from ours: 5-D, 4-D and 3-D convolutions for our 4-D and linear weights, one-element
vectors for our scalars, and the alpha of SVD's decoder, which weighs the temporal branch."""

FEED_FORWARD = {"proj_in": "net.0.proj", "proj_out": "net.2"}
Rules = tuple[tuple[str, Callable[[re.Match], str]], ...]

BLOCK: Rules = (  # inside one transformer block
    (r"norms\.(\d+)\.", lambda m: f"norm{int(m[1]) + 1}."),
    (r"attentions\.(\d+)\.to_out\.", lambda m: f"attn{int(m[1]) + 1}.to_out.0."),
    (r"attentions\.(\d+)\.(to_[qkv]\.)", lambda m: f"attn{int(m[1]) + 1}.{m[2]}"),
    (r"norm_out\.", lambda m: "norm3."),
    (r"ff_out\.(proj_in|proj_out)\.", lambda m: f"ff.{FEED_FORWARD[m[1]]}."),
)
MAPS: Rules = (  # a block with projections around it, on feature maps
    (r"in_norm\.", lambda m: "norm."),
    (r"(proj_in|proj_out)\.", lambda m: m[0]),
    *((pattern, lambda m, put=put: "transformer_blocks.0." + put(m)) for pattern, put in BLOCK),
)
TOKENS: Rules = (  # SVD's block; what it shares with the other blocks of its transformer stands one level up
    (r"position\.(linear_[12]\.)", lambda m: f"../time_pos_embed.{m[1]}"),
    (r"blend\.logit$", lambda m: "../time_mixer.mix_factor"),
    (r"norm_in\.", lambda m: m[0]),
    (r"ff_in\.(proj_in|proj_out)\.", lambda m: f"ff_in.{FEED_FORWARD[m[1]]}."),
    *BLOCK,
)
SVD_RESBLOCK: Rules = (
    (r"norms\.([01])\.", lambda m: f"temporal_res_block.norm{int(m[1]) + 1}."),
    (r"convs\.([01])\.", lambda m: f"temporal_res_block.conv{int(m[1]) + 1}."),
    (r"temb_proj\.", lambda m: "temporal_res_block.time_emb_proj."),
    (r"blend\.logit$", lambda m: "time_mixer.mix_factor"),
)
MODELSCOPE_RESBLOCK: Rules = (
    (r"norms\.(\d)\.", lambda m: f"conv{int(m[1]) + 1}.0."),
    (r"convs\.0\.", lambda m: "conv1.2."),
    (r"convs\.(\d)\.", lambda m: f"conv{int(m[1]) + 1}.3."),  # behind a dropout
)


def temporal_name(family: str, site: InjectionSite, key: str) -> tuple[str, Change]:
    """Name and change of a temporal tensor in diffusers' model.

    Args:
        family: of the model.
        site: where the layer is.
        key: of the tensor within the layer.

    Raises:
        ValueError: if the model has no such tensor.
    """
    base, rules = _place(family, site)
    for pattern, put in rules:
        match = re.match(pattern, key)
        if match is not None:
            tail = put(match) + key[match.end() :]
            if tail.startswith("../"):  # "x.transformer_blocks.0" shares with its siblings under "x"
                base, tail = base.rsplit(".", 2)[0], tail.removeprefix("../")
            return f"{base}.{tail}", _change(family, key)
    raise ValueError(
        f"{site.name}.temporal.{key}: expected a tensor that {family} has, got one it has not; "
        f"the layers differ from {family}'s"
    )


def _place(family: str, site: InjectionSite) -> tuple[str, Rules]:
    block, _, index = re.sub(r"\.(resnets|attentions)\.", " ", site.name).partition(" ")
    match (family, site.kind):
        case ("animatediff", "resnet" | "attention"):
            return f"{block}.motion_modules.{index}", MAPS
        case ("modelscope", "attention"):
            return f"{block}.temp_attentions.{index}", MAPS
        case ("modelscope", "conv_in"):
            return "transformer_in", MAPS
        case ("modelscope", "resnet"):
            return f"{block}.temp_convs.{index}", MODELSCOPE_RESBLOCK
        case ("svd", "transformer_block"):
            return site.name.replace(".transformer_blocks.", ".temporal_transformer_blocks."), TOKENS
        case ("svd" | "svd-decoder", "resnet"):
            return site.name, SVD_RESBLOCK
        case ("svd-decoder", "conv_out"):
            return "decoder.time_conv_out", ((r"conv\.", lambda m: ""),)
    return site.name, ()


def _change(family: str, key: str) -> Change:
    if key == "blend.logit":
        return "negated" if family == "svd-decoder" else "scalar"
    return "conv3d" if re.search(r"\bconvs?\b.*\.weight$", key) else "none"


def spatial_name(family: str, key: str) -> str:
    """Name of a tensor of the image model in diffusers' video model."""
    if family == "svd":
        key = re.sub(r"^class_embedding\.", "add_embedding.", key)
    if family == "svd" or (family == "svd-decoder" and key.startswith("decoder.")):
        key = re.sub(r"(\.resnets\.\d+\.)", r"\1spatial_res_block.", key)
    return key


def to_foreign(value: Tensor, change: Change) -> Tensor:
    """Our tensor in their shape."""
    match change:
        case "conv3d" | "conv1d":
            return value.unsqueeze(-1)
        case "conv2d":
            return value[..., None, None]
        case "scalar":
            return value.reshape(1)
        case "negated":
            return -value.reshape(1)
    return value


def from_foreign(value: Tensor, change: Change) -> Tensor:
    """Undo :func:`to_foreign`."""
    match change:
        case "conv3d" | "conv1d":
            return value.squeeze(-1)
        case "conv2d":
            return value[..., 0, 0]
        case "scalar":
            return value.reshape(torch.Size())
        case "negated":
            return -value.reshape(torch.Size())
    return value
