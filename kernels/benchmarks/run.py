"""Measures workloads one after another and keeps a row for each provider, also for one that fails."""

import gc
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from temporal_layers.kernels.benchmarks.cases import Case
from temporal_layers.kernels.benchmarks.gate import Expected, check, expect
from temporal_layers.kernels.benchmarks.measure import Run, Timing, measure
from temporal_layers.kernels.benchmarks.workloads import Provider, Workload, build

Row = dict[str, object]


@dataclass(frozen=True)
class Plan:
    """What a run measures and how long it may take.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        jobs: Operator, case and dtype, in order.
        modes: ``"forward"``, ``"backward"`` or both.
        skip: Providers that are left out.
        compiled: Whether torch.compile takes part in every case, rather than in those that are marked.
        seconds: Time of one provider's calls in one mode.
        rounds: Turns that the providers take.
        limit: Seconds after which no further job starts.
    """

    device: str
    jobs: tuple[tuple[str, Case, torch.dtype], ...]
    modes: tuple[str, ...]
    skip: frozenset[str]
    compiled: bool
    seconds: float
    rounds: int
    limit: float


class BrokenDevice(RuntimeError):
    """A peer has left the GPU in a state in which nothing further runs in this process."""


def execute(plan: Plan, ceilings: dict) -> Iterator[list[Row]]:
    """Yields the rows of one job after another.

    Raises:
        BrokenDevice: the GPU no longer answers; the rows so far are good.
    """
    began = time.monotonic()
    for op, case, dtype in plan.jobs:
        if time.monotonic() - began > plan.limit:
            yield [row_of(op, case, dtype, mode, "all", error="not run: time limit reached") for mode in plan.modes]
            continue
        # Warnings of peers on the way (deterministic algorithms, donated buffers) are no news of this library.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = list(run_job(plan, op, case, dtype))
        complete(rows, ceilings)
        yield rows
        gc.collect()
        if plan.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise BrokenDevice(f"{op} on {case.name}: {first_line(error)}") from error


def run_job(plan: Plan, op: str, case: Case, dtype: torch.dtype) -> Iterable[Row]:
    """Builds, checks and times all providers of one operator on one case."""
    workload = build(op, case, dtype, plan.device)
    # What is checked is what is timed, but for a CPU, which would spend minutes on float64: there it has fewer pixels.
    sample = workload if plan.device == "cuda" else build(op, case.sample(), dtype, plan.device)
    modes = [mode for mode in plan.modes if mode == "forward" or case.backward]
    chosen = [provider for provider in workload.providers if takes_part(plan, case, provider)]
    expected = expect(sample, backward="backward" in modes)
    upstream = upstream_of(workload)
    errors: dict[tuple[str, str], str] = {}
    runs: dict[str, dict[str, Run]] = {mode: {} for mode in modes}
    for provider in chosen:
        try:
            run = Run(workload, provider, provider.build(), upstream)
        except Exception as error:
            errors |= {(provider.name, mode): first_line(error) for mode in modes}
            continue
        for mode in modes:
            red = red_text(sample, provider.name, run, expected, mode)
            if red is None:
                runs[mode][provider.name] = run
            else:
                errors[provider.name, mode] = red
    del expected, sample
    for mode in modes:
        timings = measure(runs[mode], mode, plan.seconds, plan.rounds)
        for provider in chosen:
            timing = timings.get(provider.name)
            row = row_of(op, case, dtype, mode, provider.name)
            row |= {"bytes": workload.costs[mode].bytes, "flops": workload.costs[mode].flops}
            if isinstance(timing, Timing):
                row |= timing.summary()
            else:
                row["error"] = errors.get((provider.name, mode)) or first_line(timing)
            yield row


def upstream_of(workload: Workload) -> Tensor:
    """A random gradient of the output, in memory as the library writes the output."""
    first = workload.inputs[0]
    return torch.randn_like(first) if workload.output is None else torch.randn(workload.output).to(first)


def takes_part(plan: Plan, case: Case, provider: Provider) -> bool:
    """Whether a provider is tried at all."""
    if provider.name in plan.skip or (provider.gpu_only and plan.device == "cpu"):
        return False
    return provider.name != "torch.compile" or plan.compiled or case.compiled


def red_text(sample: Workload, name: str, run: Run, expected: Expected, mode: str) -> str | None:
    """What is wrong with a provider's results on the sample, None if nothing is."""
    provider = next(provider for provider in sample.providers if provider.name == name)
    try:
        function = run.function if sample.inputs[0].is_cuda else provider.build()
        check(sample, provider, function, expected, backward=mode == "backward")
    except AssertionError as error:
        return f"wrong: {first_line(error)}"
    except Exception as error:
        return first_line(error)
    return None


def row_of(op: str, case: Case, dtype: torch.dtype, mode: str, provider: str, error: str | None = None) -> Row:
    """A row without figures."""
    shape = [case.batch, case.frames, case.channels, case.height, case.width]
    return {
        "op": op, "case": case.name, "shape_bfchw": shape, "heads": case.heads,
        "dtype": str(dtype).removeprefix("torch."), "mode": mode, "provider": provider, "error": error,
    }  # fmt: skip


def complete(rows: list[Row], ceilings: dict) -> None:
    """Adds what follows from the times: rates, percentages of the ceilings, and factors against this library.

    ``versus_ours`` is the provider's time over that of the fused kernel where that ran, of the reference otherwise.
    """
    for row in rows:
        if "median_us" not in row:
            continue
        seconds = row["median_us"] / 1e6
        row["tb_per_s"] = row["bytes"] / seconds / 1e12
        row["percent_of_copy"] = 100 * row["bytes"] / seconds / ceilings["copy"]
        row["tflop_per_s"] = row["flops"] / seconds / 1e12
        gemm = ceilings["gemm"][row["dtype"]]
        row["percent_of_gemm"] = 100 * row["flops"] / seconds / gemm
        row["floor_us"] = 1e6 * max(row["bytes"] / ceilings["copy"], row["flops"] / gemm)
        same = {other["provider"]: other for other in rows if other["mode"] == row["mode"] and "median_us" in other}
        base = same.get("fused") or same.get("reference")
        row["versus_ours"] = row["median_us"] / base["median_us"] if base else None


def first_line(error: BaseException | None) -> str:
    """The kind and the first line of an error, short enough for a table."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:240]
