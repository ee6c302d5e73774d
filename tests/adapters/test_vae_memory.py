"""The most memory that decoding needs at a time, as PyTorch's allocator reports it to the profiler."""

import pytest
import torch

from temporal_layers import TemporalResBlockConfig
from temporal_layers.adapters import TemporalConfig, inject

CHUNK, REACH = 4, 4


@pytest.fixture
def injected(make_vae):
    model = make_vae(block_out_channels=(32, 32))
    resblock = TemporalResBlockConfig(timestep_embedding=False, norm="frame", num_convs=1)
    adapter = inject(model, TemporalConfig(resblock=resblock, transformer=None, include=("up_blocks",)))
    assert adapter.receptive_field == (REACH, REACH)
    return model, adapter


def latents(frames, batch=1):
    return torch.randn(batch, 4, frames, 8, 8)


def kept(z):
    """What grows with the clip whatever the chunks: the folded latents, before and after a convolution, and images."""
    return 4 * (2 * z.numel() + z.numel() * 3)  # 3 channels for 4, and twice the height and width


@pytest.mark.parametrize(("frames", "batch"), [(16, 1), (64, 1), (16, 2)])
def test_chunks_need_what_one_chunk_with_its_overlap_needs(injected, peak, frames, batch):
    model, adapter = injected
    one = latents(CHUNK + 2 * REACH)
    bound = peak(lambda: model.decode(one))
    adapter.enable_temporal_chunking(CHUNK)
    z = latents(frames, batch)
    assert peak(lambda: model.decode(z)) <= bound + kept(z)


def test_memory_grows_with_the_clip_without_chunks_and_hardly_with_them(injected, peak):
    model, adapter = injected
    short, long = latents(16), latents(64)
    whole = peak(lambda: model.decode(long)) - peak(lambda: model.decode(short))
    assert whole > 2.9 * peak(lambda: model.decode(short))
    adapter.enable_temporal_chunking(CHUNK)
    chunked = peak(lambda: model.decode(long)) - peak(lambda: model.decode(short))
    assert chunked <= kept(long) - kept(short)
    adapter.enable_temporal_chunking(CHUNK, overlap=1)  # blended; fewer frames at once
    assert peak(lambda: model.decode(long)) - peak(lambda: model.decode(short)) <= kept(long) - kept(short)


def test_clips_one_at_a_time_need_what_one_clip_needs(injected, peak):
    model, _ = injected
    one, three = latents(8), latents(8, batch=3)
    bound = peak(lambda: model.decode(one))
    model.enable_slicing()
    assert peak(lambda: model.decode(three)) <= bound + kept(three)


def test_tiles_and_chunks_together_bound_memory_in_all_directions(injected, peak):
    # The plain model's tiling keeps every tile's pixels beside the stitched ones; they overlap by a quarter.
    model, adapter = injected
    model.tile_latent_min_size, model.tile_sample_min_size = 8, 16
    model.enable_tiling()
    bound = peak(lambda: model.decode(latents(CHUNK + 2 * REACH)))
    adapter.enable_temporal_chunking(CHUNK)
    z = torch.randn(1, 4, 24, 16, 16)
    pixels = 4 * z.numel() * 3
    assert peak(lambda: model.decode(z)) <= bound + kept(z) + 3 * pixels
