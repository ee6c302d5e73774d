"""The driving corpus: reproducible, in range, labelled as stated, and moving as its parameters say."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from temporal_layers.recipes.driving import LABELS, DrivingConfig, DrivingCorpus, caption
from temporal_layers.recipes.driving_frame import Painter
from temporal_layers.recipes.driving_scene import (
    CAMERA_HEIGHT,
    CAMERA_LATERAL,
    DASH_LENGTH,
    DASH_PERIOD,
    OBJECT_SPACING,
    View,
)

SMALL = DrivingConfig(height=32, width=48)


def test_a_clip_depends_on_seed_and_index_alone():
    first, again = DrivingCorpus(SMALL, seed=3), DrivingCorpus(SMALL, seed=3)
    again.clip(5, 2)
    assert torch.equal(first.clip(8, 3).frames, again.clip(8, 3).frames)
    assert not torch.equal(first.clip(8, 3).frames, first.clip(9, 3).frames)
    assert not torch.equal(first.clip(8, 3).frames, DrivingCorpus(SMALL, seed=4).clip(8, 3).frames)


@settings(max_examples=5)
@given(index=st.integers(0, 1 << 21), start=st.integers(0, 30), num_frames=st.integers(1, 4))
def test_any_part_of_a_clip_equals_that_part_of_a_longer_one(index, start, num_frames):
    corpus = DrivingCorpus(SMALL)
    part = corpus.clip(index, num_frames, start=start)
    longer = corpus.clip(index, num_frames + 2, start=max(start - 1, 0))
    offset = min(start, 1)
    assert torch.equal(part.frames, longer.frames[:, offset : offset + num_frames])
    assert torch.equal(part.lead_distance, longer.lead_distance[offset : offset + num_frames])


@settings(max_examples=12)
@given(
    height=st.integers(32, 70),
    width=st.integers(32, 100),
    fps=st.sampled_from([4.0, 8.0, 29.97]),
    index=st.integers(0, 1000),
)
def test_frames_have_the_asked_size_and_stay_in_range(height, width, fps, index):
    clip = DrivingCorpus(DrivingConfig(height=height, width=width, fps=fps)).clip(index, 2)
    assert clip.frames.shape == (3, 2, height, width)
    assert clip.frames.dtype == torch.float32
    assert clip.frames.min() >= 0 and clip.frames.max() <= 1
    assert clip.frames.std() > 0.02
    assert clip.fps == fps


def test_a_higher_frame_rate_shows_the_same_moments():
    slow = DrivingCorpus(DrivingConfig(height=32, width=48, fps=4)).clip(2, 3)
    fast = DrivingCorpus(DrivingConfig(height=32, width=48, fps=12)).clip(2, 7)
    torch.testing.assert_close(slow.frames, fast.frames[:, ::3], atol=1e-5, rtol=0)


def test_labels_are_uniform_and_agree_with_clips_and_captions():
    corpus = DrivingCorpus(SMALL, seed=1)
    counts = np.bincount([corpus.label(index) for index in range(6000)], minlength=len(LABELS))
    expected = 6000 / len(LABELS)
    # 99.99 % point of chi-squared with 11 degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 37.4
    for index in range(24):
        clip = corpus.clip(index, 1)
        time, weather = LABELS[clip.label].split()
        assert clip.label == corpus.label(index)
        assert {"day": "by day", "dusk": "at dusk", "night": "at night"}[time] in clip.caption
        assert {"clear": "clear sky", "rain": "rain", "fog": "fog", "snow": "snow"}[weather] in clip.caption
        assert ("behind a" in clip.caption) == bool(clip.lead_distance[0] > 0)


def test_nights_are_dark_and_snow_whitens_the_ground():
    corpus = DrivingCorpus(SMALL)
    frames, labels = corpus.stills(range(72))
    names = np.array([LABELS[label] for label in labels])
    brightness = frames.mean((1, 2, 3)).numpy()
    nights, days = (np.char.startswith(names, time) for time in ("night", "day"))
    assert brightness[nights].max() < brightness[days].min()
    ground = frames[:, :, 16:].mean((1, 2, 3)).numpy()
    assert ground[names == "day snow"].min() > ground[names == "day clear"].max()


def test_stills_are_frames_of_their_clips():
    corpus = DrivingCorpus(SMALL)
    frames, labels = corpus.stills([4])
    clip = corpus.clip(4, 64)
    assert labels.tolist() == [clip.label]
    assert (clip.frames == frames[0][:, None]).flatten(2).all(2).all(0).sum() == 1


def straight(scene):
    return dataclasses.replace(scene, curvature=0.0, lead_gap=0.0, oncoming_period=0.0, weather="clear", time="day")


def test_dashes_move_toward_the_viewer_at_the_stated_speed():
    view = View(192, 320)
    scene = dataclasses.replace(straight(DrivingCorpus().scene(0)), speed=8.0)
    top, z, _ = view.ground()
    z = z[:, 0]
    columns = np.round(view.centre - CAMERA_LATERAL * view.focal / z - 0.5).astype(int)
    seen = (columns >= 0) & (z < 30)
    grid = np.linspace(z[seen].min(), z[seen].max(), 2000)

    def profile(seconds):
        frame = Painter(scene, view, seconds).frame()[top:]
        values = frame[np.arange(len(z))[seen], columns[seen]].mean(-1)
        return np.interp(grid, z[seen][::-1], values[::-1])

    for seconds in (0.25, 0.5):
        # The dash pattern has a period, so a shift below half of it is the only candidate.
        shifts = np.arange(0, int(0.5 * DASH_PERIOD / (grid[1] - grid[0])))
        before, after = profile(1.0), profile(1.0 + seconds)
        errors = [np.mean((before[shift:] - after[: len(after) - shift]) ** 2) for shift in shifts]
        measured = np.argmin(errors) * (grid[1] - grid[0])
        assert measured == pytest.approx(8.0 * seconds, abs=0.12)


@pytest.mark.parametrize("index", [1, 6, 12])
def test_road_flow_predicts_the_next_frame(index):
    config = DrivingConfig(height=96, width=144)
    corpus = DrivingCorpus(config)
    scene = dataclasses.replace(corpus.scene(index), lead_gap=0.0, oncoming_period=0.0)
    now, then = (torch.from_numpy(Painter(scene, corpus.view, frame / config.fps).frame()) for frame in (3, 4))
    flow, mask = corpus.road_flow(index, 3)
    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(144.0), indexing="ij")
    x, y = columns + flow[0], rows + flow[1]
    grid = torch.stack([2 * (x + 0.5) / 144 - 1, 2 * (y + 0.5) / 96 - 1], -1)
    warped = F.grid_sample(then.permute(2, 0, 1)[None], grid[None], align_corners=False)[0].permute(1, 2, 0)
    # The road near the camera, away from the frame's border and from objects beside the road.
    _, z, lateral = corpus.view.ground()
    road = torch.zeros(96, 144, dtype=torch.bool)
    road[96 - len(z) :] = torch.from_numpy((z < 25) & (abs(lateral) < 1.9))
    inside = mask & road & (x > 1) & (x < 142) & (y > 1) & (y < 94)
    assert inside.sum() > 500
    still = (then - now)[inside].square().mean()
    moved = (warped - now)[inside].square().mean()
    assert moved < 0.25 * still


def test_road_flow_on_a_straight_road_is_the_closed_form_of_perspective():
    corpus = DrivingCorpus()
    flow, mask = corpus.road_flow(7, 2)
    view, speed = corpus.view, corpus.scene(7).speed
    rows = torch.arange(view.height, dtype=torch.float64) + 0.5
    depth = view.focal * CAMERA_HEIGHT / (rows - view.horizon)
    expected = view.focal * CAMERA_HEIGHT / (depth - speed / corpus.config.fps) + view.horizon - rows
    shown = mask.any(1)
    assert shown.sum() > 20
    torch.testing.assert_close(flow[1, shown, 0].double(), expected[shown], atol=1e-3, rtol=1e-4)
    assert not mask[: int(view.horizon)].any()


@settings(max_examples=20)
@given(index=st.integers(0, 10_000), arc=st.floats(0, 2000), z=st.floats(1, 80))
def test_heading_and_offset_are_the_integrals_of_the_curvature(index, arc, z):
    scene = DrivingCorpus().scene(index)

    def curvature(s):
        return scene.curvature * np.sin(2 * np.pi * s / scene.wavelength + scene.phase)

    turned = quad(curvature, arc, arc + z)[0]
    offset = quad(lambda s: quad(curvature, arc, s)[0], arc, arc + z)[0]
    assert scene.heading(arc + z) - scene.heading(arc) == pytest.approx(turned, abs=1e-7)
    assert scene.road_offset(arc, z) == pytest.approx(offset, abs=1e-6)


def test_nothing_moves_by_more_than_a_third_of_its_period_per_frame():
    corpus = DrivingCorpus()
    speeds = np.array([corpus.scene(index).speed for index in range(500)])
    assert speeds.max() / corpus.config.fps < min(DASH_PERIOD, OBJECT_SPACING) / 3
    assert speeds.min() / corpus.config.fps > 0.05 * DASH_PERIOD
    assert 0.3 < DASH_LENGTH / DASH_PERIOD < 0.7


def test_traffic_keeps_its_distance_and_oncoming_cars_come_closer():
    corpus = DrivingCorpus()
    followed = [clip for clip in (corpus.scene(index) for index in range(60)) if clip.lead_gap]
    oncoming = [clip for clip in (corpus.scene(index) for index in range(60)) if clip.oncoming_period]
    assert 15 < len(followed) < 55 and 15 < len(oncoming) < 55
    for scene in followed:
        assert 6 < min(scene.lead_distance(t) for t in np.arange(0, 16, 0.25)) < 20
    for scene in oncoming:
        before, number = scene.oncoming_distance(1.0)
        after, next_number = scene.oncoming_distance(1.125)
        if number == next_number:
            assert before - after == pytest.approx((scene.speed + scene.oncoming_speed) / 8)


def test_caption_reads_as_a_sentence():
    scene = dataclasses.replace(
        DrivingCorpus().scene(0),
        time="night",
        weather="rain",
        setting="forest",
        speed=9.0,
        lead_gap=12.0,
        lead_colour=0,
    )
    assert caption(scene) == "driving slowly through a forest behind a red car at night in the rain"


@pytest.mark.parametrize("options", [{"height": 31}, {"width": 8}])
def test_frames_that_are_too_small_are_refused(options):
    with pytest.raises(ValueError, match=r"DrivingConfig: expected height and width of at least 32 pixels, got"):
        DrivingConfig(**options)


def test_bad_rates_indices_and_ranges_are_refused():
    with pytest.raises(ValueError, match="DrivingConfig: expected fps above 0, got -1"):
        DrivingConfig(fps=-1)
    corpus = DrivingCorpus(SMALL)
    with pytest.raises(ValueError, match="DrivingCorpus: expected a clip index of at least 0, got -3"):
        corpus.clip(-3, 1)
    with pytest.raises(ValueError, match="expected num_frames >= 1 and start >= 0, got num_frames=0 and start=0"):
        corpus.clip(0, 0)
    with pytest.raises(ValueError, match="got num_frames=2 and start=-1"):
        corpus.clip(0, 2, start=-1)
    with pytest.raises(ValueError, match=r"DrivingCorpus\.stills: expected at least one clip index, got none"):
        corpus.stills([])
