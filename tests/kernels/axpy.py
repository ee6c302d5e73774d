"""A small masked kernel and what tests/kernels/test_launch.py runs in processes of its own.

Triton decides when it is imported whether it interprets, so one process cannot test both ways. The command line
names one of the functions below; its result goes to standard output as JSON.
"""

import json
import sys

import torch
import triton
import triton.language as tl

from temporal_layers.kernels.launch import can_launch, compile_only, launch, target_of
from temporal_layers.kernels.testing import random_normal

TARGETS = ("sm_80", "sm_90", "gfx942")


@triton.jit
def axpy_kernel(x_ptr, y_ptr, out_ptr, scale, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0)
    tl.store(out_ptr + offsets, scale * x + y, mask=inside)


@triton.jit
def matmul_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + rows[:, None] * BLOCK + rows[None, :])
    tl.store(out_ptr + rows[:, None] * BLOCK + rows[None, :], tl.dot(tile, tile))


@triton.jit
def strided_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(out_ptr + rows, tl.load(x_ptr + rows * stride))


@triton.jit
def spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + rows[:, None] * BLOCK + rows[None, :])
    tl.store(out_ptr + rows[:, None] * BLOCK + rows[None, :], tl.cumsum(tl.exp(tile), axis=0) + tile)


def axpy(x, y, scale, block=128):
    """``scale * x + y`` of contiguous tensors."""
    out = torch.full_like(x, torch.nan) if x.device.type != "meta" else torch.empty_like(x)
    launch(axpy_kernel, (triton.cdiv(x.numel(), block),), x, y, out, scale, x.numel(), BLOCK=block, num_warps=4)
    return out


def text_of_error(function, *args):
    """Text of the ValueError that a call raises."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    raise AssertionError("no ValueError")


def active_driver():
    """Triton's driver, None where there is no GPU."""
    try:
        return triton.runtime.driver.active
    except RuntimeError:
        return None


def interpret():
    """Runs the kernel on sizes with and without a ragged last block."""
    errors = []
    for size in (1, 127, 128, 300):
        x, y = random_normal((size,), 0).float(), random_normal((size,), 1).float()
        errors.append(float((axpy(x, y, 2.5).double() - (2.5 * x.double() + y.double())).abs().max()))
    return {
        "errors": errors,
        "empty": list(axpy(torch.empty(0), torch.empty(0), 1.0).shape),
        "can_launch": can_launch(torch.empty(1)),
        "named": target_of(torch.empty(1)),
        "compile_only": text_of_error(compile_only("sm_90").__enter__),
    }


def counts(kernel):
    """What is counted in the machine code."""
    return {
        "num_warps": kernel.num_warps,
        "loads": len(kernel.loads),
        "vector_loads": kernel.vector_loads,
        "tensor_core_ops": kernel.tensor_core_ops,
    }


def compile_others(target):
    """Compiles a kernel for the tensor cores and one whose loads cannot be joined; returns their counts."""
    half, wide = torch.empty(64, 64, device="meta", dtype=torch.float16), torch.empty(1, 64, device="meta")
    with compile_only(target) as compiled:
        launch(matmul_kernel, (1,), half, wide, BLOCK=64, num_warps=4)
        launch(strided_kernel, (1,), wide, wide, 3, BLOCK=512, num_warps=8)
    return [counts(kernel) for kernel in compiled]


def compile_ahead():
    """Compiles the kernel for each target and reads its cost off the machine code."""
    kernels, meta = {}, torch.empty(1024, device="meta")
    for target in TARGETS:
        with compile_only(target) as compiled:
            axpy(meta, meta, 2.5, block=1024)
            axpy(meta[:0], meta[:0], 2.5)
            inside, named = can_launch(meta), target_of(meta)
        [kernel] = compiled
        binary = next(kernel.asm[name] for name in ("cubin", "hsaco") if name in kernel.asm)
        kernels[target] = {
            "name": kernel.name, "target": kernel.target, "registers": kernel.registers, "spills": kernel.spills,
            "shared_bytes": kernel.shared_bytes, "magic": binary[:4].hex(), "machine_code": kernel.machine_code,
            "counts": counts(kernel), "others": compile_others(target), "named": named,
        }  # fmt: skip
    before = active_driver()
    with compile_only("sm_80") as spilling:
        tile = torch.empty(128, 128, device="meta")
        launch(spilling_kernel, (1,), tile, tile, BLOCK=128, num_warps=4)
    return {
        "kernels": kernels,
        "restored": active_driver() is before,
        "spills": spilling[0].spills,
        "shared_bytes": spilling[0].shared_bytes,
        "can_launch": [inside, can_launch(meta)],
        "target": text_of_error(compile_only("h100").__enter__),
        "device": text_of_error(axpy, torch.empty(4), torch.empty(4), 2.5),
    }


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_ahead}[sys.argv[1]]()))
