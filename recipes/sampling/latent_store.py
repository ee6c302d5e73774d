"""Latents that are made piece by piece and kept in a folder, so that sampling that was killed goes on where it was.

``settings.json`` says what all pieces depend on, and ``latents-*.safetensors`` hold one piece each, together with
digests of its values and of what it was made of. Files are put in place whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from temporal_layers.recipes.digests import tensors_digest
from temporal_layers.recipes.training.files import remove_parts, replace_bytes, replace_text

FORMAT = 1


class LatentStore:
    """Latents in a folder, by number.

    Args:
        folder: Made if missing. One process at a time writes to it.
        settings: What all pieces depend on: names and values that JSON knows.

    Raises:
        ValueError: If the folder holds latents of other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_parts(self.folder)
        self.settings = json.loads(json.dumps({"format": FORMAT, **settings}, default=str))
        path = self.folder / "settings.json"
        if path.is_file():
            self._check(path)
        else:
            replace_text(path, json.dumps(self.settings, indent=2) + "\n")

    def piece(self, number: int, made_of: Mapping[str, Tensor], make: Callable[[], Tensor]) -> Tensor:
        """The latents of a number: from the folder, or made and put there.

        Args:
            number: Of the piece.
            made_of: Tensors that it depends on, besides the settings.
            make: Makes it.

        Raises:
            ValueError: If the file is damaged, or was made of something else.
        """
        path, source = self.folder / f"latents-{number:06d}.safetensors", self._source(made_of)
        if path.is_file():
            return _read(path, source)
        latents = make().contiguous()
        notes = {"made_of": source, "content": tensors_digest({"latents": latents})}
        replace_bytes(path, save({"latents": latents}, metadata=notes))
        return latents

    def _source(self, made_of: Mapping[str, Tensor]) -> str:
        text = json.dumps(self.settings, sort_keys=True) + tensors_digest(made_of)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def _check(self, path: Path) -> None:
        try:
            stored = dict(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"LatentStore: {path}: expected JSON, got damaged data ({error}); delete the folder"
            ) from error
        names = [name for name in {**stored, **self.settings} if stored.get(name) != self.settings.get(name)]
        if names:
            different = [f"{name}={stored.get(name)!r} in place of {self.settings.get(name)!r}" for name in names]
            raise ValueError(
                f"LatentStore: {self.folder}: expected latents of the same settings, got some with "
                f"{', '.join(different)}; name another folder, or delete this one"
            )


def _read(path: Path, source: str) -> Tensor:
    try:
        with safe_open(str(path), framework="pt") as file:
            notes, latents = file.metadata() or {}, file.get_tensor("latents")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"LatentStore: {path}: {_DAMAGED} ({error})") from error
    if notes.get("made_of") != source:
        raise ValueError(
            f"LatentStore: {path}: expected latents that go on from the same frames with the same conditioning, got "
            "others; name another folder, or delete this one"
        )
    if notes.get("content") != tensors_digest({"latents": latents}):
        raise ValueError(f"LatentStore: {path}: {_DAMAGED}")
    return latents


_DAMAGED = "expected a whole file, got damaged data; delete this file, and it is made again"
