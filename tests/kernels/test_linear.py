"""A product with its layer norm, residual and blend against their definitions in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.kernels.launch import is_interpreted, launch
from temporal_layers.kernels.linear import linear
from temporal_layers.kernels.testing import (
    assert_within_budget,
    in_nan_surroundings,
    random_normal,
    with_gradients,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EPS = 1e-5
NORM = ("norm_weight", "norm_bias")


def normed(x, weight, bias):
    """The layer norm, written out."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def definition(
    x, weight, bias=None, norm_weight=None, norm_bias=None, residual=None, alpha=None, *, norm, num_frames=1
):
    """The formulas, one after the other."""
    y = (normed(x, norm_weight, norm_bias) if norm else x) @ weight.t()
    return finished(y if bias is None else y + bias, residual, alpha, num_frames)


def of_pytorch(
    x, weight, bias=None, norm_weight=None, norm_bias=None, residual=None, alpha=None, *, norm, num_frames=1
):
    """PyTorch's operators, one after the other."""
    rows = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS) if norm else x
    return finished(F.linear(rows, weight, bias), residual, alpha, num_frames)


def finished(update, residual, alpha, num_frames):
    """The blend of a residual branch with its input, step by step."""
    if residual is None:
        return update
    if alpha is None:
        return residual + update
    per_row = alpha.expand(num_frames, update.shape[-1]).repeat(len(update) // num_frames, 1)
    per_row = per_row.view(len(update), *[1] * (update.dim() - 2), -1)
    return (per_row * residual + (1 - per_row) * (residual + update)).to(update.dtype)


def operands(shape, out, names, dtype, *, num_frames=1, mean=0.0, device="cpu"):
    """Input, weight, and by argument what ``names`` asks for, as in ``alpha:frame``; a norm's weight is about one."""
    channels = shape[-1]
    x = random_normal(shape, 0)
    shapes = {
        "bias": (out,), "norm_weight": (channels,), "norm_bias": (channels,), "residual": (*shape[:-1], out),
        "alpha:scalar": (), "alpha:frame": (num_frames, 1), "alpha:channel": (1, out), "alpha:both": (num_frames, out),
    }  # fmt: skip
    found = {"x": (x + mean).to(dtype), "weight": (random_normal((out, channels), 1) * channels**-0.5).to(dtype)}
    for seed, name in enumerate(names, start=2):
        value = random_normal(shapes[name], seed)
        if name.startswith("alpha"):
            found["alpha"] = value.float().sigmoid()
        else:
            found[name] = (1 + 0.3 * value if name == "norm_weight" else value).to(dtype)
    return {name: value.to(device) for name, value in found.items()}


def by_name(function, names, norm, num_frames, **options):
    """A function of the tensors alone. ``linear`` says by its epsilon that it norms."""
    if function is linear:
        options["norm_eps"] = EPS if norm else None
    else:
        options["norm"] = norm

    def call(*tensors):
        return function(**dict(zip(names, tensors, strict=True)), num_frames=num_frames, **options)

    return call


def check(tensors, dtype, *, norm, num_frames=1, impl="auto"):
    """Holds the result and the gradients to the budget that PyTorch's error gives."""
    inputs = list(tensors.values())
    ours = by_name(linear, tensors, norm, num_frames, impl=impl)
    actual = with_gradients(ours, *inputs, dtype=dtype)
    inputs = [x.cpu() for x in inputs]
    expected = with_gradients(
        by_name(definition, tensors, norm, num_frames), *(x.double() for x in inputs), dtype=dtype
    )
    eager = with_gradients(by_name(of_pytorch, tensors, norm, num_frames), *inputs, dtype=dtype)
    for name, *results in zip(["result", *tensors], actual, expected, eager, strict=True):
        magnitude = magnitude_of_alpha(results[1], tensors, norm) if name == "alpha" else None
        assert_within_budget(*results, magnitude=magnitude, what=name)
    return actual


def magnitude_of_alpha(gradient, tensors, norm):
    """What the rounding of alpha's gradient is relative to: random terms, rounded like the update."""
    beside = {name: value.cpu().double() for name, value in tensors.items() if name not in ("residual", "alpha")}
    update = definition(**beside, norm=norm)
    upstream = random_normal(tuple(update.shape), 99)  # that of with_gradients
    ratio = torch.finfo(tensors["x"].dtype).eps / torch.finfo(torch.float32).eps
    return gradient.abs() + ratio * (update * upstream).norm() / gradient.numel() ** 0.5


@given(
    shape=st.sampled_from([(6, 5), (6, 2, 8), (6, 1, 3, 4), (2, 7)]),
    out=st.integers(1, 6),
    beside=st.sampled_from([(), ("bias",)]),
    norm=st.sampled_from([None, (), NORM[:1], NORM]),
    blend=st.sampled_from(
        [(), ("residual",), *(("residual", f"alpha:{kind}") for kind in ("scalar", "frame", "channel", "both"))]
    ),
    dtype=st.sampled_from([FP16, BF16, FP32, FP64]),
)
def test_matches_the_definition(shape, out, beside, norm, blend, dtype):
    tensors = operands(shape, out, (*beside, *(norm or ()), *blend), dtype, num_frames=2)
    if dtype != FP64:
        check(tensors, dtype, norm=norm is not None, num_frames=2)
        return
    functions = (by_name(function, tensors, norm is not None, 2) for function in (linear, definition))
    wide = [x.double() for x in tensors.values()]
    for got, want in zip(*(with_gradients(call, *wide, dtype=dtype) for call in functions), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_is_that_of_the_layers():
    layer, norm = torch.nn.Linear(6, 5), torch.nn.LayerNorm(6)
    x, residual = random_normal((3, 4, 6), 0).float(), random_normal((3, 4, 5), 1).float()
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    named = {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
    assert torch.equal(linear(x, layer.weight, layer.bias, **named, residual=residual), residual + layer(norm(x)))


def test_a_zero_update_and_an_alpha_of_one_give_the_residual():
    x, residual = random_normal((4, 6), 0).float(), random_normal((4, 5), 1).float()
    weight, alpha = random_normal((5, 6), 2).float(), torch.tensor(0.3)
    assert torch.equal(linear(x, torch.zeros(5, 6), residual=residual, alpha=alpha), residual)
    assert torch.equal(linear(x, weight, residual=residual, alpha=torch.tensor(1.0)), residual)


@pytest.mark.parametrize("train", [True, False])
def test_operands_are_not_written(train):
    tensors = operands((4, 3, 6), 5, ("bias", *NORM, "residual", "alpha:channel"), FP32)
    strided = {name: in_nan_surroundings(value) for name, value in tensors.items()}
    with torch.set_grad_enabled(train):
        result = linear(**strided, norm_eps=EPS)
    assert all(torch.equal(strided[name], tensors[name]) for name in tensors)
    torch.testing.assert_close(result, definition(**tensors, norm=True))


def test_gradients():
    tensors = operands((4, 2, 4), 3, ("bias", *NORM, "residual", "alpha:frame"), FP64, num_frames=2)
    inputs = [x.double().requires_grad_() for x in tensors.values()]
    call = by_name(linear, tensors, True, 2)
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)


def test_empty_batch():
    assert linear(torch.empty(0, 3, 4), torch.ones(6, 4), norm_eps=EPS, residual=torch.empty(0, 3, 6)).shape == (
        0,
        3,
        6,
    )
    assert linear(torch.empty(0, 4), torch.ones(6, 4), residual=torch.empty(0, 6), alpha=torch.ones(())).shape == (0, 6)


# The fused kernel. It runs on a GPU or interpreted; elsewhere the fixture ``device`` skips these tests.

ALL = ("bias", *NORM, "residual", "alpha:scalar")
FUSED = {  # shape of x, channels out, frames, dtype, norm?, what stands around
    "all-bf16": ((37, 24), 40, 1, BF16, True, ALL),
    "all-fp16-clips": ((2, 19, 32), 48, 2, FP16, True, ALL),
    "all-odd-fp32": ((2, 17, 23), 37, 2, FP32, True, (*ALL[:-1], "alpha:channel")),
    "norm-bf16": ((2, 40, 64), 33, 1, BF16, True, NORM),
    "norm-without-parameters-fp16": ((35, 16), 16, 1, FP16, True, ()),
    "norm-weight-fp32": ((35, 40), 16, 1, FP32, True, ("norm_weight", "bias")),
    "norm-bias-odd-bf16": ((33, 7), 5, 1, BF16, True, ("norm_bias",)),
    "residual-bf16": ((4, 9, 32), 24, 2, BF16, False, ("bias", "residual")),
    "alpha-per-frame-fp32": ((4, 9, 16), 24, 2, FP32, False, ("bias", "residual", "alpha:frame")),
    "alpha-per-frame-and-channel-fp16": ((4, 16), 24, 2, FP16, True, ("residual", "alpha:both")),
    "plain-fp32": ((1, 16), 3, 1, FP32, False, ()),
}


def fused_case(name, device, layout="contiguous"):
    shape, out, num_frames, dtype, norm, names = FUSED[name]
    tensors = operands(shape, out, names, dtype, num_frames=num_frames, device=device)
    if layout == "strided":
        tensors = {name: in_nan_surroundings(value) for name, value in tensors.items()}
    return tensors, {"norm": norm, "num_frames": num_frames}


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("case", FUSED)
def test_fused_matches_the_definition(case, layout, device):
    tensors, options = fused_case(case, device, layout)
    dtype = tensors["x"].dtype
    result = check(tensors, dtype, **options, impl="fused")[0]
    assert result.is_contiguous() and result.dtype == dtype


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("mean", [3, 30, 300])
def test_fused_norm_where_the_mean_is_far_from_zero(mean, dtype, device):
    # Of both signs, and rows whose first element is far from the others.
    tensors = operands((40, 48), 24, ("bias", *NORM), dtype, mean=mean, device=device)
    tensors["x"][::2] *= -1
    tensors["x"][::5, 0] += 10
    check(tensors, dtype, norm=True, impl="fused")


def test_fused_norm_of_rows_that_are_constant(device):
    x = torch.tensor([0.0, 1.0, -30.0, 300.0], device=device)[:, None].expand(4, 40)
    weight = random_normal((24, 40), 1).to(device)
    for dtype in (BF16, FP32):
        result = linear(x.to(dtype), weight.to(dtype), norm_eps=EPS, impl="fused")
        # What is left is the rounding of the fp32 sum, times the reciprocal deviation of 1 / sqrt(eps).
        assert float(result.abs().max()) <= (0 if dtype == FP32 else 300 * 2**-20 * EPS**-0.5)


def test_fused_writes_the_whole_result_and_nothing_else(device, monkeypatch):
    from temporal_layers.kernels.linear import fused as launchers

    tensors, _ = fused_case("all-bf16", device)
    x, weight, bias, norm_weight, norm_bias, residual, alpha = tensors.values()
    arguments = (x, weight, bias, norm_weight, norm_bias, EPS, residual, alpha.reshape(1))
    plain, rooms = launchers.forward(*arguments), []

    def among_nan(x, columns, dtype):
        rooms.append(torch.full((x.shape[0] + 2, columns), torch.nan, dtype=dtype, device=x.device))
        return rooms[-1][1:-1]

    monkeypatch.setattr(launchers, "empty_rows", among_nan)
    result = launchers.forward(*arguments)
    assert torch.equal(result, plain) and rooms[0].isnan().sum() == rooms[0].numel() - result.numel()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [(), NORM[:1], NORM])
def test_the_norm_is_folded_into_the_weight(norm, bias, device):
    from temporal_layers.kernels.product import fold_norm

    tensors = operands((1, 600), 5, ("bias", *norm), FP16, device=device)
    weight, gamma, beta = (tensors.get(name) for name in ("weight", *NORM))
    folded, shift, sums = fold_norm(weight, tensors["bias"] if bias else None, gamma, beta)
    exact = weight.double() * (1 if gamma is None else gamma.double())
    assert torch.equal(folded, exact.to(FP16))
    torch.testing.assert_close(sums.double(), folded.double().sum(1), rtol=1e-5, atol=1e-5)
    added = torch.zeros_like(shift).double() if beta is None else weight.double() @ beta.double()
    torch.testing.assert_close(shift.double(), added + (tensors["bias"].double() if bias else 0), rtol=1e-5, atol=1e-5)


def test_fused_is_an_operator_of_pytorch(device):
    from temporal_layers.kernels.linear.fused import linear as operator

    tensors = operands((5, 6), 4, ALL, FP32, device=device)
    x, weight, bias, norm_weight, norm_bias, residual, alpha = (value.requires_grad_() for value in tensors.values())
    alpha = alpha.detach().reshape(1).requires_grad_()
    torch.library.opcheck(operator, (x, weight, bias, norm_weight, norm_bias, EPS, residual, alpha))
    torch.library.opcheck(operator, (x.detach(), weight, None, None, None, None, None, None))


def test_fused_in_programs(device):
    tensors, _ = fused_case("all-bf16", device)
    inputs = [x.float() for x in tensors.values()]

    class Product(torch.nn.Module):
        def forward(self, *inputs):
            return linear(**dict(zip(tensors, inputs, strict=True)), norm_eps=EPS, impl="fused")

    module = Product()
    expected = with_gradients(module, *inputs, dtype=FP32)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for got, want in zip(with_gradients(compiled, *inputs, dtype=FP32), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    program = torch.export.export(module, tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), expected[0])
    x, weight, bias, *rest = inputs
    biases = torch.stack([bias, -bias])
    mapped = torch.func.vmap(module, in_dims=(None, None, 0, *[None] * len(rest)))(x, weight, biases, *rest)
    torch.testing.assert_close(mapped, torch.stack([module(x, weight, each, *rest) for each in biases]))


def test_fused_keeps_nothing_but_its_operands(device):
    tensors = operands((5, 6), 4, ALL, FP32, device=device)
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear(**leaves, norm_eps=EPS, impl="fused")
    expected = [value.numel() for name, value in leaves.items() if name != "residual"]
    assert sorted(x.numel() for x in kept) == sorted(expected)


@pytest.mark.parametrize("trained", ["norm_weight", "bias", "residual", "alpha"])
def test_fused_gradient_of_one_operand(trained, device):
    tensors, _ = fused_case("all-odd-fp32", device)
    call = lambda value: linear(**tensors | {trained: value}, norm_eps=EPS, impl="fused")  # noqa: E731
    alone = with_gradients(call, tensors[trained], dtype=FP32)[1]
    together = with_gradients(by_name(linear, tensors, True, 2, impl="fused"), *tensors.values(), dtype=FP32)[1:]
    torch.testing.assert_close(alone, dict(zip(tensors, together, strict=True))[trained])


def test_fused_under_autocast_is_in_the_low_dtype(device):
    tensors = operands((5, 6), 4, ALL, FP32, device=device)
    inputs = list(tensors.values())
    exact = with_gradients(by_name(linear, tensors, True, 1, impl="fused"), *inputs, dtype=FP32)
    with torch.autocast(device.type, BF16):
        assert linear(*inputs[:2], impl="fused").dtype == BF16
        calls = (by_name(linear, tensors, True, 1, impl=impl) for impl in ("fused", "reference"))
        results = [with_gradients(call, *inputs, dtype=FP32) for call in calls]
    for got, other, want in zip(*results, exact, strict=True):
        assert got.dtype == other.dtype == FP32
        assert float((got - want).norm()) < 0.03 * float(want.norm())


def test_fused_empty_batch(device):
    tensors = operands((0, 4), 3, ALL[:-1], FP32, device=device)
    result, *gradients = with_gradients(by_name(linear, tensors, True, 1, impl="fused"), *tensors.values(), dtype=FP32)
    assert result.shape == (0, 3) and all(map(torch.equal, gradients, map(torch.zeros_like, tensors.values())))


@pytest.mark.skipif(not is_interpreted(), reason="all programs but the last are left out")
def test_fused_reaches_beyond_two_to_the_31(device, monkeypatch):
    from temporal_layers.kernels import product
    from temporal_layers.kernels.linear import fused as launchers

    # Only the touched pages of this memory exist. The last tile of every tensor lies beyond element 2**31.
    rows, tile = 2**27 + 32, 32
    x = torch.empty(rows, 16, dtype=FP16)
    x[-tile:] = random_normal((tile, 16), 0)
    _, weight, bias, *norm = operands((1, 16), 16, ("bias", *NORM), FP16).values()
    call = lambda x: launchers.forward(x, weight, bias, *norm, EPS, x, None)  # noqa: E731
    expected = call(x[-tile:])
    monkeypatch.setattr(launchers.kernels, "place", lambda row_tiles, *_: (row_tiles - 1, row_tiles * 0))

    def launch_one(kernel, grid, *arguments, **options):
        launch(kernel, grid if kernel is product.fold_norm_kernel else (1,), *arguments, **options)

    monkeypatch.setattr(product, "launch", launch_one)
    assert torch.equal(call(x)[-tile:], expected)
