"""Paint one frame of a driving scene: sky, horizon, ground, roadside and traffic, far things first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from temporal_layers.recipes.driving_paint import Array, Canvas, band_coverage, dash_coverage, hashed_uniform
from temporal_layers.recipes.driving_scene import (
    CAMERA_HEIGHT,
    CAMERA_LATERAL,
    CAR_HALF_WIDTH,
    CAR_HEIGHT,
    DASH_LENGTH,
    DASH_PERIOD,
    FAR,
    LANE_WIDTH,
    LINE_WIDTH,
    OBJECT_SPACING,
    POST_SPACING,
    ROAD_HALF_WIDTH,
    Scene,
    View,
)


@dataclass(frozen=True)
class Light:
    """Colours of one time of day; ``ambient`` multiplies every surface, ``lamps`` says whether lights are on."""

    sky_high: tuple[float, float, float]
    sky_low: tuple[float, float, float]
    ambient: tuple[float, float, float]
    hills: tuple[float, float, float]
    lamps: float


LIGHTS = {
    "day": Light((0.20, 0.47, 0.86), (0.78, 0.90, 0.98), (1.0, 1.0, 1.0), (0.45, 0.62, 0.66), 0.0),
    "dusk": Light((0.23, 0.20, 0.46), (0.99, 0.58, 0.34), (0.72, 0.61, 0.66), (0.47, 0.30, 0.44), 0.6),
    "night": Light((0.02, 0.04, 0.13), (0.10, 0.16, 0.34), (0.28, 0.32, 0.46), (0.07, 0.10, 0.22), 1.0),
}
CAR_COLOURS = np.array(
    [(0.80, 0.13, 0.13), (0.13, 0.33, 0.72), (0.92, 0.92, 0.93), (0.93, 0.68, 0.10), (0.10, 0.48, 0.42)]
)
WALL_COLOURS = np.array([(0.90, 0.84, 0.72), (0.80, 0.56, 0.45), (0.72, 0.78, 0.84), (0.93, 0.91, 0.88)])
ROOF_COLOURS = np.array([(0.62, 0.24, 0.18), (0.36, 0.32, 0.36), (0.50, 0.30, 0.22)])


class Painter:
    """Paints the frame of a scene at a moment; one object per frame."""

    def __init__(self, scene: Scene, view: View, seconds: float) -> None:
        self.scene, self.view, self.seconds = scene, view, float(seconds)
        self.arc = scene.travelled(self.seconds)
        self.light = LIGHTS[scene.time]
        self.canvas = Canvas(view.height, view.width)
        self.ambient = np.array(self.light.ambient)
        self.sky_high, self.sky_low = np.array(self.light.sky_high), np.array(self.light.sky_low)
        if scene.weather != "clear":
            overcast = {"rain": (0.52, 0.57, 0.64), "fog": (0.83, 0.85, 0.87), "snow": (0.86, 0.89, 0.94)}
            veil = np.array(overcast[scene.weather]) * (0.25 * self.ambient.mean() + 0.75 * self.ambient)
            amount = {"rain": 0.8, "fog": 0.95, "snow": 0.75}[scene.weather]
            self.sky_high += amount * (0.86 * veil - self.sky_high)
            self.sky_low += amount * (veil - self.sky_low)
            self.ambient = self.ambient * {"rain": 0.80, "fog": 0.95, "snow": 1.0}[scene.weather]
        self.visibility = {"clear": 190.0, "rain": 75.0, "fog": 24.0, "snow": 80.0}[scene.weather]

    def frame(self) -> Array:
        """The painted frame, (height, width, 3), float32 in [0, 1]."""
        self.sky()
        self.horizon_line()
        self.ground()
        self.objects()
        return np.clip(self.canvas.image, 0, 1)

    def surface(self, colour: Array, z: Array | float, lateral: Array | float = 0.0) -> Array:
        """Colour of a surface z metres away after ambient light, our headlights and haze."""
        z, lateral = np.asarray(z, dtype=np.float64), np.asarray(lateral, dtype=np.float64)
        beam = np.exp(-((z / 24) ** 2) - (lateral / (2.2 + 0.22 * z)) ** 2) * self.light.lamps
        lit = np.asarray(colour) * (self.ambient + 0.62 * beam[..., None] * np.array((1.0, 0.95, 0.80)))
        clear = np.exp(-z / self.visibility)[..., None]
        return clear * lit + (1 - clear) * self.sky_low

    def place(self, z: float, lateral: float) -> tuple[float, float, float]:
        """Column, ground row and pixels per metre of a point given relative to the road's centre line."""
        return self.view.place(self.scene, self.arc, z, lateral)

    def azimuth(self, direction: float, parallax: float = 1.0) -> float:
        """Column at which a far thing in a compass direction appears."""
        turned = direction - parallax * self.scene.heading(self.arc)
        return self.view.centre + self.view.focal * turned

    def sky(self) -> None:
        """Gradient, sun or moon, stars and clouds."""
        canvas, scene, view = self.canvas, self.scene, self.view
        height = np.clip(canvas.ys / view.horizon, 0, 1)[:, None] ** 1.3
        canvas.image[:] = (self.sky_high + height * (self.sky_low - self.sky_high))[:, None, :]
        unit = view.height / 96
        if scene.weather == "clear":
            x = self.azimuth(scene.sun_azimuth)
            if scene.time == "day":
                canvas.glow(x, 12 * unit, 26 * unit, 26 * unit, (1.0, 0.95, 0.75), 0.75)
                canvas.ellipse(x, 12 * unit, 5.5 * unit, 5.5 * unit, (1.0, 0.98, 0.85))
            elif scene.time == "dusk":
                canvas.glow(x, 30 * unit, 48 * unit, 22 * unit, (1.0, 0.70, 0.35), 0.8)
                canvas.ellipse(x, 30 * unit, 8 * unit, 8 * unit, (1.0, 0.86, 0.55))
            else:
                for star in range(9):
                    where = 2.4 * hashed_uniform(scene.key, 1, star) - 1.2
                    row = 26 * unit * hashed_uniform(scene.key, 2, star)
                    canvas.glow(self.azimuth(where), row, 3 * unit, 3 * unit, (0.9, 0.93, 1.0), 0.8)
                canvas.glow(x, 14 * unit, 20 * unit, 20 * unit, (0.55, 0.62, 0.85), 0.5)
                canvas.ellipse(x, 14 * unit, 6 * unit, 6 * unit, (0.95, 0.95, 0.86))
        if scene.weather in ("clear", "rain") and scene.time != "night":
            self.clouds(unit)

    def clouds(self, unit: float) -> None:
        """A few soft clouds, fixed in direction but for a slow drift."""
        rain = self.scene.weather == "rain"
        tint = 0.62 * self.sky_high if rain else self.ambient * (1.0, 0.99, 0.98) * 0.4 + 0.6 * self.sky_low
        for cloud in range(5):
            h = [float(hashed_uniform(self.scene.key, 3, cloud, i)) for i in range(3)]
            x = self.azimuth(2.4 * h[0] - 1.2 + 0.006 * self.seconds)
            y, size = (5 + 17 * h[1]) * unit, (9 + 9 * h[2]) * unit
            for dx, dy, s in ((-0.9, 0.12, 0.62), (0.0, -0.1, 0.9), (0.95, 0.15, 0.6)):
                self.canvas.ellipse(x + dx * size, y + dy * size, s * size, 0.42 * s * size, tint, 0.62)
            self.canvas.rectangle(x - 1.2 * size, x + 1.2 * size, y + 0.17 * size, y + 0.36 * size, tint, 0.5)

    def horizon_line(self) -> None:
        """Two ranges of hills, or a skyline in the city, with parallax against the turning of the road."""
        canvas, scene, view = self.canvas, self.scene, self.view
        unit = view.height / 96
        far_clear = {"clear": 0.75, "rain": 0.5, "fog": 0.12, "snow": 0.5}[scene.weather]
        directions = (canvas.xs - view.centre) / view.focal
        for layer, (low, high, depth) in enumerate(((6.0, 9.0, 0.45), (2.5, 5.0, 0.9))):
            angle = directions + (1 + 0.15 * layer) * scene.heading(self.arc) + 0.02 * layer * self.arc / 20
            ridge = np.zeros_like(angle)
            for wave in range(3):
                h = float(hashed_uniform(scene.key, 5, layer, wave))
                ridge += np.sin((2.3 + 2.9 * wave + layer) * angle + 2 * np.pi * h) / (1 + wave)
            ridge = view.horizon - unit * (low + high * (0.5 + 0.3 * ridge))
            colour = np.array(self.light.hills) * (1.15 - 0.25 * layer)
            colour = colour + (1 - far_clear * (0.55 + 0.5 * depth)) * (self.sky_low - colour)
            coverage = np.clip(canvas.ys[:, None] + 0.5 - ridge[None, :], 0, 1)
            canvas.blend((slice(None), slice(None)), coverage, colour)
            if layer == 0 and scene.setting == "town":
                self.skyline(unit, far_clear)

    def skyline(self, unit: float, clear: float) -> None:
        """Blocks of different height in front of the far hills."""
        first = int(np.floor(((0 - self.view.centre) / self.view.focal + self.scene.heading(self.arc)) / 0.11)) - 1
        for block in range(first, first + 16):
            tall, wide, lit = (float(hashed_uniform(self.scene.key, 6, i, block)) for i in range(3))
            x = self.azimuth(block * 0.11)
            top = self.view.horizon - unit * (7 + 20 * tall**2)
            half = self.view.focal * 0.11 * (0.36 + 0.14 * wide)
            base = np.array((0.50, 0.56, 0.66)) * (0.85 + 0.3 * lit) * self.ambient
            colour = base + (1 - clear) * (self.sky_low - base)
            self.canvas.rectangle(x - half, x + half, top, self.view.horizon, colour)
            if self.light.lamps and lit > 0.35:
                warm = np.array((1.0, 0.82, 0.45))
                y = top + 4.5 * unit
                self.canvas.rectangle(x - 0.55 * half, x + 0.55 * half, y, y + 3 * unit, warm, 0.75 * clear)

    def ground(self) -> None:
        """Grass, road and markings, each filtered exactly over the pixel's footprint."""
        scene, view = self.scene, self.view
        top, z, x = view.ground()
        u = x + CAMERA_LATERAL - scene.road_offset(self.arc, z)
        depth = z**2 / (view.focal * CAMERA_HEIGHT)
        slope = x / z - (scene.road_offset(self.arc, z + 0.5) - scene.road_offset(self.arc, z - 0.5))
        across = np.hypot(z / view.focal, depth * slope)
        along = np.broadcast_to(depth, u.shape)
        arc = np.broadcast_to(self.arc + z, u.shape)

        snow, rain = scene.weather == "snow", scene.weather == "rain"
        grass = {"country": (0.40, 0.62, 0.25), "forest": (0.27, 0.46, 0.22), "town": (0.46, 0.58, 0.33)}[scene.setting]
        grass = np.array((0.90, 0.93, 0.97) if snow else grass)
        # Stripes of the terrain give the eye something to follow; they fade where a pixel spans too much of one.
        stripe = np.sin(2 * np.pi * arc / 18) * np.exp(-((along / 6) ** 2)) * (0.05 if snow else 0.13)
        colour = grass * (1 + stripe[..., None])

        def paint(coverage: Array, tint: Array | tuple[float, float, float]) -> None:
            nonlocal colour
            colour = colour + coverage[..., None] * (np.asarray(tint) - colour)

        paint(band_coverage(u, across, -ROAD_HALF_WIDTH - 1.3, ROAD_HALF_WIDTH + 1.3), 0.55 * grass + 0.22)
        asphalt = np.array((0.42, 0.43, 0.47) if not rain else (0.29, 0.31, 0.36))
        patches = np.sin(2 * np.pi * arc / 27 + 2 * np.sin(2 * np.pi * arc / 71)) * np.exp(-((along / 9) ** 2))
        paint(
            band_coverage(u, across, -ROAD_HALF_WIDTH, ROAD_HALF_WIDTH),
            asphalt * (1 + 0.07 * patches[..., None]),
        )
        if snow:
            for lane in (-LANE_WIDTH / 2, LANE_WIDTH / 2):
                paint(0.5 * band_coverage(u, across, lane - 0.4, lane + 0.4), (0.72, 0.75, 0.80))
            paint(0.6 * band_coverage(np.abs(u), across, LANE_WIDTH, ROAD_HALF_WIDTH), (0.88, 0.91, 0.96))
        if rain:
            wet = 0.5 + 0.5 * np.sin(2 * np.pi * arc / 13 + 1.3 * u) * np.exp(-((along / 5) ** 2))
            paint(0.45 * wet * band_coverage(u, across, -ROAD_HALF_WIDTH, ROAD_HALF_WIDTH), self.sky_low / self.ambient)
        for edge in (-LANE_WIDTH, LANE_WIDTH):
            low = edge - LINE_WIDTH / 2
            paint(band_coverage(u, across, low, low + LINE_WIDTH), (0.93, 0.93, 0.90))
        dashes = dash_coverage(arc, along, DASH_PERIOD, DASH_LENGTH)
        paint(dashes * band_coverage(u, across, -LINE_WIDTH / 2, LINE_WIDTH / 2), (0.97, 0.95, 0.88))
        shaded = self.surface(colour, np.broadcast_to(z, u.shape), x)
        self.canvas.image[top:] = shaded

    def objects(self) -> None:
        """Roadside objects, posts and cars, far ones first."""
        drawers = [(z, self.roadside, (z, side, slot)) for z, side, slot in self._slots(OBJECT_SPACING)]
        drawers += [(z, self.post, (z, side)) for z, side, _ in self._slots(POST_SPACING)]
        drawers += [(car.distance, self.car, car) for car in self.scene.cars(self.seconds)]
        for _, draw, arguments in sorted(drawers, key=lambda item: -item[0]):
            draw(*arguments)

    def _slots(self, spacing: float) -> list[tuple[float, int, int]]:
        first = int(np.ceil((self.arc + 2.2) / spacing))
        last = int(np.floor((self.arc + FAR) / spacing))
        return [(slot * spacing - self.arc, side, slot) for slot in range(first, last + 1) for side in (-1, 1)]

    def post(self, z: float, side: int) -> None:
        """White marker post with a reflector."""
        if self.scene.setting == "town":
            return
        x, y, scale = self.place(z, side * (ROAD_HALF_WIDTH + 0.4))
        lateral = side * ROAD_HALF_WIDTH - CAMERA_LATERAL
        alpha = min(1.0, (FAR - z) / 20)
        self.canvas.rectangle(
            x - 0.14 * scale, x + 0.14 * scale, y - scale, y, self.surface((0.95, 0.95, 0.95), z, lateral), alpha
        )
        reflector = self.surface((0.95, 0.35, 0.15), z, 0.3 * lateral)
        self.canvas.rectangle(x - 0.14 * scale, x + 0.14 * scale, y - 0.85 * scale, y - 0.55 * scale, reflector, alpha)

    def roadside(self, z: float, side: int, slot: int) -> None:
        """The tree, house or lamp that stands in a slot, if any."""
        kind, size, spread, hue = (float(hashed_uniform(self.scene.key, 11 + side, i, slot)) for i in range(4))
        shares = {
            "country": (("tree", 0.34), ("conifer", 0.46), ("house", 0.54)),
            "forest": (("conifer", 0.62), ("tree", 0.88)),
            "town": (("house", 0.48), ("lamp", 0.76), ("tree", 0.94)),
        }[self.scene.setting]
        name = next((name for name, until in shares if kind < until), None)
        # The left side is further from the camera's lane, so equal clearance from the road is enough.
        clearance = {"tree": 3.2, "conifer": 3.0, "house": 6.0, "lamp": 0.9, None: 0.0}[name]
        lateral = side * (ROAD_HALF_WIDTH + clearance + (0.0 if name == "lamp" else 4.5 * spread))
        # Objects come out of the haze, not out of nothing.
        alpha = min(1.0, (FAR - z) / 20)
        if name:
            getattr(self, f"_{name}")(z, lateral, size, hue, alpha)

    def _tree(self, z: float, lateral: float, size: float, hue: float, alpha: float) -> None:
        x, y, scale = self.place(z, lateral)
        side = lateral - CAMERA_LATERAL
        snow = self.scene.weather == "snow"
        leaf = np.array((0.24 + 0.22 * hue, 0.50 - 0.08 * hue, 0.17)) if not snow else np.array((0.62, 0.68, 0.72))
        radius = (1.5 + 0.9 * size) * scale
        middle = y - 1.5 * scale - radius * 0.95
        self._shadow(x, y, 1.3 * radius, alpha)
        self.canvas.rectangle(
            x - 0.24 * scale, x + 0.24 * scale, middle, y, self.surface((0.38, 0.27, 0.18), z, side), alpha
        )
        self.canvas.ellipse(x, middle, radius, 1.08 * radius, self.surface(0.78 * leaf, z, side), alpha)
        bright = self.surface(np.array((0.95, 0.97, 1.0)) if snow else 1.18 * leaf, z, side)
        self.canvas.ellipse(
            x - 0.18 * radius, middle - 0.28 * radius, 0.66 * radius, 0.66 * radius, bright, 0.8 * alpha
        )

    def _conifer(self, z: float, lateral: float, size: float, hue: float, alpha: float) -> None:
        x, y, scale = self.place(z, lateral)
        side = lateral - CAMERA_LATERAL
        snow = self.scene.weather == "snow"
        leaf = np.array((0.13 + 0.08 * hue, 0.37 + 0.06 * hue, 0.24))
        tall = (5.0 + 2.6 * size) * scale
        self._shadow(x, y, 0.34 * tall, alpha)
        self.canvas.rectangle(
            x - 0.22 * scale, x + 0.22 * scale, y - 0.25 * tall, y, self.surface((0.34, 0.24, 0.17), z, side), alpha
        )
        for step, (low, high, wide) in enumerate(((0.14, 0.60, 0.26), (0.38, 0.80, 0.20), (0.60, 1.0, 0.14))):
            shade = self.surface(leaf * (0.85 + 0.2 * step), z, side)
            self.canvas.trapezoid(x, 0.02 * tall, wide * tall, y - high * tall, y - low * tall, shade, alpha)
            if snow:
                white = self.surface((0.93, 0.95, 0.99), z, side)
                cut = y - (high - 0.5 * (high - low)) * tall
                self.canvas.trapezoid(x, 0.02 * tall, 0.5 * wide * tall, y - high * tall, cut, white, alpha)

    def _house(self, z: float, lateral: float, size: float, hue: float, alpha: float) -> None:
        x, y, scale = self.place(z, lateral)
        side = lateral - CAMERA_LATERAL
        wall, roof = WALL_COLOURS[int(4 * hue)], ROOF_COLOURS[int(3 * size)]
        if self.scene.weather == "snow":
            roof = np.array((0.92, 0.94, 0.98))
        half, tall = (2.4 + 0.8 * size) * scale, (2.8 + 2.4 * hue * size) * scale
        self.canvas.rectangle(x - half, x + half, y - tall, y, self.surface(wall, z, side), alpha)
        peak = y - tall - 1.9 * scale
        self.canvas.trapezoid(
            x, 0.25 * half, 1.18 * half, peak, y - tall + 0.1 * scale, self.surface(roof, z, side), alpha
        )
        glass = np.array((1.0, 0.83, 0.45)) if self.light.lamps else self.surface((0.33, 0.42, 0.52), z, side)
        for dx in (-0.5, 0.5):
            left = x + dx * half - 0.45 * scale
            self.canvas.rectangle(left, left + 0.9 * scale, y - 2.1 * scale, y - 1.0 * scale, glass, 0.95 * alpha)
        if self.light.lamps:
            self.canvas.glow(x, y - 1.5 * scale, 1.3 * half, 1.6 * scale, (1.0, 0.75, 0.35), 0.25 * alpha)

    def _lamp(self, z: float, lateral: float, size: float, hue: float, alpha: float) -> None:
        x, y, scale = self.place(z, lateral)
        toward = -np.sign(lateral)
        metal = self.surface((0.36, 0.39, 0.42), z, lateral - CAMERA_LATERAL)
        top = y - 5.6 * scale
        head = x + toward * 1.5 * scale
        self.canvas.rectangle(x - 0.15 * scale, x + 0.15 * scale, top, y, metal, alpha)
        self.canvas.rectangle(min(x, head), max(x, head), top, top + 0.24 * scale, metal, alpha)
        if self.light.lamps:
            warm = (1.0, 0.85, 0.55)
            self.canvas.glow(head, y, 3.2 * scale, 0.5 * scale, warm, 0.35 * alpha * self.light.lamps)
            self.canvas.glow(head, top + 0.4 * scale, 1.8 * scale, 1.8 * scale, warm, 0.75 * alpha)
        bulb = (1.0, 0.95, 0.78) if self.light.lamps else metal
        self.canvas.ellipse(head, top + 0.3 * scale, 0.55 * scale, 0.3 * scale, bulb, alpha)

    def _shadow(self, x: float, y: float, radius: float, alpha: float) -> None:
        if self.scene.weather == "clear" and self.scene.time != "night":
            lean = np.clip((x - self.azimuth(self.scene.sun_azimuth)) / self.view.width, -1, 1)
            self.canvas.ellipse(
                x + 0.6 * lean * radius, y, radius, max(0.16 * radius, 0.5), (0.06, 0.09, 0.10), 0.35 * alpha
            )

    def car(self, z: float, lateral: float, colour: int, oncoming: bool) -> None:
        """A car seen from behind, or from the front if it is oncoming."""
        x, y, scale = self.place(z, lateral)
        canvas, side, lamps = self.canvas, lateral - CAMERA_LATERAL, self.light.lamps
        paint = CAR_COLOURS[colour % len(CAR_COLOURS)]
        canvas.ellipse(x, y, 1.15 * scale, 0.17 * scale, (0.03, 0.03, 0.05), 0.6)
        for wheel in (-0.7, 0.7):
            left = x + (wheel - 0.2) * scale
            canvas.rectangle(left, left + 0.4 * scale, y - 0.45 * scale, y, self.surface((0.08, 0.08, 0.09), z, side))
        body, dark = self.surface(paint, z, side), self.surface(0.72 * paint, z, side)
        canvas.trapezoid(x, 0.62 * scale, 0.86 * scale, y - CAR_HEIGHT * scale, y - 0.85 * scale, body)
        glass = self.surface((0.16, 0.21, 0.28), z, side)
        canvas.trapezoid(x, 0.52 * scale, 0.70 * scale, y - 1.43 * scale, y - 0.93 * scale, glass)
        canvas.trapezoid(x, 0.90 * scale, CAR_HALF_WIDTH * scale, y - 0.95 * scale, y - 0.5 * scale, body)
        canvas.rectangle(x - 0.93 * scale, x + 0.93 * scale, y - 0.52 * scale, y - 0.25 * scale, dark)
        off = (0.90, 0.90, 0.84) if oncoming else (0.72, 0.07, 0.08)
        lamp = np.array((1.0, 0.97, 0.85) if oncoming else (1.0, 0.16, 0.12))
        for dx in (-0.68, 0.68):
            cx, cy = x + dx * scale, y - 0.70 * scale
            tint = lamp if lamps else self.surface(off, z, side)
            canvas.ellipse(cx, cy, 0.23 * scale, 0.16 * scale, tint)
            if lamps:
                reach = 1.5 if oncoming else 0.8
                canvas.glow(cx, cy, reach * scale, reach * scale, lamp, 0.7 * lamps)
                if self.scene.weather == "rain":
                    canvas.glow(cx, y + 0.5 * scale, 0.45 * scale, 1.6 * scale, lamp, 0.5)
