"""Moments and rows that are merged from shards, against those of the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.recipes.evaluation.moments import Moments, Rows, SetStatistics


def rows(count, features, seed=0, offset=0.0):
    return offset + torch.randn(count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    features=st.integers(1, 5),
    offset=st.sampled_from([0.0, 1e6]),
)
def test_shards_are_the_whole(sizes, features, offset):
    values = rows(sum(sizes), features, offset=offset)
    first, *rest = [Moments.of(part) for part in values.split(sizes)]
    for part in rest:
        first = first.merged(part)
    assert first.count == len(values)
    np.testing.assert_allclose(first.mean, values.numpy().mean(0), rtol=1e-12, atol=1e-12)
    if len(values) > 1:
        expected = np.atleast_2d(np.cov(values.numpy().T))
        # Far from the origin the deviations themselves carry the rounding of the values.
        np.testing.assert_allclose(first.covariance, expected, rtol=1e-9, atol=1e-9 * (1 + abs(offset) * 1e-6))


def test_a_large_offset_does_not_drown_the_covariance():
    values = rows(400, 3, offset=1e8)
    moments = Moments.of(values[:100])
    for part in values[100:].split(50):
        moments = moments.merged(Moments.of(part))
    naive = (values.T @ values - len(values) * torch.outer(values.mean(0), values.mean(0))) / (len(values) - 1)
    exact = np.cov((values.numpy() - 1e8).T)
    np.testing.assert_allclose(moments.covariance, exact, rtol=1e-6)
    assert (naive - torch.from_numpy(exact)).abs().max() > 0.1  # what sums of squares would give


def test_float32_rows_are_added_up_in_float64():
    values = rows(1000, 2, offset=100).float()
    np.testing.assert_allclose(Moments.of(values).covariance, np.cov(values.double().numpy().T), rtol=1e-12)


@given(order=st.permutations(range(4)))
def test_rows_come_in_the_order_of_their_places(order):
    values = rows(9, 2)
    places = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    shards = [Rows(p, values[p]) for p in places.tensor_split(4)]
    merged = shards[order[0]]
    for index in order[1:]:
        merged = merged.merged(shards[index])
    assert merged.places.tolist() == list(range(9))
    assert torch.equal(merged.values, values)


def test_a_purpose_that_one_shard_lacks_is_kept():
    one, other = Moments.of(rows(3, 1)), Moments.of(rows(2, 1, seed=1))
    kept = SetStatistics({"a": one}, {}).merged(SetStatistics({"a": other, "b": other}, {}))
    assert kept.moments["a"].count == 5
    assert kept.moments["b"].count == 2


def test_one_row_has_no_spread():
    moments = Moments.of(rows(1, 2))
    assert moments.covariance.isnan().all() and moments.standard_error.isnan().all()


def test_standard_error_is_that_of_the_mean():
    values = rows(20, 1)
    assert Moments.of(values).standard_error.item() == pytest.approx(values.std().item() / 20**0.5, rel=1e-12)


def test_refusals():
    with pytest.raises(ValueError, match="expected at least one row, got none"):
        Moments.of(torch.empty(0, 3))
    with pytest.raises(ValueError, match="expected as many features on both sides, got 2 and 3"):
        Moments.of(rows(4, 2)).merged(Moments.of(rows(4, 3)))
