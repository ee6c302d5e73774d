"""Hosts whose weights are brought to a device for each call and taken away again: temporal layers follow them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["check_in_place", "device_of", "follow"]


def check_in_place(model: nn.Module) -> None:
    """Raise a ``ValueError`` if hooks move weights of ``model`` about that would not take new layers with them."""
    for name, module in model.named_modules():
        if any(hook.place_submodules for hook in _align_hooks(module)):
            reason = "hooks that load a module's children together with it (preload_module_classes)"
        elif _group(module) is not None and (_group(module).stream or _group(module).offload_to_disk_path):
            reason = "group offloading with a stream or to disk, which lists its tensors when it is set up"
        else:
            continue
        raise ValueError(
            f"plan: {name or 'model'}: expected weights that stay in place, or offloading that new layers can join, "
            f"got {reason}; inject first, then set up offloading"
        )


def _align_hooks(module: nn.Module) -> Iterator[Any]:
    """Hooks of accelerate on ``module`` that keep its weights elsewhere between calls."""
    hook = getattr(module, "_hf_hook", None)  # one or a sequence
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "offload", False):
            yield part


def _group(module: nn.Module) -> Any:
    """The group of diffusers' group offloading that ``module`` begins or ends, if any."""
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("group_offloading")
    return None if hook is None else hook.group


def device_of(host: nn.Module) -> torch.device:
    """Where the temporal layer of ``host`` is to be made: where the weights of the host are between calls."""
    device = next(host.parameters()).device
    # Under accelerate's hooks the parameters are on the meta device, and their values are on the CPU or on disk.
    offloaded = device.type == "meta" and any(hook for module in host.modules() for hook in _align_hooks(module))
    return torch.device("cpu") if offloaded else device


def follow(host: nn.Module, layer: nn.Module) -> None:
    """Offload ``layer``, which is not in ``host`` yet, as the weights of ``host`` are."""
    aligned = next((hook for module in host.modules() for hook in _align_hooks(module)), None)
    has_hooks = any(hook for module in layer.modules() for hook in _align_hooks(module))  # it was in before
    if aligned is not None and not has_hooks:
        import accelerate  # optional; it is there, or its hook would not be

        device, buffers = aligned.execution_device, aligned.offload_buffers
        accelerate.cpu_offload(layer, execution_device=device, offload_buffers=buffers)
    # Groups of whole blocks ask their blocks for their parameters at every call. Those of single layers do not.
    leaf = next((module for module in host.modules() if _is_leaf_group(module)), None)
    if leaf is not None:
        from diffusers.hooks import apply_group_offloading

        group = _group(leaf)
        apply_group_offloading(
            layer,
            onload_device=group.onload_device,
            offload_device=group.offload_device,
            offload_type="leaf_level",
            non_blocking=group.non_blocking,
        )


def _is_leaf_group(module: nn.Module) -> bool:
    return _group(module) is not None and _group(module).modules == [module] and not any(module.children())
