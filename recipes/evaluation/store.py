"""Statistics of a set on the disk, under a name made of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from temporal_layers.recipes.evaluation.moments import Moments, Rows, SetStatistics

_FORMAT = 1


class StatisticsStore:
    """A folder of statistics.

    Args:
        folder: Made when something is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, identity: Mapping[str, Any]) -> Path:
        """File of a set.

        Args:
            identity: Contents, network and preprocessing, as plain values.
        """
        text = json.dumps([_FORMAT, identity], sort_keys=True)
        return self.folder / f"{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}.safetensors"

    def load(self, identity: Mapping[str, Any]) -> SetStatistics | None:
        """What was saved for a set; None if nothing was, or the file is damaged."""
        path = self.path(identity)
        if not path.is_file():
            return None
        moments: dict[str, Moments] = {}
        rows: dict[str, Rows] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for name, count in json.loads(file.metadata()["counts"]).items():
                    first, second = file.get_tensor(f"{name}/0"), file.get_tensor(f"{name}/1")
                    if count is None:
                        rows[name] = Rows(first, second)
                    else:
                        moments[name] = Moments(count, first, second)
        except (SafetensorError, OSError):
            return None
        return SetStatistics(moments, rows)

    def save(self, identity: Mapping[str, Any], kept: SetStatistics) -> Path:
        """Write the statistics of a set; the file appears whole, with the identity in its header."""
        path = self.path(identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        counts: dict[str, int | None] = {name: one.count for name, one in kept.moments.items()}
        counts |= dict.fromkeys(kept.rows)
        tensors: dict[str, torch.Tensor] = {}
        for name, one in kept.moments.items():
            tensors |= {f"{name}/0": one.mean, f"{name}/1": one.scatter}
        for name, some in kept.rows.items():
            tensors |= {f"{name}/0": some.places, f"{name}/1": some.values}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        metadata = {"counts": json.dumps(counts), "identity": json.dumps(identity, sort_keys=True)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, path)
        return path
