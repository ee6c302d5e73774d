"""diffusers' names of the published video models, turned into the names their authors gave."""

import re
from collections.abc import Callable, Iterable

__all__ = ["original_names"]

RESBLOCK = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
OUTSIDE_BLOCKS = {
    "conv_in.": "input_blocks.0.0.",
    "transformer_in.": "input_blocks.0.1.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
SVD_PARTS = {
    "spatial_res_block.": "",
    "temporal_res_block.": "time_stack.",
    "temporal_transformer_blocks.": "time_stack.",
    "time_pos_embed.linear_1.": "time_pos_embed.0.",
    "time_pos_embed.linear_2.": "time_pos_embed.2.",
}
ANIMATEDIFF_PARTS = {
    "norm1.": "norms.0.",
    "norm2.": "norms.1.",
    "norm3.": "ff_norm.",
    "attn1.": "attention_blocks.0.",
    "attn2.": "attention_blocks.1.",
}
AUTOENCODER_PARTS = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
    "conv_shortcut.": "nin_shortcut.",
    "spatial_res_block.": "",
    "time_mixer.": "",
}


def original_names(family: str, names: Iterable[str]) -> dict[str, str]:
    """The authors' name for each of diffusers' names.

    Args:
        family: of the model.
        names: all names of one model; how many blocks and layers it has is read off them.
    """
    names = list(names)
    rename: Callable[[str], str]
    match family:
        case "animatediff":
            rename = _animatediff
        case "svd-decoder":
            ups = 1 + max(_numbers(r"^decoder\.up_blocks\.(\d+)\.", names), default=0)
            rename = lambda name: _autoencoder(name, ups)  # noqa: E731
        case _:
            rename = _UNet(names, temporal_attention=family == "modelscope")
    return {name: rename(name) for name in names}


def _numbers(pattern: str, names: list[str]) -> list[int]:
    return [int(match[1]) for name in names if (match := re.match(pattern, name))]


def _replaced_start(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _animatediff(name: str) -> str:
    match = re.match(r"(.*\.motion_modules\.\d+\.)(transformer_blocks\.\d+\.)?(.*)", name)
    if match is None:
        return name
    module, block, rest = match[1], match[2] or "", match[3]
    return f"{module}temporal_transformer.{block}{_replaced_start(rest, ANIMATEDIFF_PARTS) if block else rest}"


def _autoencoder(name: str, num_up_blocks: int) -> str:
    name = name.replace("decoder.time_conv_out.", "decoder.conv_out.time_mix_conv.")
    name = name.replace(".conv_norm_out.", ".norm_out.").replace(".mid_block.attentions.0.", ".mid.attn_1.")
    name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
    name = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up.{num_up_blocks - 1 - int(m[1])}.", name)
    name = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", name)
    name = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", name)
    match = re.match(r"(.*\.)temporal_res_block\.(.*)", name)
    if match is not None:
        return f"{match[1]}time_stack.{_replaced_start(match[2], RESBLOCK)}"
    match = re.match(r"(.*\.(?:attn_1|block_\d+|block\.\d+)\.)(.*)", name)
    if match is None:
        return name
    rest = _replaced_start(match[2], AUTOENCODER_PARTS)
    return match[1] + _replaced_start(rest, {"conv_shortcut.": "nin_shortcut."})  # behind spatial_res_block


class _UNet:
    """Names of OpenAI's UNet with layers over time, in which the blocks stand in one row.

    Args:
        names: diffusers' names.
        temporal_attention: attentions over time are modules of their own in the row (ModelScope).
    """

    def __init__(self, names: list[str], *, temporal_attention: bool) -> None:
        self.step = 3 if temporal_attention else 2
        self.downsample = "op." if temporal_attention else "0.op."
        self.sizes = {way: self._sizes(names, way) for way in ("down", "up")}
        self.attended = {name.split(".attentions.")[0] for name in names if ".attentions." in name}
        self.attended |= {name.split(".temp_attentions.")[0] for name in names if ".temp_attentions." in name}

    @staticmethod
    def _sizes(names: list[str], way: str) -> list[int]:
        sizes: dict[int, int] = {}
        for name in names:
            match = re.match(rf"{way}_blocks\.(\d+)\.(?:resnets|temp_convs)\.(\d+)\.", name)
            if match is not None:
                block, layer = int(match[1]), int(match[2])
                sizes[block] = max(sizes.get(block, 0), layer + 1)
        return [sizes.get(block, 0) for block in range(max(sizes, default=-1) + 1)]

    def __call__(self, name: str) -> str:
        match = re.match(r"((?:down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.*)", name)
        if match is None:
            return _replaced_start(name, OUTSIDE_BLOCKS)
        block, kind, layer, rest = match[1], match[3], int(match[4]), match[5]
        if kind in ("downsamplers", "upsamplers"):
            return self._resampler(block, int(match[2]), rest.removeprefix("conv."))
        place = self._row(block, match[2], layer)
        offset = {"resnets": 0, "temp_convs": 0, "attentions": 1, "temp_attentions": 2}[kind]
        if kind == "temp_convs":
            rest = f"temopral_conv.{rest}"  # so it is spelt in the file
        rest = self._rest(kind, rest)
        if block == "mid_block":
            return f"middle_block.{layer * self.step + offset}.{rest}"
        return f"{place}.{offset}.{rest}"

    @staticmethod
    def _rest(kind: str, rest: str) -> str:
        part = next((part for part in SVD_PARTS if rest.startswith(part)), "")
        inner = rest.removeprefix(part)
        if kind == "resnets":
            inner = _replaced_start(inner, RESBLOCK)
        return SVD_PARTS.get(part, "") + inner

    def _row(self, block: str, index: str | None, layer: int) -> str:
        if block.startswith("down"):
            return f"input_blocks.{1 + sum(size + 1 for size in self.sizes['down'][: int(index)]) + layer}"
        if block.startswith("up"):
            return f"output_blocks.{sum(self.sizes['up'][: int(index)]) + layer}"
        return ""

    def _resampler(self, block: str, index: int, rest: str) -> str:
        way = "down" if block.startswith("down") else "up"
        size = self.sizes[way][index]
        if way == "down":
            return f"{self._row(block, str(index), size)}.{self.downsample}{rest}"
        behind = self.step if block in self.attended else 1
        return f"{self._row(block, str(index), size - 1)}.{behind}.conv.{rest}"
