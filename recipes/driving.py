"""Driving videos made on the spot: an endless labelled corpus with known motion, for training and tests offline.

The paper's main domain is driving video conditioned on labels such as day and night (section 4.1).  This corpus has
the same shape at the size of a CPU demo: clips of a drive along a winding road at one of three times of day in one
of four kinds of weather.  Everything about a clip follows from (seed, index), so nothing is stored, frames can be
asked for in any order, and a longer clip starts with the frames of a shorter one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from temporal_layers.recipes.driving_boxes import car_boxes
from temporal_layers.recipes.driving_frame import CAR_COLOURS, LIGHTS, Painter
from temporal_layers.recipes.driving_paint import hashed_uniform
from temporal_layers.recipes.driving_scene import CAMERA_HEIGHT, FAR, Scene, View

TIMES = tuple(LIGHTS)
WEATHERS = ("clear", "rain", "fog", "snow")
SETTINGS = ("country", "forest", "town")
LABELS: tuple[str, ...] = tuple(f"{time} {weather}" for time in TIMES for weather in WEATHERS)

_STILL_FRAMES = 64
"""Stills are taken from the first frames of a clip, so that image and video models see the same moments."""

_CAR_NAMES = ("red", "blue", "white", "yellow", "green")
_SETTING_WORDS = {"country": "the countryside", "forest": "a forest", "town": "a town"}
_TIME_WORDS = {"day": "by day", "dusk": "at dusk", "night": "at night"}
_WEATHER_WORDS = {"clear": "under a clear sky", "rain": "in the rain", "fog": "in fog", "snow": "in snow"}


@dataclass(frozen=True, kw_only=True)
class DrivingConfig:
    """Size and rate of the clips.

    Attributes:
        height: Frame height in pixels, at least 32.
        width: Frame width in pixels, at least 32.
        fps: Frames per second.  At 8 and above no scene moves by more than a third of a dash period per frame, so
            motion is never ambiguous.
    """

    height: int = 64
    width: int = 96
    fps: float = 8.0

    def __post_init__(self) -> None:
        if self.height < 32 or self.width < 32:
            raise ValueError(
                f"DrivingConfig: expected height and width of at least 32 pixels, got {self.height}x{self.width}; "
                "render larger and resize"
            )
        if self.fps <= 0:
            raise ValueError(f"DrivingConfig: expected fps above 0, got {self.fps}")


@dataclass(frozen=True, kw_only=True)
class DrivingClip:
    """A rendered clip with what is known about it.

    Attributes:
        frames: Values in [0, 1], float32.
        label: Index into ``LABELS``.
        caption: An English sentence made from the clip's parameters.
        speed: Speed of the camera along the road in metres per second.
        curvature: Curvature of the road under the camera at each frame in 1 / metres, positive to the right.
        lead_distance: Distance to the car ahead at each frame in metres; zeros if there is none.
        fps: Frames per second.
    """

    frames: Float[Tensor, "3 frames height width"]
    label: int
    caption: str
    speed: float
    curvature: Float[Tensor, " frames"]
    lead_distance: Float[Tensor, " frames"]
    fps: float


class DrivingCorpus:
    """Endless corpus of driving clips, a pure function of (seed, index).

    Example:
        >>> clip = DrivingCorpus(seed=0).clip(3, num_frames=16)
        >>> clip.frames.shape, LABELS[clip.label]
        (torch.Size([3, 16, 64, 96]), 'day fog')
    """

    def __init__(self, config: DrivingConfig | None = None, *, seed: int = 0) -> None:
        self.config = config or DrivingConfig()
        self.seed = seed
        self.view = View(self.config.height, self.config.width)

    def __repr__(self) -> str:
        return f"DrivingCorpus({self.config}, seed={self.seed})"

    def scene(self, index: int) -> Scene:
        """Parameters of the clip at an index.

        Args:
            index: Any integer of at least 0.

        Raises:
            ValueError: If the index is negative.
        """
        if index < 0:
            raise ValueError(f"DrivingCorpus: expected a clip index of at least 0, got {index}")
        rng = np.random.default_rng((self.seed, index))
        label = self.label(index)
        return Scene(
            key=int(rng.integers(1 << 62)),
            time=TIMES[label // len(WEATHERS)],
            weather=WEATHERS[label % len(WEATHERS)],
            setting=SETTINGS[rng.integers(len(SETTINGS))],
            speed=rng.uniform(7.0, 17.0),
            start=rng.uniform(0.0, 1000.0),
            curvature=rng.choice((-1.0, 1.0)) * rng.uniform(0.003, 0.013),
            wavelength=rng.uniform(160.0, 360.0),
            phase=rng.uniform(0.0, 2 * np.pi),
            sun_azimuth=rng.uniform(-0.5, 0.5),
            lead_colour=int(rng.integers(len(CAR_COLOURS))),
            lead_gap=rng.uniform(9.0, 20.0) * float(rng.random() < 0.6),
            lead_sway=rng.uniform(0.3, 0.7),
            oncoming_period=rng.uniform(55.0, 110.0) * float(rng.random() < 0.6),
            oncoming_speed=rng.uniform(6.0, 11.0),
            oncoming_offset=rng.uniform(0.0, 55.0),
        )

    def label(self, index: int) -> int:
        """Class label of the clip at an index (uniform over ``LABELS``), without rendering it."""
        return int(len(LABELS) * hashed_uniform(self.seed, 1009, index))

    def clip(self, index: int, num_frames: int, *, start: int = 0) -> DrivingClip:
        """Render frames ``start`` to ``start + num_frames - 1`` of a clip.

        Args:
            index: Which clip, at least 0.
            num_frames: How many frames, at least 1.
            start: First frame, at least 0.

        Raises:
            ValueError: If an argument is out of range.
        """
        if num_frames < 1 or start < 0:
            raise ValueError(
                f"DrivingCorpus.clip: expected num_frames >= 1 and start >= 0, got num_frames={num_frames} "
                f"and start={start}"
            )
        scene = self.scene(index)
        seconds = (start + np.arange(num_frames)) / self.config.fps
        frames = np.stack([Painter(scene, self.view, moment).frame() for moment in seconds])
        omega = 2 * np.pi / scene.wavelength
        curvature = scene.curvature * np.sin(omega * scene.travelled(seconds) + scene.phase)
        return DrivingClip(
            frames=torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous(),
            label=self.label(index),
            caption=caption(scene),
            speed=scene.speed,
            curvature=torch.from_numpy(curvature).float(),
            lead_distance=torch.tensor([float(scene.lead_distance(moment)) for moment in seconds]),
            fps=self.config.fps,
        )

    def stills(self, indices: Iterable[int]) -> tuple[Float[Tensor, "frames 3 height width"], Int[Tensor, " frames"]]:
        """One frame of each clip, at a moment drawn from (seed, index): the data of an image model.

        Args:
            indices: Clip indices, at least one.

        Returns:
            Frames in [0, 1], float32, and labels, int64.

        Raises:
            ValueError: If there are no indices or one of them is negative.
        """
        indices = list(indices)
        if not indices:
            raise ValueError("DrivingCorpus.stills: expected at least one clip index, got none")
        images = []
        for index in indices:
            scene = self.scene(index)
            images.append(Painter(scene, self.view, self.still_frame(index) / self.config.fps).frame())
        frames = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return frames, torch.tensor([self.label(index) for index in indices])

    def still_frame(self, index: int) -> int:
        """Which frame of a clip its still is."""
        return int(_STILL_FRAMES * hashed_uniform(self.seed, 2003, index))

    def boxes(self, index: int, frame: int) -> Float[Tensor, "cars 4"]:
        """Where the cars of a frame are, in closed form: the layout that the paper's box-conditioned model is given.

        A car that is too far away to be made out, or of which less than half is in the frame and not behind a nearer
        car, is left out.

        Args:
            index: Which clip, at least 0.
            frame: Which frame of it.

        Returns:
            Left, top, right and bottom of each car's body as shares of the frame's width and height, cut off at its
            edges, float32; the nearest car first, ``(0, 4)`` if there is none.
        """
        return torch.from_numpy(car_boxes(self.scene(index), self.view, frame / self.config.fps)).float()

    def road_flow(self, index: int, frame: int) -> tuple[Float[Tensor, "2 height width"], Bool[Tensor, "height width"]]:
        """Where each point of the ground moves from one frame to the next, in closed form.

        Objects that stand on the ground are ignored; their pixels carry the flow of the ground behind them.

        Args:
            index: Which clip.
            frame: The earlier frame of the pair.

        Returns:
            Displacement (columns, rows) in pixels, and a mask that is true where the ground is nearer than the
            distance at which objects appear and stays in front of the camera.
        """
        scene, view = self.scene(index), self.view
        top, z, x = view.ground()
        now = scene.travelled(frame / self.config.fps)
        step = scene.speed / self.config.fps
        lateral = x - scene.road_offset(now, z)
        z_next = z - step
        mask = np.zeros((view.height, view.width), dtype=bool)
        mask[top:] = (z < FAR) & (z_next > 1.0)
        z_next = np.maximum(z_next, 1.0)
        x_next = lateral + scene.road_offset(now + step, z_next)
        flow = np.zeros((2, view.height, view.width), dtype=np.float32)
        flow[0, top:] = view.focal * (x_next / z_next - x / z)
        flow[1, top:] = view.focal * CAMERA_HEIGHT * (1 / z_next - 1 / z)
        return torch.from_numpy(flow), torch.from_numpy(mask)


def caption(scene: Scene) -> str:
    """An English sentence about a scene, for models that are conditioned on text."""
    behind = f" behind a {_CAR_NAMES[scene.lead_colour]} car" if scene.lead_gap else ""
    pace = "slowly" if scene.speed < 10 else "fast" if scene.speed > 14 else "steadily"
    return (
        f"driving {pace} through {_SETTING_WORDS[scene.setting]}{behind} {_TIME_WORDS[scene.time]} "
        f"{_WEATHER_WORDS[scene.weather]}"
    )
