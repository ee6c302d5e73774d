"""The one place that launches a Triton kernel: on a GPU, interpreted, or compiled without running.

Every fused operator calls :func:`launch`, so the same host code serves three purposes. On a GPU it runs the kernel.
With ``TRITON_INTERPRET=1`` in the environment before triton is imported, it interprets the kernel on CPU tensors.
Inside :func:`compile_only` it compiles the kernel ahead of time for a GPU that need not be there, with exactly the
specialisation of strides and alignments that a launch would get. Triton is imported on the first launch only.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from temporal_layers.kernels.checks import invalid

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled ahead of time, with what its machine code says of its cost.

    Attributes:
        name: Name of the kernel.
        target: GPU it is compiled for, as given to :func:`compile_only`.
        num_warps: Warps (wavefronts on AMD) of one program.
        shared_bytes: Shared memory of one program, in bytes.
        asm: Code at each stage of the compilation by its name: text such as ``ptx`` and ``amdgcn``, binaries
            such as ``cubin`` and ``hsaco``.
    """

    name: str
    target: str
    num_warps: int
    shared_bytes: int
    asm: dict[str, str | bytes]

    @cached_property
    def machine_code(self) -> str:
        """Assembly the GPU executes: SASS for NVIDIA, GCN for AMD."""
        if "cubin" in self.asm:
            return run_nvidia_tool("nvdisasm", "-c", binary=self.asm["cubin"])
        return self.asm["amdgcn"]

    @cached_property
    def registers(self) -> int:
        """Registers of one thread (vector registers on AMD)."""
        if "cubin" in self.asm:
            usage = run_nvidia_tool("cuobjdump", "-res-usage", binary=self.asm["cubin"])
            return int(re.search(r"REG:(\d+)", usage)[1])
        return int(re.search(r"\.vgpr_count:\s+(\d+)", self.machine_code)[1])

    @cached_property
    def spills(self) -> int:
        """Loads and stores of spilled registers (spilled registers on AMD); 0 in a kernel that is fit to ship."""
        if "cubin" in self.asm:
            return len(re.findall(r"\b(?:LDL|STL)\b", self.machine_code))
        return sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", self.machine_code))

    @cached_property
    def loads(self) -> list[str]:
        """Every instruction that loads from global memory, without its operands.

        Scalar loads of a kernel's arguments on AMD, and :attr:`bulk_loads`, are not among them.
        """
        return re.findall(r"\b(?:LDG(?:STS)?\.[\w.]+|(?:global|buffer|flat)_load_\w+)", self.machine_code)

    @cached_property
    def vector_loads(self) -> int:
        """Those of :attr:`loads` that move 128 bits for each thread, the most a GPU has an instruction for."""
        return sum(".128" in load or load.endswith(("_dwordx4", "_b128")) for load in self.loads)

    @cached_property
    def bulk_loads(self) -> int:
        """Copies of whole tiles by tensor descriptors (NVIDIA, from Hopper on)."""
        return len(re.findall(r"\bUTMALDG\b", self.machine_code))

    @cached_property
    def tensor_core_ops(self) -> int:
        """Matrix instructions: HMMA and its kin (HGMMA: a warp group's) on NVIDIA, MFMA on AMD."""
        return len(re.findall(r"\b(?:[BDHIOQ]G?MMA\.|v_s?mfmac?_)", self.machine_code))


@dataclass(frozen=True)
class Compilation:
    """A running :func:`compile_only`: its target and the kernels compiled so far."""

    target: str
    kernels: list[Compiled]


_compilation: ContextVar[Compilation | None] = ContextVar("temporal_layers_compilation", default=None)


def launch(kernel: "JITFunction", grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches ``kernel`` over ``grid`` on the device of its tensors.

    Args:
        kernel: A function decorated with ``triton.jit``.
        grid: Programs in one to three dimensions. With a dimension of 0 nothing happens.
        *args: Arguments of the kernel; the first tensor decides the device.
        **options: Keyword arguments of the kernel, and of the compiler (``num_warps``, ``num_stages``).

    Raises:
        ValueError: the tensors are not on a GPU, and the kernel is neither interpreted nor only compiled.
    """
    if 0 in grid:
        return
    compilation = _compilation.get()
    if compilation is not None:
        compiled = kernel.warmup(*args, grid=grid, **options)
        name, metadata = kernel.fn.__name__, compiled.metadata
        compilation.kernels.append(
            Compiled(name, compilation.target, metadata.num_warps, metadata.shared, dict(compiled.asm))
        )
        return
    if is_interpreted():
        kernel[grid](*args, **options)
        return
    device = next(value.device for value in (*args, *options.values()) if isinstance(value, Tensor))
    if device.type != "cuda":
        raise invalid(
            "launch", kernel.fn.__name__, "tensors on a GPU", f"tensors on {device}",
            "move them, set TRITON_INTERPRET=1 before triton is imported, or compile under compile_only",
        )  # fmt: skip
    # Triton launches on the current device, whatever device the pointers belong to.
    with torch.cuda.device(device):
        kernel[grid](*args, **options)


@contextmanager
def compile_only(target: str) -> Iterator[list[Compiled]]:
    """Turns every :func:`launch` inside into an ahead-of-time compilation; needs no GPU.

    Call the launchers with tensors of the shapes and strides in question on ``device="meta"``: nothing is read or
    written.

    Args:
        target: ``"sm_80"``, ``"sm_90"``, ... or an AMD architecture such as ``"gfx942"``.

    Yields:
        The list to which each launch appends its :class:`Compiled` kernel.

    Raises:
        ValueError: ``target`` is no known kind of architecture, or kernels are interpreted in this process.
    """
    gpu = gpu_target(target)
    if is_interpreted():
        raise invalid(
            "compile_only", "TRITON_INTERPRET", "an unset variable", repr(os.environ["TRITON_INTERPRET"]),
            "compile in a process without it",
        )  # fmt: skip
    from triton.runtime import driver

    try:
        previous = driver.active
    except RuntimeError:  # no GPU: triton then looks for one again at the next launch
        previous = None
    driver.set_active(DeviceLessDriver(target, gpu))
    token = _compilation.set(Compilation(target, []))
    try:
        yield _compilation.get().kernels
    finally:
        _compilation.reset(token)
        driver.set_active(previous)


def is_interpreted() -> bool:
    """Whether triton interprets kernels on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def can_launch(tensor: Tensor) -> bool:
    """Whether :func:`launch` accepts ``tensor``: it is on a GPU, or kernels are interpreted or only compiled."""
    return tensor.is_cuda or is_interpreted() or _compilation.get() is not None


def target_of(tensor: Tensor) -> str:
    """Architecture for which :func:`launch` compiles a kernel on ``tensor``.

    Returns:
        ``"sm_90"``, ``"gfx942"`` or their like, or ``"interpreted"``.
    """
    compilation = _compilation.get()
    if compilation is not None:
        return compilation.target
    return gpu_name(tensor.device.index) if tensor.is_cuda else "interpreted"


@cache
def gpu_name(index: int) -> str:
    """Architecture of a GPU of this machine."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


class DeviceLessDriver:
    """What triton's compiler asks of a driver, answered for a GPU that is not there.

    The device's name is the target: triton caches kernels by device, and an index would hand the code for one
    target to the next.
    """

    def __init__(self, name: str, target: "GPUTarget") -> None:
        self.name = name
        self.target = target

    def get_current_target(self) -> "GPUTarget":
        """Architecture to compile for."""
        return self.target

    def get_current_device(self) -> str:
        """Key of triton's kernel cache."""
        return self.name

    def get_current_stream(self, device: str) -> int:
        """The default stream."""
        return 0


def gpu_target(name: str) -> "GPUTarget":
    """Triton's description of an architecture.

    Raises:
        ValueError: ``name`` is neither ``sm_<number>`` nor ``gfx<number>``.
    """
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", name):
        wavefront = 64 if name.startswith("gfx9") else 32
        return GPUTarget("hip", name, wavefront)
    raise invalid("compile_only", "target", "'sm_<number>' or 'gfx<number>'", repr(name), "name a GPU architecture")


def run_nvidia_tool(tool: str, *flags: str, binary: bytes) -> str:
    """Output of one of the CUDA tools in triton's wheel on a compiled kernel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([path, *flags, file.name], check=True, capture_output=True, text=True).stdout
