"""Making temporal layers for the sites of a model, putting them in, and taking them out."""

import torch
from torch import nn

from temporal_layers.adapters.autoencoder import VideoAutoencoder
from temporal_layers.adapters.config import TemporalConfig
from temporal_layers.adapters.offload import device_of, follow
from temporal_layers.adapters.registry import HOSTS, find
from temporal_layers.adapters.roots import VideoUNet
from temporal_layers.adapters.sites import InjectionSite, check_root
from temporal_layers.adapters.state import TemporalState, unwrap_checkpointing, wrap_checkpointing
from temporal_layers.adapters.swap import check_restorable, check_swappable, restore_class, site_mixin, swap_class

__all__ = ["attach", "build_layers", "detach", "place_of"]

ROOT_MIXINS: dict[str, type] = {"unet": VideoUNet, "autoencoder": VideoAutoencoder}


def build_layers(
    model: nn.Module, config: TemporalConfig, sites: tuple[InjectionSite, ...], *, meta: bool = False
) -> dict[str, nn.Module]:
    """Make the temporal layers by the name of their site, in the dtype and on the device of their hosts.

    Args:
        model: the model that the sites are from.
        config: what to make.
        sites: for where.
        meta: make them on the meta device, without values.

    Raises:
        ValueError: if the options do not fit a site; the text names it.
    """
    layers = {}
    for site in sites:
        device, dtype = place_of(model.get_submodule(site.name))
        try:
            layers[site.name] = site.build(config, device=torch.device("meta") if meta else device, dtype=dtype)
        except ValueError as error:
            raise ValueError(f"inject: {site.name}: {error}") from error
    return layers


def place_of(host: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for the temporal layer of ``host``.

    The dtype is that of the first parameter that is stored as it is computed with: quantised weights are integers, and
    layerwise casting stores eight bits.
    """
    wide = (p.dtype for p in host.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return device_of(host), next(wide, torch.get_default_dtype())


def attach(
    model: nn.Module,
    config: TemporalConfig,
    sites: tuple[InjectionSite, ...],
    layers: dict[str, nn.Module],
    state: TemporalState | None = None,
) -> None:
    """Put ``layers`` into ``model``; on any error the model is as before.

    Args:
        model: a plain image model.
        config: what the layers were made with.
        sites: where they go.
        layers: by the name of their site.
        state: what the model's modules share; a fresh one if not given.

    Raises:
        ValueError: if something unknown patched the forward of a module.
    """
    hosts = {name: model.get_submodule(name) for name in [*layers, ""]}
    swaps = {name: _swap_of(hosts[name], layer) for name, layer in layers.items()}
    swaps[""] = (ROOT_MIXINS[check_root(model).family], None)
    for name, host in hosts.items():
        check_swappable(name, host, *swaps[name])
    state = TemporalState(config, sites) if state is None else state
    try:
        for name, host in hosts.items():
            if host is not model:
                follow(host, layers[name])
                host.temporal = layers[name].train(host.training)
            host._temporal_state = state
            swap_class(host, *swaps[name])
        wrap_checkpointing(model, state)
    except BaseException:  # an interrupt as well
        _take_out(model, hosts)
        raise


def _swap_of(host: nn.Module, layer: nn.Module) -> tuple[type, str | None]:
    """Mixin of a host, and the argument of its forward pass that the layer gets as well."""
    mixin, registered = site_mixin(layer), find(HOSTS, type(host))
    name = mixin.extra_name
    return mixin, None if name is None or registered is None else getattr(registered, name)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`.

    Raises:
        ValueError: if a module was changed since in a way that cannot be undone here; the model is then as before.
    """
    hosts = {name: model.get_submodule(name) for name in [*(site.name for site in model._temporal_state.sites), ""]}
    for name, host in hosts.items():
        check_restorable(name, host)
    _take_out(model, hosts)


def _take_out(model: nn.Module, hosts: dict[str, nn.Module]) -> None:
    unwrap_checkpointing(model)
    for host in hosts.values():
        restore_class(host)
        host._modules.pop("temporal", None)
        host.__dict__.pop("_temporal_state", None)
