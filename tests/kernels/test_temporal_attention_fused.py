"""The fused attention over frames against float64, in what it reads and writes, and as a PyTorch operator.

Runs on a GPU, or interpreted with ``TRITON_INTERPRET=1``; skips elsewhere.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from temporal_layers.kernels.launch import is_interpreted
from temporal_layers.kernels.temporal_attention import temporal_attention, tiles
from temporal_layers.kernels.testing import (
    assert_within_budget,
    in_nan_surroundings,
    random_normal,
    random_tokens,
    with_gradients,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def allowed_pairs(batch, num_frames, key_frames, causal=False, window=None, frame_mask=None):
    """The rules of masking, ``(batch, 1, 1, frames, key_frames)``."""
    allowed = torch.zeros(batch, num_frames, key_frames, dtype=torch.bool)
    for clip, i, j in torch.cartesian_prod(*map(torch.arange, allowed.shape)).tolist():
        here = i + key_frames - num_frames
        allowed[clip, i, j] = (
            (not causal or j <= here)
            and (window is None or abs(here - j) <= window)
            and (frame_mask is None or bool(frame_mask[clip, j]))
        )
    return allowed[:, None, None]


def oracle(query, key, value, bias, num_frames, key_frames, num_heads, scale, **masks):
    """Textbook attention on permuted operands."""
    batch, positions = query.shape[0] // num_frames, query.shape[1]
    q, k, v = (x.reshape(batch, frames, positions, num_heads, -1).permute(0, 2, 3, 1, 4)
               for x, frames in ((query, num_frames), (key, key_frames), (value, key_frames)))  # fmt: skip
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    allowed = allowed_pairs(batch, num_frames, key_frames, **masks).to(query.device)
    dead = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~(allowed | dead), -torch.inf).softmax(-1).masked_fill(dead, 0)
    return (weights @ v).permute(0, 3, 1, 2, 4).reshape(query.shape)


def check(query, key, value, bias, num_frames, key_frames, num_heads, scale=None, **masks):
    """Result and every gradient within budget of float64; the yardstick is the reference in the same dtype."""
    dtype = query.dtype
    inputs = [x for x in (query, key, value, bias) if x is not None]

    def run(function, tensors):
        return with_gradients(lambda q, k, v, b=None: function(q, k, v, b), *tensors, dtype=dtype)

    def ours(impl):
        return lambda q, k, v, b: temporal_attention(
            q, k, v, num_frames=num_frames, num_heads=num_heads, bias=b, scale=scale, **masks, impl=impl,
            num_key_frames=None if key_frames == num_frames else key_frames,
        )  # fmt: skip

    actual, yardstick = run(ours("fused"), inputs), run(ours("reference"), inputs)
    expected = run(
        lambda q, k, v, b: oracle(q, k, v, b, num_frames, key_frames, num_heads, scale, **masks),
        [x.double() for x in inputs],
    )
    for what, *tensors in zip(("result", "query", "key", "value", "bias"), actual, expected, yardstick, strict=False):
        # Behind the softmax gradients are differences of terms of order head_dim, taken in fp32, and may vanish.
        terms = 8 * query.shape[2] / num_heads * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
        magnitude = tensors[1].abs() + terms if what in ("query", "key", "bias") else None
        assert_within_budget(*tensors, magnitude=magnitude, what=what)


def operands(device, batch, num_frames, key_frames, positions, channels, dtype, layout="contiguous"):
    return (
        random_tokens(batch * frames, positions, channels, dtype=dtype, layout=layout, seed=seed, device=device)
        for seed, frames in enumerate((num_frames, key_frames, key_frames))
    )


@pytest.mark.parametrize(
    ("num_frames", "key_frames", "head_dim", "num_heads", "positions", "batch", "dtype", "layout"),
    [
        (1, 1, 8, 2, 19, 2, FP32, "contiguous"),
        (1, 1, 64, 1, 3, 1, BF16, "strided"),
        (2, 2, 40, 2, 9, 1, FP16, "contiguous"),
        (5, 5, 40, 2, 5, 2, BF16, "strided"),
        (8, 8, 64, 2, 17, 1, BF16, "contiguous"),
        (8, 8, 160, 1, 3, 1, FP32, "contiguous"),
        (16, 16, 40, 2, 9, 2, BF16, "contiguous"),
        (16, 16, 64, 1, 3, 2, FP32, "strided"),
        (16, 16, 80, 2, 9, 1, FP16, "contiguous"),
        (16, 16, 128, 1, 5, 1, BF16, "contiguous"),
        (16, 16, 160, 1, 9, 1, BF16, "contiguous"),
        (17, 17, 72, 1, 3, 1, BF16, "contiguous"),
        (24, 24, 64, 2, 5, 1, FP16, "contiguous"),
        (32, 32, 80, 1, 5, 2, BF16, "contiguous"),
        (33, 33, 64, 1, 2, 1, FP32, "contiguous"),
        (64, 64, 160, 1, 2, 1, BF16, "contiguous"),
        (64, 64, 40, 1, 2, 1, FP32, "contiguous"),
        (1, 16, 40, 2, 3, 2, BF16, "contiguous"),
        (8, 3, 16, 1, 11, 2, FP32, "contiguous"),
        (3, 64, 24, 1, 2, 1, FP16, "contiguous"),
        (64, 2, 32, 1, 2, 1, FP32, "contiguous"),
    ],
)
def test_sizes(num_frames, key_frames, head_dim, num_heads, positions, batch, dtype, layout, device):
    tensors = operands(device, batch, num_frames, key_frames, positions, num_heads * head_dim, dtype, layout)
    check(*tensors, None, num_frames, key_frames, num_heads)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1.3},
        {"bias": True},
        {"causal": True},
        {"window": 1},
        {"frame_mask": torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])},
        {"frame_mask": torch.tensor([[True, True, False, True, True], [False] * 5]), "bias": True},
        {"bias": True, "causal": True, "window": 2},
    ],
    ids=["scale", "bias", "causal", "window", "frame_mask", "dead-bias", "bias-causal-window"],
)
@pytest.mark.parametrize("num_frames", [5, 18])
def test_options(dtype, options, num_frames, device):
    options = {"bias": None} | options
    tensors = operands(device, 2, num_frames, 5, 3, 2 * 16, dtype)
    if options["bias"]:
        options["bias"] = random_normal((2, num_frames, 5), 3).to(device, dtype)
    if "frame_mask" in options:
        options["frame_mask"] = options["frame_mask"].to(device)
    check(*tensors, num_frames=num_frames, key_frames=5, num_heads=2, **options)


# The device is the same for all examples.
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    num_frames=st.integers(1, 20),
    key_frames=st.integers(1, 20) | st.none(),
    positions=st.integers(1, 5),
    heads=st.sampled_from([(1, 8), (2, 16), (1, 72)]),
    with_bias=st.booleans(),
    mask_seed=st.integers(0, 100) | st.none(),
    causal=st.booleans(),
    window=st.sampled_from([None, 0, 1, 3, 100]),
    scale=st.sampled_from([None, 0.3]),
    layout=st.sampled_from(["contiguous", "strided"]),
    dtype=st.sampled_from([FP16, BF16, FP32]),
)
def test_any_options(
    device, batch, num_frames, key_frames, positions, heads, with_bias, mask_seed, causal, window, scale, layout, dtype
):
    key_frames, (num_heads, dim) = key_frames or num_frames, heads
    tensors = operands(device, batch, num_frames, key_frames, positions, num_heads * dim, dtype, layout)
    bias = random_normal((num_heads, num_frames, key_frames), 3).to(device, dtype) if with_bias else None
    frame_mask = None if mask_seed is None else (random_normal((batch, key_frames), mask_seed) > -0.3).to(device)
    check(*tensors, bias, num_frames, key_frames, num_heads, scale, causal=causal, window=window, frame_mask=frame_mask)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_operands_packed_in_one_tensor(dtype, device):
    packed = random_tokens(8, 5, 3 * 48, dtype=dtype, device=device)
    check(*packed.chunk(3, dim=-1), None, 4, 4, 2)
    interleaved = random_tokens(8, 5, 3 * 48, dtype=dtype, device=device).unflatten(-1, (2, 3, 24)).movedim(-2, 0)
    check(*(x.flatten(-2) for x in interleaved), None, 4, 4, 2)


@pytest.mark.parametrize("upstream", ["expanded", "strided"])
def test_upstream_gradient_of_any_layout(upstream, device):
    inputs = [x.requires_grad_() for x in operands(device, 2, 3, 3, 5, 16, FP32)]
    grad = random_tokens(6, 5, 16, device=device, seed=9)
    grad = grad[:, :1, :1].expand(6, 5, 16) if upstream == "expanded" else in_nan_surroundings(grad)
    results = [
        torch.autograd.grad(temporal_attention(*inputs, num_frames=3, num_heads=2, impl=impl), inputs, grad)
        for impl in ("fused", "reference")
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_bias", [False, True])
def test_same_bits_every_time(with_bias, device):
    inputs = list(operands(device, 2, 6, 6, 21, 32, BF16))
    inputs += [random_normal((2, 6, 6), 3).to(device, BF16)] if with_bias else []

    def run(q, k, v, b=None):
        return temporal_attention(q, k, v, num_frames=6, num_heads=2, bias=b, impl="fused")

    first, second = (with_gradients(run, *inputs, dtype=BF16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_gradient_of_the_bias_in_several_launches(dtype, device, monkeypatch):
    from temporal_layers.kernels.temporal_attention import fused_backward

    launches, launch = [], fused_backward.launch
    monkeypatch.setattr(fused_backward, "launch", lambda *a, **k: launches.append(a[1]) or launch(*a, **k))
    monkeypatch.setattr(fused_backward, "BIAS_PROGRAMS", 4)
    bias = random_normal((2, 6, 5), 3).to(device, dtype)
    check(*operands(device, 1, 6, 5, 21, 16, dtype), bias, 6, 5, 2, causal=True)
    assert launches == {BF16: [(4,), (2,)], FP32: [(4,), (4,), (4,)]}[dtype]


@pytest.mark.parametrize(("num_frames", "key_frames", "head_dim"), [(5, 7, 40), (16, 16, 24)])
def test_writes_every_element_of_its_results_and_nothing_else(num_frames, key_frames, head_dim, device):
    from temporal_layers.kernels.temporal_attention.call import Call
    from temporal_layers.kernels.temporal_attention.fused_backward import launch_backward
    from temporal_layers.kernels.temporal_attention.fused_forward import launch_forward

    query, key, value = operands(device, 2, num_frames, key_frames, 5, 2 * head_dim, FP32)
    grad = random_tokens(*query.shape, device=device, seed=3)
    expected = with_gradients(
        lambda q, k, v: oracle(q, k, v, None, num_frames, key_frames, 2, None),
        *(x.double() for x in (query, key, value)), dtype=FP32, seed=3,
    )  # fmt: skip
    call = Call.of(query, None, None, num_frames, key_frames, 2, False, None, head_dim**-0.5)
    results = [in_nan_surroundings(torch.full_like(x, torch.nan)) for x in (query, query, key, value)]
    launch_forward(query, key, value, results[0], call)
    launch_backward(grad, query, key, value, *results[1:], call, with_bias=False)
    for result, want in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), want, rtol=1e-5, atol=1e-5)
        room = result._base if result._base is not None else result
        assert int(room.isfinite().sum()) == result.numel()


def test_more_sequences_than_a_grid_dimension_takes(device, monkeypatch):
    if is_interpreted():  # few large programs: each costs the interpreter 20 ms
        table = {entry: (chunk, 2048, warps) for entry, (chunk, _, warps) in tiles.TABLE.items()}
        monkeypatch.setattr(tiles, "TABLE", table)
    query, key, value = operands(device, 1, 2, 2, 70_003, 8, FP32)
    check(query, key, value, None, 2, 2, 1)


@pytest.mark.gpu
def test_more_clips_than_a_grid_dimension_takes(device):
    check(*operands(device, 70_003, 2, 2, 1, 16, BF16), None, 2, 2, 2)


@pytest.mark.parametrize("far", ["frames", "positions"])
def test_offsets_beyond_two_to_the_31(far, device):
    """Operands and results whose elements lie gigabytes apart; memory in between is never touched."""
    from temporal_layers.kernels.temporal_attention.call import Call
    from temporal_layers.kernels.temporal_attention.fused_backward import launch_backward
    from temporal_layers.kernels.temporal_attention.fused_forward import launch_forward

    shape, step = {"frames": ((4, 2, 16), 2**30), "positions": ((2, 4, 16), 2**30)}[far]
    strides = (step, 256, 1) if far == "frames" else (256, step, 1)
    room = torch.empty(3 * step + 4096, dtype=FP16, device=device)

    def place(index, values=None):
        window = room.as_strided(shape, strides, 16 * index)
        return window.fill_(torch.nan) if values is None else window.copy_(values)

    near = [random_tokens(*shape, dtype=FP16, seed=seed, device=device) for seed in range(4)]
    query, key, value, grad = (place(index, values) for index, values in enumerate(near))
    out, dq, dk, dv = (place(index) for index in range(4, 8))
    call = Call.of(query, None, None, 2, 2, 2, False, None, 8**-0.5)
    launch_forward(query, key, value, out, call)
    launch_backward(grad, query, key, value, dq, dk, dv, call, with_bias=False)
    leaves = [x.requires_grad_() for x in near[:3]]
    expected = temporal_attention(*leaves, num_frames=2, num_heads=2, impl="fused")
    for got, want in zip((out, dq, dk, dv), (expected, *torch.autograd.grad(expected, leaves, near[3])), strict=True):
        assert torch.equal(got, want)


def test_a_query_without_keys_returns_zero_and_sends_no_gradient(device):
    inputs = [x.requires_grad_() for x in operands(device, 2, 3, 3, 2, 16, BF16)]
    frame_mask = torch.tensor([[True, True, True], [False, False, False]], device=device)
    out = temporal_attention(*inputs, num_frames=3, num_heads=2, frame_mask=frame_mask, impl="fused")
    assert out[3:].count_nonzero() == 0 and out[:3].count_nonzero() == out[:3].numel()
    for gradient in torch.autograd.grad(out, inputs, torch.ones_like(out)):
        assert gradient.isfinite().all() and gradient[3:].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 3, 16), (4, 0, 16)])
def test_empty_tokens(shape, device):
    x = torch.empty(shape, device=device, requires_grad=True)
    bias = torch.zeros(2, 2, 2, device=device, requires_grad=True)
    out = temporal_attention(x, x, x, num_frames=2, num_heads=2, bias=bias, impl="fused")
    assert out.shape == shape
    gradients = torch.autograd.grad(out.sum(), (x, bias))
    assert gradients[0].shape == shape and gradients[1].count_nonzero() == 0
