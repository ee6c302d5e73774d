"""Every fused kernel, compiled for GPUs that need not be there, keeps to its budget, and the committed table is true.

Run by ``python3 dev.py test --compile``; too slow for the default selection.
"""

import dataclasses
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from temporal_layers.kernels.dispatch import has_triton
from temporal_layers.kernels.launch import is_interpreted

SCRIPT = Path(__file__).with_name("resources.py")
TARGETS = ("sm_80", "sm_90", "gfx942")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_triton(), reason="needs triton"),
    pytest.mark.skipif(is_interpreted(), reason="interpreted kernels cannot be compiled"),
]


def load():
    spec = importlib.util.spec_from_file_location("aot_resources", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


resources = load()
CASES = list(resources.cases()) if has_triton() and not is_interpreted() else []


@pytest.fixture(scope="module")
def table():
    """The committed table: lines by case and target, and whether the installed compiler made it."""
    text = resources.TABLE.read_text(encoding="utf-8")
    lines = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| case", "| ---")):
            case, target = (cell.strip() for cell in line.split("|")[1:3])
            lines.setdefault((case, target), []).append(line)
    return lines, f"triton {version('triton')}," in text


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    """Compiles anew: triton's cache in the home folder is none of a test's business."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_keep_to_their_budget(case, target, table):
    rows = resources.compiled_rows(case, target)
    assert rows, "the case launches nothing"
    assert [text for row in rows for text in row.violations()] == []
    lines, same_compiler = table
    if same_compiler:
        assert lines.get((case, target)) == [row.line() for row in rows], f"stale table: run {resources.COMMAND}"


def test_table_has_no_other_cases(table):
    assert set(table[0]) == {(case, target) for case in CASES for target in TARGETS}
    assert tuple(resources.SHARED_LIMITS) == TARGETS


def test_every_operator_with_a_fused_kernel_has_cases():
    with_kernels = {path.parent.name for path in (resources.ROOT / "kernels").glob("*/fused*.py")}
    assert with_kernels and with_kernels <= {case.partition("-")[0] for case in CASES}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"spills": 3}, "k: 3 loads and stores of spilled registers"),
        ({"shared": 70_000}, "k: 70000 bytes of shared memory; gfx942 has 65536"),
        ({"vector_loads": 8}, "k: 2 of 10 loads move fewer than 128 bits; meant: at most 1"),
        ({"loads": 0, "vector_loads": 0}, "k: 0 of 0 loads move fewer than 128 bits; meant: at most 1"),
        ({"matrix_ops": 0}, "k: no tensor-core instruction"),
        ({"kernel": "unknown"}, "unknown: no budget; add one to BUDGETS in resources.py"),
    ],
)
def test_a_kernel_over_its_budget_is_found(monkeypatch, change, text):
    monkeypatch.setitem(resources.BUDGETS, "k", resources.Budget(1, tensor_cores=True))
    good = {
        "case": "op-bf16", "target": "gfx942", "kernel": "k", "warps": 4, "registers": 64, "spills": 0,
        "shared": 65_536, "loads": 10, "vector_loads": 9, "bulk_loads": 0, "matrix_ops": 1,
    }  # fmt: skip
    assert resources.Row(**good).violations() == []
    assert resources.Row(**good | change).violations() == [text]
    assert resources.Row(**good | {"matrix_ops": 0, "case": "op-fp32"}).violations() == []


def test_a_kernel_with_descriptors_copies_by_them(monkeypatch):
    monkeypatch.setitem(resources.BUDGETS, "k", resources.Budget(1, bulk=True))
    row = resources.Row("op-bf16", "sm_90", "k", 4, 64, 0, 1024, 1, 0, 2, 1)
    assert row.violations() == []
    assert dataclasses.replace(row, bulk_loads=0).violations() == [
        "k: no copy by a tensor descriptor", "k: 1 of 1 loads move fewer than 128 bits; meant: at most 1",
    ]  # fmt: skip


def test_a_budget_may_be_relaxed_for_some_cases():
    budget = resources.Budget(0, relaxed=(("masks", 5), ("fp32 gfx", None)))
    assert [budget.narrow(place) for place in ("op-bf16 sm_80", "op-masks sm_80", "op-fp32 gfx942")] == [0, 5, None]
