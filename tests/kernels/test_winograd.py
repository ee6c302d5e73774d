"""The convolution over frames with fewer multiplications: against direct summation, and where it is chosen."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.kernels.temporal_conv import temporal_conv, winograd
from temporal_layers.kernels.testing import assert_within_budget, random_map, random_normal, with_gradients


@pytest.fixture
def on_intel(monkeypatch):
    monkeypatch.setattr(winograd, "is_intel", lambda: True)


def direct(x, weight, added=None, residual=None, share=None):
    """PyTorch's conv2d and the sums around it, on ``(batch, frames, positions, channels)``."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight[..., None], padding=(1, 0)).permute(0, 2, 3, 1)
    y = y if share is None else share * y
    y = y if added is None else y + added
    return y if residual is None else residual + y


def operands(batch, num_frames, positions, channels, dtype=torch.float64):
    """Input, weight, and what is added: an embedding for each frame, a residual, a share."""
    inside, outside = channels
    shapes = [
        (batch, num_frames, positions, inside), (outside, inside, 3), (batch, num_frames, 1, outside),
        (batch, num_frames, positions, outside), (),
    ]  # fmt: skip
    return [random_normal(shape, seed).to(dtype) for seed, shape in enumerate(shapes)]


@given(
    batch=st.integers(1, 2),
    num_frames=st.integers(1, 13),
    positions=st.integers(1, 40),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    piece=st.sampled_from([1, 1 << 14, 16 << 20]),
    given=st.tuples(*[st.booleans()] * 3),
)
def test_is_the_convolution(batch, num_frames, positions, channels, piece, given):
    x, weight, *beside = operands(batch, num_frames, positions, channels)
    beside = [value if there else None for value, there in zip(beside, given, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "WORKING_BYTES", piece)  # down to 16 positions at a time
        present = [x, weight, *(value for value in beside if value is not None)]

        def of(function):
            def call(x, weight, *values):
                values = iter(values)
                return function(x, weight, *(next(values) if there else None for there in given))

            return call

        actual = with_gradients(of(winograd.WinogradConv.apply), *present, dtype=torch.float64)
    for got, want in zip(actual, with_gradients(of(direct), *present, dtype=torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("num_frames", "channels"), [(16, 320), (8, 640), (12, 256), (7, 256)])
def test_error_in_single_precision(num_frames, channels):
    """At most twice that of oneDNN's conv3d, as everywhere, in what it computes and in all gradients."""
    inputs = operands(1, num_frames, 6, (channels, channels), torch.float32)
    inputs[1] = inputs[1] / (3 * channels) ** 0.5

    def by_conv3d(x, weight, added, residual, share):
        y = F.conv3d(x.permute(0, 3, 1, 2)[..., None].contiguous(), weight[..., None, None], padding=(1, 0, 0))
        return residual + share * y.squeeze(4).permute(0, 2, 3, 1) + added

    actual = with_gradients(winograd.WinogradConv.apply, *inputs, dtype=torch.float32)
    expected = with_gradients(direct, *(x.double() for x in inputs), dtype=torch.float32)
    eager = with_gradients(by_conv3d, *inputs, dtype=torch.float32)
    for name, *tensors in zip(["result", "x", "weight", "added", "residual"], actual, expected, eager, strict=False):
        assert_within_budget(*tensors, what=name)
    # The share's gradient is one sum of millions of terms that cancel, to which rounding is relative.
    terms = (direct(inputs[0].double(), inputs[1].double()) * random_normal(tuple(actual[0].shape), 99)).norm()
    assert_within_budget(actual[5], expected[5], eager[5], magnitude=terms, what="share")


def test_a_frame_reaches_no_further_than_the_groups_that_it_touches():
    x, weight, *_ = operands(1, 16, 3, (4, 4), torch.float32)
    whole = winograd.winograd_conv(x, weight, None, None, None)
    for frame in range(16):
        spoilt = x.clone()
        spoilt[:, frame] += 1e6
        result = winograd.winograd_conv(spoilt, weight, None, None, None)
        reached = {seen // 4 for seen in (frame - 1, frame, frame + 1) if 0 <= seen < 16}
        for group in range(4):
            part = slice(4 * group, 4 * group + 4)
            if group not in reached:
                assert torch.equal(result[:, part], whole[:, part])
        spoilt[0, frame, 1] = torch.nan
        result = winograd.winograd_conv(spoilt, weight, None, None, None)
        assert result[:, :, 1].isnan().all() and not result[:, :, [0, 2]].isnan().any()


def test_gradients_of_gradients():
    x, weight, added, residual, share = operands(1, 5, 2, (2, 2))
    inputs = [value.requires_grad_() for value in (x, weight, added, residual, share)]
    assert torch.autograd.gradcheck(winograd.WinogradConv.apply, inputs)
    assert torch.autograd.gradgradcheck(winograd.WinogradConv.apply, inputs)


def test_operators():
    inputs = operands(2, 8, 5, (4, 3), torch.float32)
    torch.library.opcheck(winograd.winograd_conv, tuple(inputs))
    torch.library.opcheck(winograd.winograd_conv, (*inputs[:2], None, None, None))
    torch.library.opcheck(winograd.winograd_weight_gradient, (inputs[0], inputs[3]))


def test_under_function_transforms():
    x, weight, *_ = operands(3, 5, 4, (3, 2))

    def loss(convolve):
        return lambda weight, clip: convolve(clip[None], weight, None, None, None).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss(winograd.WinogradConv.apply)), (None, 0))(weight, x)
    torch.testing.assert_close(mapped, torch.func.vmap(torch.func.grad(loss(direct)), (None, 0))(weight, x))


BLOCK = {"bias": (256,), "temb": (8, 256), "residual": (8, 256, 8, 8), "alpha": ()}


@pytest.mark.parametrize("names", [(), ("bias",), ("bias", "temb"), ("bias", "temb", "residual"), tuple(BLOCK)])
def test_is_what_the_operator_takes(on_intel, monkeypatch, names):
    """With all that a block adds, and its gradients, as with direct summation."""
    x = random_map(8, 256, 8, 8)
    beside = [random_normal(BLOCK[name], seed).float() for seed, name in enumerate(names)]
    weight = random_normal((256, 256, 3, 1), 9).float() / 28
    calls = []

    def spied(*args):
        calls.append(args)
        return original(*args)

    original = winograd.winograd_conv
    monkeypatch.setattr(winograd, "winograd_conv", spied)

    def ours(x, weight, *values):
        return temporal_conv(x, weight, num_frames=8, **dict(zip(names, values, strict=True)))

    actual = with_gradients(ours, x, weight, *beside, dtype=torch.float32)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    given = {"bias": 2, "temb": 2, "residual": 3, "alpha": 4}  # where the first call has what is added: all in one pass
    assert all(calls[0][given[name]] is not None for name in names)
    monkeypatch.setattr(winograd, "is_intel", lambda: False)
    calls.clear()
    expected = with_gradients(ours, x.double(), weight.double(), *(y.double() for y in beside), dtype=torch.float32)
    assert not calls
    for name, got, want in zip(["result", "x", "weight", *names], actual, expected, strict=True):
        scale = float(want.abs().max()) if name != "alpha" else float(want.abs()) + 1.0
        torch.testing.assert_close(
            got.double(), want, rtol=0, atol=2e-5 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_where_it_is_chosen(on_intel, monkeypatch):
    def chosen(x=None, weight=None, num_frames=8, causal=False):
        x = torch.empty(8, 256, 8, 8) if x is None else x
        weight = torch.empty(256, 256, 3, 1) if weight is None else weight
        return winograd.is_faster(x, weight, num_frames, causal)

    assert chosen() and chosen(torch.empty(16, 256, 8, 8), num_frames=16)
    assert not chosen(causal=True)
    assert not chosen(num_frames=1) and not chosen(num_frames=2) and not chosen(torch.empty(5, 256, 16, 16), None, 5)
    assert not chosen(torch.empty(8, 256, 8, 7)), "too few pixels"
    assert not chosen(torch.empty(0, 256, 8, 8)) and not chosen(torch.empty(8, 256, 0, 8))
    assert not chosen(torch.empty(8, 128, 8, 8), torch.empty(256, 128, 3, 1)), "too few channels"
    assert not chosen(weight=torch.empty(256, 256, 5, 1)) and not chosen(weight=torch.empty(256, 256, 1, 1))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not chosen(torch.empty(8, 256, 8, 8, dtype=dtype))
    assert not chosen(torch.empty(8, 256, 8, 8, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not chosen()
    monkeypatch.setattr(winograd, "is_intel", lambda: False)
    assert not chosen()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own formulas
def test_derivatives_carried_forward_take_the_library(on_intel):
    x, weight = random_map(8, 256, 8, 8), random_normal((256, 256, 3, 1), 1).float()
    primal, tangent = torch.func.jvp(lambda x: temporal_conv(x, weight, num_frames=8), (x,), (x,))
    torch.testing.assert_close(primal, tangent)


def test_compiled_it_is_the_library(on_intel):
    """A compiler fuses what stands around a convolution that it knows."""
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph

    x, weight = random_map(8, 256, 8, 8), random_normal((256, 256, 3, 1), 1).float() / 28
    compiled = torch.compile(lambda x: temporal_conv(x, weight, num_frames=8), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), temporal_conv(x, weight, num_frames=8), rtol=0, atol=2e-5)
    assert "conv2d" in graphs[0] and "winograd" not in graphs[0]
