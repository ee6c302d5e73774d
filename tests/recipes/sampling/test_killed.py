"""A roll-out whose process is killed at a random time, and resumed, is the uninterrupted one bit for bit."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # mostly imports

WORKER = Path(__file__).parent / "roll_out_worker.py"
SPEC = importlib.util.spec_from_file_location("roll_out_worker", WORKER)
worker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(worker)


def kill_after(process, folder, files):
    """kill -9 as soon as there are so many files of latents, a little later at random."""
    deadline = time.monotonic() + 120
    while len(list(folder.rglob("latents-*.safetensors"))) < files:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.Random().uniform(0, 0.1))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("files", [1, 4])
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path, files):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(tmp_path), "0.05"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    kill_after(process, tmp_path, files)
    there = {path: path.read_bytes() for path in tmp_path.rglob("latents-*.safetensors")}
    assert files <= len(there) < 10  # three windows of key frames, seven between them
    resumed, whole = worker.run(tmp_path), worker.run(None)
    assert whole.isfinite().all() and torch.equal(resumed, whole)
    assert all(path.read_bytes() == data for path, data in there.items())
    assert len(list(tmp_path.rglob("latents-*.safetensors"))) == 10
