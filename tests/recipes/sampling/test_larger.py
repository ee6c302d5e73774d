"""Larger and longer than trained: the shipped model is convolutional in space and, within limits, in time."""

import pytest

from temporal_layers.adapters import adapter_of
from temporal_layers.recipes.sampling.clips import sample_clips
from temporal_layers.recipes.sampling.loop import Branch, GuidedModel, denoise
from temporal_layers.recipes.sampling.noise import clip_generators, clips_of_noise, windows_of_noise
from temporal_layers.recipes.sampling.regions import in_parts
from temporal_layers.recipes.sampling.sampler import Sampler
from temporal_layers.recipes.stages.video import load_shipped_adapter

STEPS = 3


@pytest.fixture(scope="module")
def base():
    return load_shipped_adapter()[0]


def days_and_nights(base):
    labels = [base.ldm.labels.index(name) for name in ("day clear", "night clear")]
    return base.conditioning(labels, ["", ""])


def check(frames, size):
    """Days are bright and nights dark, in all of the frame, and no part of it is empty."""
    assert tuple(frames.shape[2:]) == size
    day, night = frames
    for quarter in (slice(0, size[2] // 2), slice(size[2] // 2, None)):
        assert day[..., quarter].mean() > night[..., quarter].mean() + 0.15
        assert day[..., quarter].std() > 0.05 and night[..., quarter].std() > 0.02
    changes = frames.diff(dim=2).abs().mean().item()
    assert 0 < changes < 0.1  # frames of one clip: unrelated ones differ by more


def test_larger_frames_need_larger_latents_alone(base):
    channels, height, width = base.latent_shape
    noise = clips_of_noise((channels, 2, 3 * height // 2, 3 * width // 2), clip_generators(0, range(2)))
    frames = sample_clips(base, days_and_nights(base), noise, num_inference_steps=STEPS)
    check(frames, (2, 96, 144))


@pytest.mark.parametrize("way", ["distance", "windows"])
def test_longer_clips_have_closer_attention_or_windows(base, way):
    channels, *size = base.latent_shape
    adapter, shape = adapter_of(base.unet), (channels, 18, *size)
    noise = windows_of_noise(shape, clip_generators(0, range(2)), window=16, step=2)
    model = GuidedModel(base, Branch(days_and_nights(base)))
    sampler = Sampler(base.scheduler, STEPS)
    adapter.attention_window = 8 if way == "distance" else None
    if way == "windows":
        model = in_parts(model, shape[1:], window=16, overlap=14)
    frames = base.decode(denoise(model, sampler, sampler.start(noise)))
    adapter.attention_window = None
    check(frames, (18, 64, 96))
