"""Writing an adapter under the names of a published video model."""

import os
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from temporal_layers.adapters.adapter import TemporalAdapter
from temporal_layers.adapters.attach import build_layers
from temporal_layers.adapters.convert.layouts import check_layout
from temporal_layers.adapters.convert.loading import source_of
from temporal_layers.adapters.convert.names import to_foreign
from temporal_layers.adapters.convert.source import Source
from temporal_layers.adapters.convert.table import Entry, make_table, position_table, spatial_part
from temporal_layers.adapters.weights import full_state_dict

__all__ = ["export_foreign", "save_foreign"]


def export_foreign(adapter: TemporalAdapter, source: Source | None = None) -> dict[str, Tensor]:
    """The weights of an adapter as a published video model has them: names, shapes and dtypes.

    An adapter that came from a file gives back what was in the file, bit for bit, unless it was trained since or the
    model's dtype is narrower than the file's. With another style (``dataclasses.replace(report.source,
    style="diffusers")``) it converts. diffusers' classes load the result strictly.

    Args:
        adapter: of the family's layout, converted or trained.
        source: what to write; where the adapter came from if not given. Where it says ``whole``, the image model's
            weights are written too.

    Returns:
        Tensors by name, copies on the CPU.

    Raises:
        ValueError: if no source is known, the layers are of another layout, or tensors that the file shares among
            several layers have come to differ.
    """
    source = source or source_of(adapter)
    if source is None:
        raise ValueError(
            "export_foreign: source: expected a Source, got None for an adapter that was not converted; pass one, "
            "for instance Source(family='animatediff', style='diffusers', version='v3', max_frames=32)"
        )
    check_layout(source, adapter.config)
    spatial = spatial_part(adapter.model) if source.whole else {}
    made = build_layers(adapter.model, adapter.config, adapter.sites, meta=True)
    values = adapter.state_dict()
    _check_plain(spatial.keys() | (values.keys() ^ full_state_dict(made).keys()))
    table = make_table(source, adapter.sites, made, spatial)
    values |= spatial
    exported: dict[str, Tensor] = {}
    targets: dict[str, str] = {}
    for entry in table.entries:
        value = _foreign_value(entry, values[entry.target], source)
        if entry.name in exported and not torch.equal(exported[entry.name], value):
            raise ValueError(
                f"export_foreign: {entry.target}: expected the value of {targets[entry.name]}, which shares "
                f"{entry.name!r} in the file, got another; training has moved them apart"
            )
        exported[entry.name], targets[entry.name] = value, entry.target
    if source.max_frames is not None:
        for name, width in table.positions.items():
            exported[name] = position_table(source.max_frames, width).to(_dtype(source, name))
    return exported


def save_foreign(adapter: TemporalAdapter, file: str | PathLike, source: Source | None = None) -> None:
    """Write :func:`export_foreign` to a ``.safetensors`` file, with the note about the licence in its metadata.

    Raises:
        ValueError: as :func:`export_foreign`, or if the file is to have another suffix.
    """
    path = Path(file)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_foreign: {path}: expected a file named .safetensors, got {path.suffix or 'no suffix'}")
    tensors = {name: value.contiguous() for name, value in export_foreign(adapter, source).items()}
    licence = adapter.metadata.get("licence")
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, {"format": "pt"} | ({"license": licence} if licence else {}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _foreign_value(entry: Entry, value: Tensor, source: Source) -> Tensor:
    if value.is_meta:
        raise ValueError(
            f"export_foreign: {entry.target}: expected a value, got a tensor on the meta device; take off the hooks "
            "that offload it, or load the weights first"
        )
    return to_foreign(value.detach(), entry.change).to("cpu", _dtype(source, entry.name), copy=True)


def _dtype(source: Source, name: str) -> torch.dtype:
    return getattr(torch, source.dtype_of(name))


def _check_plain(names: set[str]) -> None:
    added = min((name for name in names if "lora_" in name or ".base_layer." in name), default=None)
    if added is not None:
        raise ValueError(
            f"export_foreign: {added}: expected the tensors of the image model and of the layers as injected, got "
            "those of a LoRA; merge or unload it"
        )
