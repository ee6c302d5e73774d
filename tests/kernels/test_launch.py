"""One launcher, three ways: interpreted, compiled for a GPU that is not there, and on a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from temporal_layers.kernels.dispatch import has_triton
from temporal_layers.kernels.testing import random_normal

SCRIPT = Path(__file__).with_name("axpy.py")
pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")


def run(way, **environment):
    """Runs a part of axpy.py in a process of its own; returns what it prints."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(SCRIPT.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, SCRIPT, way],
        env=inherited | {"PYTHONPATH": paths} | environment,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted():
    return run("interpret", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled():
    return run("compile")


def test_interpreted_kernel_computes(interpreted):
    assert len(interpreted["errors"]) == 4 and max(interpreted["errors"]) < 1e-6
    assert interpreted["can_launch"] and interpreted["named"] == "interpreted"


def test_empty_grid_launches_nothing(interpreted):
    assert interpreted["empty"] == [0]


def test_interpreted_process_cannot_compile(interpreted):
    assert interpreted["compile_only"] == (
        "compile_only: TRITON_INTERPRET: expected an unset variable, got '1'; compile in a process without it"
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiles_without_a_gpu(compiled, target):
    kernel = compiled["kernels"][target]
    assert (kernel["name"], kernel["target"], kernel["named"]) == ("axpy_kernel", target, target)
    assert kernel["magic"] == b"\x7fELF".hex()
    assert kernel["spills"] == 0 and kernel["shared_bytes"] == 0
    assert 4 <= kernel["registers"] <= 64


def test_each_target_gets_its_own_machine_code(compiled):
    code = {target: kernel["machine_code"] for target, kernel in compiled["kernels"].items()}
    assert code["sm_80"] != code["sm_90"]
    assert all("LDG.E.128" in code[target] and "STG.E.128" in code[target] for target in ("sm_80", "sm_90"))
    assert "global_load" in code["gfx942"] or "buffer_load" in code["gfx942"]
    assert ".vgpr_spill_count" in code["gfx942"]  # which the count of spills reads


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_instructions_are_counted(compiled, target):
    kernel = compiled["kernels"][target]
    threads = 4 * (64 if target.startswith("gfx") else 32)
    loads = 2 * 1024 // threads // 4  # two inputs of 1024 floats, of which a load of 128 bits takes four
    assert kernel["counts"] == {
        "num_warps": 4, "loads": loads, "vector_loads": loads, "tensor_core_ops": 0,
    }  # fmt: skip
    matmul, strided = kernel["others"]
    assert matmul["tensor_core_ops"] > 0 and matmul["vector_loads"] == matmul["loads"] > 0
    assert strided["num_warps"] == 8 and strided["loads"] > 0 and strided["vector_loads"] == 0


def test_cost_of_a_bad_kernel_shows(compiled):
    assert compiled["spills"] > 0 and compiled["shared_bytes"] >= 16 * 1024


def test_compilation_ends_with_its_block(compiled):
    assert compiled["can_launch"] == [True, False] and compiled["restored"]


def test_errors(compiled):
    assert compiled["target"] == (
        "compile_only: target: expected 'sm_<number>' or 'gfx<number>', got 'h100'; name a GPU architecture"
    )
    assert compiled["device"] == (
        "launch: axpy_kernel: expected tensors on a GPU, got tensors on cpu; move them, set TRITON_INTERPRET=1 before "
        "triton is imported, or compile under compile_only"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, -1])
def test_runs_on_the_device_of_its_tensors(index):
    spec = importlib.util.spec_from_file_location("axpy", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = torch.device("cuda", index % torch.cuda.device_count())
    x, y = (random_normal((1000,), seed).float().to(device) for seed in (0, 1))
    torch.testing.assert_close(module.axpy(x, y, 2.5), 2.5 * x + y)
    with module.compile_only("sm_90") as kernels:
        module.axpy(x, y, 2.5)
    assert len(kernels) == 1
    torch.testing.assert_close(module.axpy(x, y, -1.0), y - x)
