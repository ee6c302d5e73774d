"""Which classes get temporal layers: a registry of spatial modules and of models that users can add to.

    from temporal_layers.adapters import register_attention, register_model, register_resnet

    register_model("MyUNet")
    register_resnet("MyResBlock", channels="conv2.out_channels", num_groups="norm.num_groups")
    register_attention("MyAttention", channels="dim", num_heads="heads")

A class is named by itself or by its name, which spares the import; subclasses count. :mod:`catalogue` registers those
of diffusers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from temporal_layers.config import check_choice

__all__ = ["HostClass", "ModelClass", "register_attention", "register_model", "register_resnet"]

HostKind = Literal["resnet", "attention", "transformer_block"]
Family = Literal["unet", "autoencoder"]
Reader = str | int | float | Callable[[nn.Module], Any] | None
"""How a property is read off a module: by the dotted path of an attribute, by a function, or a constant."""


@dataclass(frozen=True, kw_only=True)
class HostClass:
    """How the temporal layer behind a class of spatial modules gets its sizes and its inputs.

    Attributes:
        kind: what the module is: a residual block or an attention on feature maps, or a transformer block on tokens.
        channels: channels of its output.
        num_groups: groups of its norm; if it has none, the largest divisor of 32 and the channels.
        eps: epsilon of its norm.
        temb: argument of its forward that holds the timestep embedding, ``(n, temb_channels)``.
        temb_channels: width of that embedding.
        context: argument of its forward that holds the text, ``(n, tokens, context_dim)``.
        context_dim: width of the text.
        num_heads: its attention heads.
        head_dim: channels of a head; the channels divided by the heads if not given.
        only_in: name of the list it must stand in to count; anywhere if ``None``.
        holds_blocks: whether registered transformer blocks stand inside it.
    """

    kind: HostKind
    channels: Reader
    num_groups: Reader = None
    eps: Reader = 1e-5
    temb: str | None = None
    temb_channels: Reader = None
    context: str | None = None
    context_dim: Reader = None
    num_heads: Reader = None
    head_dim: Reader = None
    only_in: str | None = None
    holds_blocks: bool = False

    def read(self, module: nn.Module) -> dict[str, Any]:
        """The properties of one module, as :class:`~temporal_layers.adapters.InjectionSite` takes them.

        Raises:
            AttributeError: if the module lacks an attribute that the registration names.
        """
        channels = read(module, self.channels)
        facts = {"channels": channels}
        if self.kind != "transformer_block":  # layers on tokens have no group norm
            groups = read(module, self.num_groups) or 32
            facts["num_groups"] = groups if channels % groups == 0 else math.gcd(groups, channels)
        if self.kind == "resnet":
            return facts | {"eps": read(module, self.eps), "temb_channels": read(module, self.temb_channels)}
        heads, head_dim = read(module, self.num_heads), read(module, self.head_dim)
        if heads is not None and head_dim is None:
            head_dim = channels // heads
        return facts | {"num_heads": heads, "head_dim": head_dim, "context_dim": read(module, self.context_dim)}


@dataclass(frozen=True, kw_only=True)
class ModelClass:
    """A class of models that temporal layers can be injected into.

    Attributes:
        family: ``"unet"``: called with (sample, timestep, ...); ``"autoencoder"``: has ``encode`` and ``decode``.
        part: the child that gets the layers; the whole model if ``None``.
    """

    family: Family
    part: str | None = None


HOSTS: dict[type | str, HostClass] = {}
MODELS: dict[type | str, ModelClass] = {}


def register_resnet(
    cls: type | str,
    *,
    channels: Reader,
    num_groups: Reader = None,
    eps: Reader = 1e-5,
    temb: str | None = None,
    temb_channels: Reader = None,
) -> None:
    """Let a class of residual blocks on feature maps get a temporal layer behind it.

    A property is the dotted path of an attribute (``"conv2.out_channels"``), a function of the module, or a constant.

    Args:
        cls: the class, or its name.
        channels: channels of its output ``(n, channels, height, width)``.
        num_groups: groups of the temporal norms; the largest divisor of 32 and the channels if not given.
        eps: epsilon of the temporal norms.
        temb: argument of its forward with the timestep embedding ``(n, temb_channels)``.
        temb_channels: width of that embedding; needed with ``temb``.

    Raises:
        ValueError: if the class is registered already, or one of ``temb`` and ``temb_channels`` is missing.
    """
    _check_pair("register_resnet", "temb", temb, "temb_channels", temb_channels)
    host = HostClass(
        kind="resnet", channels=channels, num_groups=num_groups, eps=eps, temb=temb, temb_channels=temb_channels
    )
    _add("register_resnet", HOSTS, cls, host)


def register_attention(
    cls: type | str,
    *,
    channels: Reader,
    num_heads: Reader,
    head_dim: Reader = None,
    num_groups: Reader = None,
    context: str | None = None,
    context_dim: Reader = None,
    tokens: bool = False,
    only_in: str | None = None,
    holds_blocks: bool = False,
) -> None:
    """Let a class of attentions or transformer blocks get a temporal transformer behind it.

    A property is the dotted path of an attribute, a function of the module, or a constant. The module must add its
    residual itself: what it returns is the feature map, not an update of it.

    Args:
        cls: the class, or its name.
        channels: channels of its output.
        num_heads: attention heads of the temporal layer.
        head_dim: channels of a head; ``channels // num_heads`` if not given.
        num_groups: groups of an input norm; the largest divisor of 32 and the channels if not given.
        context: argument of its forward with the text ``(n, tokens, context_dim)``.
        context_dim: width of the text; needed with ``context``. A function may return ``None`` for modules without.
        tokens: it works on tokens ``(n, positions, channels)`` rather than maps ``(n, channels, height, width)``.
        only_in: name of the module list it must stand in; elsewhere modules of this class are passed over.
        holds_blocks: classes registered with ``tokens=True`` stand inside it; ``"after_transformer_block"`` prefers
            those.

    Raises:
        ValueError: if the class is registered already, or one of ``context`` and ``context_dim`` is missing.
    """
    _check_pair("register_attention", "context", context, "context_dim", context_dim)
    host = HostClass(
        kind="transformer_block" if tokens else "attention",
        channels=channels,
        num_groups=num_groups,
        context=context,
        context_dim=context_dim,
        num_heads=num_heads,
        head_dim=head_dim,
        only_in=only_in,
        holds_blocks=holds_blocks,
    )
    _add("register_attention", HOSTS, cls, host)


def register_model(cls: type | str, *, family: Family = "unet", part: str | None = None) -> None:
    """Let a class of models be injected.

    Args:
        cls: the class, or its name.
        family: ``"unet"`` for models called with ``(sample, timestep, ...)`` that return a tensor like ``sample``, by
            itself, first in a tuple or as the attribute ``sample``; ``"autoencoder"`` for models with ``encode`` and
            ``decode``.
        part: the child that gets the layers, for instance ``"decoder"``; the whole model if not given.

    Raises:
        ValueError: if the class is registered already, or ``family`` is unknown.
    """
    check_choice("register_model: family", family, ("unet", "autoencoder"))
    _add("register_model", MODELS, cls, ModelClass(family=family, part=part))


def _check_pair(who: str, name: str, value: Any, other_name: str, other: Any) -> None:
    if (value is None) != (other is None):
        missing, given = (name, other_name) if value is None else (other_name, name)
        raise ValueError(f"{who}: {missing}: expected a value together with {given}, got None; pass both or neither")


def _add(who: str, entries: dict[type | str, Any], cls: type | str, entry: Any) -> None:
    if not isinstance(cls, type | str):
        raise ValueError(f"{who}: cls: expected a class or its name, got {cls!r}; pass type(module)")
    if cls in entries:
        name = cls if isinstance(cls, str) else cls.__qualname__
        raise ValueError(f"{who}: {name}: expected a class that is not registered yet, got one that is")
    entries[cls] = entry


def find(entries: dict[type | str, Any], cls: type) -> Any | None:
    """The entry of a class or of its nearest base that has one, by the class itself before its name."""
    for base in cls.__mro__:
        entry = entries.get(base, entries.get(base.__name__))
        if entry is not None:
            return entry
    return None


def read(module: nn.Module, reader: Reader) -> Any:
    """Read a property off a module."""
    if callable(reader):
        return reader(module)
    if not isinstance(reader, str):
        return reader
    value: Any = module
    for name in reader.split("."):
        if not hasattr(value, name) and hasattr(value, "base_layer"):
            value = value.base_layer  # PEFT's wrapper of a layer does not show the layer's attributes
        value = getattr(value, name)
    return value
