"""Curves and bars as SVG, without a script; the classes are styled by the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean

_WIDTH = 480


def number_text(value: object) -> str:
    """Floats to four significant digits without an exponent where that stays short; anything else as it prints."""
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"


def _nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven round values from at or below ``low`` to at or above ``high``."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span))
    step = next(step * factor for factor in (0.2, 0.25, 0.5, 1.0, 2.0) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _binned(values: Sequence[float], limit: int) -> list[tuple[float, float]]:
    """(step, mean) over runs of equal length, at most about ``limit``; values that are not finite are left out."""
    length = max(1, math.ceil(len(values) / limit))
    points = []
    for begin in range(0, len(values), length):
        finite = [value for value in values[begin : begin + length] if math.isfinite(value)]
        if finite:
            points.append((begin + (min(length, len(values) - begin) - 1) / 2, fmean(finite)))
    return points


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred mean over a tenth of the points, narrower at both ends so that no end is dragged inwards."""
    reach = len(points) // 20
    result = []
    for index, (step, _) in enumerate(points):
        width = min(reach, index, len(points) - 1 - index)
        result.append((step, fmean(value for _, value in points[index - width : index + width + 1])))
    return result


Curve = Sequence[tuple[float, float]]
"""Points (step, value), steps counted from 0."""


class _Axes:
    """A frame of 480 x 234 with round values on the left and the number of steps below.

    Args:
        low: Smallest value.
        high: Largest value.
        steps: Steps from the left to the right.
    """

    left, right, top, bottom = 48, _WIDTH - 10, 10, 210

    def __init__(self, low: float, high: float, steps: int) -> None:
        self.ticks, self.steps = _nice_ticks(low, high), steps

    def place(self, point: tuple[float, float]) -> str:
        """Coordinates of a point: the middle of its step."""
        x = self.left + (self.right - self.left) * (point[0] + 0.5) / self.steps
        span = self.ticks[-1] - self.ticks[0]
        y = self.bottom - (self.bottom - self.top) * (point[1] - self.ticks[0]) / span
        return f"{x:.1f},{y:.1f}"

    def line(self, kind: str, points: Curve, title: str = "") -> str:
        """A curve; the title is shown where the pointer rests on it."""
        inside = f"<title>{escape(title)}</title>" if title else ""
        return f'<polyline class="{kind}" points="{" ".join(map(self.place, points))}">{inside}</polyline>'

    def svg(self, lines: Sequence[str], label: str) -> str:
        """The whole drawing."""
        parts = []
        for tick in self.ticks:
            y = float(self.place((0, tick)).split(",")[1])
            parts.append(f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{y}" y2="{y}"/>')
            text = number_text(round(tick, 10))
            parts.append(f'<text class="faint" x="{self.left - 6}" y="{y + 4}" text-anchor="end">{text}</text>')
        parts += lines
        parts.append(f'<text class="faint" x="{self.left}" y="{self.bottom + 18}">0</text>')
        parts.append(
            f'<text class="faint" x="{self.right}" y="{self.bottom + 18}" text-anchor="end">{self.steps} steps</text>'
        )
        size = f"0 0 {_WIDTH} {self.bottom + 24}"
        return f'<svg viewBox="{size}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def losses_svg(name: str, losses: Sequence[float]) -> str:
    """Loss over steps: means of short runs of steps (thin) and their moving average (bold).

    Args:
        name: Of the training.
        losses: One a step; those that are not finite are counted.
    """
    points = _binned(losses, limit=240)
    if not points:
        return '<p class="note">No finite loss was recorded.</p>'
    axes = _Axes(min(value for _, value in points), max(value for _, value in points), len(losses))
    svg = axes.svg([axes.line("raw", points), axes.line("smooth", _smoothed(points))], f"Training loss: {name}")
    broken = sum(not math.isfinite(value) for value in losses)
    note = f" {broken} of {len(losses)} steps had no finite loss." if broken else ""
    return f"<figure>{svg}<figcaption>Loss of {escape(name)}; bold: moving average.{note}</figcaption></figure>"


def curves_svg(curves: Mapping[str, Curve], steps: int, caption: str) -> str:
    """Several curves over the steps of a training, each with its name where the pointer rests.

    Args:
        curves: By name, not empty.
        steps: Of the training.
        caption: Below.
    """
    values = [value for points in curves.values() for _, value in points]
    axes = _Axes(min(values), max(values), steps)
    lines = [axes.line("raw", points, f"{name}: {number_text(points[-1][1])}") for name, points in curves.items()]
    svg = axes.svg(lines, caption)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def alphas_svg(alphas: Mapping[str, float]) -> str:
    """One bar a layer over the full range 0 to 1."""
    pitch, parts = 24, []
    for row, (name, alpha) in enumerate(alphas.items()):
        if not 0 <= alpha <= 1:
            raise ValueError(f"write_report: alphas: {name}: expected a value in [0, 1], got {alpha}")
        y = row * pitch
        parts.append(f'<rect class="track" y="{y}" width="{_WIDTH}" height="{pitch - 4}" rx="3"/>')
        parts.append(f'<rect class="bar" y="{y}" width="{alpha * _WIDTH:.1f}" height="{pitch - 4}" rx="3"/>')
        parts.append(f'<text x="8" y="{y + 14}">{escape(name)}</text>')
        parts.append(f'<text x="{_WIDTH - 8}" y="{y + 14}" text-anchor="end">{alpha:.3f}</text>')
    height = len(alphas) * pitch
    svg = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Alpha per layer">{"".join(parts)}</svg>'
    note = "alpha per layer: the weight of the image branch; 1 is the image model, 0 the temporal layer alone."
    return f"<figure>{svg}<figcaption>{note}</figcaption></figure>"
