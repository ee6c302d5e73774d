"""What every fused kernel costs on a GPU that need not be there: compiles the cases, reads the machine code.

``cases_<operator>.py`` next to this file holds ``CASES``, a list of ``(name, launch)``: each ``launch()`` calls an
operator's launchers on meta tensors of a real size. As a script this file compiles them all for each target and
writes the table that docs/kernels.md shows; tests/aot/test_resources.py holds the kernels to their budgets and the
table to the kernels.
"""

import importlib.util
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "kernels" / "benchmarks" / "results" / "resources.md"
COMMAND = "python3 dev.py resources"

# Shared memory that one program may use, in bytes: what the GPUs have, less what the driver keeps.
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}

COLUMNS = (
    "case", "target", "kernel", "warps", "registers", "spills", "shared KiB", "loads", "128-bit", "bulk", "matrix ops",
)  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """What a kernel promises beyond what all do (no spills, shared memory within the limit).

    Attributes:
        narrow_loads: Most loads that move fewer than 128 bits: of a channel's parameters, of masks, of flags. Were the
            activation itself loaded that way, eight times as many would show. None where nothing but partial sums is
            loaded; elsewhere some load must be wide.
        tensor_cores: Whether its 16-bit cases run on the tensor cores.
        bulk: Whether its operands are copied by tensor descriptors, so that what else is loaded are parameters.
        relaxed: Other numbers of narrow loads for cases whose ``<case> <target>`` matches a pattern.
    """

    narrow_loads: int | None
    tensor_cores: bool = False
    bulk: bool = False
    relaxed: tuple[tuple[str, int | None], ...] = ()

    def narrow(self, place: str) -> int | None:
        """The number of narrow loads that a case and target may have."""
        return next((limit for pattern, limit in self.relaxed if re.search(pattern, place)), self.narrow_loads)


# Masks and biases are a value for each pair of frames. In fp32 AMD's matrix instructions take operands so laid out that
# a thread's elements do not lie side by side.
ATTENTION = Budget(0, tensor_cores=True, relaxed=(("masks-bias", 48), ("fp32 gfx942", None)))

# Parameters of the columns are loaded as the matrix units lay out their results, two or four columns to a thread. Rows
# of 100 channels do not begin at multiples of 16 bytes. Behind a norm the sums of the weight's rows are such parameters
# as well, and so are the first elements of the input's rows.
PRODUCT = Budget(17, tensor_cores=True, relaxed=(("-odd-", None), ("norm-blend", 56), ("norm-", 40)))

# By the kernel's name. A kernel that is missing here fails its test.
BUDGETS: dict[str, Budget] = {
    "temporal_attention_forward_kernel": ATTENTION,
    "temporal_attention_backward_kernel": ATTENTION,
    "temporal_conv_kernel": PRODUCT,
    "temporal_conv_descriptor_kernel": Budget(48, tensor_cores=True, bulk=True),
    "linear_kernel": PRODUCT,
    "fold_norm_kernel": Budget(1, relaxed=(("-odd-", None),)),
    "geglu_kernel": PRODUCT,
    "geglu_backward_kernel": PRODUCT,
    "moments_kernel": Budget(0),
    "fold_moments_kernel": Budget(None),
    "normalise_kernel": Budget(16),
    "gradient_sums_kernel": Budget(8),
    "fold_gradient_sums_kernel": Budget(None),
    "input_gradient_kernel": Budget(18),
    "blend_kernel": Budget(2),
    "alpha_gradient_kernel": Budget(1),
    "branch_gradients_kernel": Budget(2),
}


@dataclass(frozen=True)
class Row:
    """One kernel of one case compiled for one target; the fields are the table's columns."""

    case: str
    target: str
    kernel: str
    warps: int
    registers: int
    spills: int
    shared: int
    loads: int
    vector_loads: int
    bulk_loads: int
    matrix_ops: int

    def line(self) -> str:
        """The row in Markdown."""
        cells = (
            self.case, self.target, f"`{self.kernel}`", self.warps, self.registers, self.spills,
            f"{self.shared / 1024:.4g}", self.loads, self.vector_loads, self.bulk_loads, self.matrix_ops,
        )  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"

    def violations(self) -> list[str]:
        """What breaks the budget, in words; empty for a kernel that is fit to ship."""
        budget = BUDGETS.get(self.kernel)
        if budget is None:
            return [f"{self.kernel}: no budget; add one to BUDGETS in {Path(__file__).name}"]
        found = []
        if self.spills:
            found.append(f"{self.spills} loads and stores of spilled registers")
        if self.shared > SHARED_LIMITS[self.target]:
            found.append(f"{self.shared} bytes of shared memory; {self.target} has {SHARED_LIMITS[self.target]}")
        if budget.bulk and not self.bulk_loads:
            found.append("no copy by a tensor descriptor")
        limit, narrow = budget.narrow(f"{self.case} {self.target}"), self.loads - self.vector_loads
        if limit is not None and (narrow > limit or not (self.vector_loads or self.bulk_loads)):
            found.append(f"{narrow} of {self.loads} loads move fewer than 128 bits; meant: at most {limit}")
        if budget.tensor_cores and "fp32" not in self.case and not self.matrix_ops:
            found.append("no tensor-core instruction")
        return [f"{self.kernel}: {text}" for text in found]


@cache
def cases() -> dict[str, Callable[[], None]]:
    """All cases by name, ``<operator>-<details>``, in the order of the files and within them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for own_name, launch in module.CASES:
            op = path.stem.removeprefix("cases_")
            name = own_name if own_name.startswith(op) else f"{op}-{own_name}"
            assert name not in found, f"{name} stands twice"
            found[name] = launch
    return found


def compiled_rows(case: str, target: str) -> list[Row]:
    """Compiles one case for one target; a row for each kernel it launches, equal ones once."""
    from temporal_layers.kernels.launch import compile_only

    with compile_only(target) as kernels:
        cases()[case]()
    rows = [
        Row(
            case, target, kernel.name, kernel.num_warps, kernel.registers, kernel.spills, kernel.shared_bytes,
            len(kernel.loads), kernel.vector_loads, kernel.bulk_loads, kernel.tensor_core_ops,
        )
        for kernel in kernels
    ]  # fmt: skip
    return list(dict.fromkeys(rows))


def heading() -> str:
    """The table's first lines. They name the compiler, since another one may allocate other registers."""
    return (
        "# What the fused kernels cost\n\n"
        f"Compiled ahead of time with triton {version('triton')}, no GPU involved; made by `{COMMAND}`. Registers are "
        "a thread's; loads\nare instructions in the machine code, those in loops counted once; matrix ops are HMMA, "
        "HGMMA or MFMA; bulk are copies of a tile by\na tensor descriptor.\n\n"
        "| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * 3 + " ---: |" * (len(COLUMNS) - 3) + "\n"
    )


def main() -> None:
    """Compiles everything in two processes and writes the table."""
    jobs = [(case, target) for case in cases() for target in SHARED_LIMITS]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # spawned processes inherit it
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            results = pool.starmap(compiled_rows, jobs, chunksize=1)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(heading() + "".join(row.line() + "\n" for rows in results for row in rows), encoding="utf-8")
    broken = [f"{row.case} {row.target}: {text}" for rows in results for row in rows for text in row.violations()]
    print(f"{TABLE.relative_to(ROOT)}: {sum(map(len, results))} kernels of {len(cases())} cases", *broken, sep="\n")


if __name__ == "__main__":
    main()
