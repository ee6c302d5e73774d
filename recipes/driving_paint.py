"""Anti-aliased drawing primitives for the procedural driving scene.

Every shape is painted with its analytic pixel coverage instead of supersampling, so a frame costs a few
milliseconds and edges stay clean when a small frame is shown enlarged.  Coordinates are in pixels with the centre
of the top left pixel at (0.5, 0.5); colours are RGB triples in [0, 1].
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def hashed_uniform(key: int, *counters: Array | int) -> Array:
    """Uniform numbers in [0, 1) that depend on the key and the counters alone (splitmix64 finaliser).

    Roadside objects are numbered without end, so they cannot be drawn one after the other from a generator: a longer
    clip has to meet the same objects as a shorter one.

    Args:
        key: Any non-negative integer below 2**64.
        counters: Integers or integer arrays that broadcast against each other.

    Returns:
        float64 array of the broadcast shape.
    """
    mask = 0xFFFFFFFFFFFFFFFF
    state = np.asarray(key & mask, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            state = state + np.asarray(counter).astype(np.int64).astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))


def band_coverage(position: Array, footprint: Array, low: float, high: float) -> Array:
    """Share of the interval ``position +- footprint / 2`` that lies between low and high."""
    overlap = np.minimum(position + footprint / 2, high) - np.maximum(position - footprint / 2, low)
    return np.clip(overlap / footprint, 0.0, 1.0)


def dash_coverage(position: Array, footprint: Array, period: float, length: float) -> Array:
    """Share of ``position +- footprint / 2`` covered by dashes ``[k * period, k * period + length)``, exactly."""

    def painted(s: Array) -> Array:
        whole = np.floor(s / period)
        return whole * length + np.minimum(s - whole * period, length)

    return (painted(position + footprint / 2) - painted(position - footprint / 2)) / footprint


class Canvas:
    """An RGB image (height, width, 3), float32, that shapes are blended onto."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.image = np.zeros((height, width, 3), dtype=np.float32)
        self.xs = np.arange(width, dtype=np.float32) + 0.5
        self.ys = np.arange(height, dtype=np.float32) + 0.5

    def _window(self, left: float, right: float, top: float, bottom: float) -> tuple[slice, slice] | None:
        x0, x1 = max(int(left) - 1, 0), min(int(right) + 2, self.width)
        y0, y1 = max(int(top) - 1, 0), min(int(bottom) + 2, self.height)
        return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None

    def blend(self, window: tuple[slice, slice], coverage: Array, colour: Array) -> None:
        """Mix the colour into a window of the image in proportion to the coverage (height, width)."""
        patch = self.image[window]
        patch += coverage[..., None].astype(np.float32) * (np.asarray(colour, dtype=np.float32) - patch)

    def rectangle(self, left: float, right: float, top: float, bottom: float, colour: Array, alpha: float = 1) -> None:
        """Axis-aligned rectangle with exact coverage."""
        window = self._window(left, right, top, bottom)
        if window is None:
            return
        rows = np.clip(np.minimum(self.ys[window[0]] + 0.5, bottom) - np.maximum(self.ys[window[0]] - 0.5, top), 0, 1)
        columns = np.clip(
            np.minimum(self.xs[window[1]] + 0.5, right) - np.maximum(self.xs[window[1]] - 0.5, left), 0, 1
        )
        self.blend(window, alpha * rows[:, None] * columns[None, :], colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Array, alpha: float = 1) -> None:
        """Filled axis-aligned ellipse; coverage from the first-order distance to its edge."""
        window = self._window(x - rx, x + rx, y - ry, y + ry)
        if window is None:
            return
        dx, dy = (self.xs[window[1]] - x)[None, :], (self.ys[window[0]] - y)[:, None]
        level = np.sqrt((dx / rx) ** 2 + (dy / ry) ** 2)
        slope = np.sqrt((dx / rx**2) ** 2 + (dy / ry**2) ** 2) / np.maximum(level, 1e-3)
        distance = (1 - level) / np.maximum(slope, 1e-3)
        self.blend(window, alpha * np.clip(distance + 0.5, 0, 1), colour)

    def trapezoid(
        self, x: float, half_top: float, half_bottom: float, top: float, bottom: float, colour: Array, alpha: float = 1
    ) -> None:
        """Symmetric trapezoid around the column x; ``half_top = 0`` is a triangle."""
        half = max(half_top, half_bottom)
        window = self._window(x - half, x + half, top, bottom)
        if window is None:
            return
        ys = self.ys[window[0]]
        rows = np.clip(np.minimum(ys + 0.5, bottom) - np.maximum(ys - 0.5, top), 0, 1)
        edge = half_top + (half_bottom - half_top) * np.clip((ys - top) / max(bottom - top, 1e-6), 0, 1)
        ramp = 1 + abs(half_bottom - half_top) / max(bottom - top, 1e-6)
        columns = np.clip((edge[:, None] - np.abs(self.xs[window[1]] - x)[None, :]) / ramp + 0.5, 0, 1)
        self.blend(window, alpha * rows[:, None] * columns, colour)

    def glow(self, x: float, y: float, rx: float, ry: float, colour: Array, strength: float) -> None:
        """Add light with a Gaussian profile of standard deviations rx / 2 and ry / 2 (screen blending)."""
        window = self._window(x - 1.6 * rx, x + 1.6 * rx, y - 1.6 * ry, y + 1.6 * ry)
        if window is None:
            return
        dx, dy = (self.xs[window[1]] - x)[None, :] / rx, (self.ys[window[0]] - y)[:, None] / ry
        # The subtraction makes the profile reach zero inside the window: no visible square.
        weight = np.clip(np.exp(-2 * (dx**2 + dy**2)) - 0.006, 0, None) * strength
        patch = self.image[window]
        patch += weight[..., None].astype(np.float32) * np.asarray(colour, dtype=np.float32) * (1 - patch)
