"""The configuration of the layers of each source."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from temporal_layers import AlphaConfig, TemporalConvConfig, TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters.config import TemporalConfig
from temporal_layers.adapters.convert.reading import Foreign
from temporal_layers.adapters.convert.source import Source

__all__ = ["check_layout", "layout", "read_layout"]

UNWEIGHTED = AlphaConfig(init=0.0, learned=False)
MID_BLOCK = r"^mid_block\."


def layout(
    source: Source,
    *,
    attentions: int = 2,
    in_norm: str = "clip",
    num_heads: int = 8,
    head_dim: int = 64,
    conv_in: bool = True,
    exclude: Iterable[str] = (),
) -> TemporalConfig:
    """The layers of a source; what the source leaves open is given by name.

    Args:
        source: the format.
        attentions: attentions over frames in a block (AnimateDiff).
        in_norm: what the norm in front of a block runs over (AnimateDiff).
        num_heads: attention heads (AnimateDiff; ModelScope's first transformer).
        head_dim: channels of a head (ModelScope).
        conv_in: whether there is a transformer behind the first convolution (ModelScope).
        exclude: sites without a layer.
    """
    if source.family == "svd":
        return TemporalConfig()
    if source.family == "svd-decoder":
        return TemporalConfig(
            resblock=TemporalResBlockConfig(timestep_embedding=False, eps=1e-5),
            transformer=None,
            conv_out=TemporalConvConfig(),
        )
    block = TemporalTransformerConfig(
        attentions=("self",) * attentions,
        ff_in=False,
        position="sinusoidal" if source.family == "animatediff" else "none",
        in_norm=in_norm,
        projection=True,
        num_heads=num_heads if source.family == "animatediff" else None,
        head_dim=head_dim if source.family == "modelscope" else None,
        alpha=UNWEIGHTED,
    )
    if source.family == "animatediff":
        return TemporalConfig(resblock=None, transformer=block, transformer_policy="after_pair", exclude=tuple(exclude))
    return TemporalConfig(
        resblock=TemporalResBlockConfig(num_convs=4, timestep_embedding=False, eps=1e-5, dropout=0.1, alpha=UNWEIGHTED),
        transformer=block,
        transformer_policy="after_attention",
        conv_in=dataclasses.replace(block, num_heads=num_heads) if conv_in else None,
    )


def read_layout(
    source: Source, foreign: Foreign, *, num_heads: int | None, in_norm: str | None, has_mid_block: bool
) -> TemporalConfig:
    """The layers of a file, from its names, shapes and ``config.json``.

    Args:
        source: its format.
        foreign: its contents.
        num_heads: attention heads of AnimateDiff; read or 8 if not given.
        in_norm: as in :func:`layout`; AnimateDiff's own code normalises each frame and diffusers' the clip, which is
            the default for either.
        has_mid_block: whether the model has sites in a middle block that could be left out.

    Raises:
        ValueError: if the file says the heads differ from block to block.
    """
    if source.family == "animatediff":
        pattern = r"\.transformer_blocks\.0\.(?:attention_blocks\.|attn)(\d+)\."
        found = {match[1] for name in foreign.tensors if (match := re.search(pattern, name)) and "motion_" in name}
        mid = any("mid_block.motion_modules." in name for name in foreign.tensors)
        return layout(
            source,
            attentions=len(found),
            in_norm=in_norm or ("frame" if source.style == "original" else "clip"),
            num_heads=num_heads or _one(foreign, "motion_num_attention_heads", 8),
            exclude=(MID_BLOCK,) if has_mid_block and not mid else (),
        )
    if source.family == "modelscope":
        first = next((v for k, v in foreign.tensors.items() if k.endswith(FIRST_TRANSFORMER)), None)
        # The first transformer has 8 heads, whatever its width.
        head_dim = 64 if first is None else first.shape[0] // 8
        return layout(source, head_dim=_one(foreign, "attention_head_dim", head_dim), conv_in=first is not None)
    return layout(source)


FIRST_TRANSFORMER = ("transformer_in.proj_in.weight", "input_blocks.0.1.proj_in.weight")


def _one(foreign: Foreign, key: str, default: int) -> int:
    value = foreign.config.get(key, default)
    different = set(value) if isinstance(value, list | tuple) else {value}
    if len(different) != 1:
        raise ValueError(
            f"{foreign.where}: {key}: expected one number for all blocks, got {value}; "
            "weights with other heads in some blocks are not supported"
        )
    return different.pop()


def num_groups(source: Source, foreign: Foreign) -> int | None:
    """Groups of the temporal group norms, as far as the source or the ``config.json`` says."""
    if source.family in ("svd", "svd-decoder"):
        return 32
    return foreign.config.get("motion_norm_num_groups", foreign.config.get("norm_num_groups"))


def check_layout(source: Source, config: TemporalConfig) -> None:
    """Raise a ``ValueError`` that names the first difference if the layers of ``config`` are none of ``source``.

    Heads, dropout, start values and patterns may differ.
    """
    block = config.transformer or TemporalTransformerConfig()
    over = block.in_norm if block.in_norm != "none" else "clip"
    own = {"attentions": len(block.attentions), "in_norm": over} if source.family == "animatediff" else {}
    expected = layout(source, conv_in=config.conv_in is not None, **own)
    difference = _difference(_essence(expected.to_dict()), _essence(config.to_dict()), "TemporalConfig")
    if difference is not None:
        raise ValueError(
            f"export_foreign: expected the layers of {source.family}, got another configuration: {difference}; "
            "only adapters of that layout can be written as such"
        )


FREE = frozenset({"include", "exclude", "zero_init", "dropout", "num_heads", "head_dim"})


def _essence(values: dict[str, Any]) -> dict[str, Any]:
    """What makes a difference to the computation, given the weights and the model."""
    kept = {key: value for key, value in values.items() if key not in FREE}
    if kept.get("learned"):
        kept.pop("init")
    return {key: _essence(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _difference(expected: Any, found: Any, where: str) -> str | None:
    if isinstance(expected, dict) and isinstance(found, dict):
        pairs = ((f"{where}.{key}", expected.get(key), found.get(key)) for key in expected.keys() | found.keys())
        differences = (_difference(one, other, path) for path, one, other in sorted(pairs, key=lambda pair: pair[0]))
        return next(filter(None, differences), None)
    if expected == found:
        return None
    return f"{where}: expected {_short(expected)}, got {_short(found)}"


def _short(value: Any) -> str:
    return "options" if isinstance(value, dict) else repr(value)
