"""Windows and tiles: pieces that are put together again, in closed form."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.recipes.sampling.regions import InRegions, Region, regions, windows


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_windows_cover_a_length_in_order(length, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    found = windows(length, window, overlap)
    assert {place for part in found for place in part} == set(range(length))
    assert all(len(part) == min(window, length) for part in found)
    assert all(
        later.start - earlier.start <= window - overlap for earlier, later in itertools.pairwise(found)
    )
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
