"""Noise, targets and samples of the denoising stages, against closed forms and diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from temporal_layers.recipes.stages.clips import TensorClips
from temporal_layers.recipes.stages.denoising import ClipSamples, clip_noise, kind_of_prediction, noised
from temporal_layers.recipes.training.streams import SampleStream, generator_at


@pytest.mark.parametrize("per_frame", [False, True])
def test_diffusion_targets_are_what_the_scheduler_says(per_frame):
    latents, noise = torch.randn(2, 4, 3, 5, 5), torch.randn(2, 4, 3, 5, 5)
    timesteps = torch.tensor([[10, 500, 3], [900, 0, 999]]) if per_frame else torch.tensor([10, 900])
    alpha_bar = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), 0)[timesteps]
    alpha_bar = alpha_bar.view(2, 1, -1, 1, 1)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    expected = {"epsilon": noise, "v_prediction": signal * noise - sigma * latents, "sample": latents}
    for kind, target in expected.items():
        noisy, told, asked = noised(DDIMScheduler(prediction_type=kind), latents, noise, timesteps)
        torch.testing.assert_close(noisy, signal * latents + sigma * noise)
        torch.testing.assert_close(asked, target)
        assert torch.equal(told, timesteps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_targets_lead_the_scheduler_from_noise_to_data(shift):
    """One Euler step of the scheduler from any place to its end, along the true flow, gives the clean clip."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    latents, noise = torch.randn(3, 4, 2, 5, 5), torch.randn(3, 4, 2, 5, 5)
    timesteps = torch.tensor([999, 400, 0])
    noisy, told, flow = noised(scheduler, latents, noise, timesteps)
    sigmas = told / 1000
    expected = shift * (timesteps + 1) / 1000 / (1 + (shift - 1) * (timesteps + 1) / 1000)
    torch.testing.assert_close(sigmas, expected)
    torch.testing.assert_close(noisy - sigmas.view(3, 1, 1, 1, 1) * flow, latents, atol=1e-5, rtol=1e-5)
    one_by_one = [scheduler.scale_noise(latents[i], told[i : i + 1], noise[i]) for i in range(3)]
    torch.testing.assert_close(noisy, torch.stack(one_by_one))
    frames, told, _ = noised(scheduler, latents, noise, torch.tensor([[5, 9]] * 3))
    assert told.shape == (3, 2)
    torch.testing.assert_close(frames[:, :, 1], noised(scheduler, latents, noise, torch.tensor([9] * 3))[0][:, :, 1])


def test_unknown_kinds_of_prediction_are_refused():
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match=r"expected one of epsilon, .*flow, got prediction_type='score'"):
        kind_of_prediction(scheduler)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_clip_noise_is_standard_normal_with_the_correlation_asked_for(correlation):
    noise = clip_noise((4, 4, 3, 64, 64), correlation=correlation, generator=torch.Generator().manual_seed(0))
    frames = noise.transpose(1, 2).flatten(2)  # (4, 3, 16384)
    covariance = frames @ frames.transpose(1, 2) / frames.shape[-1]
    expected = torch.full((3, 3), correlation).fill_diagonal_(1.0)
    torch.testing.assert_close(covariance, expected.expand(4, 3, 3), rtol=0, atol=0.05)


def test_clip_noise_refuses_a_correlation_out_of_range():
    with pytest.raises(ValueError, match=r"clip_noise: correlation: expected a value from 0 to 1, got 1\.5"):
        clip_noise((1, 1, 2, 2, 2), correlation=1.5)


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
