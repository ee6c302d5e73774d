"""Telling from the names and shapes of tensors which published video model they are of."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from temporal_layers.adapters.convert.source import Source

__all__ = ["detect"]

# Family, style, and a part of a name that this family in this style has and no other.
MARKS = (
    ("animatediff", "original", r"(?:down|up)_blocks\.\d+\.motion_modules\.\d+\.temporal_transformer\."),
    ("animatediff", "diffusers", r"(?:down|up)_blocks\.\d+\.motion_modules\.\d+\.transformer_blocks\."),
    ("modelscope", "original", r"input_blocks\.\d+\.0\.temopral_conv\."),  # so it is spelt there
    ("modelscope", "diffusers", r"down_blocks\.\d+\.temp_convs\.\d+\."),
    ("svd", "sgm", r"input_blocks\.\d+\.0\.time_stack\."),
    ("svd", "diffusers", r"(?<!decoder\.)(?:down|up)_blocks\.\d+\.resnets\.\d+\.temporal_res_block\."),
    ("svd-decoder", "sgm", r"decoder\.up\.\d+\.block\.\d+\.time_stack\."),
    ("svd-decoder", "diffusers", r"decoder\.up_blocks\.\d+\.resnets\.\d+\.temporal_res_block\."),
)
FIRST_CONVOLUTIONS = ("conv_in.weight", "input_blocks.0.0.weight", "decoder.conv_in.weight")


def detect(tensors: Mapping[str, Tensor], part: Literal["unet", "autoencoder"] | None = None) -> Source:
    """Tell the format of a state dict.

    Args:
        tensors: tensors by name, as in the file.
        part: look for layers of a UNet or of an autoencoder only; a file of Stable Video Diffusion has both. The UNet
            goes first if not given.

    Returns:
        The format.

    Raises:
        ValueError: if it is none of the known ones.
    """
    for family, style, mark in MARKS:
        if part is not None and (part == "autoencoder") != (family == "svd-decoder"):
            continue
        match = next((match for name in tensors if (match := re.search(mark, name))), None)
        if match is not None:
            return _described(family, style, match.string[: match.start()], tensors)
    wanted = [
        f"{family} ({style} names: {re.sub(r'[(]+[?][:<!].*?[)]', '', mark)})"
        for family, style, mark in MARKS
        if part is None or (part == "autoencoder") == (family == "svd-decoder")
    ]
    names = list(tensors)
    raise ValueError(
        f"detect: expected the names of one of {'; '.join(wanted)}; got {len(names)} tensors such as "
        f"{', '.join(names[:3]) or 'none'}; pass the file of the UNet, motion adapter or autoencoder itself"
    )


def _described(family: str, style: str, prefix: str, tensors: Mapping[str, Tensor]) -> Source:
    own = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in own.items()}
    common = Counter(dtypes.values()).most_common(1)[0][0]
    max_frames = next((value.shape[1] for name, value in own.items() if _is_position_table(name, value)), None)
    return Source(
        family=family,
        style=style,
        version=_animatediff_version(own, max_frames) if family == "animatediff" else "",
        prefix=prefix,
        whole=any(prefix + name in own for name in FIRST_CONVOLUTIONS),
        max_frames=max_frames,
        dtype=common,
        exceptions=tuple(f"{name} {dtype}" for name, dtype in dtypes.items() if dtype != common),
    )


def _is_position_table(name: str, value: Tensor) -> bool:
    return name.endswith((".pos_encoder.pe", ".pos_embed.pe")) and value.ndim == 3 and value.is_floating_point()


def _animatediff_version(tensors: Mapping[str, Tensor], max_frames: int | None) -> str:
    levels = {match[1] for name in tensors if (match := re.search(r"down_blocks\.(\d+)\.motion_modules\.", name))}
    if any("mid_block.motion_modules." in name for name in tensors):
        return "v2"
    if len(levels) == 3:
        return "sdxl"
    return "v1" if max_frames is not None and max_frames <= 24 else "v3"
