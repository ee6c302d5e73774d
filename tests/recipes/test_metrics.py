"""Metrics against closed forms, SciPy, and footage that was spoiled in known ways."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temporal_layers.recipes.data.video_io import bunny_path, read_video
from temporal_layers.recipes.driving import DrivingConfig, DrivingCorpus
from temporal_layers.recipes.metrics import (
    NUM_FEATURES,
    clip_features,
    clip_frechet,
    frame_difference,
    frechet_distance,
    motion_agreement,
)


def texture(x, y):
    """Waves 7 to 50 pixels long in many directions, values within [0, 1]."""
    wave_vectors = ((0.8, 0.35), (-0.4, 0.75), (0.2, 0.1), (0.08, -0.17), (0.05, 0.12))
    return 0.5 + sum(torch.sin(kx * x + ky * y + kx) for kx, ky in wave_vectors) / 12


def sliding(velocity, num_frames=5, height=48, width=64):
    """The texture moved by ``velocity(t)`` = (columns, rows) in all until frame t, evaluated exactly."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = [texture(columns - dx, rows - dy) for dx, dy in map(velocity, range(num_frames))]
    return torch.stack(frames).expand(1, 3, num_frames, height, width)


@pytest.fixture(scope="module")
def driving():
    corpus = DrivingCorpus(DrivingConfig(height=48, width=80), seed=7)
    return torch.stack([corpus.clip(index, num_frames=16).frames for index in range(16)])


@pytest.fixture(scope="module")
def bunny():
    frames = read_video(bunny_path()).frames[:, :64]
    return torch.stack(frames.split(16, dim=1))


def shuffled(clips):
    generator = torch.Generator().manual_seed(1)
    return torch.stack([clip[:, torch.randperm(clip.shape[1], generator=generator)] for clip in clips])


def flickering(clips):
    """Frame t of clip i is frame t of clip i + t: every frame from another clip."""
    frames = range(clips.shape[2])
    return torch.stack([clips.roll(-t, dims=0)[:, :, t] for t in frames], dim=2)


def frozen(clips):
    return clips[:, :, :1].expand_as(clips)


def noisy(clips, scale):
    return (clips + scale * torch.randn(clips.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)


def test_frame_difference_is_the_mean_step():
    clips = torch.tensor([0.0, 0.25, 0.25, 1.0]).view(1, 1, 4, 1, 1).expand(2, 3, 4, 16, 16)
    assert frame_difference(clips) == pytest.approx((0.25 + 0 + 0.75) / 3)
    assert frame_difference(frozen(clips)) == 0


@given(dx=st.floats(-3, 3), dy=st.floats(-3, 3))
@settings(max_examples=10)
def test_uniform_motion_is_predicted(dx, dy):
    clips = sliding(lambda t: (t * dx, t * dy))
    if math.hypot(dx, dy) > 0.05:
        assert motion_agreement(clips) > 0.7


@pytest.mark.parametrize(
    ("velocity", "least"),
    [((1.0, 0.0), 0.9), ((0.0, -1.5), 0.85), ((2.5, 1.0), 0.85), ((5.5, -4.0), 0.8), ((8.0, -6.0), 0.8)],
)
def test_only_what_comes_in_over_the_edges_is_missed(velocity, least):
    wide = sliding(lambda t: (t * velocity[0], t * velocity[1]), num_frames=3, height=64, width=96)
    assert motion_agreement(wide) > least


def test_motion_that_turns_back_is_mispredicted():
    there_and_back = sliding(lambda t: (0.8 * (t % 2), 0))
    # The prediction goes on by 0.8 where the frame goes back by 0.8: about twice the error of standing still.
    assert motion_agreement(there_and_back) == pytest.approx(-1, abs=0.2)


def test_changes_of_speed_are_mispredicted_by_their_share():
    braking = sliding(lambda t: ((0, 2, 3)[t], 0), num_frames=3)
    # Predicted 2 pixels, moved 1: the error is as large as that of standing still.
    assert motion_agreement(braking) == pytest.approx(0, abs=0.15)
    # Predicted 1 pixel, moved 2: half of it is explained.
    speeding = sliding(lambda t: ((0, 1, 3)[t], 0), num_frames=3)
    assert motion_agreement(speeding) == pytest.approx(0.5, abs=0.1)


def test_a_clip_without_motion_scores_zero(driving):
    assert motion_agreement(frozen(driving[:2])) == 0
    assert abs(motion_agreement(noisy(frozen(driving[:4]), 0.02))) < 0.05
    fading = torch.linspace(0.2, 0.8, 5).view(1, 1, 5, 1, 1).expand(1, 3, 5, 32, 32)
    assert motion_agreement(fading) == 0


def test_real_motion_stands_out(driving, bunny):
    clips = driving[:4]
    real = motion_agreement(clips)
    assert real > 0.35
    assert motion_agreement(shuffled(clips)) < 0.05
    assert motion_agreement(flickering(clips)) < 0.05
    assert motion_agreement(clips[:, :, [0, 1] * 8]) < -0.1
    assert motion_agreement(bunny) > motion_agreement(shuffled(bunny)) + 0.1


def test_the_agreement_of_a_batch_is_the_mean_over_clips(bunny):
    each = [motion_agreement(clip[None]) for clip in bunny]
    assert motion_agreement(bunny) == pytest.approx(np.mean(each))


def test_large_frames_are_judged_at_the_working_scale():
    small = sliding(lambda t: (t * 1.0, 0), height=48, width=64)
    large = torch.nn.functional.interpolate(small[0].transpose(0, 1), scale_factor=4, mode="bicubic").clamp(0, 1)
    large = large.transpose(0, 1)[None]
    assert motion_agreement(large) == pytest.approx(motion_agreement(small), abs=0.08)


def random_gaussian(seed, d):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(d, d))
    return torch.from_numpy(rng.normal(size=d)), torch.from_numpy(factor @ factor.T)


@given(seed=st.integers(0, 10**6), d=st.integers(1, 20))
def test_frechet_distance_equals_scipys_square_root(seed, d):
    (mean_a, cov_a), (mean_b, cov_b) = random_gaussian(seed, d), random_gaussian(seed + 1, d)
    root = scipy.linalg.sqrtm(cov_a.numpy() @ cov_b.numpy())
    expected = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * np.trace(root).real
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)


@given(seed=st.integers(0, 10**6), d=st.integers(1, 20))
def test_frechet_distance_is_a_symmetric_distance(seed, d):
    a, b = random_gaussian(seed, d), random_gaussian(seed + 1, d)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-7, abs=1e-7)
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-8 * a[1].trace().item() + 1e-9)


def test_frechet_distance_in_closed_form():
    zero, eye = torch.zeros(3), torch.eye(3)
    assert frechet_distance(zero, eye, torch.tensor([3.0, 4.0, 0.0]), eye) == pytest.approx(25)
    assert frechet_distance(zero, 4 * eye, zero, 9 * eye) == pytest.approx(3 * (3 - 2) ** 2)
    assert frechet_distance(zero, torch.zeros(3, 3), zero, 4 * eye) == pytest.approx(12)  # a point and a cloud
    flat = torch.diag(torch.tensor([1.0, 0.0, 0.0]))
    assert frechet_distance(zero, flat, zero, flat.roll((1, 1), (0, 1))) == pytest.approx(2)  # both singular


def test_features_of_known_clips():
    still = torch.rand(1, 3, 16, 32, 48)[:, :, :1].expand(1, 3, 16, 32, 48)
    rows = clip_features(still)
    assert rows.shape == (3, NUM_FEATURES)
    torch.testing.assert_close(rows[:, :3], still[:, :, 0].mean((2, 3)).expand(3, 3), atol=0.01, rtol=0)
    correlations = rows[:, 3:].view(3, 3, 4)[..., 1:]
    assert torch.equal(correlations, torch.ones_like(correlations))
    unrelated = clip_features(torch.rand(1, 3, 16, 64, 96))[:, 3:].view(3, 3, 4)
    assert unrelated[:, 0, 1:].abs().max() < 0.05  # white noise: no correlation over time
    assert (unrelated[0, :, 0].diff() < 0).all()  # and less contrast the coarser the band


def test_alternating_frames_have_alternating_correlations():
    pattern = torch.rand(1, 3, 1, 4, 6).repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
    clips = torch.cat([pattern, 1 - pattern] * 4, dim=2)
    rows = clip_features(clips)[:, 3:].view(3, 4)
    expected = torch.tensor([-1.0, 1, 1]).expand(2, 3)
    torch.testing.assert_close(rows[:2, 1:], expected, atol=0.02, rtol=0)


def test_clip_frechet_orders_spoiled_clips(driving):
    shown, others = driving[:8], driving[8:]
    real = clip_frechet(shown, others)
    assert clip_frechet(shuffled(shown), others) > 2 * real
    assert clip_frechet(noisy(shown, 0.2), others) > 2 * real
    assert clip_frechet(frozen(shown), others) > 5 * real
    assert clip_frechet(flickering(shown), others) > 5 * real
    assert clip_frechet(shown, shown) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("metric", "least"), [(frame_difference, 2), (motion_agreement, 3), (clip_features, 8)])
def test_bad_clips_are_refused(metric, least):
    name = metric.__name__
    good = torch.rand(1, 3, least, 16, 16)
    metric(good)
    with pytest.raises(ValueError, match=rf"{name}: clips: expected shape .*got \(3, {least}, 16, 16\); add"):
        metric(good[0])
    with pytest.raises(ValueError, match=rf"{name}: clips: expected shape \(batch, 3, .*got \(1, 4, "):
        metric(torch.rand(1, 4, least, 16, 16))
    with pytest.raises(ValueError, match=f"{name}: clips: expected at least {least} frames, got {least - 1}"):
        metric(good[:, :, 1:])
    with pytest.raises(ValueError, match=rf"{name}: clips: expected frames of at least 16 x 16 pixels, got \(16, 15\)"):
        metric(good[..., 1:])
    with pytest.raises(ValueError, match=f"{name}: clips: expected a floating dtype, got torch.uint8"):
        metric((255 * good).byte())
    with pytest.raises(ValueError, match=rf"{name}: clips: expected values in \[0, 1\], got \[-1, -1\]; scale"):
        metric(torch.full_like(good, -1.0))
    with pytest.raises(ValueError, match=rf"{name}: clips: expected values in \[0, 1\], got \[nan, nan\]"):
        metric(torch.full_like(good, math.nan))


def test_bad_sets_are_refused():
    clips = torch.rand(6, 3, 16, 16, 16)
    with pytest.raises(ValueError, match=r"clip_frechet: expected generated and real clips of one length and size"):
        clip_frechet(clips, clips[:, :, 1:])
    with pytest.raises(ValueError, match=r"clip_frechet: generated: expected more than 15 windows .* got 15"):
        clip_frechet(clips[:5], clips)
    with pytest.raises(ValueError, match=r"clip_frechet: real: expected more than 15 windows of 8 .* got 3; pass"):
        clip_frechet(clips, clips[:1])
    with pytest.raises(ValueError, match=r"frechet_distance: expected shapes \(d,\), .* got \[\(2,\), \(3, 3\)"):
        frechet_distance(torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2))
