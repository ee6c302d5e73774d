"""Where temporal layers go: a pure function from a model and a configuration to a tuple of sites.

Nothing here changes a model. Every reason to refuse an injection is found here, before anything is touched.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from temporal_layers import TemporalResBlock, TemporalTransformerBlock
from temporal_layers.adapters.config import TemporalConfig

__all__ = ["InjectionSite", "plan"]

SiteKind = Literal["resnet", "transformer_block", "attention"]

# Root classes that can be injected, with the child that holds the sites (None: the whole model). Classes are matched
# by name over the MRO, so subclasses count and diffusers' moves between files do not matter.
ROOTS: dict[str, str | None] = {"UNet2DConditionModel": None, "UNet2DModel": None, "AutoencoderKL": "decoder"}
RESNETS = frozenset({"ResnetBlock2D"})
TRANSFORMERS = frozenset({"Transformer2DModel"})
TRANSFORMER_BLOCKS = frozenset({"BasicTransformerBlock"})
MAP_ATTENTIONS = frozenset({"Attention"})
VIDEO_MODULES = frozenset(
    {
        "AnimateDiffTransformer3D",
        "MotionModules",
        "SpatioTemporalResBlock",
        "TemporalBasicTransformerBlock",
        "TemporalConvLayer",
        "TemporalResnetBlock",
        "TransformerSpatioTemporalModel",
        "TransformerTemporalModel",
        "Conv3d",
    }
)
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

    def build(self, config: TemporalConfig, **factory) -> TemporalResBlock | TemporalTransformerBlock:
        """Make the temporal layer of this site; ``factory`` may hold ``device`` and ``dtype``."""
        if self.kind == "resnet":
            return TemporalResBlock(
                self.channels,
                temb_channels=self.temb_channels,
                num_groups=self.num_groups,
                eps=self.eps,
                config=config.resblock,
                **factory,
            )
        return TemporalTransformerBlock(
            self.channels,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            context_dim=self.context_dim,
            num_groups=self.num_groups,
            config=config.transformer,
            **factory,
        )


def class_names(module: nn.Module) -> frozenset[str]:
    """Names of the classes of ``module``, bases included."""
    return frozenset(cls.__name__ for cls in type(module).__mro__)


def plan(model: nn.Module, config: TemporalConfig | None = None) -> tuple[InjectionSite, ...]:
    """List the sites that :func:`~temporal_layers.adapters.inject` would fill.

    Works on the meta device and changes nothing.

    Args:
        model: a ``UNet2DConditionModel``, ``UNet2DModel`` or ``AutoencoderKL`` (decoder).
        config: what to inject; the Video LDM's layout if not given.

    Returns:
        The sites, in the order of ``model.named_modules()``: the order of registration, not of execution. A module
        that is registered twice is one site.

    Raises:
        ValueError: if the model is of another class, is a video model already, is injected already, has no site, or
            its weights are being offloaded.
    """
    config = config or TemporalConfig()
    root = check_root(model)
    check_in_place(model)
    scope = model if ROOTS[root] is None else model.get_submodule(ROOTS[root])
    prefix = "" if ROOTS[root] is None else f"{ROOTS[root]}."
    sites: dict[nn.Module, InjectionSite] = {}
    for site in _walk(scope, prefix, config):
        sites.setdefault(model.get_submodule(site.name), site)
    if not sites:
        raise ValueError(
            f"plan: {type(model).__name__}: expected at least one residual block or attention that the configuration "
            f"covers, got none (resblock={'set' if config.resblock else None}, "
            f"transformer={'set' if config.transformer else None}); print the model and check the configuration"
        )
    for host, site in sites.items():
        if hasattr(host, "temporal"):
            raise ValueError(
                f"plan: {site.name}: expected a {type(host).__name__} without an attribute 'temporal', got one that "
                "has it; rename it, the temporal layer is registered under that name"
            )
    return tuple(sites.values())


def check_root(model: nn.Module) -> str:
    """Return the name of the supported root class of ``model``, or raise a ``ValueError`` saying why there is none."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"plan: expected one of {', '.join(ROOTS)}, got {type(model).__name__}; "
            "pass the UNet or the VAE itself, for instance pipe.unet"
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
    root = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in ROOTS), None)
    if root is None:
        raise ValueError(
            f"plan: expected one of {', '.join(ROOTS)}, got {type(model).__name__}; "
            "pass the UNet or the VAE itself, not a part of it or a wrapper around it"
        )
    return root


def check_in_place(model: nn.Module) -> None:
    """Raise a ``ValueError`` if hooks move the weights of ``model`` about: they would not know of new layers."""
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)  # accelerate's, one or a sequence
        registry = getattr(module, "_diffusers_hook", None)
        offloads = any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))
        if offloads or (registry is not None and registry.get_hook("group_offloading") is not None):
            raise ValueError(
                f"plan: {name or 'model'}: expected weights that stay in place, got hooks that offload them; "
                "inject first, then set up offloading"
            )


def _walk(module: nn.Module, prefix: str, config: TemporalConfig, parent: str = "") -> Iterator[InjectionSite]:
    for name, child in module.named_children():
        if name in RESAMPLERS:
            continue
        path = prefix + name
        names = class_names(child)
        if names & RESNETS:
            if config.resblock is not None:
                yield _resnet_site(path, child)
        elif names & TRANSFORMERS and config.transformer_policy == "after_attention":
            if config.transformer is not None:
                yield _transformer_site(path, child)
        elif names & TRANSFORMER_BLOCKS:
            if config.transformer is not None:
                yield _block_site(path, child)
        elif names & MAP_ATTENTIONS:
            # Below a list called "attentions" an Attention is a layer of the feature map with its own residual;
            # anywhere else it is a branch inside a larger block.
            if config.transformer is not None and parent == "attentions":
                yield _attention_site(path, child)
        else:
            yield from _walk(child, f"{path}.", config, parent=name)


def _resnet_site(path: str, resnet: nn.Module) -> InjectionSite:
    projection = getattr(resnet, "time_emb_proj", None)
    return InjectionSite(
        name=path,
        kind="resnet",
        channels=resnet.out_channels,
        num_groups=resnet.norm2.num_groups,
        eps=resnet.norm2.eps,
        temb_channels=None if projection is None else projection.in_features,
    )


def _heads(attention: nn.Module) -> dict[str, int]:
    # Read from the module, never from a model's config: attention_head_dim means heads there in SD 1.x.
    return {"num_heads": attention.heads, "head_dim": attention.inner_dim // attention.heads}


def _context_dim(block: nn.Module) -> int | None:
    for attention in (block.attn2, block.attn1):
        if attention is not None and attention.is_cross_attention:
            return attention.cross_attention_dim
    return None


def _block_site(path: str, block: nn.Module) -> InjectionSite:
    return InjectionSite(
        name=path,
        kind="transformer_block",
        channels=block.attn1.query_dim,
        context_dim=_context_dim(block),
        **_heads(block.attn1),
    )


def _transformer_site(path: str, transformer: nn.Module) -> InjectionSite:
    block = transformer.transformer_blocks[0]
    return InjectionSite(
        name=path,
        kind="attention",
        channels=transformer.in_channels,
        num_groups=transformer.norm.num_groups,
        context_dim=_context_dim(block),
        **_heads(block.attn1),
    )


def _attention_site(path: str, attention: nn.Module) -> InjectionSite:
    norm = attention.group_norm
    return InjectionSite(
        name=path,
        kind="attention",
        channels=attention.query_dim,
        num_groups=math.gcd(32, attention.query_dim) if norm is None else norm.num_groups,
        **_heads(attention),
    )
