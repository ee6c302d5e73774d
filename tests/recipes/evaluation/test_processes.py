"""Two processes that measure a half each get the numbers of one process that measures all."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from temporal_layers.recipes.evaluation.moments import SetStatistics
from temporal_layers.recipes.evaluation.processes import from_first_process, merged_over_processes, rank_and_size

WORKER = Path(__file__).with_name("worker.py")
SPEC = importlib.util.spec_from_file_location("evaluation_worker", WORKER)
worker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(worker)


def numbers(found):
    return {one["name"]: [one["value"], one["spread"] or 0, one["real"] or 0, one["samples"]] for one in found}


@pytest.mark.slow
def test_two_processes_are_one(folders, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [*command, *map(str, folders), str(tmp_path / "cache"), str(tmp_path / "found")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    expected = worker.run(*folders)
    for rank in range(2):
        for found in json.loads((tmp_path / f"found-{rank}.json").read_text()):
            assert found["digests"] == expected["digests"]
            ours, theirs = numbers(found["measures"]), numbers(expected["measures"])
            assert ours.keys() == theirs.keys()
            for name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-9, abs=1e-12), name


def test_one_process_has_it_all():
    kept = SetStatistics({}, {})
    assert rank_and_size() == (0, 1)
    assert merged_over_processes(kept) is kept
    assert from_first_process(lambda: 3) == 3
