"""Small videos for the tests of the data folder."""

import pytest
import torch

from temporal_layers.recipes.data.video_io import write_video


@pytest.fixture(scope="session")
def counted_video(tmp_path_factory):
    """41 frames at 10 frames per second, 32 x 48; frame t is uniform grey t / 40, so its index can be read off it."""
    values = torch.linspace(0, 1, 41).view(1, -1, 1, 1).expand(3, 41, 32, 48)
    return write_video(tmp_path_factory.mktemp("counted") / "counted.mp4", values, 10)


@pytest.fixture(scope="session")
def grey_folder(tmp_path_factory):
    """Nine videos of one grey each, 20 frames at 10 frames per second, 32 x 48; number k has the grey 28 k."""
    folder = tmp_path_factory.mktemp("greys")
    for number in range(9):
        write_video(folder / f"{number}.mp4", torch.full((3, 20, 32, 48), number * 28 / 255), 10)
        (folder / f"{number}.txt").write_text(f"grey number {number}\n")
    return folder
