"""Noise and targets, against closed forms and diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from temporal_layers.recipes.denoising import clip_noise, kind_of_prediction, noised


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
