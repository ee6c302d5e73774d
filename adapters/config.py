"""What to inject: the configuration of an adapter, in plain values."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal

from temporal_layers import TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.config import AlphaConfig

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
        if self.transformer is not None and self.transformer.in_norm != "none":
            if self.transformer_policy == "after_transformer_block":
                raise ValueError(
                    "TemporalConfig.transformer: expected in_norm='none' with transformer_policy="
                    f"'after_transformer_block' (tokens), got {self.transformer.in_norm!r}; use 'after_attention'"
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
            ValueError: if a key is unknown or a value is out of its range.
        """
        return _from_dict(cls, values, "TemporalConfig")


_NESTED = {"resblock": TemporalResBlockConfig, "transformer": TemporalTransformerConfig, "alpha": AlphaConfig}


def _from_dict(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a dictionary, got {type(values).__name__}")
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: unknown key {key!r}, expected among {', '.join(known)}{hint}")
    nested = {
        key: _from_dict(_NESTED[key], value, f"{where}.{key}") if key in _NESTED and value is not None else value
        for key, value in values.items()
    }
    return cls(**nested)
