"""What to inject: the configuration of an adapter, in plain values."""

import dataclasses
import difflib
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from temporal_layers import TemporalResBlockConfig, TemporalTransformerConfig

__all__ = ["TemporalConfig"]

TransformerPolicy = Literal["after_transformer_block", "after_attention"]


@dataclass(frozen=True, kw_only=True)
class TemporalConfig:
    """Which temporal layers an adapter injects, and where.

    The default is the Video LDM's layout: a temporal residual block behind every spatial residual block, and a
    temporal transformer block behind every spatial transformer block (in token space, inside the spatial
    transformer's projections), all blended with a learned scalar alpha. On Stable Diffusion 1.x and 2.x that makes 38
    layers with 649,687,078 and 656,076,838 parameters, the 649M and 656M of the paper.

    Args:
        resblock: options of the layer behind every spatial residual block; ``None`` for none.
        transformer: options of the layer behind the spatial attentions; ``None`` for none.
        transformer_policy: ``"after_transformer_block"`` puts one behind every block inside a spatial transformer
            (the paper, SVD); ``"after_attention"`` puts one behind the whole spatial transformer, on feature maps
            (ModelScope). Attentions on feature maps (``UNet2DModel``, autoencoders) always get the latter.

    Raises:
        ValueError: if both layers are ``None``, or the options do not fit the policy.
    """

    resblock: TemporalResBlockConfig | None = TemporalResBlockConfig()
    transformer: TemporalTransformerConfig | None = TemporalTransformerConfig()
    transformer_policy: TransformerPolicy = "after_transformer_block"

    def __post_init__(self) -> None:
        if self.resblock is None and self.transformer is None:
            raise ValueError("TemporalConfig: expected resblock or transformer or both, got None for both")
        policies = ("after_transformer_block", "after_attention")
        if self.transformer_policy not in policies:
            raise ValueError(
                f"TemporalConfig.transformer_policy: expected one of {', '.join(map(repr, policies))}, "
                f"got {self.transformer_policy!r}"
            )
        in_norm = "none" if self.transformer is None else self.transformer.in_norm
        if in_norm != "none" and self.transformer_policy == "after_transformer_block":
            raise ValueError(
                "TemporalConfig.transformer: expected in_norm='none' with transformer_policy="
                f"'after_transformer_block' (tokens), got {in_norm!r}; use 'after_attention'"
            )

    @classmethod
    def for_decoder(cls) -> "TemporalConfig":
        """The layout for a VAE decoder: residual blocks only, no timestep embedding (Video LDM, section 3.1.1; SVD)."""
        return cls(resblock=TemporalResBlockConfig(timestep_embedding=False), transformer=None)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested dictionaries of JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TemporalConfig":
        """Undo :meth:`to_dict`; missing keys take their defaults.

        Raises:
            ValueError: if a key is unknown, or a value is of another type or out of its range.
        """
        return _from_dict(cls, values, "TemporalConfig")


def _from_dict(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a dictionary, got {values!r}")
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    for key in values:
        if key not in types:
            close = difflib.get_close_matches(key, types, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: unknown key {key!r}, expected among {', '.join(types)}{hint}")
    return cls(**{key: _checked(types[key], value, f"{where}.{key}") for key, value in values.items()})


def _checked(expected: Any, value: Any, where: str) -> Any:
    """Return ``value`` as a field of type ``expected``; JSON may hold any other type in its place."""
    if get_origin(expected) is UnionType:
        if value is None:
            return None
        (expected,) = (option for option in get_args(expected) if option is not NoneType)
    if dataclasses.is_dataclass(expected):
        return _from_dict(expected, value, where)
    if get_origin(expected) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        item = get_args(expected)[0]
        return tuple(_checked(item, entry, f"{where}[{index}]") for index, entry in enumerate(value))
    plain = str if get_origin(expected) is Literal else expected
    if type(value) is not plain and not (plain is float and type(value) is int):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
        raise ValueError(f"{where}: expected {names[plain]}, got {value!r}")
    return value
