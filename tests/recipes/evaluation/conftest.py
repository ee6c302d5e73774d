"""Small sets of videos on the disk, and networks that are plain formulas."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from temporal_layers.recipes.data.video_io import write_video
from temporal_layers.recipes.evaluation.networks import FeatureNetwork


def make_clips(count, *, frames=4, height=16, width=24, seed=0):
    """Smooth noise that drifts, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, frames, 4, 6, generator=generator)
    return nn.functional.interpolate(coarse, size=(frames, height, width), mode="trilinear")


def write_set(folder, clips, *, fps=10.0, captions=()):
    """Clips as animated images, with captions if there are any."""
    for index, clip in enumerate(clips):
        write_video(folder / f"{index:03d}.webp", clip, fps)
    for index, text in enumerate(captions):
        (folder / f"{index:03d}.txt").write_text(text)
    return folder


class Pooled(nn.Module):
    """Mean and last frame of each colour, in float64, so that batches and shards agree to its rounding."""

    def forward(self, clips):
        clips = clips.double()
        return torch.cat([clips.mean((2, 3, 4)), clips[:, :, -1].mean((2, 3)) ** 2], dim=1)


@pytest.fixture(scope="session")
def pooled():
    """A network of six features."""
    return FeatureNetwork(name="pooled", digest="none", module=Pooled())


@pytest.fixture(scope="session")
def helpers():
    """The functions of this file, for tests in other ones."""
    return SimpleNamespace(make_clips=make_clips, write_set=write_set)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of 14 generated and 13 real videos."""
    root = tmp_path_factory.mktemp("sets")
    generated = write_set(root / "generated", make_clips(14, seed=1))
    return generated, write_set(root / "real", 0.9 * make_clips(13, seed=2))
