"""Contact sheets and side-by-side clips: every frame stands where it should, labels do not cover it."""

import numpy as np
import pytest
import torch
from PIL import Image

from temporal_layers.recipes.sheets import contact_sheet, side_by_side


def grey(values, height=24, width=40):
    return torch.tensor(values).view(1, -1, 1, 1).expand(3, len(values), height, width)


def pixels(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


def cell(path, row, column, height=24, width=40, gap=4):
    """The frame in a row and column counted from the lower right corner, one ring of the paper around it."""
    sheet = pixels(path)
    bottom = sheet.shape[0] - gap - row * (height + gap)
    right = sheet.shape[1] - gap - column * (width + gap)
    return sheet[bottom - height - 1 : bottom + 1, right - width - 1 : right + 1]


@pytest.mark.parametrize("scale", [1, 3])
def test_rows_are_clips_and_columns_are_evenly_spaced_frames(tmp_path, scale):
    rising = [step / 15 for step in range(16)]
    clips = {"up": grey(rising), "down": grey(rising[::-1])}
    path = contact_sheet(clips, tmp_path / "deep" / "sheet.png", num_columns=4, scale=scale)
    shown = [0, 85, 170, 255]  # frames 0, 5, 10, 15
    for row, values in enumerate([shown[::-1], shown]):
        for column, value in enumerate(reversed(values)):
            area = cell(path, row, column, 24 * scale, 40 * scale)
            assert (area[1:-1, 1:-1] == value).all()
            assert (area[0] == area[0, 0]).all() and (area[-1] == area[0, 0]).all()  # labels stay outside


def test_long_labels_are_wrapped_beside_the_frames(tmp_path):
    clip, label = grey([0.5, 0.5]), "a rather long label of a clip that goes on"
    short = pixels(contact_sheet({"a": clip}, tmp_path / "short.png", num_columns=2))
    long = pixels(contact_sheet({label: clip}, tmp_path / "long.png", num_columns=2))
    assert short.shape == long.shape
    written = [(sheet[..., 0] > 60)[:, : -2 * 44 - 4].any(axis=1).sum() for sheet in (short, long)]  # rows with ink
    assert written[1] > 1.5 * written[0]


def test_nearest_keeps_pixels_and_lanczos_smoothes(tmp_path):
    checks = ((torch.arange(24)[:, None] + torch.arange(40)) % 2).float().expand(3, 1, 24, 40)
    sharp, smooth = (
        contact_sheet({"x": checks}, tmp_path / f"{name}.png", num_columns=1, scale=4, resample=name)
        for name in ("nearest", "lanczos")
    )
    values = [set(cell(path, 0, 0, 96, 160)[1:-1, 1:-1].flatten().tolist()) for path in (sharp, smooth)]
    assert values[0] == {0, 255}
    assert len(values[1]) > 10


def test_side_by_side_holds_all_clips_unchanged():
    clips = torch.rand(3, 2, 3, 5, 24, 40)  # columns, rows, then the clip
    joined = side_by_side({"a": clips[0], "b": clips[1], "c": clips[2]})
    bar = joined.shape[2] - 52
    assert joined.shape == (3, 5, bar + 52, 128) and bar > 10
    for column in range(3):
        for row in range(2):
            left, top = 44 * column, bar + 28 * row
            held = joined[:, :, top : top + 24, left : left + 40]
            assert (held - clips[column, row]).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(joined[:, :1, :bar].expand(-1, 5, -1, -1), joined[:, :, :bar])  # the caption stands still


def test_a_single_clip_is_a_column_of_one():
    clip = torch.rand(3, 2, 24, 40)
    assert torch.equal(side_by_side({"a": clip, "b": clip}), side_by_side({"a": [clip], "b": [clip]}))


def test_captions_are_drawn_over_their_clip():
    clip = torch.zeros(3, 1, 24, 120)
    left = side_by_side({"caption": clip, "": clip}, scale=2)[0, 0, :30]
    right = side_by_side({"": clip, "caption": clip}, scale=2)[0, 0, :30]
    assert left[:, :240].max() > 0.5 > left[:, 244:].max()
    assert right[:, 244:].max() > 0.5 > right[:, :240].max()


def test_bad_arguments_are_refused(tmp_path):
    clip, path = grey([0.5, 0.5]), tmp_path / "sheet.png"
    with pytest.raises(ValueError, match="contact_sheet: clips: expected at least one labelled clip, got none"):
        contact_sheet({}, path)
    with pytest.raises(ValueError, match=r"contact_sheet: expected clips of one shape .* 'b': \(3, 1, 24, 40\)"):
        contact_sheet({"a": clip, "b": clip[:, :1]}, path)
    with pytest.raises(ValueError, match=r"contact_sheet: num_columns: expected 1 to 2 \(the frames\), got 8"):
        contact_sheet({"a": clip}, path)
    with pytest.raises(ValueError, match="contact_sheet: scale: expected 1 or more, got 0"):
        contact_sheet({"a": clip}, path, scale=0)
    with pytest.raises(ValueError, match="contact_sheet: resample: expected 'lanczos' or 'nearest', got 'cubic'"):
        contact_sheet({"a": clip}, path, resample="cubic")
    with pytest.raises(ValueError, match=r"contact_sheet: frames: expected values in \[0, 1\], got \[5, 5\]"):
        contact_sheet({"a": clip + 4.5}, path)
    with pytest.raises(ValueError, match="side_by_side: expected clips of one shape"):
        side_by_side({"a": clip, "b": clip[..., :-1]})
    with pytest.raises(ValueError, match="side_by_side: scale: expected 1 or more, got -1"):
        side_by_side({"a": clip}, scale=-1)
    with pytest.raises(ValueError, match=r"side_by_side: columns: expected as many .* got {'a': 1, 'b': 2}"):
        side_by_side({"a": clip, "b": [clip, clip]})
    with pytest.raises(ValueError, match=r"side_by_side: columns: .* got {}"):
        side_by_side({})
    assert not path.exists()
