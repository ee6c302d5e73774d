"""Where temporal layers go: a pure function from a model and a configuration to a tuple of sites.

Nothing here changes a model. Every reason to refuse an injection is found here, before anything is touched.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from temporal_layers import (
    ContextInput,
    ContextTransformer,
    TemporalConv,
    TemporalResBlock,
    TemporalResBlockConfig,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
)
from temporal_layers.adapters.catalogue import VIDEO_MODULES
from temporal_layers.adapters.config import TemporalConfig
from temporal_layers.adapters.offload import check_in_place
from temporal_layers.adapters.registry import HOSTS, MODELS, ModelClass, find

__all__ = ["InjectionSite", "plan"]

SiteKind = Literal["resnet", "transformer_block", "attention", "conv_in", "conv_out"]
TemporalLayer = TemporalResBlock | TemporalTransformerBlock | TemporalConv | ContextInput

# Residual blocks in there change the resolution; the paper puts no temporal layer behind down- and upsampling.
RESAMPLERS = frozenset({"downsamplers", "upsamplers", "resnet_down", "resnet_up"})


@dataclass(frozen=True, kw_only=True)
class InjectionSite:
    """One place in a host model that gets a temporal layer, with all that the layer takes from its host.

    Args:
        name: dotted path of the host module.
        kind: what the host is.
        channels: channels of its output.
        num_groups: groups of its norm.
        eps: epsilon of its norm (residual blocks).
        temb_channels: width of its timestep embedding, if any (residual blocks).
        num_heads: its attention heads (attentions).
        head_dim: channels of a head (attentions).
        context_dim: channels of its text, if any (attentions).
    """

    name: str
    kind: SiteKind
    channels: int
    num_groups: int = 32
    eps: float = 1e-5
    temb_channels: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    context_dim: int | None = None

    def build(self, config: TemporalConfig, **factory) -> TemporalLayer:
        """Make the temporal layer of this site; ``factory`` may hold ``device`` and ``dtype``."""
        context = config.context
        at_input = self.kind == "conv_in" and context is not None and context.at_input
        # What the patterns leave out are layers over frames; a context at the input stays.
        options = config.options_for(self.name, self.kind) if _covered(self.name, config) else None
        if isinstance(options, TemporalResBlockConfig):
            return TemporalResBlock(
                self.channels,
                temb_channels=self.temb_channels,
                num_groups=self.num_groups,
                eps=self.eps,
                config=options,
                context=context if context is not None and context.in_resblocks else None,
                **factory,
            )
        if isinstance(options, TemporalTransformerConfig):
            return (ContextTransformer if at_input else TemporalTransformerBlock)(
                self.channels,
                num_heads=self.num_heads,
                head_dim=self.head_dim,
                context_dim=self.context_dim,
                num_groups=self.num_groups,
                config=options,
                **({"frame_context": context} if at_input else {}),
                **factory,
            )
        if at_input:
            return ContextInput(self.channels, config=context, **factory)
        return TemporalConv(self.channels, config=options, **factory)


def class_names(module: nn.Module) -> frozenset[str]:
    """Names of the classes of ``module``, bases included."""
    return frozenset(cls.__name__ for cls in type(module).__mro__)


def plan(model: nn.Module, config: TemporalConfig | None = None) -> tuple[InjectionSite, ...]:
    """List the sites that :func:`~temporal_layers.adapters.inject` would fill.

    Works on the meta device and changes nothing.

    Args:
        model: a model of a registered class: diffusers' image UNets and image autoencoders (whose decoder is meant),
            or what :func:`~temporal_layers.adapters.register_model` added.
        config: what to inject; the Video LDM's layout if not given.

    Returns:
        The sites, in the order of ``model.named_modules()``: the order of registration, not of execution. A module
        that is registered twice is one site.

    Raises:
        ValueError: if ``config`` or the model is of another class, the model is a video model already, is injected
            already, has no site, its weights are offloaded in a way that new layers cannot join, a pattern of the
            configuration is found in no site, or a frame context would not get into the model.
    """
    config = TemporalConfig() if config is None else config
    if not isinstance(config, TemporalConfig):
        raise ValueError(
            f"plan: config: expected a TemporalConfig or None, got a {type(config).__name__}; make one with "
            "TemporalConfig(...)"
        )
    root = check_root(model)
    part = root.part
    check_in_place(model)
    try:
        scope = model if part is None else model.get_submodule(part)
    except AttributeError as error:
        raise ValueError(
            f"plan: {type(model).__name__}: expected a child {part!r}, as its registration says, got none"
        ) from error
    found = list(_candidates(model, scope, "" if part is None else f"{part}.", config))
    _check_patterns(type(model).__name__, [site.name for site in found], config)
    sites: dict[nn.Module, InjectionSite] = {}
    for site in found:
        if _wanted(site, config):
            sites.setdefault(model.get_submodule(site.name), site)
    if not sites:
        raise ValueError(
            f"plan: {type(model).__name__}: expected at least one residual block or attention that the configuration "
            f"covers, got none (resblock={'set' if config.resblock else None}, "
            f"transformer={'set' if config.transformer else None}); print the model and check the configuration"
        )
    _check_context(type(model).__name__, root.family, sites.values(), config)
    for host, site in sites.items():
        if hasattr(host, "temporal"):
            raise ValueError(
                f"plan: {site.name}: expected a {type(host).__name__} without an attribute 'temporal', got one that "
                "has it; rename it, the temporal layer is registered under that name"
            )
    return tuple(sites.values())


def check_root(model: nn.Module) -> ModelClass:
    """Return the registration of the class of ``model``, or raise a ``ValueError`` saying why it is not fit."""
    known = "a registered image model (" + ", ".join(c if isinstance(c, str) else c.__name__ for c in MODELS) + ")"
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"plan: expected {known}, got {type(model).__name__}; pass the UNet or the VAE itself, for instance "
            "pipe.unet"
        )
    if getattr(model, "_temporal_state", None) is not None:
        raise ValueError(
            f"plan: {type(model).__name__}: expected a plain image model, got one that has temporal layers already; "
            "call remove() on its adapter first, or use adapter_of(model)"
        )
    video = next((name for name, child in model.named_modules() if class_names(child) & VIDEO_MODULES), None)
    if video is not None:
        raise ValueError(
            f"plan: {type(model).__name__}: expected an image model, got a video model: {video!r} is a "
            f"{type(model.get_submodule(video)).__name__}; inject into the image model it was made from"
        )
    root = find(MODELS, type(model))
    if root is None:
        raise ValueError(
            f"plan: expected {known}, got {type(model).__name__}; pass the UNet or the VAE itself, not a part of it "
            "or a wrapper around it, or add its class with register_model"
        )
    return root


def _candidates(model: nn.Module, scope: nn.Module, prefix: str, config: TemporalConfig) -> Iterator[InjectionSite]:
    """Every site that the policy names, before the patterns and the missing options sort some out."""
    hosts = list(_hosts(scope, prefix, config))
    with_attention = {_block_of(site.name) for site in hosts if site.kind != "resnet"}
    conv_in, conv_out = (_convolution(scope, prefix, name, config) for name in ("conv_in", "conv_out"))
    if conv_in is not None:
        yield conv_in
    for site in hosts:
        paired = config.transformer_policy == "after_pair" and site.kind == "resnet"
        skipped = config.transformer_policy == "after_resnet" and site.kind != "resnet"
        if not skipped and not (paired and _block_of(site.name) in with_attention):
            yield site
    if conv_out is not None:
        yield conv_out


def _hosts(module: nn.Module, prefix: str, config: TemporalConfig, parent: str = "") -> Iterator[InjectionSite]:
    into_blocks = config.transformer_policy == "after_transformer_block"
    for name, child in module.named_children():
        if name in RESAMPLERS and not config.resamplers:
            continue
        path = prefix + name
        host = find(HOSTS, type(child))
        if host is None or (host.holds_blocks and into_blocks):
            yield from _hosts(child, f"{path}.", config, parent=name)
        elif host.only_in in (None, parent):
            yield InjectionSite(name=path, kind=host.kind, **_facts(path, child))


def _facts(path: str, host: nn.Module) -> dict[str, Any]:
    try:
        return find(HOSTS, type(host)).read(host)
    except AttributeError as error:
        raise ValueError(
            f"plan: {path}: expected a {type(host).__name__} with the attributes of its registration, got one without: "
            f"{error}"
        ) from error


def _block_of(path: str) -> str:
    """The module around a host and the list it stands in: ``down_blocks.0`` for ``down_blocks.0.resnets.1``."""
    *above, name = path.split(".")
    if name.isdigit() and above and not above[-1].isdigit():
        above.pop()
    return ".".join(above)


def _convolution(scope: nn.Module, prefix: str, name: SiteKind, config: TemporalConfig) -> InjectionSite | None:
    for_context = name == "conv_in" and config.context is not None and config.context.at_input
    if getattr(config, name) is None and not for_context:
        return None
    convolution = getattr(scope, name, None)
    convolution = getattr(convolution, "base_layer", convolution)
    if not isinstance(convolution, nn.Conv2d):
        raise ValueError(
            f"plan: {prefix}{name}: expected a 2-D convolution for TemporalConfig.{'context' if for_context else name}"
            f", got {type(convolution).__name__}; "
            + ("set inject='resblock'" if for_context else f"leave {name} at None for this model")
        )
    channels = convolution.out_channels
    return InjectionSite(name=prefix + name, kind=name, channels=channels, num_groups=math.gcd(32, channels))


def _wanted(site: InjectionSite, config: TemporalConfig) -> bool:
    if site.kind == "conv_in" and config.context is not None and config.context.at_input:
        return True
    return config.options_for(site.name, site.kind) is not None and _covered(site.name, config)


def _covered(name: str, config: TemporalConfig) -> bool:
    """Whether the patterns of the configuration let a site of that name have a layer over frames."""
    if config.include and not any(re.search(pattern, name) for pattern in config.include):
        return False
    return not any(re.search(pattern, name) for pattern in config.exclude)


def _check_context(who: str, family: str, sites: Iterable[InjectionSite], config: TemporalConfig) -> None:
    """Raise a ``ValueError`` if a frame context is asked for that would not get into the model."""
    if config.context is None:
        return
    if family != "unet":
        raise ValueError(
            f"plan: {who}: TemporalConfig.context: expected None for an autoencoder, got {config.context}; frames are "
            "given to the UNet"
        )
    if config.context.in_resblocks and not any(_takes_context(site, config) for site in sites):
        raise ValueError(
            f"plan: {who}: TemporalConfig.context: expected a temporal residual block for inject="
            f"{config.context.inject!r}, got none among the sites; set inject='input', or change include and exclude"
        )


def _takes_context(site: InjectionSite, config: TemporalConfig) -> bool:
    return isinstance(config.options_for(site.name, site.kind), TemporalResBlockConfig)


def _check_patterns(who: str, names: list[str], config: TemporalConfig) -> None:
    """A pattern that fits nothing is a mistake in it: raise a ``ValueError``."""
    patterns = [*config.include, *config.exclude, *(rule.pattern for rule in config.rules)]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"plan: {who}: expected a pattern that is found in the name of a site, got {pattern!r}, which is in "
                f"none of {len(names)}; names are like {', '.join(names[:2] + names[-1:])}"
            )
