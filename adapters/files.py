"""Adapter files: ``config.json`` and ``diffusion_pytorch_model.safetensors``, never pickle."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

import temporal_layers
from temporal_layers.adapters.config import TemporalConfig
from temporal_layers.adapters.sites import InjectionSite

__all__ = ["SavedAdapter", "full_state_dict", "load", "save"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
FORMAT = "temporal-layers adapter"
FORMAT_VERSION = 1
METADATA_KEY = "temporal_layers"
KEYS = frozenset({"format", "format_version", "library_version", "base_class", "temporal", "sites", "weights_sha256"})


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from its files, checked in itself but not yet against a model."""

    folder: Path
    base_class: str
    config: TemporalConfig
    sites: tuple[InjectionSite, ...]
    weights: dict[str, torch.Tensor]

    def check_sites(self, sites: tuple[InjectionSite, ...]) -> None:
        """Raise a ``ValueError`` that names the first difference between the saved sites and those of a model."""
        other = f"the adapter was made for another model (a {self.base_class})"
        for saved, found in zip(self.sites, sites, strict=False):
            if saved != found:
                raise ValueError(f"{self.folder}: expected a model with the site {saved}, got {found}; {other}")
        if len(self.sites) != len(sites):
            raise ValueError(
                f"{self.folder}: expected a model with {len(self.sites)} sites, got one with {len(sites)}; {other}"
            )

    def check_weights(self, layers: dict[str, nn.Module]) -> None:
        """Raise a ``ValueError`` unless the weights are exactly those of ``layers``, with the same shapes."""
        expected = {key: tuple(value.shape) for key, value in full_state_dict(layers).items()}
        found = {key: tuple(value.shape) for key, value in self.weights.items()}
        missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        if missing or unknown:
            raise ValueError(
                f"{self.folder}: expected {len(expected)} tensors, got {len(found)}: {len(missing)} missing "
                f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}; the configuration does not belong to the weights"
            )
        for key, shape in expected.items():
            if found[key] != shape:
                raise ValueError(
                    f"{self.folder}: {key}: expected shape {shape}, got {found[key]}; "
                    "the configuration does not belong to the weights"
                )

    def fill(self, name: str, layer: nn.Module, device: torch.device) -> None:
        """Give ``layer``, on the meta device, the weights of site ``name`` on ``device``, in its own dtype."""
        prefix = f"{name}.temporal."
        values = {
            key: self.weights[prefix + key].to(device=device, dtype=parameter.dtype)
            for key, parameter in layer.state_dict().items()
        }
        layer.load_state_dict(values, assign=True)


def full_state_dict(layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The weights of temporal layers under their full names in the model."""
    return {
        f"{name}.temporal.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()
    }


def save(
    folder: str | PathLike,
    base_class: str,
    config: TemporalConfig,
    sites: tuple[InjectionSite, ...],
    made: dict[str, nn.Module],
    weights: dict[str, torch.Tensor],
) -> None:
    """Write an adapter to ``folder``, making it if needed.

    The configuration is also in the metadata of the weights file, and loading compares the two. The weights are
    replaced first and the configuration, which holds their checksum, last, each in one step: an interruption is
    noticed at loading.

    Args:
        folder: where to.
        base_class: class of the model.
        config: what was injected.
        sites: where.
        made: layers as injection makes them; only the names of their tensors are looked at.
        weights: values under their full names in the model.

    Raises:
        ValueError: if the names of ``weights`` are not those of ``made``, or a weight has no value.
    """
    changed = sorted(weights.keys() ^ full_state_dict(made).keys())
    if changed:
        raise ValueError(
            f"save_pretrained: expected the tensors that injection made, got others: {len(changed)} differ "
            f"{changed[:3]}; unload what was added to the temporal layers (LoRA) and save it by itself"
        )
    empty = next((key for key, value in weights.items() if value.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"save_pretrained: {empty}: expected a value, got a tensor on the meta device; "
            "take off the hooks that offload it, or load the weights first"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": temporal_layers.__version__,
        "base_class": base_class,
        "temporal": config.to_dict(),
        "sites": [dataclasses.asdict(site) for site in sites],
    }
    # Copies, because safetensors refuses tensors that share memory, as tied parameters do.
    tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in weights.items()}
    data = save_safetensors(tensors, metadata={METADATA_KEY: json.dumps(header, sort_keys=True)})
    header["weights_sha256"] = hashlib.sha256(data).hexdigest()
    _replace(folder / WEIGHTS_NAME, data)
    _replace(folder / CONFIG_NAME, (json.dumps(header, indent=2) + "\n").encode())


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(folder: str | PathLike) -> SavedAdapter:
    """Read an adapter from ``folder``.

    Raises:
        ValueError: if a file is missing, truncated, altered or of an unknown format, the two do not belong together,
            or the configuration has an unknown key or a value of another type.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: expected a file {name}, got none; pass the folder that save_pretrained wrote")
    header = _read_header(folder / CONFIG_NAME)
    data = (folder / WEIGHTS_NAME).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != header["weights_sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS_NAME}: expected sha256 {header['weights_sha256']}, got {digest} of {len(data)} bytes; "
            "the file is truncated or altered: save or download it again"
        )
    try:
        weights = load_safetensors(data)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_NAME}: expected a safetensors file, got: {error}") from error
    described = {key: value for key, value in header.items() if key != "weights_sha256"}
    if _metadata(data) != json.dumps(described, sort_keys=True):
        raise ValueError(
            f"{folder / CONFIG_NAME}: expected what {WEIGHTS_NAME} was saved with, got something else; "
            "the file is altered or belongs to other weights: save or download both again"
        )
    try:
        config = TemporalConfig.from_dict(header["temporal"])
        sites = tuple(InjectionSite(**site) for site in header["sites"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG_NAME}: expected a configuration of this version, got: {error}; "
            f"it was written by version {header['library_version']}"
        ) from error
    return SavedAdapter(folder, header["base_class"], config, sites, weights)


def _metadata(data: bytes) -> str | None:
    """What this library wrote into the header of a safetensors file that has been parsed before."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__", {}).get(METADATA_KEY)


def _read_header(path: Path) -> dict:
    try:
        header = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got: {error}; the file is truncated or altered") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise ValueError(f"{path}: expected format {FORMAT!r}, got {found!r}; this is not an adapter of this library")
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format version {FORMAT_VERSION}, got {header.get('format_version')!r}; "
            "load it with the library version that wrote it"
        )
    missing, unknown = sorted(KEYS - header.keys()), sorted(header.keys() - KEYS)
    if missing or unknown:
        raise ValueError(f"{path}: expected keys {sorted(KEYS)}, missing {missing}, unknown {unknown}")
    return header
