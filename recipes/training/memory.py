"""What a training run keeps in memory whatever the batch is: parameters, gradients, optimiser, averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from temporal_layers.recipes.training.optim import OptimConfig
from temporal_layers.recipes.training.sharding import local

BLOCK = 256
"""Numbers that share a scale in an 8-bit state; tensors below 4096 numbers are kept in fp32."""


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Bytes of one parameter group on this process.

    Attributes:
        name: Of the group, and whether it is trained.
        parameters: Themselves.
        gradients: As large as the parameters where these are trained.
        optimizer: The two moments of AdamW.
        average: Averaged weights, fp32 or wider.
    """

    name: str
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.average


def memory_budget(
    objective: nn.Module, groups: Mapping[str, list[dict[str, Any]]], config: OptimConfig
) -> list[MemoryRow]:
    """Bytes that a run holds from its first step to its last, on this process.

    Not counted: activations and temporary buffers, which depend on the batch, the low-precision copies of weights
    that autocast makes, DDP's gradient buckets (as large as the gradients), CUDA's own memory.

    Args:
        objective: The module that is trained; sharded parameters count with this process' part.
        groups: Parameter groups by turn.
        config: Optimiser and averaging.

    Returns:
        A row for each group, and one each for frozen parameters and for buffers if there are any.
    """
    rows = [
        _row(f"{name} (trained)", [p for p in group["params"] if p.requires_grad], config)
        for name, group in named_groups(groups)
    ]
    frozen = sum(_bytes(parameter) for parameter in objective.parameters() if not parameter.requires_grad)
    buffers = sum(_bytes(buffer) for buffer in objective.buffers())
    rows += [MemoryRow(name=name, parameters=size) for name, size in (("frozen", frozen), ("buffers", buffers)) if size]
    return rows


def named_groups(groups: Mapping[str, list[dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All groups with a name each: its own, behind that of its turn if there are several turns, or a number."""
    used: set[str] = set()
    for turn, own in groups.items():
        for index, group in enumerate(own):
            name = str(group.get("name", "" if len(own) == 1 else index))
            name = " ".join(part for part in (turn, name) if part) or "all"
            name = f"{name} {index}" if name in used else name
            used.add(name)
            yield name, group


def format_budget(rows: list[MemoryRow], *, title: str) -> str:
    """A budget as a table in MB (10^6 bytes)."""
    columns = [field.name for field in fields(MemoryRow) if field.name != "name"]
    total = MemoryRow(name="total", **{column: sum(getattr(row, column) for row in rows) for column in columns})
    columns.append("total")
    width = max(len(row.name) for row in [*rows, total])
    lines = [f"{title}: memory in MB; activations and temporary buffers come on top"]
    lines.append(" ".join([" " * width, *(f"{column:>10}" for column in columns)]))
    lines += [
        " ".join([f"{row.name:<{width}}", *(f"{getattr(row, column) / 1e6:10.2f}" for column in columns)])
        for row in [*rows, total]
    ]
    return "\n".join(lines)


def _row(name: str, parameters: list[Tensor], config: OptimConfig) -> MemoryRow:
    own = sum(_bytes(parameter) for parameter in parameters)
    wide = sum(local(p).numel() * max(p.element_size(), torch.float32.itemsize) for p in parameters)
    return MemoryRow(
        name=name,
        parameters=own,
        gradients=own,
        optimizer=sum(_moments(parameter, config.optimizer) for parameter in parameters),
        average=wide if config.ema_decay else 0,
    )


def _moments(parameter: Tensor, optimizer: str) -> int:
    count = local(parameter).numel()
    if optimizer == "adamw8bit" and count >= 4096 and count % BLOCK == 0:
        return 2 * (count + count // BLOCK * 4)
    return 2 * count * parameter.element_size()


def _bytes(tensor: Tensor) -> int:
    return local(tensor).numel() * tensor.element_size()
