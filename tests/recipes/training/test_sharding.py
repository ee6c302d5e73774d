"""Sharded tensors through the same functions as plain ones; test_processes.py has them on two processes."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from temporal_layers.recipes.training.sharding import local, overwrite, placed_like, whole
from temporal_layers.recipes.training.steps import is_sharded


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_parts_share_memory_and_wholes_come_back(mesh):
    values = torch.arange(6.0).reshape(3, 2)
    sharded = distribute_tensor(values.clone(), mesh, [Shard(0)])
    local(sharded).add_(1)
    assert type(whole(sharded)) is torch.Tensor and torch.equal(whole(sharded), values + 1)
    placed = placed_like(values, sharded)
    assert isinstance(placed, DTensor) and placed.placements == sharded.placements
    overwrite(sharded, values)
    assert torch.equal(whole(sharded), values)


def test_plain_tensors_are_their_own_parts():
    values = nn.Parameter(torch.arange(3.0))
    assert local(values) is values and not whole(values).requires_grad
    overwrite(values, torch.ones(3))
    assert torch.equal(values, torch.ones(3))


def test_a_module_in_shards_by_half_is_refused(mesh):
    both = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    assert not is_sharded(both, "x")
    both[0].weight = nn.Parameter(distribute_tensor(both[0].weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(
        ValueError, match="'x': expected all trained parameters to be sharded, or none, got some of both"
    ):
        is_sharded(both, "x")
    both[1].requires_grad_(False)
    assert is_sharded(both, "x")
