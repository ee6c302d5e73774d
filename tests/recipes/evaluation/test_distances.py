"""Distances and scores against closed forms, SciPy, loops in NumPy, and torchmetrics."""

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from temporal_layers.recipes.evaluation.distances import (
    check_enough_classes,
    frechet,
    inception_score,
    kernel_distance,
    mean_of,
)
from temporal_layers.recipes.evaluation.moments import Moments


def rows(count, features, seed=0):
    return torch.randn(count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixed(count, features, seed):
    """Correlated rows away from the origin."""
    generator = torch.Generator().manual_seed(1000 + seed)
    matrix = torch.randn(features, features, dtype=torch.float64, generator=generator)
    return rows(count, features, seed) @ matrix + torch.randn(features, dtype=torch.float64, generator=generator)


@given(count=st.integers(20, 60), features=st.integers(1, 12), seed=st.integers(0, 50))
def test_frechet_agrees_with_scipy_and_torchmetrics(count, features, seed):
    a, b = mixed(count, features, seed), mixed(count + 3, features, seed + 1)
    found = frechet(Moments.of(a), Moments.of(b)).value
    x, y = a.numpy(), b.numpy()
    cov_x, cov_y = np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root)
    scale = np.trace(cov_x) + np.trace(cov_y)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9 * scale)
    theirs = _compute_fid(a.mean(0), torch.from_numpy(cov_x), b.mean(0), torch.from_numpy(cov_y)).item()
    assert found == pytest.approx(theirs, rel=1e-9, abs=1e-9 * scale)


def test_frechet_of_known_gaussians():
    d = 3
    standard = Moments(101, torch.zeros(d, dtype=torch.float64), 100 * torch.eye(d, dtype=torch.float64))
    variances = torch.tensor([4.0, 9.0, 0.25], dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    other = Moments(51, shift, 50 * torch.diag(variances))
    expected = shift.square().sum() + (variances.sqrt() - 1).square().sum()
    assert frechet(standard, other).value == pytest.approx(expected.item(), rel=1e-12)
    assert frechet(other, standard).value == pytest.approx(expected.item(), rel=1e-12)
    assert frechet(other, other).value == pytest.approx(0, abs=1e-12)


@given(seed=st.integers(0, 20), scale=st.floats(0.1, 10))
def test_frechet_invariances(seed, scale):
    """Rotation and shift of both sets change nothing; a scale goes in squared."""
    a, b = mixed(30, 4, seed), mixed(25, 4, seed + 1)
    plain = frechet(Moments.of(a), Moments.of(b)).value
    rotation = torch.linalg.qr(rows(4, 4, seed + 2)).Q
    moved = frechet(Moments.of(a @ rotation + 5), Moments.of(b @ rotation + 5)).value
    assert moved == pytest.approx(plain, rel=1e-9)
    assert frechet(Moments.of(scale * a), Moments.of(scale * b)).value == pytest.approx(scale**2 * plain, rel=1e-9)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
    assert frechet(Moments.of(a[order]), Moments.of(b)).value == pytest.approx(plain, rel=1e-9)


def naive_mmd(x, y):
    """The unbiased estimate, pair by pair."""

    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


@given(m=st.integers(2, 9), n=st.integers(2, 9), features=st.integers(1, 6), seed=st.integers(0, 30))
def test_kernel_distance_is_the_mean_over_pairs(m, n, features, seed):
    x, y = rows(m, features, seed), rows(n, features, seed + 100) + 0.3
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(naive_mmd(x.numpy(), y.numpy()), rel=1e-9, abs=1e-9)
    assert found.spread is None


def test_kernel_distance_agrees_with_torchmetrics():
    x, y = mixed(40, 7, 3), mixed(40, 7, 4)
    assert kernel_distance(x, y).value == pytest.approx(poly_mmd(x, y, degree=3, coef=1.0).item(), rel=1e-9)


def test_kernel_distance_has_the_closed_form_mean_of_one_feature():
    """Of normal rows in one dimension: E k = 1 + 3 s t, and E[(x y)^2] = s t, E[(x y)^3] = 0 for variances s, t."""
    x, y = rows(4000, 1, 1), 2 * rows(4000, 1, 2)
    found = kernel_distance(x, y, block_size=400)
    # k = (xy)^3 + 3 (xy)^2 + 3 xy + 1, so the expectation of the distance is 3 (1 + 16 - 2 * 4)
    assert found.value == pytest.approx(27, abs=4 * found.spread)


def test_kernel_distance_is_unbiased_where_frechet_is_not():
    """Two sets of one distribution: blocks of any size have mean 0, the Frechet distance stays above."""
    x, y = rows(2000, 5, 1), rows(2000, 5, 2)
    small = kernel_distance(x, y, block_size=20)
    assert abs(small.value) < 4 * small.spread
    assert frechet(Moments.of(x[:20]), Moments.of(y[:20])).value > 0.1


def test_blocks_are_the_mean_of_their_parts():
    x, y = rows(50, 3, 1), rows(46, 3, 2)
    order = torch.Generator().manual_seed(7)
    parts = [v[torch.randperm(len(v), generator=order)].tensor_split(4) for v in (x, y)]
    values = [naive_mmd(a.numpy(), b.numpy()) for a, b in zip(*parts, strict=True)]
    found = kernel_distance(x, y, block_size=11, seed=7)
    assert found.value == pytest.approx(np.mean(values), rel=1e-9)
    assert found.spread == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-9)


def test_inception_score_by_hand():
    certain = torch.eye(4, dtype=torch.float64).clamp_min(1e-12).log().repeat(5, 1)
    assert inception_score(certain, splits=1).value == pytest.approx(4, rel=1e-9)
    assert inception_score(torch.zeros(20, 4), splits=1).value == pytest.approx(1, rel=1e-12)
    p = np.array([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    expected = math.exp(np.mean((p * np.log(p / p.mean(0))).sum(1)))
    assert inception_score(torch.from_numpy(np.log(p) + 3), splits=1).value == pytest.approx(expected, rel=1e-12)


class Given(torch.nn.Module):
    """Hands its input on, so that torchmetrics scores rows of our choice."""

    num_features = 3

    def forward(self, x):
        return x


def test_inception_score_agrees_with_torchmetrics():
    logits = 2 * rows(60, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory, and of the standard deviation over one split
        theirs = InceptionScore(feature=Given(), splits=1)
        theirs.update(logits)
        mean, _ = theirs.compute()
    assert inception_score(logits, splits=1).value == pytest.approx(mean.item(), rel=1e-9)


def test_inception_score_spreads_over_its_splits():
    logits = rows(40, 3)
    parts = [inception_score(part, splits=1).value for part in logits.tensor_split(4)]
    found = inception_score(logits, splits=4)
    assert found.value == pytest.approx(np.mean(parts), rel=1e-12)
    assert found.spread == pytest.approx(np.std(parts), rel=1e-9)


def test_mean_of_numbers_per_clip():
    values = torch.tensor([[1.0], [2.0], [6.0]])
    found = mean_of(Moments.of(values))
    assert found.value == 3
    assert found.spread == pytest.approx(values.std().item() / 3**0.5, rel=1e-6)
    assert mean_of(Moments.of(values[:1])).spread is None


def test_too_few_samples_are_refused_with_a_way_out():
    full, short = Moments.of(rows(10, 5)), Moments.of(rows(5, 5))
    with pytest.raises(ValueError, match=r"generated: expected more samples than the 5 features, got 5.*no full rank"):
        frechet(short, full)
    with pytest.raises(ValueError, match=r"real: expected more samples than the 5 features.*take more samples"):
        frechet(full, short)
    with pytest.raises(ValueError, match="expected as many features of both sets, got 5 and 4"):
        frechet(full, Moments.of(rows(10, 4)))
    with pytest.raises(ValueError, match="expected as many features of both sets, got 3 and 4"):
        kernel_distance(rows(4, 3), rows(4, 4))
    with pytest.raises(ValueError, match=r"at least two samples of each set.*got 1 generated and 4 real"):
        kernel_distance(rows(1, 3), rows(4, 3))
    with pytest.raises(ValueError, match="block_size=1"):
        kernel_distance(rows(4, 3), rows(4, 3), block_size=1)
    with pytest.raises(ValueError, match=r"at least 3 samples, one for each class, in each of 10 splits.*least 30"):
        inception_score(rows(29, 3))
    with pytest.raises(ValueError, match="in each of 0 splits"):
        check_enough_classes(10, 2, 0)
