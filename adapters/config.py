"""What to inject: the configuration of an adapter, in plain values."""

import dataclasses
import difflib
import re
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from temporal_layers import ContextConfig, TemporalConvConfig, TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.config import check_choice

__all__ = ["SiteRule", "TemporalConfig"]

TransformerPolicy = Literal["after_transformer_block", "after_attention", "after_pair", "after_resnet"]
POLICIES = ("after_transformer_block", "after_attention", "after_pair", "after_resnet")


@dataclass(frozen=True, kw_only=True)
class SiteRule:
    """Other options for the sites whose name a regular expression is found in.

    Args:
        pattern: regular expression, searched for in the name of a site (``"mid_block"``, ``r"^up_blocks\\.[01]"``).
        resblock: options of the layers behind residual blocks there; ``None`` leaves them as they are.
        transformer: options of the layers behind attentions there; ``None`` leaves them as they are.

    Raises:
        ValueError: if both options are ``None``, or the pattern is no regular expression.
    """

    pattern: str
    resblock: TemporalResBlockConfig | None = None
    transformer: TemporalTransformerConfig | None = None

    def __post_init__(self) -> None:
        _check_pattern("SiteRule.pattern", self.pattern)
        if self.resblock is None and self.transformer is None:
            raise ValueError(
                f"SiteRule: expected resblock or transformer or both, got None for both; "
                f"to leave out the sites of {self.pattern!r} use TemporalConfig.exclude"
            )


@dataclass(frozen=True, kw_only=True)
class TemporalConfig:
    """Which temporal layers an adapter injects, and where.

    The default is the Video LDM's layout: a temporal residual block behind every spatial residual block, and a
    temporal transformer block behind every spatial transformer block (in token space, inside the spatial
    transformer's projections), all blended with a learned scalar alpha. On Stable Diffusion 1.x and 2.x that makes 38
    layers with 649,687,078 and 656,076,838 parameters, the 649M and 656M of the paper.

    Args:
        resblock: options of the layer behind every spatial residual block; ``None`` for none.
        transformer: options of the transformer layers; ``None`` for none.
        transformer_policy: where those go. ``"after_transformer_block"``: behind every block inside a spatial
            transformer (the paper, SVD); attentions without such blocks get one behind them. ``"after_attention"``:
            behind every spatial attention or transformer, on feature maps (ModelScope). ``"after_pair"``: behind
            every attention, and behind every residual block where the surrounding block has no attention
            (AnimateDiff). ``"after_resnet"``: behind every residual block. The last two need ``resblock=None``.
        resamplers: also behind the residual blocks that change the resolution (DeepFloyd IF, Kandinsky 2, NCSN++).
        conv_in: options of a transformer behind the model's first convolution (ModelScope); ``None`` for none.
        conv_out: options of a convolution behind the model's last one (SVD's decoder); ``None`` for none.
        context: conditioning on given frames (prediction, interpolation), passed to the model as ``frame_context``;
            ``None`` for none. At the input it is a site of its own, or part of the layer of ``conv_in``.
        include: regular expressions; only sites are filled in whose name one of them is found. Empty for all.
        exclude: regular expressions; no site is filled in whose name one of them is found.
        rules: other options for some sites; the first rule that fits a site and its layer counts.

    Raises:
        ValueError: if no layer is configured, the options do not fit the policy, or a pattern is no regular
            expression.
    """

    resblock: TemporalResBlockConfig | None = TemporalResBlockConfig()
    transformer: TemporalTransformerConfig | None = TemporalTransformerConfig()
    transformer_policy: TransformerPolicy = "after_transformer_block"
    resamplers: bool = False
    conv_in: TemporalTransformerConfig | None = None
    conv_out: TemporalConvConfig | None = None
    context: ContextConfig | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rules: tuple[SiteRule, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "rules"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"TemporalConfig.{name}: expected a tuple, got the string {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists only
        for name in ("include", "exclude"):
            for index, pattern in enumerate(getattr(self, name)):
                _check_pattern(f"TemporalConfig.{name}[{index}]", pattern)
        if self.context is not None and self.context.in_resblocks and self.resblock is None:
            raise ValueError(
                f"TemporalConfig.context: expected inject='input' without temporal residual blocks, got "
                f"{self.context.inject!r}; set resblock, or let the context in at the input"
            )
        if all(layer is None for layer in (self.resblock, self.transformer, self.conv_in, self.conv_out)):
            raise ValueError("TemporalConfig: expected resblock or transformer or both, got None for both")
        check_choice("TemporalConfig.transformer_policy", self.transformer_policy, POLICIES)
        if self.transformer_policy in ("after_pair", "after_resnet") and self.resblock is not None:
            raise ValueError(
                f"TemporalConfig.resblock: expected None with transformer_policy={self.transformer_policy!r}, which "
                "puts transformers behind residual blocks; one module gets one temporal layer"
            )
        for options in (self.transformer, *(rule.transformer for rule in self.rules)):
            in_norm = "none" if options is None else options.in_norm
            if in_norm != "none" and self.transformer_policy == "after_transformer_block":
                raise ValueError(
                    "TemporalConfig.transformer: expected in_norm='none' with transformer_policy="
                    f"'after_transformer_block' (tokens), got {in_norm!r}; use 'after_attention'"
                )

    def options_for(
        self, name: str, kind: str
    ) -> TemporalResBlockConfig | TemporalTransformerConfig | TemporalConvConfig | None:
        """The options of the layer at a site, ``None`` if there is to be none.

        Args:
            name: name of the site.
            kind: what its host is: ``"resnet"``, ``"attention"``, ``"transformer_block"``, ``"conv_in"`` or
                ``"conv_out"``.
        """
        if kind in ("conv_in", "conv_out"):
            return getattr(self, kind)
        on_resnets = self.transformer_policy in ("after_pair", "after_resnet")
        layer = "resblock" if kind == "resnet" and not on_resnets else "transformer"
        default = getattr(self, layer)
        if default is None:
            return None
        fitting = (getattr(rule, layer) for rule in self.rules if re.search(rule.pattern, name))
        return next((options for options in fitting if options is not None), default)

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


def _check_pattern(where: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{where}: expected a regular expression, got {pattern!r}: {error}") from error
