"""What a result depends on: the machine, the versions, the commit, and the ceilings measured on the spot."""

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[2]


def describe(device: str, commit: str | None) -> dict:
    """The machine and the versions of what is measured.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        commit: Commit of the sources; asked of git if None.

    Returns:
        Names and versions, ready for JSON. ``load`` is the mean number of processes that wanted a core in the last
        minute, this one included: above the number of threads, the machine was shared.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "device": name,
        "kind": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{package: version_of(package) for package in ("triton", "diffusers", "xformers")},
        "commit": commit or head(),
    }


def version_of(package: str) -> str | None:
    """Version of an installed package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as the system reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    except OSError:
        found = None
    return re.sub(r"\((R|TM)\)", "", found[1]).strip() if found else platform.processor() or platform.machine()


def head() -> str:
    """Commit of the checkout, with ``+`` if files of the library differ from it; ``unknown`` outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "kernels", "temporal_layers")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def file_stem(machine: dict) -> str:
    """Name of the result files: device, versions, commit."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    torch_version = machine["torch"].partition("+")[0]
    return f"{device}-torch{torch_version}-triton{machine['triton'] or 'none'}-{machine['commit'].rstrip('+')}"


def ceilings(device: str, dtypes: list[torch.dtype], *, small: bool = False) -> dict:
    """What this machine reaches at best: bytes per second of a copy, operations per second of a matrix product.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        dtypes: Dtypes whose matrix product is measured.
        small: Spend no more than an instant on it.

    Returns:
        ``{"copy": bytes/s, "gemm": {dtype: FLOP/s}}``. A percentage of a ceiling above 100 means that the tensors of
        the case fit a cache that those of the copy did not.
    """
    on_gpu = device == "cuda"
    # Larger than any cache; on a CPU small enough for a machine of 8 GB.
    numel = 1 << (24 if small else 32 if on_gpu else 28)
    source = torch.ones(numel, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * numel / best_time(lambda: target.copy_(source), device)
    del source, target
    gemm = {}
    for dtype in dtypes:
        size = 512 if small else 8192 if on_gpu else 1536
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        gemm[str(dtype).removeprefix("torch.")] = 2 * size**3 / best_time(lambda a=a, b=b: a @ b, device)
    return {"copy": copy, "gemm": gemm}


def best_time(function, device: str, repeats: int = 7) -> float:
    """Median seconds of a call after one to warm up: device time on a GPU, CPU time of one thread otherwise."""
    function()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
            began = clock()
            function()
            times.append(clock() - began)
    return median(times)
