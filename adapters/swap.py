"""Class swap: how a spatial module gets its temporal layer without changing its name, its keys or its identity.

A host module keeps its object and its parameters. Its class becomes a subclass, made on the fly, of its own class with
the same name; the forward pass of the subclass runs the spatial one and hands the result to the child ``temporal``.
"""

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from temporal_layers import ContextInput, ContextTransformer, TemporalResBlock, TemporalTransformerBlock
from temporal_layers.adapters.budget import over_frames
from temporal_layers.adapters.scale import scale_of

__all__ = ["Swapped", "check_restorable", "check_swappable", "restore_class", "site_mixin", "swap_class"]


class Swapped:
    """Mixin of every swapped module: lets ``deepcopy`` and pickle rebuild a class that has no importable name."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        cls = type(self)
        return _rebuild, (cls.mixin, cls.spatial_class, cls.extra_input), *super().__reduce_ex__(protocol)[2:]


class TemporalSite(Swapped):
    """Mixin of a swapped spatial module: spatial forward pass, then the temporal layer."""

    extra_input: str | None = None  # argument of the host's forward that the temporal layer needs as well
    extra_index: int = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self._spatial(args, kwargs)
        state = self._temporal_state
        if not state.active or scale_of(self.temporal) == 0:
            return output  # at a strength of 0 bit for bit, and at no cost
        extra = self._extra(args, kwargs)
        if isinstance(output, tuple):
            return (self._mix(output[0], extra), *output[1:])
        if torch.is_tensor(output):
            return self._mix(output, extra)
        output.sample = self._mix(output.sample, extra)
        return output

    def _spatial(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        state, forward = self._temporal_state, super().forward
        # Within a module that holds another temporal layer the frames of a clip have to stay together.
        if not state.active or state.memory_budget is None or self._holds_site():
            return forward(*args, **kwargs)
        return over_frames(forward, args, kwargs, state.memory_budget)

    def _holds_site(self) -> bool:
        return any(isinstance(module, TemporalSite) for module in self.modules() if module is not self)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in the image model, plus the temporal layer if the state dict of the whole model is asked for.

        A part of an injected model has the state dict of that part of the image model. Constructors that copy single
        blocks (``ControlNetModel.from_unet``, ``UNetMotionModel.from_unet2d``) rely on it.
        """
        destination = super().state_dict(*args, **kwargs)
        if not self._temporal_state.in_root_state_dict:
            prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
            for key in [key for key in destination if key.startswith(f"{prefix}temporal.")]:
                del destination[key]
        return destination

    def _extra(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        # diffusers passes by keyword normally and by position under gradient checkpointing.
        if self.extra_input is None:
            return None
        return args[self.extra_index] if len(args) > self.extra_index else kwargs.get(self.extra_input)

    def _mix(self, hidden_states: Tensor, extra: Any) -> Tensor:
        raise NotImplementedError


class ResBlockSite(TemporalSite):
    """A host with a temporal residual block, which gets the timestep embedding of a residual block."""

    extra_name = "temb"

    def _mix(self, hidden_states: Tensor, extra: Any) -> Tensor:
        state = self._temporal_state
        return self.temporal(
            hidden_states,
            extra,
            num_frames=state.num_frames,
            image_only=state.image_only,
            frame_context=self._frame_context(),
            cache=state.cache,
        )

    def _frame_context(self) -> Tensor | None:
        # A context that enters at the input only is not for the blocks.
        return None if self.temporal.context_in is None else self._temporal_state.frame_context


class TransformerSite(TemporalSite):
    """A host with a temporal transformer, which gets the text of each clip's first frame from an attention."""

    extra_name = "context"

    def _mix(self, hidden_states: Tensor, extra: Any) -> Tensor:
        state = self._temporal_state
        if isinstance(extra, tuple):  # an IP-Adapter appends image embeddings to the text
            extra = extra[0]
        context = None
        if self.temporal.context_dim is not None:
            context = state.text
            if context is None and extra is not None:
                context = extra.unflatten(0, (-1, state.num_frames))[:, 0]
        return self.temporal(
            hidden_states,
            context,
            num_frames=state.num_frames,
            image_only=state.image_only,
            cache=state.cache,
            memory_budget=state.memory_budget,
        )


class ConvSite(TemporalSite):
    """A host with a bare temporal convolution."""

    extra_name = None

    def _mix(self, hidden_states: Tensor, extra: Any) -> Tensor:
        state = self._temporal_state
        return self.temporal(hidden_states, num_frames=state.num_frames, image_only=state.image_only, cache=state.cache)


class ContextSite(TemporalSite):
    """The first convolution, with a frame context added and perhaps a transformer over frames behind it."""

    extra_name = None

    def _mix(self, hidden_states: Tensor, extra: Any) -> Tensor:
        state = self._temporal_state
        return self.temporal(
            hidden_states,
            frame_context=state.frame_context,
            num_frames=state.num_frames,
            image_only=state.image_only,
            **self._for_frames(),
        )

    def _for_frames(self) -> dict[str, Any]:
        # Adding a context is done frame by frame.
        if not isinstance(self.temporal, ContextTransformer):
            return {}
        return {"cache": self._temporal_state.cache, "memory_budget": self._temporal_state.memory_budget}


def site_mixin(layer: nn.Module) -> type[TemporalSite]:
    """The mixin of a host with this temporal layer."""
    if isinstance(layer, ContextInput | ContextTransformer):
        return ContextSite
    if isinstance(layer, TemporalResBlock):
        return ResBlockSite
    return TransformerSite if isinstance(layer, TemporalTransformerBlock) else ConvSite


@functools.cache
def temporal_class(mixin: type, spatial_class: type, extra_input: str | None = None) -> type:
    """The subclass of ``mixin`` and ``spatial_class`` that carries the spatial class's name.

    Args:
        mixin: the mixin of a root model, or of a site.
        spatial_class: the class of the module.
        extra_input: argument of the spatial forward pass that is handed to the temporal layer as well.
    """
    # Read here, once a class: torch.compile cannot trace inspect.
    names = tuple(inspect.signature(spatial_class.forward).parameters)[1:]
    attributes = {
        "mixin": mixin,
        "spatial_class": spatial_class,
        "__module__": spatial_class.__module__,
        "__qualname__": spatial_class.__qualname__,
        "__doc__": spatial_class.__doc__,
        "argument_names": names,
        "extra_input": extra_input,
    }
    if extra_input is not None:
        if extra_input not in names:
            raise ValueError(
                f"{spatial_class.__name__}: expected a forward with the argument {extra_input!r}, as its registration "
                f"says, got {', '.join(names)}"
            )
        attributes["extra_index"] = names.index(extra_input)
    return type(spatial_class.__name__, (mixin, spatial_class), attributes)


def _rebuild(mixin: type, spatial_class: type, extra_input: str | None = None) -> nn.Module:
    cls = temporal_class(mixin, spatial_class, extra_input)
    return cls.__new__(cls)


def _patched_by(module: nn.Module) -> str | None:
    """Who put a ``forward`` on the instance: offload hooks do, and some leave it there after removal."""
    own = module.__dict__.get("forward")
    if own is None:
        return None

    def is_plain(function: Any) -> bool:
        return inspect.ismethod(function) and function.__self__ is module and function.__func__ is type(module).forward

    if is_plain(own):
        return "leftover"
    if is_plain(module.__dict__.get("_old_forward")):
        return "accelerate"
    hook = module.__dict__.get("_diffusers_hook")
    if hook is not None and hook._fn_refs and is_plain(hook._fn_refs[0].forward):
        return "diffusers"
    return "unknown"


def check_swappable(name: str, module: nn.Module, mixin: type, extra_input: str | None = None) -> None:
    """Raise a ``ValueError`` if something unknown patched ``module``, so that :func:`swap_class` would be lost."""
    _check_forward(name, module)
    # A class that cannot be made fails here, before anything is touched.
    temporal_class(mixin, type(module), extra_input)


def check_restorable(name: str, module: nn.Module) -> None:
    """Raise a ``ValueError`` if :func:`swap_class` cannot be undone because something else changed ``module`` since."""
    if "spatial_class" not in type(module).__dict__:
        raise ValueError(
            f"{name or 'model'}: expected the class that injection gave it, got {type(module).__qualname__}; something "
            "changed the class since (fully_shard and torch.nn.utils.parametrize do): undo that first"
        )
    _check_forward(name, module)


def _check_forward(name: str, module: nn.Module) -> None:
    if _patched_by(module) == "unknown":
        raise ValueError(
            f"{name or 'model'}: {type(module).__name__}: expected the class's own forward, got a 'forward' patched on "
            "the instance by something unknown; undo that, inject or remove, and patch again"
        )


def _set_class(module: nn.Module, cls: type) -> None:
    """Change the class of ``module``, and point hooks that hold its old ``forward`` to the new one."""
    patched = _patched_by(module)
    module.__class__ = cls
    forward = types.MethodType(cls.forward, module)
    if patched == "leftover":
        del module.__dict__["forward"]
    elif patched == "accelerate":
        module.__dict__["_old_forward"] = forward
    elif patched == "diffusers":
        module.__dict__["_diffusers_hook"]._fn_refs[0].forward = forward


def swap_class(module: nn.Module, mixin: type, extra_input: str | None = None) -> None:
    """Give ``module`` the behaviour of ``mixin`` on top of its own."""
    _set_class(module, temporal_class(mixin, type(module), extra_input))


def restore_class(module: nn.Module) -> None:
    """Undo :func:`swap_class`; does nothing to a module that was not swapped."""
    if isinstance(module, Swapped):
        _set_class(module, type(module).spatial_class)
