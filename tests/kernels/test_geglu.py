"""The gated projection against its definition in float64, and against diffusers' GEGLU with the same weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.kernels.geglu import geglu
from temporal_layers.kernels.launch import is_interpreted, launch
from temporal_layers.kernels.testing import (
    assert_within_budget,
    in_nan_surroundings,
    random_normal,
    with_gradients,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def definition(x, weight, bias=None):
    """The formula, with the normal distribution function written out."""
    projected = x @ weight.t() + (0 if bias is None else bias)
    value, gate = projected[..., : len(weight) // 2], projected[..., len(weight) // 2 :]
    return value * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2


def of_pytorch(x, weight, bias=None):
    """PyTorch's operators. On a CPU its GELU of contiguous memory is oneDNN's, less exact in fp32 than the formula."""
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate.contiguous())


def operands(shape, inner, dtype, *, bias=True, device="cpu"):
    """Input, weight and bias for gates of about one."""
    channels = shape[-1]
    weight = random_normal((2 * inner, channels), 1) * channels**-0.5
    tensors = [random_normal(shape, 0), weight, *([random_normal((2 * inner,), 2)] if bias else [])]
    return [x.to(device, dtype) for x in tensors]


def check(function, inputs, dtype, eager=definition):
    """Holds the result and the gradients of a function to the budget that the error of ``eager`` gives."""
    actual, eager = (with_gradients(call, *inputs, dtype=dtype) for call in (function, eager))
    expected = with_gradients(definition, *(x.double() for x in inputs), dtype=dtype)
    for what, *tensors in zip(("result", "x", "weight", "bias"), actual, expected, eager, strict=False):
        assert_within_budget(*tensors, what=what)


@given(
    shape=st.sampled_from([(7, 5), (2, 3, 8), (1, 1), (2, 1, 3, 4)]),
    inner=st.integers(1, 6),
    bias=st.booleans(),
    dtype=st.sampled_from([FP16, BF16, FP32, FP64]),
)
def test_matches_the_definition(shape, inner, bias, dtype):
    inputs = operands(shape, inner, dtype, bias=bias)
    if dtype != FP64:
        check(geglu, inputs, dtype, eager=of_pytorch)
        return
    actual, expected = (with_gradients(function, *inputs, dtype=dtype) for function in (geglu, definition))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_one_of_diffusers(bias, train):
    activations = pytest.importorskip("diffusers.models.activations")
    theirs = activations.GEGLU(8, 12, bias=bias)
    x = random_normal((2, 5, 8), 0).float()
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(geglu(x, theirs.proj.weight, theirs.proj.bias), theirs(x))


@pytest.mark.parametrize("train", [True, False])
def test_operands_are_not_written_and_the_result_is_contiguous(train):
    inputs = [in_nan_surroundings(x) for x in operands((4, 3, 6), 5, FP32)]
    copies = [x.clone() for x in inputs]
    with torch.set_grad_enabled(train):
        result = geglu(*inputs)
    assert all(map(torch.equal, inputs, copies))
    assert result.is_contiguous() and result.shape == (4, 3, 5)
    torch.testing.assert_close(result, definition(*copies))


def test_gradients():
    inputs = [x.requires_grad_() for x in operands((3, 4), 2, FP64)]
    assert torch.autograd.gradcheck(geglu, inputs) and torch.autograd.gradgradcheck(geglu, inputs)


def test_empty_batch():
    assert geglu(torch.empty(0, 3, 4), torch.ones(6, 4)).shape == (0, 3, 3)


# The fused kernels. They run on a GPU or interpreted; elsewhere the fixture ``device`` skips these tests.

FUSED = {  # shape of x, inner, dtype, bias?
    "bf16": ((37, 24), 40, BF16, True),
    "fp16-clips": ((2, 19, 32), 16, FP16, True),
    "fp32": ((2, 17, 24), 20, FP32, True),
    "odd-bf16": ((33, 7), 5, BF16, False),
    "one-row-fp32": ((1, 16), 3, FP32, True),
}


def fused(*tensors):
    return geglu(*tensors, impl="fused")


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("case", FUSED)
def test_fused_matches_the_definition(case, layout, device):
    shape, inner, dtype, bias = FUSED[case]
    inputs = operands(shape, inner, dtype, bias=bias, device=device)
    check(fused, [in_nan_surroundings(x) for x in inputs] if layout == "strided" else inputs, dtype)


def test_fused_where_the_gates_are_far_from_zero(device):
    x, weight = operands((9, 16), 16, FP32, bias=False, device=device)
    check(fused, [30 * x, weight], FP32)
    assert torch.isfinite(fused(1e4 * x, weight)).all()


def test_fused_writes_the_whole_result_and_nothing_else(device, monkeypatch):
    from temporal_layers.kernels.geglu import fused as launchers

    x, weight, bias = operands((37, 24), 20, FP32, device=device)
    grad = random_normal((37, 20), 5).to(device, FP32)
    plain = launchers.forward(x, weight, bias), launchers.backward(grad, x, weight, bias)
    rooms = []

    def among_nan(x, columns):
        rooms.append(torch.full((x.shape[0] + 2, columns), torch.nan, dtype=x.dtype, device=x.device))
        return rooms[-1][1:-1]

    monkeypatch.setattr(launchers, "empty_rows", among_nan)
    results = launchers.forward(x, weight, bias), launchers.backward(grad, x, weight, bias)
    assert all(map(torch.equal, results, plain))
    for room, result in zip(rooms, results, strict=True):
        assert room.isnan().sum() == room.numel() - result.numel()


def test_fused_is_an_operator_of_pytorch(device):
    from temporal_layers.kernels.geglu.fused import geglu as operator

    x, weight, bias = (x.requires_grad_() for x in operands((5, 6), 4, FP32, device=device))
    torch.library.opcheck(operator, (x, weight, bias))
    torch.library.opcheck(operator, (x.detach(), weight, None))


def test_fused_in_programs(device):
    x, weight, bias = operands((2, 5, 6), 4, FP32, device=device)

    class Projection(torch.nn.Module):
        def forward(self, x, weight, bias):
            return fused(x, weight, bias)

    module = Projection()
    expected = with_gradients(module, x, weight, bias, dtype=FP32)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for got, want in zip(with_gradients(compiled, x, weight, bias, dtype=FP32), expected, strict=True):
        torch.testing.assert_close(got, want)
    program = torch.export.export(module, (x, weight, bias))
    torch.testing.assert_close(program.module()(x, weight, bias), expected[0])
    mapped = torch.func.vmap(module, in_dims=(0, None, 0))(x, weight, torch.stack([bias, -bias]))
    torch.testing.assert_close(mapped, torch.stack([module(x[0], weight, bias), module(x[1], weight, -bias)]))


def test_fused_keeps_nothing_but_its_operands(device):
    inputs = [x.requires_grad_() for x in operands((5, 6), 4, FP32, device=device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fused(*inputs)
    assert sorted(x.numel() for x in kept) == sorted(x.numel() for x in inputs)


def test_fused_under_autocast_is_in_the_low_dtype(device):
    inputs = operands((5, 6), 4, FP32, device=device)
    with torch.autocast(device.type, BF16):
        result, *gradients = with_gradients(fused, *inputs, dtype=BF16)
        assert result.dtype == geglu(*inputs).dtype == BF16
    expected = with_gradients(fused, *inputs, dtype=BF16)
    assert [x.dtype for x in gradients] == [FP32] * 3
    for got, want in zip((result, *gradients), expected, strict=True):
        torch.testing.assert_close(got.float(), want, rtol=0.03, atol=0.03)


def test_fused_empty_batch(device):
    inputs = [torch.empty(0, 4, device=device), torch.ones(6, 4, device=device), torch.ones(6, device=device)]
    result, *gradients = with_gradients(fused, *inputs, dtype=FP32)
    assert result.shape == (0, 3) and all(map(torch.equal, gradients, map(torch.zeros_like, inputs)))


@pytest.mark.skipif(not is_interpreted(), reason="all programs but the last are left out")
def test_fused_reaches_beyond_two_to_the_31(device, monkeypatch):
    from temporal_layers.kernels.geglu import fused as launchers

    # Only the touched pages of this memory exist. The last tile of every tensor lies beyond element 2**31.
    rows, tile = 2**27 + 32, 32
    x = torch.empty(rows, 16, dtype=FP16)
    x[-tile:] = random_normal((tile, 16), 0)
    _, weight, bias = operands((1, 16), 16, FP16)
    grad = x  # of the result's shape as well
    expected = launchers.forward(x[-tile:], weight, bias), launchers.backward(grad[-tile:], x[-tile:], weight, bias)
    monkeypatch.setattr(launchers.kernels, "place", lambda row_tiles, *_: (row_tiles - 1, row_tiles * 0))
    monkeypatch.setattr(launchers, "launch", lambda kernel, grid, *args, **kw: launch(kernel, (1,), *args, **kw))
    far = launchers.forward(x, weight, bias), launchers.backward(grad, x, weight, bias)
    assert all(torch.equal(a[-tile:], b) for a, b in zip(far, expected, strict=True))
