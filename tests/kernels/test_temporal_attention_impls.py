"""Attention over frames under the names "sdpa" and "xformers"."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from temporal_layers.kernels.temporal_attention import reference, temporal_attention, xformers
from temporal_layers.kernels.testing import random_normal, random_tokens, with_gradients

OPTIONS = [
    {},
    {"causal": True},
    {"window": 1},
    {"bias": True},
    {"frame_mask": torch.tensor([[True, False, True], [False, False, False]])},
    {"bias": True, "causal": True, "scale": 0.7},
]


def run(impl, options, dtype=torch.float32):
    options = dict(options)
    tokens = [random_tokens(6, 7, 16, dtype=dtype, seed=seed) for seed in range(3)]
    if "bias" in options:
        options["bias"] = random_normal((2, 3, 3), 3).to(dtype)
    return with_gradients(
        lambda *x: temporal_attention(*x, num_frames=3, num_heads=2, impl=impl, **options), *tokens, dtype=dtype
    )


class LowerTriangularMask:
    """Stands for xformers' mask of the same name."""


@pytest.fixture
def stub(monkeypatch):
    """xformers has no kernels for the CPU: SDPA in its place, which holds the layout of the arguments to its rules."""
    heads = []

    def memory_efficient_attention(query, key, value, attn_bias=None, scale=None):
        batch, frames, num_heads, _ = query.shape
        heads.append(num_heads)
        mask = None
        if isinstance(attn_bias, torch.Tensor):
            mask = attn_bias
            assert mask.shape == (batch, num_heads, frames, key.shape[1]) and mask.dtype == query.dtype
            assert mask.stride(-2) % 8 == 0 and mask.stride(-1) == 1
        causal = isinstance(attn_bias, LowerTriangularMask)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale).transpose(1, 2)

    ops = SimpleNamespace(
        memory_efficient_attention=memory_efficient_attention, LowerTriangularMask=LowerTriangularMask
    )
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(xformers, "check_xformers", lambda op, tensor: None)
    return heads


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sdpa_is_the_reference(options, dtype):
    assert all(
        torch.equal(a, b) for a, b in zip(run("sdpa", options, dtype), run("reference", options, dtype), strict=True)
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_xformers_gets_its_layout_in_chunks(options, stub, monkeypatch):
    expected = run("reference", options)
    torch.testing.assert_close(run("xformers", options), expected)
    assert stub == [14]
    stub.clear()
    monkeypatch.setattr(reference, "MAX_SEQUENCES", 15)
    torch.testing.assert_close(run("xformers", options), expected)
    assert stub == [6, 6, 2]


def test_xformers_is_missing(monkeypatch):
    monkeypatch.setattr(xformers, "has_xformers", lambda: False)
    with pytest.raises(ValueError) as error:
        run("xformers", {})
    assert str(error.value) == (
        "temporal_attention: impl: expected xformers for 'xformers', got an environment without it; install it or pass "
        "impl='auto' or impl='sdpa'"
    )


def test_xformers_has_no_kernels_for_the_cpu(monkeypatch):
    monkeypatch.setattr(xformers, "has_xformers", lambda: True)
    with pytest.raises(ValueError) as error:
        run("xformers", {})
    assert str(error.value) == (
        "temporal_attention: impl: expected tensors on a GPU for 'xformers', got tensors on cpu; pass impl='auto' or "
        "impl='sdpa'"
    )
    xformers.check_xformers("op", SimpleNamespace(is_cuda=True))


@pytest.mark.parametrize("spec", [None, object()])
def test_xformers_is_looked_for_without_importing_it(spec, monkeypatch):
    asked = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: asked.append(name) or spec)
    xformers.has_xformers.cache_clear()
    assert xformers.has_xformers() == (spec is not None) and asked == ["xformers"]
    xformers.has_xformers.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_xformers_on_a_gpu(options):
    pytest.importorskip("xformers.ops")
    tokens = [random_tokens(6, 7, 64, dtype=torch.float16, seed=seed, device="cuda") for seed in range(3)]
    options = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    if "bias" in options:
        options["bias"] = random_normal((2, 3, 3), 3).to("cuda", torch.float16)
    results = [
        temporal_attention(*tokens, num_frames=3, num_heads=2, impl=impl, **options) for impl in ("xformers", "sdpa")
    ]
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)
