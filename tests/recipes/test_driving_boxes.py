"""Boxes of cars: against the pixels that a car changes, and what is left out."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temporal_layers.recipes.driving import DrivingConfig, DrivingCorpus
from temporal_layers.recipes.driving_boxes import LEAST_HEIGHT, LEAST_VISIBLE, car_boxes
from temporal_layers.recipes.driving_frame import Painter
from temporal_layers.recipes.driving_scene import View

VIEW = View(128, 192)
GONE = {"lead": {"lead_gap": 0.0}, "oncoming": {"oncoming_period": 0.0}}


def by_day(index, **changes):
    """The scene of a clip by day, when no lamp lights more than itself."""
    return dataclasses.replace(DrivingCorpus().scene(index), time="day", **changes)


def changed(scene, without, seconds, threshold=0.004):
    """Pixels in which two scenes differ."""
    frames = [Painter(one, VIEW, seconds).frame() for one in (scene, without)]
    return np.abs(frames[0] - frames[1]).max(-1) > threshold


def bounds(mask):
    """Left, top, right and bottom of a mask's true pixels."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@settings(max_examples=15)
@given(index=st.integers(0, 2000), seconds=st.floats(0, 8), kind=st.sampled_from(sorted(GONE)))
def test_a_box_is_where_the_pixels_of_the_car_are(index, seconds, kind):
    other = next(name for name in GONE if name != kind)
    period = {"oncoming_period": 70.0} if kind == "oncoming" else {"lead_gap": 12.0}
    scene = by_day(index, **{**GONE[other], **period})
    boxes = car_boxes(scene, VIEW, seconds)
    if len(boxes) == 0:  # an oncoming car that is far away
        return
    mask = changed(scene, dataclasses.replace(scene, **GONE[kind]), seconds)
    size = np.array([VIEW.width, VIEW.height] * 2)
    left, top, right, bottom = boxes[0] * size
    # The shadow under a car is wider than the body and begins below it: rows of the body alone tell its width.
    height = bottom - top
    body = bounds(mask[: int(bottom - 0.2 * height)])
    assert np.abs(np.array(body[:3]) - [left, top, right]).max() <= 1.01
    whole = bounds(mask)
    assert bottom - 1.01 <= whole[3] <= bottom + 0.15 * height + 1.01
    inside = mask[round(top) : round(bottom), round(left) : round(right)]
    assert inside.mean() > 0.7  # the corners beside the roof and between the wheels are not the car's


@pytest.mark.parametrize("size", [(64, 96), (256, 384)])
def test_boxes_are_shares_of_the_frame_whatever_its_size(size):
    small, large = DrivingCorpus(), DrivingCorpus(DrivingConfig(height=size[0], width=size[1]))
    for index in range(40):
        torch.testing.assert_close(small.boxes(index, 5), large.boxes(index, 5), atol=5e-3, rtol=0)  # a row's rounding


def test_boxes_of_the_corpus_are_in_the_frame_and_large_enough():
    corpus = DrivingCorpus()
    found = [corpus.boxes(index, corpus.still_frame(index)) for index in range(300)]
    assert {len(boxes) for boxes in found} == {0, 1, 2}
    assert {boxes.dtype for boxes in found} == {torch.float32}
    boxes = torch.cat(found)
    assert boxes.min() >= 0 and boxes.max() <= 1
    assert (boxes[:, 3] - boxes[:, 1]).min() >= LEAST_HEIGHT
    assert (boxes[:, 2] > boxes[:, 0]).all()
    assert (boxes[:, 0] == 0).any()  # one that drives past is cut off at the edge


def test_the_still_of_a_clip_is_the_frame_it_says():
    corpus = DrivingCorpus()
    frames, _ = corpus.stills([3, 8])
    for frame, index in zip(frames, (3, 8), strict=True):
        assert torch.equal(corpus.clip(index, 1, start=corpus.still_frame(index)).frames[:, 0], frame)


def test_cars_come_nearest_first_and_grow_as_they_come():
    scene = by_day(0, lead_gap=12.0, lead_sway=0.0, phase=0.0, oncoming_period=80.0, curvature=0.0)
    heights = []
    for seconds in np.arange(0, 12, 0.1):
        boxes = car_boxes(scene, VIEW, seconds)
        distances = [
            car.distance for car in sorted(scene.cars(seconds)) if 1.55 / car.distance * VIEW.focal / VIEW.height > 0.05
        ]
        if len(boxes) == len(distances) == 2:
            assert (boxes[0, 3] > boxes[1, 3]) == (distances[0] < distances[1])
            heights.append(boxes[:, 3] - boxes[:, 1])
    assert heights and all(first >= second for first, second in heights)


def test_what_is_hidden_too_small_or_out_of_the_frame_is_left_out():
    straight = by_day(0, lead_gap=12.0, phase=0.0, lead_sway=0.0, oncoming_period=0.0, curvature=0.0)
    assert len(car_boxes(straight, VIEW, 0.0)) == 1
    focal, height = VIEW.focal / VIEW.height, 1.55
    far = height * focal / LEAST_HEIGHT
    for gap, count in ((far - 0.1, 1), (far + 0.1, 0)):
        assert len(car_boxes(dataclasses.replace(straight, lead_gap=gap), VIEW, 0.0)) == count
    passing = dataclasses.replace(straight, lead_gap=0.0, oncoming_period=80.0, oncoming_offset=0.0)

    def oncoming(distance):
        seconds = (80.0 - distance) / (passing.speed + passing.oncoming_speed)
        assert passing.oncoming_distance(seconds)[0] == pytest.approx(distance)
        return car_boxes(passing, VIEW, seconds)

    # Its middle is 3.6 m to the left, the edge of the frame at 2/3 of its distance: half of it is seen from 5.4 m on.
    assert len(oncoming(5.3)) == 0 and len(oncoming(5.5)) == 1
    assert oncoming(5.5)[0, 0] == 0 and oncoming(9.0)[0, 0] > 0


def test_a_car_behind_another_is_left_out_as_soon_as_less_than_half_of_it_is_seen():
    # In a bend the lane of the other car lies behind the nearer one.
    hidden = seen = 0
    for index in range(400):
        scene = DrivingCorpus().scene(index)
        scene = dataclasses.replace(scene, lead_gap=9.0, oncoming_period=60.0, curvature=0.013 * (1 - 2 * (index % 2)))
        cars = sorted(scene.cars(1.0))
        if len(cars) < 2 or cars[1].distance > 30 or cars[0].oncoming:
            continue
        alone = [car_boxes(dataclasses.replace(scene, **gone), VIEW, 1.0) for gone in (GONE["oncoming"], GONE["lead"])]
        if min(map(len, alone)) == 0:
            continue
        grid = [raster(one[0]) for one in alone]  # counts pixels, where the function multiplies sides
        share = (grid[1] & ~grid[0]).sum() / grid[1].sum()
        if abs(share - LEAST_VISIBLE) < 0.02:
            continue
        both = car_boxes(scene, VIEW, 1.0)
        assert len(both) == (2 if share > LEAST_VISIBLE else 1)
        hidden, seen = hidden + (share < LEAST_VISIBLE), seen + (LEAST_VISIBLE < share < 1)
    assert hidden and seen


def raster(box, size=500):
    """A box as pixels."""
    places = (np.arange(size) + 0.5) / size
    across, down = ((box[i] <= places) & (places <= box[i + 2]) for i in (0, 1))
    return down[:, None] & across[None, :]


def test_bad_indices_are_refused():
    with pytest.raises(ValueError, match="expected a clip index of at least 0, got -1"):
        DrivingCorpus().boxes(-1, 0)
