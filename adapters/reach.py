"""How far a decoder with temporal layers sees over frames: a pure function of the layers."""

from collections import Counter
from collections.abc import Iterator

from torch import nn

from temporal_layers import TemporalTransformerBlock
from temporal_layers.adapters.registry import MODELS, find
from temporal_layers.adapters.sites import InjectionSite

__all__ = ["layer_reach", "layers_in", "receptive_field", "unbounded_layers"]


def layer_reach(layer: nn.Module) -> tuple[int, int] | None:
    """Frames ``(past, future)`` around a frame that one pass through a temporal layer lets it see.

    Args:
        layer: a temporal layer of this library.

    Returns:
        The two distances, or ``None`` if a frame sees the whole clip: a norm over the clip, or an attention without a
        window.
    """
    if _why_unbounded(layer) is not None:
        return None
    config = layer.config
    if isinstance(layer, TemporalTransformerBlock):
        reach = config.window * config.attentions.count("self")
        return reach, 0 if config.causal else reach
    convs = getattr(config, "num_convs", 1)
    if config.causal:
        return convs * (config.kernel_size - 1), 0
    return (convs * (config.kernel_size // 2),) * 2


def _why_unbounded(layer: nn.Module) -> str | None:
    """Why a frame sees the whole clip, and which option changes that; ``None`` if it does not."""
    config = layer.config
    if isinstance(layer, TemporalTransformerBlock):
        if config.in_norm == "clip":
            return "a norm over the whole clip (in_norm='clip'; 'frame' is local)"
        if config.window is None:
            return "attention to all frames (window=None; a window is local)"
    elif getattr(config, "norm", "frame") == "clip":
        return "a norm over the whole clip (norm='clip'; 'frame' is local)"
    return None


def layers_in(model: nn.Module, sites: tuple[InjectionSite, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The temporal layers by the name of their site."""
    return ((site.name, model.get_submodule(site.name).temporal) for site in sites)


def unbounded_layers(model: nn.Module, sites: tuple[InjectionSite, ...]) -> dict[str, str]:
    """The layers in which a frame sees the whole clip, by the name of their site, and why."""
    reasons = {name: _why_unbounded(layer) for name, layer in layers_in(model, sites)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def receptive_field(model: nn.Module, sites: tuple[InjectionSite, ...]) -> tuple[int, int] | None:
    """Latent frames ``(past, future)`` around a frame that a decoded frame depends on; ``None`` for the whole clip.

    The sites of a decoder run one behind the other, so their reaches add up; a module that stands in it twice counts
    twice.

    Raises:
        ValueError: if ``model`` is no autoencoder: the sites of a UNet may run several times, or side by side.
    """
    root = find(MODELS, type(model))
    if root is None or root.family != "autoencoder":
        raise ValueError(
            f"TemporalAdapter.receptive_field: expected an autoencoder, got {type(model).__name__}; a UNet's layers "
            "may run several times in one call, and its clips are not decoded in chunks"
        )
    times = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    past = future = 0
    for name, layer in layers_in(model, sites):
        reach = layer_reach(layer)
        if reach is None:
            return None
        runs = times[id(model.get_submodule(name))]
        past, future = past + runs * reach[0], future + runs * reach[1]
    return past, future
