"""Samples of the denoising stages: windows, noise, timesteps, dropped conditioning, images among clips."""

import torch

from temporal_layers.recipes.stages.clip_samples import ClipSamples
from temporal_layers.recipes.stages.clips import TensorClips
from temporal_layers.recipes.training.streams import SampleStream, generator_at

LATENTS = torch.randn(3, 4, 5, 6, 7, generator=torch.Generator().manual_seed(0))
CLIPS = TensorClips(LATENTS, {"labels": torch.tensor([10, 11, 12])})


def make_stream(**changes):
    options = {"num_frames": 3, "num_timesteps": 1000, "drop": 0.0, "seed": 0, **changes}
    return SampleStream(ClipSamples(CLIPS, {"labels": torch.tensor([99])}, **options))


def batch(size=4, **changes):
    return next(make_stream(**changes).batches(0, batch_size=size))


def test_samples_are_windows_of_clips_with_their_conditioning():
    starts = set()
    clips, noise, timesteps, labels = batch(30)
    assert noise.shape == clips.shape == (30, 4, 3, 6, 7) and timesteps.shape == (30,)
    for clip, label in zip(clips, labels, strict=True):
        found = [s for s in range(3) if torch.equal(clip, LATENTS[label - 10, :, s : s + 3])]
        assert len(found) == 1
        starts.add(found[0])
    assert starts == {0, 1, 2} and labels.bincount()[10:].tolist() == [10, 10, 10]
    assert noise.flatten(2).std() > 0.5 and not torch.equal(noise[:, :, 0], noise[:, :, 1])


def test_samples_repeat_with_their_seed_and_drop_conditioning():
    first, again, other = (batch(seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert (batch(drop=1.0)[3] == 99).all()
    assert 0.25 < (batch(1200, drop=0.3)[3] == 99).float().mean() < 0.35


def test_image_samples_are_marked_and_have_a_noise_level_for_each_frame():
    clips, _, timesteps, image_only, labels = batch(400, image_share=0.25)
    assert timesteps.shape == image_only.shape == (400, 3)
    images = image_only.all(1)
    assert torch.equal(images, image_only.any(1)) and 0.18 < images.float().mean() < 0.32
    assert (timesteps[~images] == timesteps[~images][:, :1]).all()
    assert (timesteps[images][:, 0] != timesteps[images][:, 1]).float().mean() > 0.9
    for clip, label in zip(clips[images], labels[images], strict=True):
        rows = [[torch.equal(clip[:, i], LATENTS[label - 10, :, f]) for f in range(5)].index(True) for i in range(3)]
        assert len(set(rows)) == 3


def test_windows_from_elsewhere_are_completed_as_those_of_clips():
    stream = make_stream(drop=0.5)
    expected = next(stream.batches(3, batch_size=4))
    windows = torch.randn(4, 4, 3, 6, 7)
    conditioning = {"labels": torch.tensor([20, 21, 22, 23])}
    found = stream.draw.complete_batch(windows, conditioning, [12, 13, 14, 15])
    again = stream.draw.complete_batch(windows, conditioning, [12, 13, 14, 15])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert torch.equal(found[0], windows) and [v.shape for v in found] == [v.shape for v in expected]
    noise = torch.randn(4, 3, 6, 7, generator=generator_at(0, 13))
    assert torch.equal(found[1][1], noise)
    labels = [
        label
        for first in range(0, 80, 4)
        for label in stream.draw.complete_batch(windows, conditioning, range(first, first + 4))[3].tolist()
    ]
    assert set(labels) == {99, 20, 21, 22, 23} and 20 < labels.count(99) < 60
