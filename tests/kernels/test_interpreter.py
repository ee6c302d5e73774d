"""The interpreter's bf16, as corrected in conftest.py, against PyTorch's; on a GPU the hardware's."""

import pytest
import torch

from temporal_layers.kernels.dispatch import has_triton
from temporal_layers.kernels.launch import is_interpreted, launch
from temporal_layers.kernels.testing import random_normal

if has_triton():
    import triton
    import triton.language as tl
else:
    pytest.skip("needs triton", allow_module_level=True)

SIZE = 4096


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, x + y)
    tl.store(out_ptr + SIZE + at, x * y)
    tl.store(out_ptr + 2 * SIZE + at, x - y)
    tl.store(out_ptr + 3 * SIZE + at, tl.where((x < y) & (y > 0), x, -y))
    tl.store(out_ptr + 4 * SIZE + at, tl.maximum(x, y))
    tl.store(out_ptr + 5 * SIZE + at, tl.abs(x) * 1.5)


@triton.jit
def cast_kernel(x_ptr, narrow_ptr, wide_ptr, half_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    narrow = tl.load(x_ptr + at).to(tl.bfloat16)
    tl.store(narrow_ptr + at, narrow)
    tl.store(wide_ptr + at, narrow.to(tl.float32))
    tl.store(half_ptr + at, narrow.to(tl.float16))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tile = at[:, None] * SIZE + at[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile)))


@triton.jit
def sum_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, SIZE))))


def normal(seed, *shape):
    return random_normal(shape or (SIZE,), seed).float()


def test_arithmetic_is_torchs_bit_for_bit(device):
    x, y = (normal(seed).bfloat16().to(device) for seed in (0, 1))
    out = x.new_empty(6, SIZE)
    launch(arithmetic_kernel, (1,), x, y, out, SIZE=SIZE)
    expected = [x + y, x * y, x - y, torch.where((x < y) & (y > 0), x, -y), torch.maximum(x, y), x.abs() * 1.5]
    for got, want in zip(out, expected, strict=True):
        assert torch.equal(got, want)


def test_casts_are_torchs_bit_for_bit(device):
    # Every upper half of fp32 bits, so every bf16 value with infinities and NaN, with a lower half that must round.
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (upper | lower).view(torch.float32).to(device)
        narrow, half = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.float16)
        wide = torch.empty_like(x)
        launch(cast_kernel, (1,), x, narrow, wide, half, SIZE=1 << 16)
        expected = x.bfloat16()
        for got, want in ((narrow, expected), (wide, expected.float()), (half, expected.half())):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_dot_accumulates_in_fp32(device):
    x, y = (normal(seed, 32, 32).bfloat16().to(device) for seed in (0, 1))
    out = torch.empty(32, 32, device=device)
    launch(dot_kernel, (1,), x, y, out, SIZE=32)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-6, atol=1e-5)


def test_a_reduction_of_bf16_is_refused(device):
    if not is_interpreted():
        pytest.skip("a rule for kernels that must run interpreted")
    out = torch.empty(1)
    with pytest.raises(Exception, match=r"reduce bf16 after \.to\(tl\.float32\)"):
        launch(sum_kernel, (1,), torch.ones(16).bfloat16(), out, SIZE=16)
    launch(sum_kernel, (1,), torch.ones(16), out, SIZE=16)
    assert out == 16
