"""Clocks: device time on a GPU, CPU time of the one thread otherwise, with the providers taking turns."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from temporal_layers.kernels.benchmarks.workloads import Function, Provider, Workload


@dataclass
class Timing:
    """Seconds of one provider in one mode.

    Attributes:
        samples: One for each timed call.
        peak_bytes: Most memory in use during a call beyond what was in use before it; None on a CPU.
    """

    samples: list[float]
    peak_bytes: int | None = None

    def summary(self) -> dict[str, float | int | None]:
        """Median, 20th and 80th percentile in microseconds, and the peak in megabytes."""
        low, high = (quantiles(self.samples, n=5)[i] for i in (0, 3)) if len(self.samples) > 1 else self.samples * 2
        return {
            "median_us": 1e6 * median(self.samples),
            "p20_us": 1e6 * low,
            "p80_us": 1e6 * high,
            "samples": len(self.samples),
            "peak_mb": None if self.peak_bytes is None else self.peak_bytes / 1e6,
        }


class Run:
    """One provider ready to be timed: inputs in its layout, weights that need gradients, an upstream gradient."""

    def __init__(self, workload: Workload, provider: Provider, function: Function, upstream: Tensor) -> None:
        layout, count = provider.layout, workload.activations
        to = (lambda x: x) if layout is None else layout.to
        self.function = function
        self.inputs = [to(x) if index < count else x for index, x in enumerate(workload.inputs)]
        self.upstream = to(upstream)
        self.on_gpu = upstream.is_cuda

    def forward(self) -> Callable[[], object]:
        """The forward pass as inference runs it."""

        def call() -> Tensor:
            with torch.no_grad():
                return self.function(*self.inputs)

        return call

    def backward(self) -> Callable[[], object]:
        """A forward pass with a graph, now, and its backward pass as the call."""
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        out = self.function(*leaves)
        weights = list(self.function.parameters()) if isinstance(self.function, nn.Module) else []
        upstream = self.upstream.to(out.dtype)
        return lambda: torch.autograd.grad(out, leaves + weights, upstream, allow_unused=True)

    def prepare(self, mode: str) -> Callable[[], object]:
        """What is timed in a mode."""
        return self.forward() if mode == "forward" else self.backward()

    def peak(self, mode: str) -> int | None:
        """Peak memory of a call, graph and forward pass included; None on a CPU, which keeps no count."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.prepare(mode)()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def cpu_seconds(run: Run, mode: str, calls: int) -> list[float]:
    """Times calls by the CPU time of the thread, which other processes on the machine disturb least.

    With several threads by the wall clock, the only one that sees them all.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples = []
    for _ in range(calls):
        call = run.prepare(mode)
        began = clock()
        call()
        samples.append(clock() - began)
    return samples


def gpu_seconds(run: Run, mode: str, calls: int) -> list[float]:
    """Times calls by events on the stream, each on a cold L2 cache.

    Overwriting the cache takes longer than queueing a call, so the GPU does not wait for Python in between.
    """
    cache = torch.empty(1 << 28, dtype=torch.int32, device="cuda")
    events = []
    for _ in range(calls):
        call = run.prepare(mode)
        cache.zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        call()
        pair[1].record()
        events.append(pair)
        del call
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def measure(runs: dict[str, Run], mode: str, seconds: float, rounds: int) -> dict[str, Timing | Exception]:
    """Times several providers of a workload in turns, so that a change of the machine's pace meets them all.

    Args:
        runs: Providers by name.
        mode: ``"forward"`` or ``"backward"``.
        seconds: What one provider's timed calls should take in all.
        rounds: Turns of each provider; at least one call is timed in each, and at least three of a slow provider.

    Returns:
        A timing for each provider, or what it raised.
    """
    results: dict[str, Timing | Exception] = {}
    calls = {}
    for name, run in runs.items():
        seconds_of = gpu_seconds if run.on_gpu else cpu_seconds
        try:
            seconds_of(run, mode, 2 if run.on_gpu else 1)  # compiles, fills caches
            [estimate] = seconds_of(run, mode, 1)
            calls[name] = max(1, min(100, round(seconds / rounds / max(estimate, 1e-6))))
            results[name] = Timing([], run.peak(mode))
        except Exception as error:
            results[name] = error
    for _ in range(rounds):
        for name, timing in results.items():
            if isinstance(timing, Exception):
                continue
            run = runs[name]
            if len(timing.samples) >= 3 and sum(timing.samples) > 3 * seconds:
                continue  # a slow one has had its share
            try:
                timing.samples += (gpu_seconds if run.on_gpu else cpu_seconds)(run, mode, calls[name])
            except Exception as error:
                results[name] = error
    return results
