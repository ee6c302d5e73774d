"""Several processes of ``torch.distributed``: who measures what, and how all get the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from temporal_layers.recipes.evaluation.moments import SetStatistics


def rank_and_size() -> tuple[int, int]:
    """Number of this process and of all of them; (0, 1) without ``torch.distributed``."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def merged_over_processes(kept: SetStatistics) -> SetStatistics:
    """What all processes have together, the same on each: shards are merged in the order of their ranks."""
    _, size = rank_and_size()
    if size == 1:
        return kept
    shards: list[Any] = [None] * size
    dist.all_gather_object(shards, kept)
    whole, *rest = shards
    for shard in rest:
        whole = whole.merged(shard)
    return whole


def from_first_process(make: Callable[[], Any]) -> Any:
    """What the first process makes, on all of them: a file may be there for one and not for another."""
    rank, size = rank_and_size()
    made = [make() if rank == 0 else None]
    if size > 1:
        dist.broadcast_object_list(made)
    return made[0]
