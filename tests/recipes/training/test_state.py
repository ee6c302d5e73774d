"""What a checkpoint holds, and what it is refused for."""

import io

import pytest
import torch
from torch import nn

from temporal_layers.recipes.training.average import AveragedWeights
from temporal_layers.recipes.training.state import TrainingState, changed, settings


def module(bias=True):
    torch.manual_seed(0)  # frozen parameters are not in a checkpoint
    net = nn.Sequential(nn.Linear(3, 2, bias=bias), nn.BatchNorm1d(2), nn.Linear(2, 2).requires_grad_(False))
    net.register_buffer("scratch", torch.zeros(1), persistent=False)
    return net


def state_of(net, turns=("",), average=False, scaler=None):
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizers = {turn: torch.optim.AdamW(trained, lr=0.1) for turn in turns}
    return TrainingState(net, optimizers, AveragedWeights(net, decay=0.5) if average else None, scaler)


def steps(state, count=3):
    for _ in range(count):
        state.objective(torch.randn(4, 3)).square().mean().backward()
        for optimizer in state.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        if state.average is not None:
            state.average.update()


def saved(state):
    file = io.BytesIO()
    torch.save(state.collect(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_only_what_changes_is_in_it_and_all_of_that():
    state = state_of(module(), average=True)
    steps(state)
    found = saved(state)
    trained = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(found["parameters"]) == trained == list(found["optimizers"][""])
    assert list(found["buffers"]) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert found["average"]["updates"] == 3 and "scaler" not in found
    other = state_of(module(), average=True)
    other.restore(found)
    torch.manual_seed(1)
    steps(state)
    torch.manual_seed(1)
    steps(other)
    own, theirs = state.objective.state_dict(), other.objective.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own if not name.startswith("2."))
    assert all(torch.equal(a, b) for a, b in zip(state.average.averages, other.average.averages, strict=True))


def test_a_process_that_does_not_write_keeps_no_copy():
    state = state_of(module())
    assert set(state.collect(keep=False)["parameters"].values()) == {None}


def test_a_view_does_not_bring_what_it_looks_into():
    net = nn.Linear(2, 1, bias=False)
    net.weight = nn.Parameter(torch.zeros(1000, 2)[:1])
    file = io.BytesIO()
    torch.save(state_of(net).collect(), file)
    assert file.tell() < 4000


def test_the_loss_scaler_of_fp16_training_goes_on_where_it_was():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))  # makes its state
    found = saved(state_of(module(), scaler=scaler))
    fresh = torch.amp.GradScaler("cpu", init_scale=2.0)
    state_of(module(), scaler=fresh).restore(found)
    assert fresh.state_dict() == scaler.state_dict() and fresh.get_scale() == 8.0
    with pytest.raises(ValueError, match="checkpoint: a loss scaler: expected False, got True; go on with the config"):
        state_of(module()).restore(found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: state_of(module(bias=False)),
            r"got 1 other, the first of them '0\.bias': \(2,\) in the .* missing here",
        ),
        (lambda: state_of(module(), turns=("a", "b")), r"checkpoint: turns: expected \['a', 'b'\], got \[''\]; go on"),
        (lambda: state_of(module(), average=True), "checkpoint: averaged weights: expected True, got False"),
    ],
)
def test_a_state_of_something_else_is_refused_before_anything_is_written(make, message):
    source = state_of(module())
    steps(source)
    state = make()
    before = {name: value.clone() for name, value in state.objective.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        state.restore(saved(source))
    assert all(torch.equal(value, before[name]) for name, value in state.objective.state_dict().items())


def test_other_buffers_are_refused():
    source, state = state_of(module()), state_of(module())
    state.objective.register_buffer("more", torch.ones(1))
    with pytest.raises(ValueError, match=r"checkpoint: buffers: expected \['1\.num.*'more'\], got \['1\.num"):
        state.restore(saved(source))


def test_settings_say_what_is_computed_and_not_how():
    options = {"seed": 1, "samples_per_step": 8, "precision": "no", "groups": {"alpha": {"lr": 0.1}}}
    run = {
        "out": "here",
        "note": "a",
        "optim": {"batch_size": 2, "lr": 0.5, "betas": [0.9, 0.99]},
        "engine": {"keep": 2},
    }
    one = settings({"lr": 0.5, "batch_size": 2, "checkpoint_every": 3}, run=run, **options)
    assert one == {
        "optim.lr": 0.5,
        "groups.alpha.lr": 0.1,
        "run.note": "a",
        "run.optim.lr": 0.5,
        "run.optim.betas.0": 0.9,
        "run.optim.betas.1": 0.99,
        "seed": 1,
        "samples_per_step": 8,
        "precision": "no",
    }
    other = {**one, "seed": 2, "more": None}
    del other["run.note"]
    assert changed(other, one) == [
        "more was not there and is None",
        "run.note was a and is not there",
        "seed was 1 and is 2",
    ]
    assert changed(one, dict(one)) == []
