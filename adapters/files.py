"""Adapter files: ``config.json`` and ``diffusion_pytorch_model.safetensors``, never pickle."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import temporal_layers
from temporal_layers.adapters.config import TemporalConfig
from temporal_layers.adapters.sites import InjectionSite

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "Content", "is_alpha", "load", "save"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CARD_NAME = "README.md"
FORMAT = "temporal-layers adapter"
METADATA_KEY = "temporal_layers"
KEYS_1 = frozenset({"format", "format_version", "library_version", "base_class", "temporal", "sites", "weights_sha256"})
KEYS = {1: KEYS_1, 2: KEYS_1 | {"metadata"}}  # by format version; the last is written, all are read
FORMAT_VERSION = max(KEYS)


@dataclass(frozen=True)
class Content:
    """What the files of an adapter hold.

    Attributes:
        base_class: name of the model's class.
        config: what was injected.
        sites: where.
        weights: tensors by their full names in the model.
        metadata: notes that go with the weights.
    """

    base_class: str
    config: TemporalConfig
    sites: tuple[InjectionSite, ...]
    weights: dict[str, torch.Tensor] = field(repr=False)
    metadata: dict[str, str]


def is_alpha(key: str) -> bool:
    """Whether a weight is the logit of an alpha."""
    return key.endswith(".temporal.blend.logit")


def save(
    folder: str | PathLike, content: Content, *, dtype: torch.dtype | None = None, card: str | None = None
) -> None:
    """Write an adapter to ``folder``, making it if needed.

    The configuration is also in the metadata of the weights file, and loading compares the two. The weights are
    replaced first and the configuration, which holds their checksum, last, each in one step: an interruption is
    noticed at loading.

    Args:
        folder: where to.
        content: what.
        dtype: stores the weights in it, alpha excepted; as they are if not given.
        card: text of ``README.md``; none is written if not given.

    Raises:
        ValueError: if a weight has no value or none in ``dtype``, ``dtype`` is not floating, or the metadata is
            something else than strings.
    """
    check_metadata(content.metadata)
    tensors = {key: _stored(key, value, dtype) for key, value in content.weights.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": temporal_layers.__version__,
        "base_class": content.base_class,
        "temporal": content.config.to_dict(),
        "sites": [dataclasses.asdict(site) for site in content.sites],
        "metadata": content.metadata,
    }
    data = save_safetensors(tensors, metadata={METADATA_KEY: json.dumps(header, sort_keys=True)})
    header["weights_sha256"] = hashlib.sha256(data).hexdigest()
    _replace(folder / WEIGHTS_NAME, data)
    _replace(folder / CONFIG_NAME, (json.dumps(header, indent=2) + "\n").encode())
    if card is not None:
        _replace(folder / CARD_NAME, card.encode())


def _stored(key: str, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if value.is_meta:
        raise ValueError(
            f"save_pretrained: {key}: expected a value, got a tensor on the meta device; "
            "take off the hooks that offload it, or load the weights first"
        )
    if is_traceable_wrapper_subclass(value):
        raise ValueError(
            f"save_pretrained: {key}: expected a plain tensor, got a {type(value).__name__}; "
            "save the adapter before its layers are quantised"
        )
    if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
        raise ValueError(
            f"save_pretrained: dtype: expected a floating dtype of two bytes or more, got {dtype}; "
            "use torch.float16 or torch.bfloat16 for small files"
        )
    value = value.detach()
    # In 16 bits an alpha near 0 or 1 would move.
    wanted = value.dtype if dtype is None or is_alpha(key) or not value.is_floating_point() else dtype
    # A copy, because safetensors refuses tensors that share memory, as tied parameters do.
    stored = value.to("cpu", wanted, copy=True).contiguous()
    if wanted != value.dtype and stored.isinf().sum() != value.isinf().sum():
        raise ValueError(
            f"save_pretrained: {key}: expected values within the range of {dtype}, got "
            f"{value.abs().max().item():.3g}; use torch.bfloat16, which has the range of torch.float32"
        )
    return stored


def check_metadata(metadata: Any) -> None:
    """Raise a ``ValueError`` unless ``metadata`` is a dictionary from strings to strings."""
    plain = isinstance(metadata, dict) and all(isinstance(part, str) for item in metadata.items() for part in item)
    if not plain:
        raise ValueError(
            f"metadata: expected a dictionary from strings to strings, got {metadata!r}; turn other values into text"
        )


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(folder: str | PathLike) -> Content:
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
        check_metadata(header.get("metadata", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG_NAME}: expected a configuration of this version, got: {error}; "
            f"it was written by version {header['library_version']}"
        ) from error
    # Early files hold a scalar alpha without an axis.
    weights = {key: value.reshape(1) if value.ndim == 0 else value for key, value in weights.items()}
    return Content(header["base_class"], config, sites, weights, header.get("metadata", {}))


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
    version = header.get("format_version")
    if type(version) is not int or version not in KEYS:
        raise ValueError(
            f"{path}: expected format version {' or '.join(map(str, KEYS))}, got {version!r}; "
            "load it with the library version that wrote it"
        )
    keys = KEYS[version]
    missing, unknown = sorted(keys - header.keys()), sorted(header.keys() - keys)
    if missing or unknown:
        raise ValueError(f"{path}: expected keys {sorted(keys)}, missing {missing}, unknown {unknown}")
    return header
