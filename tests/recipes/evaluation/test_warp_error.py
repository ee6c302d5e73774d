"""The flicker that motion does not explain: known motion leaves little of it, change without motion all."""

import pytest
import torch

from temporal_layers.recipes.driving import DrivingCorpus
from temporal_layers.recipes.metrics import frame_difference, warp_error


def texture(x, y):
    waves = ((0.8, 0.35), (-0.4, 0.75), (0.2, 0.1), (0.08, -0.17), (0.05, 0.12))
    return 0.5 + sum(torch.sin(kx * x + ky * y + kx) for kx, ky in waves) / 12


def sliding(dx, dy, num_frames=5, height=64, width=96):
    """A texture that moves by (dx, dy) pixels a frame, evaluated exactly."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = [texture(columns - dx * t, rows - dy * t) for t in range(num_frames)]
    return torch.stack(frames).expand(1, 3, num_frames, height, width)


@pytest.mark.parametrize(("dx", "dy", "share"), [(1.0, 0.0, 0.05), (2.0, 1.0, 0.05), (0.5, -1.5, 0.15)])
def test_motion_is_no_flicker(dx, dy, share):
    """Between pixels, linear interpolation takes some of the shortest waves away."""
    clips = sliding(dx, dy)
    assert warp_error(clips) < share * frame_difference(clips)


def test_a_frozen_clip_has_none():
    assert warp_error(sliding(1.0, 0.0)[:, :, :1].expand(1, 3, 4, 64, 96)) < 1e-6


def test_a_change_of_brightness_is_flicker_in_full():
    """Grey frames have no motion that could explain a change."""
    levels = torch.tensor([0.2, 0.5, 0.3, 0.6]).view(1, 1, 4, 1, 1)
    assert warp_error(levels.expand(1, 3, 4, 32, 32)) == pytest.approx((0.3 + 0.2 + 0.3) / 3, rel=1e-4)


def test_it_grows_with_noise_in_each_frame():
    clip = DrivingCorpus().clip(1, 6).frames[None]
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    errors = [warp_error((clip + level * noise).clamp(0, 1)) for level in (0, 0.02, 0.05, 0.1)]
    assert errors == sorted(errors) and errors[3] > 3 * errors[0]


def test_it_is_the_mean_over_clips():
    both = torch.cat([sliding(1.0, 0.0), sliding(0.0, 3.0)])
    assert warp_error(both) == pytest.approx((warp_error(both[:1]) + warp_error(both[1:])) / 2, rel=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="warp_error: clips: expected at least 2 frames, got 1"):
        warp_error(torch.rand(1, 3, 1, 32, 32))
