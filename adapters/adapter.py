"""Injection and the handle to what was injected."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from torch import nn

from temporal_layers import ContextInput, FrameCache
from temporal_layers.adapters import named
from temporal_layers.adapters.attach import build_layers, detach
from temporal_layers.adapters.chunks import plan_chunks
from temporal_layers.adapters.config import TemporalConfig
from temporal_layers.adapters.groups import Group, named_parameters, parameter_groups
from temporal_layers.adapters.reach import receptive_field, unbounded_layers
from temporal_layers.adapters.saving import Saving
from temporal_layers.adapters.scale import get_scales, resolve_scales, set_scales
from temporal_layers.adapters.sites import InjectionSite, plan
from temporal_layers.adapters.state import Stream, TemporalState
from temporal_layers.adapters.summary import table
from temporal_layers.adapters.window import get_windows, set_windows
from temporal_layers.config import check_at_least
from temporal_layers.streaming import check_streams

__all__ = ["TemporalAdapter", "adapter_of", "inject"]


def inject(model: nn.Module, config: TemporalConfig | None = None, *, name: str = "default") -> "TemporalAdapter":
    """Insert temporal layers into an image model, in place.

    The model then takes clips ``(batch, channels, frames, height, width)`` as well as images; conditioning tensors
    with ``batch`` in front are repeated for every frame. A fresh injection computes exactly what the image model does
    (zero-initialised layers). The layers get the dtype and device of the modules they follow and the weights of the
    model are untouched. Either all sites are filled or the model is as before.

    Beside others, see docs/compatibility.md: LoRAs, processors and offloading may come before or after the injection;
    a LoRA on the image model leaves the temporal layers trainable. The model's state dict has the temporal layers in
    it; the state dict of a part of the model is that of the image model, so that ``ControlNetModel.from_unet`` and the
    like work.

    Args:
        model: an image UNet or image autoencoder (its decoder gets the layers) of diffusers, or a model of a class
            added with :func:`~temporal_layers.adapters.register_model`.
        config: which layers, where; the Video LDM's layout if not given.
        name: of the adapter; with a new one the model may have other adapters, which are kept aside.

    Returns:
        The handle: freeze, switch off, save, remove.

    Raises:
        ValueError: as :func:`~temporal_layers.adapters.plan`, or if something unknown patched a module's forward, or
            the model has an adapter of that name.

    Example:
        >>> adapter = inject(unet)  # doctest: +SKIP
        >>> video = unet(noise, timestep, text).sample  # doctest: +SKIP
    """
    config = TemporalConfig() if config is None else config
    with named.beside("inject", model, name) as state:
        sites = plan(model, config)
        layers = build_layers(model, config, sites)
        named.put_in(model, name, named.Aside(config, sites, layers), state)
    return TemporalAdapter(model)


def adapter_of(model: nn.Module) -> "TemporalAdapter":
    """Return the handle of an injected model, for instance of a copy or an unpickled one.

    Raises:
        ValueError: if the model has no temporal layers.
    """
    if getattr(model, "_temporal_state", None) is None:
        raise ValueError(
            f"adapter_of: expected a model with temporal layers, got a plain {type(model).__name__}; call inject first"
        )
    return TemporalAdapter(model)


class TemporalAdapter(Saving):
    """Handle to the temporal layers of a model. Made by :func:`inject`, :meth:`from_pretrained`, :func:`adapter_of`.

    It has no state of its own: all handles of a model are equal, and speak of the adapter whose layers are in it. The
    clip length of a call is kept in the model, so one model serves one thread at a time; give every thread a copy.

    Attributes:
        model: the model they are in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def _state(self) -> TemporalState:
        state = getattr(self.model, "_temporal_state", None)
        if state is None:
            raise ValueError(
                f"TemporalAdapter: expected temporal layers in the {type(self.model).__name__}, "
                "got none: they were removed; call inject again"
            )
        return state

    @property
    def config(self) -> TemporalConfig:
        """What was injected."""
        return self._state.config

    @property
    def sites(self) -> tuple[InjectionSite, ...]:
        """Where it was injected."""
        return self._state.sites

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The temporal layers by the name of their site."""
        return {site.name: self.model.get_submodule(site.name).temporal for site in self.sites}

    @property
    def metadata(self) -> dict[str, str]:
        """Notes that are saved with the layers, for instance their licence; from and to strings."""
        return self._state.metadata

    @property
    def name(self) -> str:
        """Name of the adapter whose layers are in the model; all that this handle says and does is about that one."""
        return self._state.name

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters of the model, in the order they came."""
        return tuple(self._state.adapters)

    def set_active(self, name: str) -> "TemporalAdapter":
        """Put the adapter of that name into the model, and the one that is there aside. Returns the adapter.

        No weight is copied. Adapters that are kept aside are in no ``model.parameters()`` and no state dict; when they
        come in, they follow what ``model.to(...)`` did to their hosts meanwhile. Switch between training steps, not
        between a forward pass and its backward pass.

        Raises:
            ValueError: if there is none of that name, hooks offload the weights of the model, or something else changed
                a module since in a way that stands in between.
        """
        named.switch(self.model, self._state, name)
        return self

    def delete(self, name: str) -> None:
        """Forget an adapter that is kept aside.

        Raises:
            ValueError: if there is none of that name, or it is the one in the model.
        """
        named.delete(self._state, name)

    @property
    def num_frames(self) -> int | None:
        """Clip length of 4-D input, whose frames are folded into the batch; ``None`` (the start) makes it images.

        Set it to run pipelines that know images only, with ``num_images_per_prompt`` equal to the clip length.
        5-D input brings its own clip length and does not change this.
        """
        return self._state.default_num_frames

    @num_frames.setter
    def num_frames(self, value: int | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(
                f"TemporalAdapter.num_frames: expected a whole number of at least 1, or None for images, got {value!r}"
            )
        self._state.default_num_frames = value

    @property
    def scale(self) -> float | dict[str, float]:
        """Strength of the temporal layers: 1 as trained, 0 the image model bit for bit, in between and beyond linear.

        At every site the result is ``spatial + scale * (blended - spatial)``. Set one number for all sites, or a
        dictionary from regular expressions, searched for in the names of the sites, to numbers; it then says
        everything: sites that no key fits get 1, and the first key that fits counts (a full name before all others).
        Reading gives one number, or a number for each site where they differ. It is for inference, and not saved; a
        compiled model compiles once for 1, once for 0 and once for all others.

        Example:
            >>> adapter.scale = 0.7  # doctest: +SKIP
            >>> adapter.scale = {"mid_block": 0.5, "^up_blocks": 0.8}  # doctest: +SKIP
        """
        return get_scales(self.layers)

    @scale.setter
    def scale(self, value: float | Mapping[str, float]) -> None:
        set_scales(self.layers, resolve_scales([site.name for site in self.sites], value))

    @property
    def attention_window(self) -> int | dict[str, int | None] | None:
        """Largest distance of frames that attend to each other; ``None`` for all. By site where layers differ.

        Set it for clips longer than those of training (the paper takes 8); a layer that was made with a smaller
        ``window`` keeps that, and ``None`` gives every layer its own again. It is for inference, and not saved.
        """
        return get_windows(self.layers)

    @attention_window.setter
    def attention_window(self, value: int | None) -> None:
        set_windows(self.layers, value)

    @property
    def memory_budget(self) -> int | None:
        """Bytes that a module with a temporal layer may work on at a time, at inference; ``None``, the start: no limit.

        What needs more is cut where rows do not see each other, and the result is the same up to rounding: a spatial
        module runs on a few frames at a time, and a transformer over frames on a few positions. At least one frame and
        one position is taken, whatever the budget. The feature maps between the modules, and the convolutions over
        frames, whose norms take in all positions, need what they need. Not saved; see docs/memory.md.
        """
        return self._state.memory_budget

    @memory_budget.setter
    def memory_budget(self, value: int | None) -> None:
        if value is not None:
            check_at_least("TemporalAdapter.memory_budget", value, 1)
        self._state.memory_budget = value

    @property
    def receptive_field(self) -> tuple[int, int] | None:
        """Frames ``(past, future)`` that a decoded frame depends on; ``None`` for the whole clip. Autoencoders only.

        Of one pass through the decoder: a consistency decoder makes several.
        """
        return receptive_field(self.model, self.sites)

    @property
    def unbounded_layers(self) -> dict[str, str]:
        """The layers in which a frame sees the whole clip, by the name of their site, and why."""
        return unbounded_layers(self.model, self.sites)

    def enable_temporal_chunking(self, num_frames: int, overlap: int | None = None) -> "TemporalAdapter":
        """Decode clips in chunks over time, so that memory does not grow with their length. Returns the adapter.

        Clips go one at a time, and at most ``num_frames`` frames plus the overlap on both sides at once.

        Args:
            num_frames: frames of a chunk.
            overlap: frames decoded in addition on each side of a chunk. ``None`` takes :attr:`receptive_field`, with
                which the result is that of the whole clip, up to rounding; so is any overlap that is no smaller. With
                a smaller one the result is an approximation: neighbouring chunks are blended linearly.

        Raises:
            ValueError: if ``overlap`` is ``None`` where no chunks give the result of the whole clip (the text names
                the layer), is more than half a chunk where chunks are blended, the model is no autoencoder, or an
                alpha is per frame.
        """
        self._state.chunking = plan_chunks(self.model, self._state, num_frames, overlap)
        return self

    def disable_temporal_chunking(self) -> "TemporalAdapter":
        """Decode clips as a whole again. Returns the adapter."""
        self._state.chunking = None
        return self

    @contextmanager
    def streaming(self, cache: FrameCache | None = None, *, update: bool = True) -> Iterator[FrameCache]:
        """Calls inside the ``with`` block take a clip block by block, with the result of the whole clip in one pass.

        Every call of the model (of ``decode``, for an autoencoder) is the next block of frames, of any number. For
        causal layers, and for inference. See docs/streaming.md.

        Args:
            cache: a stream to go on with; a new one if not given.
            update: remember the frames of the calls. If false they see what the cache has and leave it as it is, so
                that the next block can run many times before it is remembered.

        Yields:
            The cache: what the layers keep of the frames so far.

        Raises:
            ValueError: if a layer is not causal or has an alpha per frame; the calls inside raise if gradients are
                recorded, clips are cut into chunks, or a block does not fit those before it.

        Example:
            >>> with torch.no_grad(), adapter.streaming():  # doctest: +SKIP
            ...     frames = [vae.decode(latents).sample for latents in blocks]
        """
        for name, layer in self.layers.items():
            if not isinstance(layer, ContextInput):  # works frame by frame
                check_streams(f"TemporalAdapter.streaming: {name}", layer.config)
        state, cache = self._state, FrameCache() if cache is None else cache
        before, state.stream = state.stream, Stream(cache, update)
        try:
            yield cache
        finally:
            state.stream = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the temporal layers off inside the ``with`` block: the image model, bit for bit."""
        state = self._state
        before = state.enabled
        state.enabled = False
        try:
            yield
        finally:
            state.enabled = before

    def named_parameters(self, group: Group | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the model by name: of one group, or all.

        Args:
            group: ``"spatial"`` (the image model), ``"temporal"`` (the injected layers without alpha) or ``"alpha"``.
        """
        return named_parameters(self.model, self.layers, group)

    def parameter_groups(
        self, *, lr: float, alpha_lr: float | None = None, spatial_lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser.

        Alpha is a group of its own and never decayed: decay would pull its logit to 0, that is alpha to 0.5.

        Args:
            lr: learning rate of the temporal layers.
            alpha_lr: learning rate of alpha; ``lr`` if not given.
            spatial_lr: learning rate of the image model; it is left out if not given (the paper trains the temporal
                layers only).
            weight_decay: of the temporal layers and the image model.

        Returns:
            Dictionaries with ``name``, ``params``, ``lr`` and ``weight_decay``; empty groups are left out.
        """
        rates = {"temporal": lr, "alpha": lr if alpha_lr is None else alpha_lr, "spatial": spatial_lr}
        return parameter_groups(self.model, self.layers, rates, weight_decay)

    def freeze(self) -> "TemporalAdapter":
        """Stop gradients of the image model's parameters; the temporal layers stay trainable. Returns the adapter."""
        state = self._state
        if state.frozen is None:
            state.frozen = {name: parameter.requires_grad for name, parameter in self.named_parameters("spatial")}
        for _, parameter in self.named_parameters("spatial"):
            parameter.requires_grad_(False)
        return self

    def unfreeze(self) -> "TemporalAdapter":
        """Undo :meth:`freeze`: the image model's parameters are as trainable as they were. Returns the adapter."""
        _restore_requires_grad(self.model, self._state)
        return self

    def remove(self) -> None:
        """Take the temporal layers out: classes, state-dict keys and outputs of the model are as before injection.

        Adapters that are kept aside are forgotten as well. Undoes :meth:`freeze` as well.

        Raises:
            ValueError: if something else changed a module since in a way that stands in between.
        """
        state = self._state
        detach(self.model)
        _restore_requires_grad(self.model, state)

    def summary(self, file: TextIO | None = None) -> None:
        """Print a table of the sites: channels, layer, alpha and parameter count, and totals.

        Args:
            file: where to; standard output if not given.
        """
        print(self._table(), file=file or sys.stdout)

    def _table(self) -> str:
        counts = {
            group: sum(parameter.numel() for _, parameter in self.named_parameters(group))
            for group in ("temporal", "alpha", "spatial")
        }
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        total = (
            f"{type(self.model).__name__}: {len(self.sites)} sites, {counts['temporal'] + counts['alpha']:,} temporal "
            f"parameters (of them {counts['alpha']:,} alpha), {counts['spatial']:,} spatial, {trainable:,} trainable"
        )
        return "\n".join([*table(self.layers), total])

    def __repr__(self) -> str:
        if getattr(self.model, "_temporal_state", None) is None:
            return f"TemporalAdapter({type(self.model).__name__}, removed)"
        others = [name for name in self.names if name != self.name]
        aside = f", {self.name!r}; aside: {', '.join(map(repr, others))}" if others else ""
        return f"TemporalAdapter({type(self.model).__name__}, {len(self.sites)} sites{aside})"


def _restore_requires_grad(model: nn.Module, state: TemporalState) -> None:
    for name, parameter in model.named_parameters():
        if state.frozen is not None and name in state.frozen:
            parameter.requires_grad_(state.frozen[name])
    state.frozen = None
