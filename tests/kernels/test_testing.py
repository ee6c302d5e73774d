"""The measured tolerance passes what it should and, above all, fails what it should."""

import pytest
import torch

from temporal_layers.kernels.testing import (
    assert_within_budget,
    random_map,
    random_normal,
    random_tokens,
    with_gradients,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def product(dtype):
    """An oracle in float64 and plain PyTorch's result, of inputs rounded to ``dtype``."""
    x, y = (random_normal((64, 33), seed).to(dtype) for seed in (0, 1))
    return (x.double() @ y.double().T) + 3, (x @ y.T) + 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_accepts_the_reference_and_the_rounded_oracle(dtype):
    expected, reference = product(dtype)
    assert_within_budget(reference, expected, reference)
    assert_within_budget(expected.to(dtype), expected, reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_rejects_one_wrong_element(dtype):
    expected, reference = product(dtype)
    wrong = reference.clone()
    wrong[5, 7] *= 1 + 64 * torch.finfo(dtype).eps
    wrong[5, 7] += 64 * torch.finfo(dtype).eps * expected.abs().max().item()
    with pytest.raises(AssertionError, match=r"result: error .* in the inf-norm exceeds 2.0 x \(the reference's"):
        assert_within_budget(wrong, expected, reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_budget_rejects_a_small_bias_everywhere(dtype):
    expected, reference = product(dtype)
    own = (reference.double() - expected).norm() / expected.norm()
    step = 4 * (own.item() + torch.finfo(dtype).eps)
    with pytest.raises(AssertionError, match=r"in the (2\.0|inf)-norm"):
        assert_within_budget((expected * (1 + step)).to(dtype), expected, reference)
    with pytest.raises(AssertionError, match=r"in the 2\.0-norm"):
        # Within the largest error of a reference with one outlier, but everywhere.
        outlier = reference.clone()
        outlier[0, 0] += 8 * step * expected.abs().max().item()
        assert_within_budget((expected + 2 * step * expected.abs().max()).to(dtype), expected, outlier)


def test_budget_rejects_arithmetic_of_lower_precision():
    x, y = random_normal((64, 64), 0).float(), random_normal((64, 64), 1).float()
    low = (x.bfloat16() @ y.bfloat16()).float()
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget(low, x.double() @ y.double(), x @ y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_budget_rejects_values_that_are_not_finite(value):
    expected, reference = product(torch.float32)
    wrong = reference.clone()
    wrong[0, 0] = value
    with pytest.raises(AssertionError, match="out: 1 values are not finite"):
        assert_within_budget(wrong, expected, reference, what="out")


def test_budget_rejects_other_shapes_and_dtypes():
    expected, reference = product(torch.float32)
    with pytest.raises(AssertionError, match=r"result: shapes \(63, 64\), oracle \(64, 64\)"):
        assert_within_budget(reference[1:], expected, reference)
    with pytest.raises(AssertionError, match=r"dtype torch.float64, reference torch.float32"):
        assert_within_budget(expected, expected, reference)
    with pytest.raises(AssertionError, match=r"the oracle is torch.float32, not float64"):
        assert_within_budget(reference, expected.float(), reference)


def test_rounding_is_relative_to_the_terms_of_a_sum_that_cancels():
    terms = torch.tensor([1e4, 1.0, -1e4], dtype=torch.float64)
    expected, reference = terms.sum(), torch.tensor(1.0)
    off = reference + 4 * torch.finfo(torch.float32).eps
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget(off, expected, reference)
    assert_within_budget(off, expected, reference, magnitude=terms.abs().sum())
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget(reference + 0.1, expected, reference, magnitude=terms.abs().sum())


def test_budget_holds_for_empty_tensors():
    empty = torch.empty(0, 3)
    assert_within_budget(empty, empty.double(), empty)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_maps_depend_on_seed_and_shape_alone(layout):
    maps = random_map(2, 3, 4, 5, layout=layout, seed=7)
    assert torch.equal(maps, random_map(2, 3, 4, 5, layout="contiguous", seed=7))
    assert torch.equal(maps.bfloat16(), random_map(2, 3, 4, 5, layout=layout, seed=7, dtype=torch.bfloat16))
    assert not torch.equal(maps, random_map(2, 3, 4, 5, layout=layout, seed=8))
    assert maps.is_contiguous() == (layout == "contiguous")
    assert maps.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_strided_inputs_stand_among_nan():
    tokens = random_tokens(2, 3, 4, layout="strided")
    assert torch.equal(tokens, random_tokens(2, 3, 4))
    room = tokens.as_strided((5 * 7 * 9,), (1,), 0)
    assert room.isnan().sum() == 5 * 7 * 9 - 2 * 3 * 4


def test_gradients_belong_to_the_upstream_gradient():
    x, y = random_normal((3, 4), 0), random_normal((3, 4), 1)
    result, to_x, to_y = with_gradients(torch.mul, x, y, dtype=torch.bfloat16)
    upstream = random_normal((3, 4), 99).bfloat16().double()
    assert torch.equal(result, x * y) and torch.equal(to_x, upstream * y) and torch.equal(to_y, upstream * x)
