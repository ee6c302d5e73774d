"""Drawing primitives: coverage against areas, integrals and brute-force supersampling."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.recipes.driving_paint import Canvas, band_coverage, dash_coverage, hashed_uniform

WHITE = (1.0, 1.0, 1.0)
inner = st.floats(4, 26)


def area(canvas):
    assert (canvas.image[..., 0] == canvas.image[..., 2]).all()
    return canvas.image[..., 0].sum()


@given(x0=inner, x1=inner, y0=inner, y1=inner)
def test_a_rectangle_covers_exactly_its_area(x0, x1, y0, y1):
    left, right, top, bottom = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    canvas = Canvas(32, 32)
    canvas.rectangle(left, right, top, bottom, WHITE)
    assert area(canvas) == pytest.approx((right - left) * (bottom - top), abs=1e-3)


@given(x=st.floats(12, 20), y=st.floats(12, 20), rx=st.floats(2, 9), ry=st.floats(2, 9))
def test_an_ellipse_covers_nearly_its_area(x, y, rx, ry):
    canvas = Canvas(32, 32)
    canvas.ellipse(x, y, rx, ry, WHITE)
    assert area(canvas) == pytest.approx(np.pi * rx * ry, rel=0.06)


@given(half_top=st.floats(0, 8), half_bottom=st.floats(3, 9), top=st.floats(4, 10), bottom=st.floats(16, 26))
def test_a_trapezoid_covers_nearly_its_area(half_top, half_bottom, top, bottom):
    canvas = Canvas(32, 32)
    canvas.trapezoid(16.3, half_top, half_bottom, top, bottom, WHITE)
    assert area(canvas) == pytest.approx((half_top + half_bottom) * (bottom - top), rel=0.04, abs=1.0)


@given(x=st.floats(-40, 70), y=st.floats(-40, 70), size=st.floats(0.2, 30), alpha=st.floats(0, 1))
def test_shapes_may_lie_anywhere_and_never_leave_the_range(x, y, size, alpha):
    canvas = Canvas(24, 32)
    canvas.rectangle(x, x + size, y, y + size, WHITE, alpha)
    canvas.ellipse(x, y, size, 0.5 * size, (0.2, 0.4, 0.6), alpha)
    canvas.trapezoid(x, 0.0, size, y, y + size, (0.9, 0.1, 0.3), alpha)
    canvas.glow(x, y, size, size, WHITE, alpha)
    assert canvas.image.min() >= 0 and canvas.image.max() <= 1 + 1e-6


def test_glow_fades_to_nothing_inside_its_window():
    canvas = Canvas(64, 64)
    canvas.glow(32.5, 32.5, 12, 12, WHITE, 1.0)
    assert canvas.image[32, 32, 0] == pytest.approx(0.994, abs=1e-3)
    assert (np.diff(canvas.image[32, 32:, 0]) <= 0).all()
    assert canvas.image[32, 12:14, 0].max() < 1e-2 and canvas.image[:8].max() == 0


@given(position=st.floats(-20, 20), footprint=st.floats(0.05, 30))
def test_dashes_are_filtered_like_dense_supersampling(position, footprint):
    samples = position + footprint * ((np.arange(40_000) + 0.5) / 40_000 - 0.5)
    expected = np.mean(samples % 9.0 < 4.0)
    value = dash_coverage(np.array(position), np.array(footprint), 9.0, 4.0)
    assert value == pytest.approx(expected, abs=2e-4)


@given(position=st.floats(-5, 5), footprint=st.floats(0.05, 8))
def test_bands_are_filtered_like_dense_supersampling(position, footprint):
    samples = position + footprint * ((np.arange(40_000) + 0.5) / 40_000 - 0.5)
    expected = np.mean((samples > -0.7) & (samples < 1.1))
    assert band_coverage(np.array(position), np.array(footprint), -0.7, 1.1) == pytest.approx(expected, abs=2e-4)


def test_hashed_numbers_are_uniform_uncorrelated_and_independent_of_the_array_they_come_in():
    slots = np.arange(-5000, 5000)
    values = hashed_uniform(123, slots)
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    # 99.99 % point of chi-squared with 19 degrees of freedom.
    assert ((counts - 500) ** 2 / 500).sum() < 50.8
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(values, hashed_uniform(124, slots))[0, 1]) < 0.04
    assert hashed_uniform(123, 17) == values[5017]
    assert hashed_uniform(123, 2, 17) != hashed_uniform(123, 17, 2)
