"""The folder of a run: what is needed to repeat it, and one JSON line of numbers per step."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from temporal_layers.recipes.training.files import replace_text


class RunFolder:
    """Folder of a run: resolved configuration, versions and one JSON line per step in ``losses.jsonl``.

    What a folder holds already stays until ``fit`` goes over it: a run that goes on keeps its records up to the
    checkpoint, one that starts afresh drops those of its stage.

    Args:
        path: Folder to create.
        config: Dataclass instance with everything needed to repeat the run.
    """

    def __init__(self, path: Path | str, config: Any) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.config = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        self.write("config.json", self.config)
        self.write("versions.json", versions())
        self.losses = self.path / "losses.jsonl"
        self.losses.touch()

    def write(self, name: str, value: Any) -> None:
        """Write a value as indented JSON, in one go: the file is the old one or the new one at any time."""
        replace_text(self.path / name, as_json(value))

    def log(self, **record: Any) -> None:
        """Append one record to ``losses.jsonl``."""
        with self.losses.open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    def finish(self, history: Sequence[float], *, started: float, **more: Any) -> None:
        """Write ``result.json``: the mean loss of the last tenth of the steps, the seconds, and what else there is.

        Args:
            history: The loss of each step.
            started: When the stage began, by ``time.perf_counter``.
            **more: Further results.
        """
        tail = history[-max(1, len(history) // 10) :]
        seconds = round(time.perf_counter() - started, 1)
        self.write("result.json", {"seconds": seconds, "loss": sum(tail) / len(tail), **more})

    def records(self) -> list[dict[str, Any]]:
        """The records of ``losses.jsonl``, without a last line that was cut off."""
        lines = self.losses.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]  # behind the last line's end there is nothing, or a part

    def rewind(self, stage: str, step: int) -> None:
        """Drop the records of a stage from a step on, as the run is about to make them again."""
        kept = [r for r in self.records() if r.get("stage") != stage or r["step"] < step]
        replace_text(self.losses, "".join(json.dumps(record) + "\n" for record in kept))

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        with self.losses.open("a") as stream:
            os.fsync(stream.fileno())


def as_json(value: Any) -> str:
    """A value as indented JSON; what JSON does not know, paths for instance, as text."""
    return json.dumps(value, indent=2, default=str) + "\n"


def versions() -> dict[str, str]:
    """Versions of everything that can change a training run."""
    names = ("torch", "diffusers", "accelerate", "numpy", "temporal-layers")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"
