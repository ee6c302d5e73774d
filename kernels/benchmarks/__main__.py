"""Command line of the benchmarks: ``python -m temporal_layers.kernels.benchmarks``."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from temporal_layers.kernels.benchmarks import cases, machine, report
from temporal_layers.kernels.benchmarks.run import BrokenDevice, Plan, execute

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """The options. Without any, everything is measured that the machine can run."""
    options = argparse.ArgumentParser(
        prog="python3 dev.py bench", description="Measures the operators and layers against their peers."
    )
    options.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    options.add_argument("--ops", nargs="+", choices=cases.OPS, metavar="OP", help="operators and layers")
    options.add_argument("--cases", nargs="+", metavar="TEXT", help="only cases whose name contains one of the texts")
    options.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), help="default: bfloat16; on a CPU float32 too")
    options.add_argument("--forward", action="store_true", help="leave the backward pass out")
    options.add_argument("--skip", nargs="+", default=(), metavar="PROVIDER", help="providers to leave out")
    options.add_argument("--compile", action="store_true", help="torch.compile in every case (slow)")
    options.add_argument("--smoke", action="store_true", help="one tiny case: does everything still run?")
    options.add_argument("--limit", type=float, help="seconds after which nothing new starts (GPU 420, CPU 165)")
    options.add_argument("--threads", type=int, default=1, help="threads of PyTorch on a CPU (default 1)")
    options.add_argument("--tests", action="store_true", help="run the operators' tests first; measure if they pass")
    options.add_argument("--commit", help="commit to write into the result, where git cannot tell")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options.add_argument("--summary", action="store_true", help="print no more than the summary")
    options.add_argument("--print-only", action="store_true", help="write no files")
    return options


def plan_of(options: argparse.Namespace, device: str) -> Plan:
    """What the options ask for."""
    on_gpu = device == "cuda"
    chosen = cases.SMOKE_CASES if options.smoke else cases.GPU_CASES if on_gpu else cases.CPU_CASES
    if options.cases:
        chosen = tuple(case for case in chosen if any(text in case.name for text in options.cases))
    names = options.dtypes or (["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    ops = options.ops or [op for op in cases.OPS if on_gpu or options.smoke or op not in cases.FUSIONS]
    # Case by case, so that a run that is cut short has every operator on the first ones.
    jobs = tuple((op, case, DTYPES[name]) for case in chosen for op in ops if case.suits(op) for name in names)
    return Plan(
        device=device,
        jobs=jobs,
        modes=("forward",) if options.forward else ("forward", "backward"),
        skip=frozenset(options.skip),
        compiled=options.compile,
        seconds=0.02 if options.smoke else 0.06 if on_gpu else 0.16,
        rounds=3 if on_gpu or options.smoke else 5,
        limit=options.limit or (420 if on_gpu else 165),
    )


def run_tests() -> int:
    """Runs the operators' tests of the checkout in a process of their own; returns pytest's status."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", str(machine.ROOT / "tests" / "kernels")]
    if importlib.util.find_spec("pytest_timeout") is None:  # pytest refuses the project's settings without it
        command += ["-c", os.devnull, "--rootdir", str(machine.ROOT), "--import-mode=importlib"]
    environment = os.environ | {"PYTHONPATH": str(machine.ROOT)}
    return subprocess.run(command, cwd=machine.ROOT, env=environment, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes the result files, prints the Markdown; returns the exit status."""
    options = parser().parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.tests and (status := run_tests()):
        print(f"The tests failed (status {status}): nothing is measured.", file=sys.stderr)
        return status
    torch.set_num_threads(options.threads)
    plan = plan_of(options, device)
    found = machine.describe(device, options.commit)
    ceilings = machine.ceilings(device, list(dict.fromkeys(dtype for *_, dtype in plan.jobs)), small=options.smoke)
    rows, status = [], 0
    stem = options.out / machine.file_stem(found)
    try:
        for job_rows in execute(plan, ceilings):
            rows += job_rows
            print(progress(job_rows), file=sys.stderr, flush=True)
            if not options.print_only:  # after every job: a run that is cut short leaves what it has
                options.out.mkdir(parents=True, exist_ok=True)
                report.save(stem.with_name(stem.name + ".json"), found, ceilings, rows)
    except BrokenDevice as error:
        print(f"Stopped: {error}. Leave the peer out with --skip.", file=sys.stderr)
        status = 1
    print(report.markdown(found, ceilings, rows, details=not options.summary))
    if not options.print_only:
        write(stem, report.markdown(found, ceilings, rows), found, rows)
    # A wrong result of this library is the one thing that fails a run; times never do.
    wrong = [row for row in rows if row["provider"] in ("fused", "reference") and str(row["error"]).startswith("wrong")]
    return 1 if wrong else status


def progress(rows: list[dict]) -> str:
    """A line on one job: what was measured, and how it went."""
    first = rows[0]
    done = sum("median_us" in row for row in rows)
    return f"{first['op']} {first['case']} {first['dtype']}: {done} of {len(rows)} timed"


def write(stem: Path, text: str, found: dict, rows: list[dict]) -> None:
    """Writes the Markdown and, where matplotlib is installed, the plot."""
    stem.with_name(stem.name + ".md").write_text(text, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("No plot: matplotlib is not installed.", file=sys.stderr)
        return
    from temporal_layers.kernels.benchmarks import plot

    plot.draw(stem.with_name(stem.name + ".png"), found, rows)


if __name__ == "__main__":
    sys.exit(main())
