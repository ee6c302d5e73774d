"""Two processes train a decoder as one with twice the batch does, adaptive weight and discriminator included."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("decoder_worker.py")
SPEC = importlib.util.spec_from_file_location("decoder_worker", WORKER)
worker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(worker)


def records(folder):
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("stage", "seconds")} for line in lines]


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [*command, str(tmp_path / "two"), "1"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    vae = worker.train(tmp_path / "one", 2)
    found, expected = (records(tmp_path / name) for name in ("two", "one"))
    assert "generator/adversarial_weight" not in expected[0] and expected[1]["generator/adversarial_weight"] > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    weights = torch.load(tmp_path / "two" / "weights.pt")
    torch.testing.assert_close(weights, dict(vae.state_dict()), rtol=1e-9, atol=1e-11)
