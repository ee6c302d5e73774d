"""Attention over frames against loops in float64, against PyTorch's after a permutation, and its masks by hand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.kernels.temporal_attention import reference, temporal_attention
from temporal_layers.kernels.testing import assert_within_budget, random_normal, random_tokens, with_gradients

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FULL = {"causal": False, "window": None, "frame_mask": None}


def may_attend(clip, i, j, num_frames, key_frames, causal, window, frame_mask):
    """The rules of masking, for one query frame and one key frame."""
    here = i + key_frames - num_frames
    return (
        (not causal or j <= here)
        and (window is None or abs(here - j) <= window)
        and (frame_mask is None or bool(frame_mask[clip, j]))
    )


def loops(query, key, value, bias, num_frames, key_frames, num_heads, scale, **masks):
    """Each query frame by itself: scores against the key frames it may attend to, then their weighted sum."""
    positions, channels = query.shape[1:]
    dim = channels // num_heads
    scale = dim**-0.5 if scale is None else scale
    q, k, v = (x.reshape(-1, f, positions, num_heads, dim)
               for x, f in ((query, num_frames), (key, key_frames), (value, key_frames)))  # fmt: skip
    clips = []
    for clip in range(q.shape[0]):
        frames = []
        for i in range(num_frames):
            js = [j for j in range(key_frames) if may_attend(clip, i, j, num_frames, key_frames, **masks)]
            if not js:
                frames.append(0 * q[clip, i])
                continue
            scores = torch.einsum("shd,jshd->jsh", q[clip, i], k[clip, js]) * scale
            if bias is not None:
                scores = scores + bias[:, i, js].T[:, None]
            weights = torch.exp(scores - scores.amax(0))
            frames.append(torch.einsum("jsh,jshd->shd", weights / weights.sum(0), v[clip, js]))
        clips.append(torch.stack(frames))
    return torch.stack(clips).reshape(query.shape)


def permuted(query, key, value, bias, num_frames, key_frames, num_heads, scale, **masks):
    """PyTorch's attention over ``(batch*positions, heads, frames, dim)``, with an additive mask."""
    batch, positions = query.shape[0] // num_frames, query.shape[1]

    def split(x, frames):
        return x.reshape(batch, frames, positions, num_heads, -1).permute(0, 2, 3, 1, 4).flatten(0, 1)

    mask = torch.zeros(batch, 1, num_frames, key_frames, dtype=query.dtype)
    dead = torch.zeros(batch, num_frames, 1, 1, dtype=torch.bool)
    for clip in range(batch):
        for i in range(num_frames):
            allowed = [may_attend(clip, i, j, num_frames, key_frames, **masks) for j in range(key_frames)]
            dead[clip, i] = not any(allowed)
            mask[clip, 0, i, ~torch.tensor(allowed)] = -torch.inf if any(allowed) else 0
    mask = mask if bias is None else mask + bias
    out = F.scaled_dot_product_attention(
        split(query, num_frames), split(key, key_frames), split(value, key_frames),
        attn_mask=mask.repeat_interleave(positions, 0), scale=scale,
    )  # fmt: skip
    out = out.unflatten(0, (batch, positions)).permute(0, 3, 1, 2, 4).flatten(3)
    return out.masked_fill(dead, 0).reshape(query.shape)


def check(query, key, value, bias, num_frames, key_frames, num_heads, scale, **masks):
    """Result and every gradient within budget of float64; the yardstick is PyTorch's attention in the same dtype."""
    dtype = query.dtype
    inputs = [x for x in (query, key, value, bias) if x is not None]

    def ours(query, key, value, bias, num_frames, key_frames, num_heads, scale, **masks):
        return temporal_attention(
            query, key, value, num_frames=num_frames, num_heads=num_heads, bias=bias, scale=scale, **masks,
            num_key_frames=None if key_frames == num_frames else key_frames,
        )  # fmt: skip

    def run(function, tensors):
        return with_gradients(
            lambda q, k, v, b=None: function(q, k, v, b, num_frames, key_frames, num_heads, scale, **masks),
            *tensors, dtype=dtype,
        )  # fmt: skip

    actual, expected = run(ours, inputs), run(loops, [x.double() for x in inputs])
    assert all(x.isfinite().all() for x in actual)
    if dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        return
    names = ("result", "query", "key", "value", "bias")[: len(actual)]
    for what, *tensors in zip(names, actual, expected, run(permuted, inputs), strict=True):
        # Behind the softmax gradients are differences of terms of order head_dim, taken in fp32, and may vanish.
        terms = 8 * query.shape[2] / num_heads * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
        magnitude = tensors[1].abs() + terms if what in ("query", "key", "bias") else None
        assert_within_budget(*tensors, magnitude=magnitude, what=what)


@given(
    batch=st.integers(1, 3),
    num_frames=st.integers(1, 5),
    key_frames=st.integers(1, 6) | st.none(),
    positions=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (1, 8), (2, 3), (3, 4)]),
    with_bias=st.booleans(),
    mask_seed=st.integers(0, 100) | st.none(),
    causal=st.booleans(),
    window=st.sampled_from([None, 0, 1, 3]),
    scale=st.sampled_from([None, 0.3]),
    layout=st.sampled_from(["contiguous", "strided"]),
    dtype=st.sampled_from(DTYPES),
)
def test_matches_the_loops(
    batch, num_frames, key_frames, positions, heads, with_bias, mask_seed, causal, window, scale, layout, dtype
):
    key_frames, (num_heads, dim) = key_frames or num_frames, heads
    query, key, value = (
        random_tokens(batch * frames, positions, num_heads * dim, dtype=dtype, layout=layout, seed=seed)
        for seed, frames in enumerate((num_frames, key_frames, key_frames))
    )
    bias = random_normal((num_heads, num_frames, key_frames), 3).to(dtype) if with_bias else None
    frame_mask = None if mask_seed is None else random_normal((batch, key_frames), mask_seed) > -0.3
    check(
        query, key, value, bias, num_frames, key_frames, num_heads, scale,
        causal=causal, window=window, frame_mask=frame_mask,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 1.3},
        {"bias": True},
        {"causal": True},
        {"window": 1},
        {"frame_mask": torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])},
        {"bias": True, "causal": True, "window": 2},
    ],
)
@pytest.mark.parametrize("num_frames", [3, 5])
def test_each_option_alone(dtype, options, num_frames):
    options = {"scale": None, "bias": None} | FULL | options
    query, key, value = (
        random_tokens(2 * frames, 3, 12, dtype=dtype, seed=seed) for seed, frames in enumerate((num_frames, 5, 5))
    )
    if options["bias"] is not None:
        options["bias"] = random_normal((2, num_frames, 5), 3).to(dtype)
    check(query, key, value, num_frames=num_frames, key_frames=5, num_heads=2, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operands_packed_in_one_tensor(dtype):
    packed = random_tokens(8, 5, 3 * 12, dtype=dtype)
    check(*packed.chunk(3, dim=-1), None, 4, 4, 3, None, **FULL)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 1}, {"frame_mask": torch.eye(2, 3) > 0}])
def test_gradients(options):
    query, key, value = (random_tokens(6, 2, 4, dtype=torch.float64, seed=seed).requires_grad_() for seed in range(3))
    bias = random_normal((2, 3, 3), 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: temporal_attention(q, k, v, num_frames=3, num_heads=2, bias=b, **options),
        (query, key, value, bias),
    )


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"causal": True}, {"window": 1}, {"frame_mask": True}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_of_positions_change_nothing_and_respect_the_limit(options, dtype, monkeypatch):
    options = dict(options)
    query, key, value = (random_tokens(6, 7, 8, dtype=dtype, seed=seed) for seed in range(3))
    if "bias" in options:
        options["bias"] = random_normal((2, 3, 3), 3).to(dtype)
    if "frame_mask" in options:
        options["frame_mask"] = torch.tensor([[True, False, True], [False, False, False]])
    sequences, sdpa = [], F.scaled_dot_product_attention

    def spy(q, *args, **kwargs):
        sequences.append(q.shape[0] * q.shape[1])
        return sdpa(q, *args, **kwargs)

    def run():
        sequences.clear()
        return with_gradients(
            lambda *x: temporal_attention(*x, num_frames=3, num_heads=2, **options), query, key, value, dtype=dtype
        )

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    whole = run()
    assert sequences == [28]
    monkeypatch.setattr(reference, "MAX_SEQUENCES", 15)
    chunked = run()
    assert sequences == [12, 12, 4]
    torch.testing.assert_close(chunked, whole)


def test_sixteen_bit_operands_are_converted_in_chunks(monkeypatch):
    query, key, value = (random_tokens(6, 7, 8, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    whole = temporal_attention(query, key, value, num_frames=3, num_heads=2)
    monkeypatch.setattr(reference, "CONVERTED_ELEMENTS", 3 * 4 * 9)
    seen, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: seen.append((q.dtype, q.numel())) or sdpa(q, *a, **k)
    )
    assert torch.equal(temporal_attention(query, key, value, num_frames=3, num_heads=2), whole)
    assert len(seen) > 1 and all(dtype == torch.float32 and numel <= 3 * 4 * 9 for dtype, numel in seen)


def test_the_limit_is_what_a_gpu_grid_takes():
    assert reference.MAX_SEQUENCES < 65_535


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_query_without_keys_returns_zero_and_sends_no_gradient(dtype):
    inputs = [random_tokens(6, 2, 4, dtype=dtype, seed=seed).requires_grad_() for seed in range(3)]
    frame_mask = torch.tensor([[True, True, True], [False, False, False]])
    out = temporal_attention(*inputs, num_frames=3, num_heads=2, frame_mask=frame_mask)
    assert out[3:].count_nonzero() == 0 and out[:3].count_nonzero() == out[:3].numel()
    for gradient in torch.autograd.grad(out, inputs, torch.ones_like(out)):
        assert gradient.isfinite().all() and gradient[3:].count_nonzero() == 0


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", [{"frame_mask": torch.zeros(2, 2, dtype=torch.bool)}, {"causal": True}])
def test_no_kernel_sees_a_query_without_keys(options, with_bias, monkeypatch):
    masks, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *a, attn_mask, **k: masks.append(attn_mask) or sdpa(*a, attn_mask, **k),
    )
    query, key = random_tokens(6, 2, 4), random_tokens(4, 2, 4, seed=1)
    bias = torch.zeros(2, 3, 2) if with_bias else None
    temporal_attention(query, key, key, num_frames=3, num_key_frames=2, num_heads=2, bias=bias, **options)
    [mask] = masks
    assert (mask if mask.dtype == torch.bool else mask > -torch.inf).any(-1).all()


@pytest.mark.parametrize(
    ("num_frames", "key_frames", "options", "expected"),
    [
        (3, 3, {"causal": True}, ["100", "110", "111"]),
        (2, 4, {"causal": True}, ["1110", "1111"]),
        (3, 2, {"causal": True}, ["00", "10", "11"]),
        (4, 4, {"window": 1}, ["1100", "1110", "0111", "0011"]),
        (2, 4, {"window": 1}, ["0111", "0011"]),
        (3, 3, {"window": 1, "causal": True}, ["100", "110", "011"]),
        (2, 3, {"frame_mask": torch.tensor([[False, True, True]])}, ["011", "011"]),
        (2, 3, {"frame_mask": torch.tensor([[False, True, True]]), "causal": True}, ["010", "011"]),
    ],
)
def test_which_frames_are_attended(num_frames, key_frames, options, expected):
    value = torch.eye(key_frames).reshape(key_frames, 1, key_frames)
    query = torch.zeros(num_frames, 1, key_frames)
    out = temporal_attention(
        query, torch.zeros_like(value), value,
        num_frames=num_frames, num_key_frames=key_frames, num_heads=1, **options,
    )  # fmt: skip
    assert ["".join(str(int(weight > 0)) for weight in row[0]) for row in out] == expected


def test_positions_and_clips_do_not_mix():
    query, key, value = (random_tokens(6, 3, 4, seed=seed) for seed in range(3))
    changed = value.clone()
    changed[4, 1] += 1
    before, after = (temporal_attention(query, key, v, num_frames=3, num_heads=2) for v in (value, changed))
    expected = torch.zeros(6, 3, dtype=torch.bool)
    expected[3:, 1] = True
    assert torch.equal((before != after).any(-1), expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_empty_tokens(shape, dtype):
    x = torch.empty(shape, dtype=dtype)
    mask = torch.ones(shape[0] // 2, 2, dtype=torch.bool)
    assert temporal_attention(x, x, x, num_frames=2, num_heads=2, frame_mask=mask).shape == shape
