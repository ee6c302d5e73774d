"""Tiles of the operators that are matrix products: what table entry a call gets, and that it fits the problem."""

from importlib import import_module

import pytest
import torch

from temporal_layers.kernels.dispatch import Impl
from temporal_layers.kernels.geglu import geglu
from temporal_layers.kernels.geglu import tiles as geglu_tiles
from temporal_layers.kernels.linear import linear
from temporal_layers.kernels.linear import tiles as linear_tiles
from temporal_layers.kernels.matmul import Tile, family_of
from temporal_layers.kernels.temporal_conv import temporal_conv
from temporal_layers.kernels.temporal_conv import tiles as conv_tiles

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("target", "family"),
    [
        ("sm_80", "ampere"), ("sm_89", "ampere"), ("sm_90", "hopper"), ("sm_100", "blackwell"), ("sm_120", "ampere"),
        ("gfx942", "amd"), ("interpreted", "interpreted"),
    ],
)  # fmt: skip
def test_family(target, family):
    assert family_of(target) == family


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "interpreted"])
def test_every_target_has_tiles(target, dtype):
    for rows in (64, 65536):
        assert conv_tiles.tile_for(target, 2, rows, 320, 320, dtype).rows >= 32
        assert geglu_tiles.tile_for(target, rows, 1280, 320, dtype).rows >= 32
        assert linear_tiles.tile_for(target, rows, 320, 320, dtype).rows >= 32


def test_a_tile_is_no_larger_than_the_problem():
    tile = Tile(128, 64, 32, warps=8, stages=3)
    assert tile.clipped(1000, 1000, 1000) == tile
    assert tile.clipped(33, 5, 17) == Tile(64, 16, 32, warps=8, stages=3)


def test_small_convolutions_take_smaller_tiles():
    large = conv_tiles.tile_for("sm_90", 2, 16 * 64 * 64, 320, 320, BF16)
    small = conv_tiles.tile_for("sm_90", 2, 16 * 8 * 8, 1280, 1280, BF16)
    assert (large.rows, large.columns) == (256, 128) and small.rows * small.columns < large.rows * large.columns
    assert conv_tiles.tile_for("sm_80", 1, 1024, 320, 320, FP32) == conv_tiles.TABLE["ampere", False, False]


@pytest.mark.parametrize(
    ("target", "dtype", "channels", "takes"),
    [
        ("sm_90", BF16, (320, 320), True), ("sm_100", torch.float16, (8, 16), True), ("sm_80", BF16, (320, 320), False),
        ("sm_90", BF16, (320, 4), False), ("sm_90", FP32, (320, 320), False), ("gfx942", BF16, (320, 320), False),
    ],
)  # fmt: skip
def test_descriptors_are_for_whole_16_bytes_on_hopper(target, dtype, channels, takes):
    assert conv_tiles.takes_descriptors(target, dtype, *channels) is takes


@pytest.mark.parametrize("tiles", [conv_tiles, geglu_tiles, linear_tiles])
def test_nothing_is_said_to_be_faster_before_it_is_measured(tiles):
    assert not tiles.FASTER


def test_what_was_measured_to_be_faster(monkeypatch):
    x, tokens = torch.ones(2, 8, 1, 1), torch.ones(2, 8)
    entries = (conv_tiles, ("sm_90", 16)), (geglu_tiles, ("sm_90", 8)), (linear_tiles, ("sm_90", 8, 16))
    for tiles, entry in entries:
        monkeypatch.setattr(tiles, "FASTER", frozenset([entry]))
        monkeypatch.setattr(tiles, "target_of", lambda x: "sm_90")
    assert conv_tiles.is_faster(x, 16) and geglu_tiles.is_faster(tokens)
    assert not conv_tiles.is_faster(x, 8) and not geglu_tiles.is_faster(tokens[:, :4])
    assert linear_tiles.is_faster(tokens, 16) and not linear_tiles.is_faster(tokens, 8)


CALLS = {
    "temporal_conv": lambda: temporal_conv(torch.ones(2, 8, 1, 1), torch.ones(16, 8, 1, 1), num_frames=1),
    "geglu": lambda: geglu(torch.ones(2, 8), torch.ones(4, 8)),
    "linear": lambda: linear(torch.ones(2, 8), torch.ones(4, 8)),
}


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("op", CALLS)
def test_auto_asks_whether_the_kernel_is_faster(op, faster, monkeypatch):
    module, asked = import_module(f"temporal_layers.kernels.{op}"), []

    def spy(*arguments, preferred, **options):
        asked.append(preferred)
        return Impl.REFERENCE

    monkeypatch.setattr(module, "is_faster", lambda *_: faster)
    monkeypatch.setattr(module, "resolve_impl", spy)
    CALLS[op]()
    assert asked == [faster]
