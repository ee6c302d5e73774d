"""The memory budget: what it says is what PyTorch then holds."""

import pytest
import torch
from torch import nn

from temporal_layers.recipes.training.average import AveragedWeights
from temporal_layers.recipes.training.engine import fit
from temporal_layers.recipes.training.memory import MemoryRow, format_budget, memory_budget, named_groups
from temporal_layers.recipes.training.optim import OptimConfig, build_optimizer
from temporal_layers.recipes.training.streams import SampleStream


def model(dtype=torch.float32):
    net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 32)).to(dtype)
    net[0].requires_grad_(False)
    return net


def groups_of(net):
    return {"": [{"name": "norm", "params": list(net[1].parameters())}, {"params": list(net[2].parameters())}]}


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_is_what_is_held_after_a_step(dtype):
    net = model(dtype)
    config = OptimConfig(steps=1, batch_size=1, lr=0.1, ema_decay=0.9)
    rows = {row.name: row for row in memory_budget(net, groups_of(net), config)}
    optimizer = build_optimizer(groups_of(net)[""], config)
    net(torch.ones(4, 64, dtype=dtype)).float().square().mean().backward()
    optimizer.step()
    assert list(rows) == ["norm (trained)", "1 (trained)", "frozen", "buffers"]
    for name, part in (("norm (trained)", net[1]), ("1 (trained)", net[2])):
        parameters = list(part.parameters())
        assert rows[name].parameters == size(parameters)
        assert rows[name].gradients == size(p.grad for p in parameters)
        state = [optimizer.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")]
        assert rows[name].optimizer == size(state)
        assert rows[name].average == size(AveragedWeights(part, decay=0.9).averages)
    assert rows["frozen"] == MemoryRow(name="frozen", parameters=size(net[0].parameters()))
    assert rows["buffers"].total == size(net.buffers())


def test_an_8_bit_state_is_a_byte_a_number_and_a_scale_a_block():
    net = nn.Linear(4096, 4, bias=False)
    config = OptimConfig(steps=1, batch_size=1, lr=0.1, optimizer="adamw8bit")
    [row] = memory_budget(net, {"": [{"params": list(net.parameters())}]}, config)
    assert row.optimizer == 2 * (16384 + 64 * 4) and row.average == 0
    small = nn.Linear(4, 4)
    [row] = memory_budget(small, {"": [{"params": list(small.parameters())}]}, config)
    assert row.optimizer == 2 * 4 * 20


def test_every_group_has_a_name_of_its_own():
    def names(**groups):
        return [name for name, _ in named_groups({turn.strip("_"): own for turn, own in groups.items()})]

    assert names(_=[{}]) == ["all"]
    assert names(_=[{}, {"name": "alpha"}, {}]) == ["0", "alpha", "2"]
    assert names(_=[{"name": "a"}, {"name": "a"}]) == ["a", "a 1"]
    assert names(g=[{}], d=[{"name": "x"}, {}]) == ["g", "d x", "d 1"]


def test_fit_prints_the_budget_in_megabytes(capsys):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1000, 500, bias=False)

        def forward(self, x):
            return {"loss": self.net(x).mean()}

    config = OptimConfig(steps=1, batch_size=1, lr=0.1, ema_decay=0.5)
    fit(Net(), SampleStream(lambda position: (torch.ones(1000),)), config, name="a stage")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a stage: memory in MB; activations and temporary buffers come on top"
    assert lines[1].split() == ["parameters", "gradients", "optimizer", "average", "total"]
    assert lines[2].split() == ["all", "(trained)", "2.00", "2.00", "4.00", "2.00", "10.00"]
    assert lines[3].split() == ["total", "2.00", "2.00", "4.00", "2.00", "10.00"]


def test_a_table_adds_its_rows_up():
    rows = [MemoryRow(name="a", parameters=1_000_000), MemoryRow(name="b", gradients=2_500_000)]
    assert format_budget(rows, title="t").splitlines()[-1].split() == ["total", "1.00", "2.50", "0.00", "0.00", "3.50"]
