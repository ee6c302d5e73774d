"""The training of temporal layers, as far as it is the same in all stages: which parameters, how, and what is left."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from temporal_layers.adapters import TemporalAdapter, TemporalConfig, adapter_of, inject, plan
from temporal_layers.recipes.training.configs import read
from temporal_layers.recipes.training.engine import OptimConfig, fit
from temporal_layers.recipes.training.streams import Stream

Trained = Literal["temporal", "all"]


def layers_in_file(path: Path | None, model: nn.Module) -> TemporalConfig | None:
    """What a file says that is to be injected, if there is one; for before the videos are looked at.

    Args:
        path: File of a ``TemporalConfig``, or None.
        model: What it is for, without temporal layers.

    Raises:
        ValueError: If the file cannot be read or does not fit the model.
    """
    if path is None:
        return None
    config = TemporalConfig.from_dict(read(path))
    plan(model, config)
    return config


def trainable_adapter(
    unet: nn.Module, temporal: TemporalConfig | None, train: Trained, *, seed: int = 0
) -> TemporalAdapter:
    """The temporal layers of a UNet, injected if there are none, with the UNet in training mode.

    Args:
        unet: Gets the layers, and their gradients or all.
        temporal: What to inject; the paper's layout if None.
        train: ``temporal`` freezes the image model, ``all`` makes it trainable as well.
        seed: Of the initial weights.

    Raises:
        ValueError: If ``temporal`` is given for a UNet that has temporal layers already.
    """
    if getattr(unet, "_temporal_state", None) is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = inject(unet, temporal)
    elif temporal is None:
        adapter = adapter_of(unet)
    else:
        raise ValueError(
            "trainable_adapter: temporal: expected None for a UNet that has temporal layers, which say what they are; "
            "got a configuration: remove() them first, or leave it out to go on with them"
        )
    unet.train()
    if train == "temporal":
        return adapter.freeze()
    unet.requires_grad_(True)
    return adapter


def fit_adapter(
    adapter: TemporalAdapter,
    objective: nn.Module,
    stream: Stream,
    config: OptimConfig,
    *,
    name: str = "temporal layers",
    train: Trained = "temporal",
    on_checkpoint: Callable[[TemporalAdapter, int], None] | None = None,
    **engine: Any,
) -> tuple[TemporalAdapter, list[float]]:
    """`fit` with the parameter groups of an adapter; leaves its model in evaluation mode.

    Args:
        adapter: Of the model that is trained, from `trainable_adapter`.
        objective: As in `fit`.
        stream: As in `fit`.
        config: Steps, learning rate and so on.
        name: What to call the training.
        train: What `trainable_adapter` was told.
        on_checkpoint: Called with the adapter and the number of finished steps.
        **engine: Further arguments of `fit`.

    Returns:
        The adapter and the loss of each step.
    """
    history = fit(
        objective,
        stream,
        config,
        name=name,
        groups=adapter.parameter_groups(
            lr=config.lr, spatial_lr=config.lr if train == "all" else None, weight_decay=config.weight_decay
        ),
        on_checkpoint=None if on_checkpoint is None else functools.partial(on_checkpoint, adapter),
        **engine,
    )
    adapter.model.eval()
    return adapter, history


def save_trained(adapter: TemporalAdapter, out: Path, *, train: Trained) -> TemporalAdapter:
    """Write ``adapter/`` and, if all was trained, the UNet without temporal layers to ``unet/``.

    Args:
        adapter: What was trained.
        out: Folder of the run.
        train: What `trainable_adapter` was told.

    Returns:
        The adapter.
    """
    adapter.save_pretrained(out / "adapter")
    if train == "temporal":
        return adapter
    unet, layers = adapter.model, adapter.snapshot()
    adapter.remove()
    unet.save_pretrained(out / "unet")
    return TemporalAdapter.from_pretrained(unet, layers)


def alphas(adapter: TemporalAdapter) -> dict[str, float]:
    """Mean alpha of every temporal layer that has one, by the name of its site."""
    blending = {name: layer.blend for name, layer in adapter.layers.items() if hasattr(layer, "blend")}
    return {name: blend.alpha.mean().item() for name, blend in blending.items()}
