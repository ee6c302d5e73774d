"""Reading weight files of others: safetensors, and pickles as far as they hold nothing but tensors."""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["Foreign", "Weights", "read_foreign"]

Weights = str | PathLike | Mapping[str, Any]
NESTED = ("state_dict", "model_state_dict", "module")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Foreign:
    """What was read.

    Attributes:
        where: the file, or ``"state dict"``.
        tensors: by name.
        others: names of what is no tensor, with what it is.
        config: the model's ``config.json``, if the weights came in diffusers' folder.
        licence: as the file or the model card states it.
    """

    where: str
    tensors: dict[str, Tensor]
    others: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None


def read_foreign(weights: Weights) -> Foreign:
    """Read a file, diffusers' folder of one model, or a state dict.

    Pickle files run code when they are opened. Here they are read by PyTorch's restricted reader, which knows tensors
    and plain containers only; anything else in them is an error.

    Args:
        weights: a ``.safetensors``, ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` file; a folder with such a file and
            a ``config.json``; or tensors by name, perhaps below ``"state_dict"``.

    Raises:
        ValueError: if there is no such file, it is of another kind, damaged, or has more than tensors in it.
    """
    if isinstance(weights, Mapping):
        return _sorted_out("state dict", weights)
    path = Path(weights)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a file or a folder, got none; check the path")
    return _read_file(path)


def _read_file(path: Path) -> Foreign:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a safetensors file, got: {error}") from error
        stated = (metadata.get(key) for key in ("license", "licence", "modelspec.license"))
        return Foreign(str(path), tensors, licence=next(filter(None, stated), None))
    if path.suffix not in PICKLES:
        raise ValueError(
            f"{path}: expected a file named .safetensors, {', '.join(PICKLES)}, got {path.suffix or 'no suffix'}"
        )
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected tensors in plain containers, got a pickle with more in it, which would run its code: "
            f"{str(error).splitlines()[0]}; ask for a .safetensors file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: expected a PyTorch file, got: {error}; it is damaged: download it again") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: expected tensors by name, got a {type(values).__name__}")
    return _sorted_out(str(path), values)


def _sorted_out(where: str, values: Mapping[str, Any]) -> Foreign:
    """Go down to the level of the tensors, noting what else is there."""
    others: dict[str, str] = {}
    while nested := next((key for key in NESTED if isinstance(values.get(key), Mapping)), None):
        others |= {str(key): f"stands beside {nested!r}" for key in values if key != nested}
        values = values[nested]
    tensors = {}
    for key, value in values.items():
        if torch.is_tensor(value):
            tensors[str(key)] = value
        else:
            others[str(key)] = f"no tensor but a {type(value).__name__}"
    return Foreign(where, tensors, others)


def _read_folder(folder: Path) -> Foreign:
    index = folder / f"{STEM}.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [next(filter(Path.is_file, (folder / (STEM + end) for end in (".safetensors", *PICKLES))), None)]
        if files == [None]:
            files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(
                f"{folder}: expected one weights file, {STEM}.safetensors for instance, got "
                f"{', '.join(file.name for file in files) or 'none'}; pass the folder of the UNet, motion adapter or "
                "autoencoder, or the file itself"
            )
    parts = [_read_file(file) for file in files]
    config = folder / "config.json"
    return Foreign(
        str(folder),
        {name: value for part in parts for name, value in part.tensors.items()},
        {name: value for part in parts for name, value in part.others.items()},
        json.loads(config.read_text()) if config.is_file() else {},
        next(filter(None, (part.licence for part in parts)), None) or _card_licence(folder),
    )


def _card_licence(folder: Path) -> str | None:
    """The licence in the head of the model card, in the folder or in the pipeline's folder around it."""
    for card in (folder / "README.md", folder.parent / "README.md"):
        if card.is_file():
            head = card.read_text(errors="replace").split("\n---", 1)[0]
            found = re.findall(r"^license(?:_name|_link)?: *(\S.*?) *$", head, flags=re.MULTILINE)
            if head.startswith("---") and found:
                return ", ".join(found)
    return None
