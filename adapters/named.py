"""Several adapters on one model, of which one is in it: the others are kept aside, and switching moves pointers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from temporal_layers.adapters.attach import attach, detach, place_of
from temporal_layers.adapters.config import TemporalConfig
from temporal_layers.adapters.sites import InjectionSite, check_in_place
from temporal_layers.adapters.state import TemporalState

__all__ = ["Aside", "beside", "delete", "find", "put_in", "switch"]

Place = tuple[torch.device, torch.dtype]


@dataclass
class Aside:
    """An adapter whose layers are not in the model.

    Attributes:
        config: what was injected, or will be.
        sites: where.
        layers: by the name of their site.
        metadata: notes that are saved with it.
        chunking: how it cuts clips to decode them.
        places: device and dtype of the hosts when the layers were taken out, by the name of the site.
    """

    config: TemporalConfig
    sites: tuple[InjectionSite, ...]
    layers: dict[str, nn.Module]
    metadata: dict[str, str] = field(default_factory=dict)
    chunking: Any = None
    places: dict[str, Place] = field(default_factory=dict)

    def follow(self, model: nn.Module) -> None:
        """Do to the layers what ``.to()`` did to their hosts since they were taken out, and nothing else.

        Nothing else: layers that are deliberately wider than their hosts stay so.
        """
        for name, (device, dtype) in self.places.items():
            now = place_of(model.get_submodule(name))
            if now != (device, dtype) and now[0].type != "meta":
                layer = self.layers[name]
                if now[0] != device:
                    layer.to(device=now[0])
                if now[1] != dtype:
                    layer.to(dtype=now[1])


@contextmanager
def beside(who: str, model: nn.Module, name: str) -> Iterator[TemporalState | None]:
    """Make room in ``model`` for another adapter: the body plans it on the plain model and puts it in.

    The adapter in the model is set aside; if the body fails, it is put back.

    Args:
        who: name of the caller, for the error texts.
        model: a plain model, or one with adapters.
        name: of the new adapter.

    Yields:
        What the model's modules share, for :func:`put_in`; ``None`` for a plain model.

    Raises:
        ValueError: if the model has an adapter of that name, or something else changed a module since in a way that
            stands in between.
    """
    state = getattr(model, "_temporal_state", None)
    if state is None:
        yield None
        return
    if name in state.adapters:
        raise ValueError(
            f"{who}: {type(model).__name__}: expected a plain image model or the name of a new adapter, got one that "
            f"has temporal layers already, named {name!r}; call remove() on its adapter first, pass another name to "
            "have both, or use adapter_of(model)"
        )
    with _set_aside(model, state):
        yield state


@contextmanager
def _set_aside(model: nn.Module, state: TemporalState) -> Iterator[None]:
    name = state.name
    kept = find(model, state, name)
    detach(model)
    kept.places = {site.name: place_of(model.get_submodule(site.name)) for site in state.sites}
    try:
        yield
    except BaseException:  # an interrupt as well
        put_in(model, name, kept, state)
        raise
    state.adapters[name] = kept


def put_in(model: nn.Module, name: str, adapter: Aside, state: TemporalState | None = None) -> None:
    """Put the layers of ``adapter`` into ``model``, which has none.

    Args:
        model: a model without temporal layers.
        name: of the adapter.
        adapter: what to put in.
        state: what the model's modules share; a fresh one if not given.

    Raises:
        ValueError: if something unknown patched the forward of a module; the model is then as before.
    """
    attach(model, adapter.config, adapter.sites, adapter.layers, state)
    if state is None:
        state = model._temporal_state
        state.adapters = {}
    state.adapters[name] = None
    state.name, state.config, state.sites = name, adapter.config, adapter.sites
    state.metadata, state.chunking = adapter.metadata, adapter.chunking


def switch(model: nn.Module, state: TemporalState, name: str) -> None:
    """Put the adapter of that name into the model, and the one that is there aside.

    Raises:
        ValueError: if there is none of that name, hooks offload the weights of the model, or something else changed a
            module since in a way that stands in between.
    """
    _check_known("set_active", state, name)
    if name == state.name:
        return
    try:
        check_in_place(model)
    except ValueError as error:
        raise ValueError(f"TemporalAdapter.set_active: {error}; switch before that as well") from error
    with _set_aside(model, state):
        adapter = state.adapters[name]
        adapter.follow(model)
        put_in(model, name, adapter, state)


def find(model: nn.Module, state: TemporalState, name: str) -> Aside:
    """The adapter of that name, in the model or aside.

    Raises:
        ValueError: if there is none.
    """
    _check_known("snapshot", state, name)
    kept = state.adapters[name]
    if kept is not None:
        return kept
    layers = {site.name: model.get_submodule(site.name).temporal for site in state.sites}
    return Aside(state.config, state.sites, layers, state.metadata, state.chunking)


def delete(state: TemporalState, name: str) -> None:
    """Forget an adapter that is kept aside.

    Raises:
        ValueError: if there is none of that name, or it is the one in the model.
    """
    _check_known("delete", state, name)
    if name == state.name:
        raise ValueError(
            f"TemporalAdapter.delete: expected an adapter that is kept aside, got {name!r}, whose layers are in the "
            "model; call set_active with another name first, or remove() to take out all"
        )
    del state.adapters[name]


def _check_known(method: str, state: TemporalState, name: str) -> None:
    if name not in state.adapters:
        raise ValueError(
            f"TemporalAdapter.{method}: expected the name of an adapter of this model ("
            f"{', '.join(map(repr, state.adapters))}), got {name!r}"
        )
