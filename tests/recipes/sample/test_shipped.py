"""The models that come with the package, from a label to a long, large clip."""

import pytest

from temporal_layers.recipes.cli import main
from temporal_layers.recipes.data.video_io import read_video
from temporal_layers.recipes.metrics import frame_difference


@pytest.mark.slow
def test_the_cascade_of_the_shipped_models(tmp_path):
    """With fewer steps than the defaults; all the same 113 frames that change little from one to the next."""
    steps = ["--steps", "6", "--interpolation-steps", "2", "--upscale-steps", "1"]
    assert main(["sample", "cascade", "day clear", "--out", str(tmp_path / "a.mp4"), *steps]) == 0
    clip = read_video(tmp_path / "a.mp4")
    assert clip.frames.shape == (3, 113, 256, 384) and clip.fps == 30
    assert 0.001 < frame_difference(clip.frames[None]) < 0.03
    assert clip.frames.std() > 0.1
