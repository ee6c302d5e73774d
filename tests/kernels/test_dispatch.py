"""Which implementation runs, and what is said where the one asked for cannot."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from temporal_layers.kernels import dispatch
from temporal_layers.kernels.alpha_blend import alpha_blend, alpha_residual
from temporal_layers.kernels.dispatch import Impl, resolve_impl
from temporal_layers.kernels.geglu import geglu
from temporal_layers.kernels.group_norm import group_norm
from temporal_layers.kernels.linear import linear
from temporal_layers.kernels.temporal_attention import temporal_attention
from temporal_layers.kernels.temporal_conv import temporal_conv

CPU = torch.empty(1)
GPU = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))  # all that the choice looks at
MAPS, TOKENS, SCALAR = torch.ones(2, 2, 2, 2), torch.ones(2, 2, 8), torch.tensor(0.5)
CALLS = {
    "alpha_blend": lambda impl: alpha_blend(MAPS, MAPS, SCALAR, impl=impl),
    "alpha_residual": lambda impl: alpha_residual(MAPS, MAPS, SCALAR, impl=impl),
    "geglu": lambda impl: geglu(TOKENS, torch.ones(6, 8), impl=impl),
    "group_norm": lambda impl: group_norm(MAPS, 1, impl=impl),
    "linear": lambda impl: linear(TOKENS, torch.ones(6, 8), impl=impl),
    "temporal_attention": lambda impl: temporal_attention(TOKENS, TOKENS, TOKENS, num_frames=2, num_heads=1, impl=impl),
    "temporal_conv": lambda impl: temporal_conv(MAPS, torch.ones(2, 2, 1, 1), num_frames=2, impl=impl),
}
every_op = pytest.mark.parametrize("op", CALLS)


@pytest.fixture
def triton(monkeypatch):
    """Decides whether triton is installed."""
    return lambda installed: monkeypatch.setattr(dispatch, "has_triton", lambda: installed)


@every_op
def test_auto_is_the_reference(op):
    expected = CALLS[op](Impl.REFERENCE)
    assert torch.equal(CALLS[op](Impl.AUTO), expected) and torch.equal(CALLS[op]("auto"), expected)
    assert torch.equal(CALLS[op]("reference"), expected)


def test_the_environment_can_ask_for_the_reference_everywhere(triton, monkeypatch):
    triton(True)
    assert resolve_impl("op", "auto", GPU, has_fused=True) == Impl.FUSED
    monkeypatch.setattr(dispatch, "REFERENCE_ONLY", True)
    assert resolve_impl("op", "auto", GPU, has_fused=True) == Impl.REFERENCE
    assert resolve_impl("op", "fused", GPU, has_fused=True) == Impl.FUSED


@pytest.mark.parametrize(("value", "only"), [("reference", True), ("auto", False), (None, False)])
def test_the_environment_is_read_at_import(value, only, monkeypatch):
    monkeypatch.delenv("TEMPORAL_LAYERS_IMPL", raising=False)
    if value is not None:
        monkeypatch.setenv("TEMPORAL_LAYERS_IMPL", value)
    fresh = {"__name__": dispatch.__name__}
    exec(compile(Path(dispatch.__file__).read_text(), dispatch.__file__, "exec"), fresh)
    assert fresh["REFERENCE_ONLY"] is only


@every_op
def test_fused_raises_where_no_kernel_runs(op, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError) as error:
        CALLS[op]("fused")
    reason = "expected tensors on a GPU for 'fused', got tensors on cpu"
    assert str(error.value) == f"{op}: impl: {reason}; pass impl='auto' or impl='reference'"


@every_op
@pytest.mark.parametrize("impl", ["triton", "AUTO", None])
def test_unknown_name_raises(op, impl):
    with pytest.raises(ValueError) as error:
        CALLS[op](impl)
    others = {"temporal_attention": "'auto', 'fused', 'reference', 'sdpa' or 'xformers'"}
    names = others.get(op, "'auto', 'fused' or 'reference'")
    assert str(error.value) == f"{op}: impl: expected {names}, got {impl!r}; pass one of these names"


@pytest.mark.parametrize(
    ("tensor", "has_fused", "installed", "expected"),
    [
        (CPU, True, True, Impl.REFERENCE),
        (GPU, False, True, Impl.REFERENCE),
        (GPU, True, False, Impl.REFERENCE),
        (GPU, True, True, Impl.FUSED),
    ],
)
def test_auto_takes_the_kernel_only_where_it_runs(tensor, has_fused, installed, expected, triton):
    triton(installed)
    assert resolve_impl("op", "auto", tensor, has_fused=has_fused) is expected
    assert resolve_impl("op", "reference", tensor, has_fused=has_fused) is Impl.REFERENCE


def test_auto_takes_what_is_preferred(triton):
    triton(True)
    assert resolve_impl("op", "auto", GPU, has_fused=True, preferred=False) is Impl.REFERENCE
    assert resolve_impl("op", "fused", GPU, has_fused=True, preferred=False) is Impl.FUSED


@pytest.mark.parametrize("op", ["geglu", "linear", "temporal_conv"])
def test_fused_takes_no_fp64(op):
    x = torch.ones(2, 2, 2, 2, dtype=torch.float64)
    weight = torch.ones(2, 2, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError) as error:
        if op == "temporal_conv":
            temporal_conv(x, weight, num_frames=2, impl="fused")
        else:
            {"geglu": geglu, "linear": linear}[op](x, weight[..., 0, 0], impl="fused")
    reason = "expected float16, bfloat16 or float32 for 'fused', got float64"
    assert str(error.value) == f"{op}: impl: {reason}; pass impl='auto' or impl='reference'"


def test_a_missing_kernel_says_so():
    with pytest.raises(ValueError, match=r"^op: impl: expected 'auto' or 'reference' \(no fused kernel exists\), got"):
        resolve_impl("op", "fused", GPU)


def test_fused_says_what_is_missing(triton, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton(True)
    assert resolve_impl("op", Impl.FUSED, GPU, has_fused=True) is Impl.FUSED
    with pytest.raises(ValueError, match=r"^op: impl: expected tensors on a GPU for 'fused', got tensors on cpu; pass"):
        resolve_impl("op", "fused", CPU, has_fused=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_impl("op", "fused", CPU, has_fused=True) is Impl.FUSED
    assert resolve_impl("op", "auto", CPU, has_fused=True) is Impl.REFERENCE
    triton(False)
    with pytest.raises(
        ValueError, match=r"^op: impl: expected triton for 'fused', got an environment without it; pass"
    ):
        resolve_impl("op", "fused", GPU, has_fused=True)


@pytest.mark.parametrize("spec", [None, object()])
def test_triton_is_looked_for_without_importing_it(spec, monkeypatch):
    asked = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: asked.append(name) or spec)
    code = compile(Path(dispatch.__file__).read_text(), dispatch.__file__, "exec")
    fresh = {"__name__": dispatch.__name__}
    exec(code, fresh)
    assert fresh["has_triton"]() == (spec is not None) and asked == ["triton"]
