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
EPS = 1e-5  # of the norm, which is there where its two parameters are


def definition(x, weight, bias=None, norm_weight=None, norm_bias=None):
    """The formula, with the norm and the normal distribution function written out."""
    if norm_weight is not None:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * norm_weight + norm_bias
    projected = x @ weight.t() + (0 if bias is None else bias)
    value, gate = projected[..., : len(weight) // 2], projected[..., len(weight) // 2 :]
    return value * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2


def of_pytorch(x, weight, bias=None, norm_weight=None, norm_bias=None):
    """PyTorch's operators. On a CPU its GELU of contiguous memory is oneDNN's, less exact in fp32 than the formula."""
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate.contiguous())


def operands(shape, inner, dtype, *, bias=True, norm=False, device="cpu"):
    """Input, weight, bias and the norm's weight and bias, for gates of about one."""
    channels = shape[-1]
    weight = random_normal((2 * inner, channels), 1) * channels**-0.5
    tensors = [random_normal(shape, 0), weight, *([random_normal((2 * inner,), 2)] if bias else [])]
    if norm:
        tensors += [1 + 0.3 * random_normal((channels,), 3), random_normal((channels,), 4)]
    return [x.to(device, dtype) for x in tensors]


def projection(x, weight, bias=None, norm_weight=None, norm_bias=None, **options):
    """The operator on the tensors that there are."""
    eps = None if norm_weight is None else EPS
    return geglu(x, weight, bias, norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=eps, **options)


def check(function, inputs, dtype, eager=definition):
    """Holds the result and the gradients of a function to the budget that the error of ``eager`` gives."""
    actual, eager = (with_gradients(call, *inputs, dtype=dtype) for call in (function, eager))
    expected = with_gradients(definition, *(x.double() for x in inputs), dtype=dtype)
    names = "result", "x", "weight", "bias", "norm_weight", "norm_bias"
    for what, *tensors in zip(names, actual, expected, eager, strict=False):
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


def test_behind_a_norm():
    x, *parameters, norm_weight, norm_bias = operands((2, 3, 8), 5, FP64, norm=True)
    inputs = x, *parameters, norm_weight, norm_bias
    actual, expected = (with_gradients(function, *inputs, dtype=FP64) for function in (projection, definition))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(actual[0], geglu(F.layer_norm(x, (8,), norm_weight, norm_bias, EPS), *parameters))


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
    inputs = [in_nan_surroundings(x) for x in operands((4, 3, 6), 5, FP32, norm=True)]
    copies = [x.clone() for x in inputs]
    with torch.set_grad_enabled(train):
        result = projection(*inputs)
    assert all(map(torch.equal, inputs, copies))
    assert result.is_contiguous() and result.shape == (4, 3, 5)
    torch.testing.assert_close(result, definition(*copies))


def test_gradients():
    inputs = [x.requires_grad_() for x in operands((3, 4), 2, FP64, norm=True)]
    assert torch.autograd.gradcheck(projection, inputs) and torch.autograd.gradgradcheck(projection, inputs)


def test_empty_batch():
    assert geglu(torch.empty(0, 3, 4), torch.ones(6, 4)).shape == (0, 3, 3)


# The fused kernels. They run on a GPU or interpreted; elsewhere the fixture ``device`` skips these tests.

FUSED = {  # shape of x, inner, dtype, parameters
    "bf16": ((37, 24), 40, BF16, {}),
    "fp16-clips": ((2, 19, 32), 16, FP16, {}),
    "fp32": ((2, 17, 24), 20, FP32, {}),
    "odd-bf16": ((33, 7), 5, BF16, {"bias": False}),
    "one-row-fp32": ((1, 16), 3, FP32, {}),
    "norm-bf16": ((37, 40), 40, BF16, {"norm": True}),
    "norm-fp16-clips": ((2, 19, 32), 16, FP16, {"norm": True}),
    "norm-odd-fp32": ((35, 23), 19, FP32, {"norm": True}),
}


def fused(*tensors):
    return projection(*tensors, impl="fused")


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("case", FUSED)
def test_fused_matches_the_definition(case, layout, device):
    shape, inner, dtype, parameters = FUSED[case]
    inputs = operands(shape, inner, dtype, **parameters, device=device)
    check(fused, [in_nan_surroundings(x) for x in inputs] if layout == "strided" else inputs, dtype)


def test_fused_where_the_gates_are_far_from_zero(device):
    x, weight = operands((9, 16), 16, FP32, bias=False, device=device)
    check(fused, [30 * x, weight], FP32)
    assert torch.isfinite(fused(1e4 * x, weight)).all()


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_fused_norm_where_the_mean_is_far_from_zero(dtype, device):
    x, *parameters = operands((40, 48), 16, dtype, norm=True, device=device)
    check(fused, [x + 30, *parameters], dtype)


def test_fused_writes_the_whole_result_and_nothing_else(device, monkeypatch):
    from temporal_layers.kernels.geglu import fused as launchers

    tensors = *operands((37, 24), 20, FP32, norm=True, device=device), EPS
    grad = random_normal((37, 20), 5).to(device, FP32)
    plain = launchers.forward(*tensors), launchers.backward(grad, *tensors)
    rooms = []

    def among_nan(x, columns, dtype):
        rooms.append(torch.full((x.shape[0] + 2, columns), torch.nan, dtype=dtype, device=x.device))
        return rooms[-1][1:-1]

    monkeypatch.setattr(launchers, "empty_rows", among_nan)
    results = launchers.forward(*tensors), launchers.backward(grad, *tensors)
    assert all(map(torch.equal, results, plain))
    for room, result in zip(rooms, results, strict=True):
        assert room.isnan().sum() == room.numel() - result.numel()


def test_fused_is_an_operator_of_pytorch(device):
    from temporal_layers.kernels.geglu.fused import geglu as operator

    tensors = [x.requires_grad_() for x in operands((5, 6), 4, FP32, norm=True, device=device)]
    torch.library.opcheck(operator, (*tensors, EPS))
    torch.library.opcheck(operator, (tensors[0].detach(), tensors[1], None, None, None, None))


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
    inputs = [x.requires_grad_() for x in operands((5, 6), 4, FP32, norm=True, device=device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fused(*inputs)
    assert sorted(x.numel() for x in kept) == sorted(x.numel() for x in inputs)


def test_fused_under_autocast_is_in_the_low_dtype(device):
    inputs = operands((5, 6), 4, FP32, norm=True, device=device)
    with torch.autocast(device.type, BF16):
        result, *gradients = with_gradients(fused, *inputs, dtype=BF16)
        assert result.dtype == projection(*inputs).dtype == BF16
    expected = with_gradients(fused, *inputs, dtype=BF16)
    assert [x.dtype for x in gradients] == [FP32] * 5
    for got, want in zip((result, *gradients), expected, strict=True):
        assert float((got.float() - want).norm()) < 0.03 * float(want.norm())


def test_fused_empty_batch(device):
    inputs = operands((0, 4), 3, FP32, norm=True, device=device)
    result, *gradients = with_gradients(fused, *inputs, dtype=FP32)
    assert result.shape == (0, 3) and all(map(torch.equal, gradients, map(torch.zeros_like, inputs)))


@pytest.mark.skipif(not is_interpreted(), reason="all programs but the last are left out")
def test_fused_reaches_beyond_two_to_the_31(device, monkeypatch):
    from temporal_layers.kernels import product
    from temporal_layers.kernels.geglu import fused as launchers

    # Only the touched pages of this memory exist. The last tile of every tensor lies beyond element 2**31.
    rows, tile = 2**27 + 32, 32
    x = torch.empty(rows, 16, dtype=FP16)
    x[-tile:] = random_normal((tile, 16), 0)
    parameters = *operands((1, 16), 16, FP16)[1:], None, None, None
    grad = x  # of the result's shape as well
    expected = launchers.forward(x[-tile:], *parameters), launchers.backward(grad[-tile:], x[-tile:], *parameters)
    monkeypatch.setattr(launchers.kernels, "place", lambda row_tiles, *_: (row_tiles - 1, row_tiles * 0))
    monkeypatch.setattr(product, "launch", lambda kernel, grid, *args, **kw: launch(kernel, (1,), *args, **kw))
    far = launchers.forward(x, *parameters), launchers.backward(grad, x, *parameters)
    assert all(torch.equal(a[-tile:], b) for a, b in zip(far, expected, strict=True))
