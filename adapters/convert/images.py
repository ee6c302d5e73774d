"""The image model inside a file of a whole video model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.adapters.convert.detection import detect
from temporal_layers.adapters.convert.names import from_foreign
from temporal_layers.adapters.convert.reading import Foreign, Weights, read_foreign
from temporal_layers.adapters.convert.source import Source
from temporal_layers.adapters.convert.table import make_table

__all__ = ["image_model_of", "micro_conditioning"]


def image_model_of(weights: Weights, *, part: str | None = None, head_dim: int | None = None) -> nn.Module:
    """Make the image model that is inside Stable Video Diffusion, the decoder of its autoencoder, or ModelScope.

    Its shape is read off the tensors. The result plus :func:`load_foreign` of the same file computes what the video
    model computes. SVD's UNet takes its time ids as class labels: see :func:`micro_conditioning`. The epsilons of its
    norms are those of diffusers' class.

    Args:
        weights: as for :func:`load_foreign`.
        part: ``"unet"`` or ``"autoencoder"``, for a file that has both; the UNet if not given.
        head_dim: channels of an attention head; what the ``config.json`` says if not given, or 64 as in all published
            models.

    Returns:
        A ``UNet2DConditionModel`` or ``AutoencoderKL`` in the dtype of the file, in evaluation mode.

    Raises:
        ValueError: if the file cannot be read, is of an unknown format, or has no complete image model in it.
    """
    foreign = read_foreign(weights)
    source = detect(foreign.tensors, part)
    if source.family == "animatediff" or not source.whole:
        raise ValueError(
            f"image_model_of: {foreign.where}: expected a whole video model of SVD or ModelScope, got {source}; "
            "pass load_foreign the image model that the layers were trained for"
        )
    tensors = {k.removeprefix(source.prefix): v for k, v in foreign.tensors.items() if k.startswith(source.prefix)}
    try:
        if source.family == "svd-decoder":
            model: nn.Module = AutoencoderKL(**_autoencoder_config(source, tensors, foreign.config))
        else:
            model = UNet2DConditionModel(**_unet_config(source, tensors, foreign.config, head_dim))
    except (KeyError, StopIteration, IndexError) as error:
        raise _incomplete(foreign, [str(error.args[0] if error.args else "attentions")]) from error
    nn.Module.to(model, getattr(torch, source.dtype))
    if source.family == "svd":
        _set_epsilons(model)
    values = _values(source, foreign, model)
    try:
        model.load_state_dict(values)
    except RuntimeError as error:
        raise ValueError(
            f"image_model_of: {foreign.where}: expected the shapes of {source}, got others: "
            f"{' '.join(str(error).split())}; the file is of a variant that is not supported"
        ) from error
    return model.eval()


def micro_conditioning(added_time_ids: Float[Tensor, "batch ids"], dim: int = 256) -> Float[Tensor, "batch features"]:
    """SVD's time ids as the class labels of the image model made by :func:`image_model_of`.

    Args:
        added_time_ids: ``(batch, 3)``: frames per second, motion bucket, noise on the first frame.
        dim: width of the sinusoid for each, ``addition_time_embed_dim`` in the ``config.json``.

    Returns:
        ``(batch, 3 * dim)`` in the dtype of the ids, or fp32 for whole numbers.
    """
    sinusoid = get_timestep_embedding(added_time_ids.flatten(), dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    wanted = added_time_ids.dtype if added_time_ids.is_floating_point() else torch.float32
    return sinusoid.unflatten(0, added_time_ids.shape).flatten(1).to(wanted)


@dataclass(frozen=True)
class Level:
    """One resolution of a model.

    Attributes:
        channels: of its feature maps.
        layers: residual blocks on the way down.
        attention: what the names of its first attention begin with; ``None`` if it has none.
    """

    channels: int
    layers: int
    attention: str | None = None


def _levels(tensors: Mapping[str, Tensor], block: str, attention: str | None = None) -> list[Level]:
    """Read levels off names that count levels and layers by themselves.

    Args:
        tensors: by name.
        block: pattern of the name of a residual block's last convolution, with a level and a layer.
        attention: name of a level's first attention, with ``{}`` for the level.
    """
    found: dict[int, list[int]] = {}
    for name, value in tensors.items():
        if match := re.fullmatch(block, name):
            found.setdefault(int(match[1]), []).append(value.shape[0])
    starts = {level: f"{attention}.".format(level) for level in found} if attention else {}
    attended = {level for level, start in starts.items() if any(name.startswith(start) for name in tensors)}
    return [
        Level(found[level][0], len(found[level]), starts[level] if level in attended else None)
        for level in sorted(found)
    ]


def _levels_in_a_row(tensors: Mapping[str, Tensor]) -> list[Level]:
    """Read levels off names that count all layers in one row, with a convolution between two levels."""
    levels: list[Level] = []
    channels, layers, attention, index = 0, 0, None, 1
    while any(name.startswith(f"input_blocks.{index}.") for name in tensors):
        block = f"input_blocks.{index}."
        weight = tensors.get(f"{block}0.out_layers.3.weight")
        if weight is None:
            levels.append(Level(channels, layers, attention))
            layers, attention = 0, None
        else:
            channels, layers = weight.shape[0], layers + 1
            if attention is None and f"{block}1.proj_in.weight" in tensors:
                attention = f"{block}1."
        index += 1
    return [*levels, Level(channels, layers, attention)]


def _unet_config(
    source: Source, tensors: Mapping[str, Tensor], config: Mapping[str, Any], head_dim: int | None
) -> dict[str, Any]:
    if source.style == "diffusers":
        pattern = r"down_blocks\.(\d+)\.resnets\.\d+\.(?:spatial_res_block\.)?conv2\.weight"
        levels = _levels(tensors, pattern, "down_blocks.{}.attentions.0")
        names = {"in": "conv_in", "out": "conv_out", "labels": "add_embedding.linear_1"}
    else:
        levels = _levels_in_a_row(tensors)
        names = {"in": "input_blocks.0.0", "out": "out.2", "labels": "label_emb.0.0"}
    first = next(level.attention for level in levels if level.attention is not None)
    told = config.get("attention_head_dim" if source.family == "modelscope" else "num_attention_heads")
    if source.family == "modelscope":
        head_dim, told = head_dim or told, None
    heads = told if told is not None else [level.channels // (head_dim or 64) for level in levels]
    made = {
        "sample_size": config.get("sample_size"),
        "in_channels": tensors[f"{names['in']}.weight"].shape[1],
        "out_channels": tensors[f"{names['out']}.weight"].shape[0],
        "down_block_types": tuple(f"{_cross(level)}DownBlock2D" for level in levels),
        "up_block_types": tuple(f"{_cross(level)}UpBlock2D" for level in reversed(levels)),
        "block_out_channels": tuple(level.channels for level in levels),
        "layers_per_block": levels[0].layers,
        "norm_num_groups": config.get("norm_num_groups", 32),
        "norm_eps": config.get("norm_eps", 1e-5),
        "cross_attention_dim": tensors[f"{first}transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": heads if isinstance(heads, int) else tuple(heads),
        "transformer_layers_per_block": tuple(_depth(tensors, level) for level in levels),
        "use_linear_projection": tensors[f"{first}proj_in.weight"].ndim == 2,
    }
    if source.family == "svd":
        width = tensors[f"{names['labels']}.weight"].shape[1]
        made |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width}
    return made


def _cross(level: Level) -> str:
    return "" if level.attention is None else "CrossAttn"


def _depth(tensors: Mapping[str, Tensor], level: Level) -> int:
    if level.attention is None:
        return 1
    pattern = re.escape(level.attention) + r"transformer_blocks\.(\d+)\."
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _autoencoder_config(source: Source, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    blocks = r"encoder\.down_blocks\.(\d+)\.resnets" if source.style == "diffusers" else r"encoder\.down\.(\d+)\.block"
    levels = _levels(tensors, blocks + r"\.\d+\.conv2\.weight")
    kept = ("sample_size", "scaling_factor", "force_upcast")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * len(levels),
        "up_block_types": ("UpDecoderBlock2D",) * len(levels),
        "block_out_channels": tuple(level.channels for level in levels),
        "layers_per_block": levels[0].layers,
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": False,
        **{key: config[key] for key in kept if key in config},
    }


def _set_epsilons(model: nn.Module) -> None:
    """As in diffusers' video UNet: 1e-6 but for the middle and levels down without attention."""
    for name, module in model.named_modules():
        if re.search(r"\.resnets\.\d+\.norm[12]$", name):
            block = name.split(".resnets.")[0]
            wide = block == "mid_block" or (
                block.startswith("down") and not hasattr(model.get_submodule(block), "attentions")
            )
            module.eps = 1e-5 if wide else 1e-6


def _values(source: Source, foreign: Foreign, model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors as the state dict of ``model``."""
    table = make_table(source, (), {}, model.state_dict())
    missing = sorted(entry.name for entry in table.entries if entry.name not in foreign.tensors)
    if missing:
        raise _incomplete(foreign, missing)
    return {entry.target: from_foreign(foreign.tensors[entry.name], entry.change) for entry in table.entries}


def _incomplete(foreign: Foreign, missing: list[str]) -> ValueError:
    return ValueError(
        f"image_model_of: {foreign.where}: expected a complete image model, got {len(missing)} tensors missing "
        f"{missing[:3]}; the file is incomplete or of a variant that is not supported"
    )
