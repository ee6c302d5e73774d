"""Windows and tiles: pieces that are put together again, in closed form."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.recipes.sampling.regions import InRegions, Region, in_parts, regions, windows


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_windows_cover_a_length_in_order(length, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    found = windows(length, window, overlap)
    assert {place for part in found for place in part} == set(range(length))
    assert all(len(part) == min(window, length) for part in found)
    assert all(later.start - earlier.start <= window - overlap for earlier, later in itertools.pairwise(found))
    assert all(later.start > earlier.start for earlier, later in itertools.pairwise(found))


def test_windows_have_to_move_on():
    for window, overlap in ((4, 4), (0, 0), (3, -1)):
        with pytest.raises(ValueError, match=rf"windows: overlap: expected 0 to below window={window}, got {overlap}"):
            windows(8, window, overlap)


@given(st.booleans(), st.integers(1, 7), st.integers(2, 6), st.integers(2, 6), st.integers(0, 1))
def test_every_region_is_told_where_it_is(ramp, frames, rows, columns, overlap):
    """The answer is looked up in planes of the whole clip, so that one wrong place would show."""
    planes, noisy = torch.rand(2, 3, 7, 8, 9), torch.randn(2, 3, 7, 8, 9)
    asked = regions(
        windows(7, frames, min(overlap, frames - 1)), windows(8, rows, overlap), windows(9, columns, overlap)
    )

    def look(part, timestep, region):
        assert torch.equal(part, region.cut(noisy)) and timestep == 5
        return region.cut(planes)

    fused = InRegions(look, asked, ramp=ramp)(noisy, torch.tensor(5), Region.of(noisy))
    torch.testing.assert_close(fused, planes)


def test_regions_of_a_region():
    planes, noisy = torch.rand(1, 1, 6, 8, 8), torch.randn(1, 1, 6, 8, 8)
    inner = InRegions(lambda part, timestep, region: region.cut(planes), regions(windows(4, 2, 1)))
    outer = InRegions(inner, regions(windows(6, 4, 2), windows(8, 4, 2)))
    torch.testing.assert_close(outer(noisy, torch.tensor(0), Region.of(noisy)), planes)


def test_overlaps_are_averaged_equally_or_by_the_distance_from_the_border():
    noisy = torch.zeros(1, 1, 6, 1, 1)

    def number(part, timestep, region):
        return torch.full_like(part, 1.0 if region.frames.start == 0 else 4.0)

    asked = regions(windows(6, 4, 2))
    flat = InRegions(number, asked)(noisy, torch.tensor(0), Region.of(noisy)).flatten()
    torch.testing.assert_close(flat, torch.tensor([1, 1, 2.5, 2.5, 4, 4]))
    ramped = InRegions(number, asked, ramp=True)(noisy, torch.tensor(0), Region.of(noisy)).flatten()
    # Weights 1 2 2 1 of the first window and of the second, two frames later.
    torch.testing.assert_close(ramped, torch.tensor([1, 1, (2 + 4) / 3, (1 + 8) / 3, 4, 4]))


def test_next_to_a_cut_nothing_counts_within_the_margin():
    noisy = torch.zeros(1, 1, 1, 10, 1)

    def number(part, timestep, region):
        return torch.full_like(part, 1.0 if region.rows.start == 0 else 4.0)

    asked = regions(None, windows(10, 7, 4))  # rows 0 to 6, and 3 to 9
    fused = InRegions(number, asked, margin=1)(noisy, torch.tensor(0), Region.of(noisy)).flatten()
    torch.testing.assert_close(fused, torch.tensor([1, 1, 1, 1, 2.5, 2.5, 4, 4, 4, 4]))
    fused = InRegions(number, asked, ramp=True, margin=1)(noisy, torch.tensor(0), Region.of(noisy)).flatten()
    # At rows 4 and 5 the first has weights 2 and 1, the second 1 and 2.
    torch.testing.assert_close(fused, torch.tensor([1.0, 1, 1, 1, 2, 3, 4, 4, 4, 4]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fused_clips_keep_their_precision(dtype):
    planes = torch.rand(1, 1, 40, 96, 96).to(dtype)
    asked = in_parts(lambda part, t, region: region.cut(planes), (40, 96, 96), window=8, tile=(64, 64), tile_overlap=9)
    fused = asked(torch.zeros_like(planes), torch.tensor(0), Region.of(planes))
    assert fused.dtype == dtype
    torch.testing.assert_close(fused, planes)


def convolve(kernel, part):
    """A model that sees as far as half its kernel, with zeros around what it is given, as in a UNet."""
    pads = [side // 2 for side in reversed(kernel.shape[2:]) for _ in range(2)]
    return torch.nn.functional.conv3d(torch.nn.functional.pad(part, pads), kernel)


@given(st.integers(0, 2), st.integers(9, 14), st.integers(9, 14), st.integers(0, 3), st.integers(12, 30))
def test_tiles_with_enough_overlap_are_the_whole(reach, height, width, more, size):
    """To the last bit but one: the convolution sees ``reach`` places, a quarter of the overlap."""
    overlap = 4 * reach + more
    tile = (max(height, overlap + 1), max(width, overlap + 1))
    kernel = torch.randn(1, 1, 3, 2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
    noisy = torch.randn(2, 1, 3, size, size + 3, dtype=torch.float64)
    tiled = in_parts(lambda part, *_: convolve(kernel, part), noisy.shape[2:], tile=tile, tile_overlap=overlap)
    torch.testing.assert_close(tiled(noisy, torch.tensor(0), Region.of(noisy)), convolve(kernel, noisy))


def test_windows_with_a_margin_are_the_whole_in_time_as_well():
    kernel, noisy = torch.randn(1, 1, 5, 1, 1), torch.randn(1, 1, 23, 2, 2)
    asked = InRegions(lambda part, *_: convolve(kernel, part), regions(windows(23, 7, 4)), margin=2)
    whole = convolve(kernel, noisy)
    torch.testing.assert_close(asked(noisy, torch.tensor(0), Region.of(noisy)), whole)
    assert not torch.allclose(InRegions(asked.denoiser, asked.regions)(noisy, torch.tensor(0), Region.of(noisy)), whole)


def test_parts_are_no_larger_than_asked_for():
    sizes = set()

    def look(part, timestep, region):
        sizes.add(tuple(part.shape[2:]))
        return part

    noisy = torch.zeros(1, 1, 20, 30, 40)
    in_parts(look, noisy.shape[2:], window=8, overlap=2, tile=(16, 24), tile_overlap=4)(
        noisy, torch.tensor(0), Region.of(noisy)
    )
    assert sizes == {(8, 16, 24)}
    sizes.clear()
    in_parts(look, noisy.shape[2:], window=20, tile=(30, 40))(noisy, torch.tensor(0), Region.of(noisy))
    assert sizes == {(20, 30, 40)}
    assert in_parts(look, noisy.shape[2:]) is look


@pytest.mark.parametrize(("asked", "margin"), [(regions(windows(8, 4, 1)), 1), ([*regions(windows(4, 2))], 0)])
def test_places_without_a_prediction_are_refused(asked, margin):
    noisy = torch.zeros(1, 1, 8, 2, 2)
    with pytest.raises(ValueError, match=r"regions: expected regions that cover clips of \(8, 2, 2\), margin"):
        InRegions(lambda part, *_: part, asked, margin=margin)(noisy, torch.tensor(0), Region.of(noisy))
