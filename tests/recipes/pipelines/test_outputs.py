"""Frames in and out: every form of the same clips comes out the same, in the order of diffusers."""

import numpy as np
import pytest
import torch
from PIL import Image

from temporal_layers.recipes.pipelines.outputs import (
    OUTPUT_TYPES,
    VideoOutput,
    check_output_type,
    clips_of,
    frames_of,
)

SIZE = (6, 8)


@pytest.fixture
def clips():
    """Two clips of three frames whose values are whole 255ths, so that images hold them exactly."""
    return torch.randint(0, 256, (2, 3, 3, *SIZE)) / 255


def test_outputs_are_in_the_order_of_diffusers(clips):
    pt, array, images = (frames_of(clips, kind) for kind in ("pt", "np", "pil"))
    assert torch.equal(pt, clips.transpose(1, 2))
    assert array.shape == (2, 3, *SIZE, 3) and np.array_equal(array[1, 2, :, :, 0], clips[1, 0, 2].numpy())
    assert len(images) == 2 and len(images[0]) == 3
    red = np.asarray(images[1][2])[:, :, 0]
    assert np.array_equal(red, (clips[1, 0, 2] * 255).round().numpy().astype(np.uint8))


@pytest.mark.parametrize("kind", ["pt", "np", "pil"])
def test_what_comes_out_goes_in_again(clips, kind):
    frames = frames_of(clips, kind)
    torch.testing.assert_close(clips_of("it", frames, SIZE), clips, rtol=0, atol=1e-6)
    torch.testing.assert_close(clips_of("it", frames[0], SIZE), clips[:1], rtol=0, atol=1e-6)
    torch.testing.assert_close(clips_of("it", list(frames[0]), SIZE), clips[:1], rtol=0, atol=1e-6)
    torch.testing.assert_close(clips_of("it", tuple(frames[0]), SIZE), clips[:1], rtol=0, atol=1e-6)
    torch.testing.assert_close(clips_of("it", [list(clip) for clip in frames], SIZE), clips, rtol=0, atol=1e-6)
    torch.testing.assert_close(clips_of("it", frames[1][2], SIZE), clips[1:, :, 2:], rtol=0, atol=1e-6)


def test_images_of_another_size_cover_the_frame_and_are_cropped():
    wide = Image.new("L", (40, 6), 255)  # grey, too wide: its middle counts
    wide.paste(0, (0, 0, 10, 6))
    clip = clips_of("it", wide, SIZE)
    assert clip.shape == (1, 3, 1, *SIZE) and (clip == 1).all()
    assert clips_of("it", Image.new("RGBA", (3, 4)), SIZE).shape == (1, 3, 1, *SIZE)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (
            torch.zeros(2, 3, 6, 9),
            r"frames of 3 channels, 6 high and 8 wide, got 3 channels, 6 high and 9 wide",
        ),
        (torch.zeros(2, 4, 6, 8), "expected frames of 3 channels, 6 high and 8 wide, got 4 channels"),
        (np.full((6, 8, 3), 200, np.uint8), r"it: expected values in \[0, 1\], got 200 to 200; divide bytes by 255"),
        (torch.full((3, 6, 8), -0.5), r"expected values in \[0, 1\], got -0.5 to -0.5"),
        (torch.full((3, 6, 8), torch.nan), r"expected values in \[0, 1\], got nan"),
        ([], "it: expected images, or arrays .* got list"),
        ("a.mp4", "it: expected images, or arrays .* got str"),
        (torch.zeros(6, 8), r"it: expected images, or arrays .* got Tensor \(6, 8\)"),
        ([[torch.zeros(3, 6, 8)], [torch.zeros(3, 6, 8)] * 2], "clips of the same length, got list of Tensor"),
    ],
)
def test_other_frames_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        clips_of("it", frames, SIZE)


def test_output_types_are_those_of_diffusers():
    for kind in OUTPUT_TYPES:
        check_output_type("it", kind)
    with pytest.raises(ValueError, match="it: output_type: expected one of pil, np, pt, latent, got 'gif'"):
        check_output_type("it", "gif")
    output = VideoOutput(frames=torch.zeros(1))
    assert output.frames is output["frames"] is output[0]
