"""Runs that are killed, and runs on two processes, come to what an undisturbed run on one process comes to."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # mostly imports, on a busy machine

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("training_worker", HERE / "worker.py")
worker = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = worker  # dataclasses look their module up
SPEC.loader.exec_module(worker)

# Everything that draws or averages: dropout, averaged weights, several batches a step.
DISTURBED = {"steps": 9, "accumulation": 2, "dropout": 0.2, "ema_decay": 0.9, "checkpoint_every": 2}
PLAIN = {"steps": 6, "double": True, "ema_decay": 0.9}


def start(jobs, processes):
    """Start the worker script on jobs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), str(HERE / "worker.py"), json.dumps(jobs)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


def kill_after(process, losses, steps):
    """kill -9 of all processes as soon as that many steps are in the log."""
    deadline = time.monotonic() + 200
    while not losses.exists() or losses.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:  # the workers of torchrun first
        member.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """Runs on one and on two processes, killed at a random step: their folders and the number of finished steps."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"killed{processes}")
        steps = random.Random().randint(2, DISTURBED["steps"] - 2)
        process = start([{**DISTURBED, "folder": str(folder), "pause": 0.05}], processes)
        kill_after(process, folder / "losses.jsonl", steps)
        found[processes] = folder, len((folder / "losses.jsonl").read_text().splitlines())
    return found


@pytest.fixture(scope="module")
def on_two(victims, tmp_path_factory):
    """What two processes did: went on with the killed run and others, in folders by name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("undisturbed", "terminated", "ddp", "fsdp", "turns")}
    jobs = [
        {**DISTURBED, "folder": str(victims[2][0]), "resume": "auto"},
        {**DISTURBED, "folder": str(folders["undisturbed"])},
        {**DISTURBED, "folder": str(folders["terminated"]), "term_at": 3, "checkpoint_every": 0},
        {**DISTURBED, "folder": str(folders["terminated"]), "resume": "auto"},
        {**PLAIN, "folder": str(folders["turns"]), "turns": True},
        {**PLAIN, "folder": str(folders["ddp"])},
        {**PLAIN, "folder": str(folders["fsdp"]), "shard": True},
    ]
    finish(start(jobs, 2))
    return folders


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    """The same without shards on one process with twice the batch: folder, losses and weights by name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "turns")}
    jobs = {
        name: worker.Job(**PLAIN, folder=str(folder), batch_size=2, turns=name == "turns")
        for name, folder in folders.items()
    }
    return {name: (folders[name], *worker.train(job)) for name, job in jobs.items()}


def equal(value, expected):
    """Compare trees of tensors, dictionaries and numbers bit for bit."""
    if isinstance(expected, torch.Tensor):
        return torch.equal(value, expected)
    if isinstance(expected, dict):
        return value.keys() == expected.keys() and all(equal(value[key], expected[key]) for key in expected)
    return value == expected


def last_state(folder):
    return torch.load(sorted(folder.glob("checkpoints/*/step-*/state.pt"))[-1], weights_only=True)


def test_killed_on_one_process_and_resumed_is_the_undisturbed_run(victims, tmp_path):
    folder, steps = victims[1]
    assert 2 <= steps < DISTURBED["steps"]
    history, weights = worker.train(worker.Job(**DISTURBED, folder=str(folder), resume="auto"))
    expected_history, expected = worker.train(worker.Job(**DISTURBED, folder=str(tmp_path)))
    assert history == expected_history, f"killed after {steps} steps"
    assert equal(weights, expected)
    assert worker.records(folder) == worker.records(tmp_path)
    assert [record["step"] for record in worker.records(folder)] == list(range(DISTURBED["steps"]))
    assert equal(last_state(folder), last_state(tmp_path))


def test_killed_on_two_processes_and_resumed_is_the_undisturbed_run(victims, on_two):
    folder, steps = victims[2]
    assert 2 <= steps < DISTURBED["steps"]
    assert worker.records(folder) == worker.records(on_two["undisturbed"]), f"killed after {steps} steps"
    assert [record["step"] for record in worker.records(folder)] == list(range(DISTURBED["steps"]))
    assert equal(last_state(folder), last_state(on_two["undisturbed"]))


def test_a_signal_to_one_process_stops_both_and_both_go_on(on_two):
    records = worker.records(on_two["terminated"])
    assert records == worker.records(on_two["undisturbed"])
    assert equal(last_state(on_two["terminated"]), last_state(on_two["undisturbed"]))


@pytest.mark.parametrize(("kind", "alone"), [("ddp", "one"), ("fsdp", "one"), ("turns", "turns")])
def test_two_processes_are_one_with_twice_the_batch(kind, alone, on_two, on_one):
    folder = on_one[alone][0]
    for record, expected in zip(worker.records(on_two[kind]), worker.records(folder), strict=True):
        assert record.pop("stage") == expected.pop("stage") == "tiny unet"
        assert record == pytest.approx(expected, rel=1e-12, abs=1e-13)
    state, expected_state = last_state(on_two[kind]), last_state(folder)
    for part in (("parameters",), ("average", "averages")):
        found, expected = state, expected_state
        for key in part:
            found, expected = found[key], expected[key]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    for turn, expected in expected_state["optimizers"].items():
        torch.testing.assert_close(state["optimizers"][turn], expected, rtol=1e-10, atol=1e-16)


def test_one_process_goes_on_from_a_checkpoint_of_shards(on_two, on_one, tmp_path):
    _, expected_history, expected = on_one["one"]
    [middle] = on_two["fsdp"].glob("checkpoints/*/step-00000003")
    [last] = on_two["fsdp"].glob("checkpoints/*/step-00000006")
    assert json.loads((middle / "manifest.json").read_text())["step"] == 3
    copy = shutil.copytree(middle, tmp_path / "elsewhere")
    job = worker.Job(**PLAIN, folder=str(tmp_path / "run"), batch_size=2, resume=str(copy))
    history, weights = worker.train(job)
    assert history == pytest.approx(expected_history, rel=1e-12)
    torch.testing.assert_close(weights, expected, rtol=1e-11, atol=1e-12)
    assert [record["step"] for record in worker.records(job.folder)] == [3, 4, 5]  # in a folder of its own
    torch.testing.assert_close(
        last_state(Path(job.folder))["parameters"], torch.load(last / "state.pt")["parameters"], rtol=1e-11, atol=1e-12
    )
