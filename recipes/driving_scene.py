"""Geometry of a driving scene: the road, the camera's way along it, and where things appear in the frame.

Units are metres, seconds and pixels.  The camera drives along the road in the right-hand lane, at height
``CAMERA_HEIGHT``, looking along the tangent of the road.  A ground point at distance z and lateral position x appears
at column ``centre + focal * x / z`` and row ``horizon + focal * CAMERA_HEIGHT / z``.  The road's curvature is a sine
of the travelled distance, so heading and lateral offset have closed forms and the motion of every pixel is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from temporal_layers.recipes.driving_paint import Array

CAMERA_HEIGHT = 2.0
LANE_WIDTH = 3.6
CAMERA_LATERAL = LANE_WIDTH / 2
DASH_PERIOD, DASH_LENGTH, LINE_WIDTH = 9.0, 4.0, 0.32
ROAD_HALF_WIDTH = LANE_WIDTH + 0.7
OBJECT_SPACING, POST_SPACING, FAR = 7.0, 14.0, 85.0
CAR_HALF_WIDTH, CAR_HEIGHT = 0.94, 1.55


class Car(NamedTuple):
    """A car on the road.

    Attributes:
        distance: From the camera, in metres.
        lateral: Of its middle from the road's centre line, positive to the right.
        colour: Number of its colour; more numbers than colours begin again.
        oncoming: Whether its front is seen.
    """

    distance: float
    lateral: float
    colour: int
    oncoming: bool


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that is drawn from the seed for one clip (metres, seconds, radians, 1/metres)."""

    key: int
    time: str
    weather: str
    setting: str
    speed: float
    start: float
    curvature: float
    wavelength: float
    phase: float
    sun_azimuth: float
    lead_colour: int
    lead_gap: float
    lead_sway: float
    oncoming_period: float
    oncoming_speed: float
    oncoming_offset: float

    def travelled(self, seconds: float) -> float:
        """Arc length of the camera along the road."""
        return self.start + self.speed * seconds

    def heading(self, arc: Array | float) -> Array | float:
        """Direction of the road at an arc length: the integral of its curvature."""
        omega = 2 * np.pi / self.wavelength
        return -self.curvature / omega * np.cos(omega * arc + self.phase)

    def road_offset(self, arc: float, z: Array | float) -> Array | float:
        """Lateral position of the road's centre line z metres ahead, seen from the tangent at ``arc``."""
        omega = 2 * np.pi / self.wavelength
        angle = omega * arc + self.phase
        return self.curvature / omega * (z * np.cos(angle) - (np.sin(angle + omega * z) - np.sin(angle)) / omega)

    def lead_distance(self, seconds: float) -> float:
        """Gap to the car ahead; 0 if there is none."""
        return self.lead_gap and self.lead_gap * (1 + 0.22 * np.sin(self.lead_sway * seconds + self.phase))

    def oncoming_distance(self, seconds: float) -> tuple[float, int]:
        """Distance of the next oncoming car and its number; infinite where there is none."""
        if not self.oncoming_period:
            return np.inf, 0
        passed = (self.speed + self.oncoming_speed) * seconds - self.oncoming_offset
        number = int(np.floor(passed / self.oncoming_period))
        return self.oncoming_period - (passed - number * self.oncoming_period), number

    def cars(self, seconds: float) -> list[Car]:
        """The cars in sight, those hidden by others included."""
        cars = []
        lead = self.lead_distance(seconds)
        if lead:
            cars.append(Car(lead, LANE_WIDTH / 2, self.lead_colour, False))
        oncoming, number = self.oncoming_distance(seconds)
        if 2.5 < oncoming < FAR:
            cars.append(Car(oncoming, -LANE_WIDTH / 2, number, True))
        return cars


@dataclass(frozen=True)
class View:
    """Pixel geometry of a frame size."""

    height: int
    width: int

    @property
    def focal(self) -> float:
        """Focal length in pixels: a horizontal angle of view of 67 degrees."""
        return 0.75 * self.width

    @property
    def horizon(self) -> float:
        """Row of the horizon."""
        return round(0.42 * self.height)

    @property
    def centre(self) -> float:
        """Column of the vanishing point of a straight road."""
        return self.width / 2

    def place(self, scene: Scene, arc: float, z: float, lateral: float) -> tuple[float, float, float]:
        """Column, ground row and pixels per metre of a point given relative to the road's centre line."""
        x = scene.road_offset(arc, z) + lateral - CAMERA_LATERAL
        scale = self.focal / z
        return self.centre + x * scale, self.horizon + CAMERA_HEIGHT * scale, scale

    def ground(self) -> tuple[Array, Array, Array]:
        """First ground row, distance z of each ground row and lateral position x of each ground pixel, in metres."""
        top = int(np.ceil(self.horizon + 0.4))
        z = self.focal * CAMERA_HEIGHT / (np.arange(top, self.height) + 0.5 - self.horizon)
        columns = (np.arange(self.width) + 0.5 - self.centre) / self.focal
        return top, z[:, None], columns[None, :] * z[:, None]
