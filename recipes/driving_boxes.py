"""Boxes around the cars of a driving frame, from the geometry of the scene alone."""

from __future__ import annotations

import numpy as np

from temporal_layers.recipes.driving_paint import Array
from temporal_layers.recipes.driving_scene import CAR_HALF_WIDTH, CAR_HEIGHT, Scene, View

LEAST_HEIGHT = 0.05
"""Height of a car, as a share of the frame's, below which it counts as too small: at about 37 metres."""

LEAST_VISIBLE = 0.5
"""Share of a car's box that has to be in the frame and not behind a nearer car."""


def car_boxes(scene: Scene, view: View, seconds: float) -> Array:
    """Boxes around the bodies of the cars that can be seen, without their shadows and the light of their lamps.

    What stands at the roadside is not taken to hide a car.

    Args:
        scene: Of the clip.
        view: Size of the frame.
        seconds: Moment of the clip.

    Returns:
        ``(cars, 4)``, float64: left, top, right and bottom as shares of the frame's width and height, cut off at its
        edges; the nearest car first.
    """
    arc = scene.travelled(seconds)
    nearer: list[Array] = []
    shown: list[Array] = []
    for car in sorted(scene.cars(seconds)):
        column, row, scale = view.place(scene, arc, car.distance, car.lateral)
        half = CAR_HALF_WIDTH * scale
        box = np.array([column - half, row - CAR_HEIGHT * scale, column + half, row])
        box /= (view.width, view.height, view.width, view.height)
        inside = box.clip(0, 1)
        hidden = sum(_area(_overlap(inside, other)) for other in nearer)
        nearer.append(box)
        if box[3] - box[1] >= LEAST_HEIGHT and _area(inside) - hidden >= LEAST_VISIBLE * _area(box):
            shown.append(inside)
    return np.array(shown).reshape(-1, 4)


def _overlap(box: Array, other: Array) -> Array:
    return np.concatenate([np.maximum(box[:2], other[:2]), np.minimum(box[2:], other[2:])])


def _area(box: Array) -> float:
    width, height = np.maximum(box[2:] - box[:2], 0)
    return float(width * height)
