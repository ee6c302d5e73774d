"""Checkpoints on the disk: whole or absent, checked when they are read, the last few of them kept.

    runs/video/checkpoints/temporal-layers/step-00000400/state.pt
                                                         manifest.json

A checkpoint is written into a folder of another name, brought to the disk and renamed, so that a process killed in
between leaves no half of one under its name. Its manifest has the length and the SHA-256 of every file; one that
does not agree with it is reported and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from temporal_layers.recipes.training.files import publish, remove_parts, sync

FORMAT = 1


class Checkpoints:
    """The checkpoints of one ``fit``.

    Args:
        folder: Where they are.
        keep: How many stay; older ones are removed when a new one has been written.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """All checkpoints, usable or not, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))

    def write(self, step: int, state: dict[str, Any], about: Mapping[str, Any] | None = None) -> Path:
        """Write a checkpoint and remove those that are too many.

        Args:
            step: Number of finished steps.
            state: Tensors on the CPU, numbers and text, in dictionaries and lists.
            about: Numbers and text that can be read without reading the state.

        Returns:
            Its folder.

        Raises:
            OSError: If it cannot be written, for instance because the disk is full; what is there already stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{step:08d}"
        part = self.folder / f".{final.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir()
            entry = _save(part / "state.pt", state)
            manifest = {"format": FORMAT, "step": step, "files": {"state.pt": entry}, "about": dict(about or {})}
            (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            sync(part / "manifest.json")
            sync(part)
            publish(part, final)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        for outdated in self.paths()[: -self.keep]:
            if outdated != final:
                shutil.rmtree(outdated)
        return final

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest usable checkpoint, if any, and what is wrong with newer ones. Clears what was left half-way."""
        problems: list[str] = []
        if self.folder.is_dir():
            remove_parts(self.folder)
        for path in reversed(self.paths()):
            try:
                verify(path)
            except ValueError as error:
                problems.append(str(error))
            else:
                return path, problems
        return None, problems


def verify(path: Path) -> dict[str, Any]:
    """Compare a checkpoint with its manifest.

    Returns:
        The manifest: ``step``, the number of finished steps, and ``about``, among other things.

    Raises:
        ValueError: If it is not a checkpoint, or not as it was written.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version, files, _, _ = (manifest[key] for key in ("format", "files", "step", "about"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {path}: expected a folder with a readable manifest.json, got {type(error).__name__}: {error}"
        ) from error
    if version != FORMAT:
        raise ValueError(f"checkpoint {path}: expected format {FORMAT}, got {version}; use the version that wrote it")
    for name, entry in files.items():
        file = path / name
        length = file.stat().st_size if file.is_file() else 0
        if length != entry["bytes"]:
            raise ValueError(f"checkpoint {path}: {name}: expected {entry['bytes']} bytes, got {length}: cut off")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise ValueError(f"checkpoint {path}: {name}: expected the bytes that were written, got others: corrupt")
    return manifest


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint that `verify` or `Checkpoints.latest` found good. Runs no code that is in the file."""
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


class _Hashing:
    """A file that hashes what is written, and keeps the error that torch.save turns into one without a code."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    with path.open("wb") as file:
        hashing = _Hashing(file)
        try:
            torch.save(state, hashing)
        except RuntimeError:
            if hashing.error is None:
                raise
            raise hashing.error from None
        file.flush()
        os.fsync(file.fileno())
        return {"sha256": hashing.digest.hexdigest(), "bytes": file.tell()}
