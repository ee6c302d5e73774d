"""Models with causal layers take a clip block by block: the same frames as in one pass over the whole clip."""

import copy
import pickle
import re

import pytest
import torch
from diffusers import DDIMScheduler

from temporal_layers import (
    AlphaConfig,
    ContextConfig,
    FrameCache,
    TemporalConvConfig,
    TemporalResBlockConfig,
    TemporalTransformerConfig,
)
from temporal_layers.adapters import TemporalConfig, adapter_of, inject

CAUSAL = TemporalConfig(
    resblock=TemporalResBlockConfig(norm="frame", causal=True),
    transformer=TemporalTransformerConfig(causal=True, window=3),
)
DECODER = TemporalConfig(
    resblock=TemporalResBlockConfig(timestep_embedding=False, norm="frame", causal=True),
    transformer=None,
    conv_out=TemporalConvConfig(causal=True),
)
DOUBLE = {"dtype": torch.float64}


@pytest.fixture
def unet(make_any_unet, randomise):
    make, others = make_any_unet
    model = make().double()
    randomise(inject(model, CAUSAL))
    return model, tuple(value.double() for value in others(2))


@pytest.fixture
def vae(make_vae, randomise):
    model = make_vae().double()
    randomise(inject(model, DECODER))
    return model


def clips(frames=5, size=8):
    return torch.randn(2, 4, frames, size, size, **DOUBLE)


def assert_same(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def in_blocks(function, sample, lengths, dim=2):
    return torch.cat([function(block) for block in sample.split(lengths, dim=dim)], dim=dim)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1] * 5, [2, 3]], ids=str)
def test_unets(unet, lengths):
    model, others = unet
    sample = clips()
    expected = model(sample, 7, *others).sample
    with adapter_of(model).streaming() as cache:
        result = in_blocks(lambda block: model(block, 7, *others).sample, sample, lengths)
    assert_same(result, expected)
    assert cache.num_frames == 5
    assert torch.equal(model(sample, 7, *others).sample, expected)  # whole clips again


@torch.no_grad()
def test_everything_that_comes_with_a_frame(make_unet, randomise):
    model = make_unet().double()
    config = TemporalConfig(
        resblock=CAUSAL.resblock,
        transformer=CAUSAL.transformer,
        context=ContextConfig(channels=3, inject="both"),
    )
    adapter = randomise(inject(model, config))
    sample, text, planes = clips(), torch.randn(2, 3, 12, **DOUBLE), torch.randn(2, 3, 5, 8, 8, **DOUBLE)
    timesteps, flags = torch.randint(0, 1000, (2, 5)), torch.rand(2, 5) < 0.4

    def run(start, stop):
        frames = slice(start, stop)
        return model(
            sample[:, :, frames], timesteps[:, frames], text, image_only=flags[:, frames],
            frame_context=planes[:, :, frames],
        ).sample  # fmt: skip

    expected = run(0, 5)
    with adapter.streaming():
        assert_same(torch.cat([run(0, 1), run(1, 3), run(3, 5)], dim=2), expected)


@torch.no_grad()
def test_frames_in_the_batch(unet):
    """A pipeline for images, which hands one clip folded into the batch, streams as well."""
    model, others = unet
    sample = clips()
    expected = model(sample, 7, *others).sample
    adapter = adapter_of(model)

    def folded(block):
        adapter.num_frames = block.shape[2]
        repeated = (value.repeat_interleave(block.shape[2], dim=0) for value in others)
        result = model(block.transpose(1, 2).flatten(0, 1), 7, *repeated).sample
        return result.unflatten(0, (2, -1)).transpose(1, 2)

    with adapter.streaming():
        assert_same(in_blocks(folded, sample, [2, 3]), expected)


@torch.no_grad()
@pytest.mark.parametrize("switch", ["none", "slicing", "tiling", "both"])
def test_decoders(vae, switch):
    size = 12 if switch in ("tiling", "both") else 4
    if switch in ("tiling", "both"):
        vae.enable_tiling()
    if switch in ("slicing", "both"):
        vae.enable_slicing()
    latents = clips(size=size)
    expected = vae.decode(latents).sample
    with adapter_of(vae).streaming() as cache:
        assert_same(in_blocks(lambda block: vae.decode(block).sample, latents, [1, 3, 1]), expected)
    assert cache.num_frames == 5


@torch.no_grad()
def test_memory_does_not_grow_with_the_stream(vae):
    sizes = []
    with adapter_of(vae).streaming() as cache:
        for _ in range(6):
            vae.decode(clips(2, size=4))
            sizes.append(cache.nbytes)
    assert len(set(sizes[1:])) == 1 and cache.num_frames == 12


@torch.no_grad()
def test_denoising_needs_a_cache_for_each_timestep(make_unet, randomise):
    """Block after block through all steps gives what all frames at once do: what a step sees is of the same step."""
    model = make_unet().double()
    adapter = randomise(inject(model, CAUSAL), std=0.05)
    scheduler = DDIMScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(3)
    noise, text = clips(), torch.randn(2, 3, 12, **DOUBLE)

    def denoise(sample, streams):
        for timestep in scheduler.timesteps:
            output = streams(int(timestep), sample, timestep)
            sample = scheduler.step(output, timestep, sample).prev_sample
        return sample

    expected = denoise(noise, lambda step, sample, timestep: model(sample, timestep, text).sample)
    caches = {int(timestep): FrameCache() for timestep in scheduler.timesteps}

    def in_stream(step, sample, timestep):
        with adapter.streaming(caches[step]):
            return model(sample, timestep, text).sample

    assert_same(in_blocks(lambda block: denoise(block, in_stream), noise, [2, 2, 1]), expected)


@torch.no_grad()
def test_a_block_that_runs_again_before_it_is_remembered(unet):
    model, others = unet
    adapter, sample = adapter_of(model), clips()
    expected = model(sample, 7, *others).sample
    with adapter.streaming() as cache:
        model(sample[:, :, :2], 7, *others)
        with adapter.streaming(cache, update=False) as same:
            assert same is cache
            for _ in range(2):
                assert_same(model(sample[:, :, 2:], 7, *others).sample, expected[:, :, 2:])
        assert cache.num_frames == 2
        assert_same(model(sample[:, :, 2:], 7, *others).sample, expected[:, :, 2:])
        assert cache.num_frames == 5


@torch.no_grad()
def test_calls_without_temporal_layers_are_no_blocks(unet):
    model, others = unet
    adapter, sample = adapter_of(model), clips(2)
    with adapter.streaming() as cache:
        with adapter.disabled():
            model(sample, 7, *others)
        model(sample[:, :, 0], 7, *others)
    assert (cache.num_frames, cache.nbytes) == (0, 0)


def test_copies_and_pickles_are_outside_of_the_stream(make_unet):
    model = make_unet()
    with torch.no_grad(), inject(model, CAUSAL).streaming():
        model(torch.randn(1, 4, 2, 8, 8), 7, torch.randn(1, 3, 12))
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        assert twin._temporal_state.stream is None
        twin(torch.randn(2, 4, 3, 8, 8), 7, torch.randn(2, 3, 12))


def test_the_stream_ends_with_the_block_whatever_happens(unet):
    model, _ = unet
    adapter = adapter_of(model)
    with pytest.raises(KeyboardInterrupt), adapter.streaming():
        raise KeyboardInterrupt
    assert model._temporal_state.stream is None


def stream(model, config, frames=2, chunks=False):
    adapter = inject(model, config)
    if chunks:
        adapter.enable_temporal_chunking(2)
    with torch.no_grad(), adapter.streaming():
        model.decode(torch.randn(1, 4, frames, 4, 4))


def test_mistakes(make_vae, make_unet):
    mistakes = [
        (
            lambda: stream(make_vae(), TemporalConfig.for_decoder()),
            "TemporalAdapter.streaming: decoder.up_blocks.0.resnets.0: cache: expected a causal layer, got causal=Fal",
        ),
        (
            lambda: stream(
                make_vae(),
                TemporalConfig(
                    resblock=TemporalResBlockConfig(
                        norm="frame", causal=True, alpha=AlphaConfig(shape="frame", num_frames=2)
                    ),
                    transformer=None,
                ),
            ),
            "decoder.up_blocks.0.resnets.0: cache: expected an alpha for clips of any length, got one per frame of 2",
        ),
        (
            lambda: stream(make_vae(), DECODER, chunks=True),
            "TemporalAdapter.streaming: expected whole blocks, got enable_temporal_chunking(), which would cut them; "
            "call disable_temporal_chunking() and pass shorter blocks",
        ),
    ]
    for mistake, message in mistakes:
        with pytest.raises(ValueError, match=re.escape(message)):
            mistake()
    model = make_unet()
    with inject(model, CAUSAL).streaming(), pytest.raises(ValueError, match="expected no gradients"):
        model(torch.randn(1, 4, 2, 8, 8), 7, torch.randn(1, 3, 12))
