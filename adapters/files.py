"""Adapter files: ``config.json`` and ``diffusion_pytorch_model.safetensors``, never pickle."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

import temporal_layers
from temporal_layers.adapters.config import TemporalConfig
from temporal_layers.adapters.sites import InjectionSite

__all__ = ["SavedAdapter", "load", "save"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
FORMAT = "temporal-layers adapter"
FORMAT_VERSION = 1
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
        for saved, found in zip(self.sites, sites, strict=False):
            if saved != found:
                raise ValueError(
                    f"{self.folder}: expected a model with the site {saved}, got {found}; "
                    "the adapter was made for another model"
                )
        if len(self.sites) != len(sites):
            raise ValueError(
                f"{self.folder}: expected a model with {len(self.sites)} sites, got one with {len(sites)}; "
                "the adapter was made for another model"
            )

    def check_weights(self, layers: dict[str, nn.Module]) -> None:
        """Raise a ``ValueError`` unless the weights are exactly those of ``layers``, with the same shapes."""
        expected = {
            f"{name}.temporal.{key}": tuple(value.shape)
            for name, layer in layers.items()
            for key, value in layer.state_dict().items()
        }
        found = {key: tuple(value.shape) for key, value in self.weights.items()}
        missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        if missing or unknown:
            raise ValueError(
                f"{self.folder}: expected {len(expected)} tensors, got {len(found)}: {len(missing)} missing "
                f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}; the configuration does not belong to the weights"
            )
        for key, shape in expected.items():
            if found[key] != shape:
                raise ValueError(f"{self.folder}: {key}: expected shape {shape}, got {found[key]}")


def save(
    folder: str | PathLike,
    base_class: str,
    config: TemporalConfig,
    sites: tuple[InjectionSite, ...],
    weights: dict[str, torch.Tensor],
) -> None:
    """Write an adapter to ``folder``, making it if needed.

    The configuration is also in the metadata of the weights file. The weights are replaced first and the
    configuration, which holds their checksum, last, each in one step: an interruption is noticed at loading.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": temporal_layers.__version__,
        "base_class": base_class,
        "temporal": config.to_dict(),
        "sites": [dataclasses.asdict(site) for site in sites],
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    data = save_safetensors(tensors, metadata={"temporal_layers": json.dumps(header)})
    header["weights_sha256"] = hashlib.sha256(data).hexdigest()
    _replace(folder / WEIGHTS_NAME, data)
    _replace(folder / CONFIG_NAME, (json.dumps(header, indent=2) + "\n").encode())


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def load(folder: str | PathLike) -> SavedAdapter:
    """Read an adapter from ``folder``.

    Raises:
        ValueError: if a file is missing, truncated, altered or of an unknown format, or the configuration has an
            unknown key.
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
    config = TemporalConfig.from_dict(header["temporal"])
    try:
        sites = tuple(InjectionSite(**site) for site in header["sites"])
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: sites: expected fields of InjectionSite, got: {error}") from error
    return SavedAdapter(folder, header["base_class"], config, sites, weights)


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
