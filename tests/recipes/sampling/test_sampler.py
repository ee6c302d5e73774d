"""Steps from noise to clean latents: what a model that knows the truth leads to, under every scheduler."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from temporal_layers.recipes.denoising import matches_flows
from temporal_layers.recipes.sampling.sampler import Sampler

CLASSES = (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)


# Of diffusers, about tensors of torch.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


def make(cls):
    options = {"clip_sample": False} if cls in (DDIMScheduler, DDPMScheduler, LCMScheduler) else {}
    return cls(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


def true_noise(scheduler, scaled, clean, timestep):
    """What noise there is in latents as a model gets them, if these are of the variance-preserving kind."""
    bar = scheduler.alphas_cumprod.double()[timestep.long()].float()
    return (scaled - bar.sqrt() * clean) / (1 - bar).sqrt()


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(prediction_type="sample", clip_sample=False), FlowMatchEulerDiscreteScheduler(shift=2)],
    ids=["diffusion", "flow"],
)
def test_a_sampler_that_is_told_the_truth_ends_at_it_however_often_it_is_used(scheduler):
    clean, noise = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    sampler = Sampler(scheduler, 7)
    for _ in range(2):
        latents = sampler.start(noise)
        assert torch.equal(latents, noise) and len(sampler.timesteps) == 7
        for timestep in sampler.timesteps:
            truth = noise - clean if matches_flows(scheduler) else clean
            latents = sampler.step(truth, timestep, sampler.scaled(latents, timestep))
        torch.testing.assert_close(latents, clean, atol=1e-4, rtol=1e-4)
    assert scheduler.timesteps.shape == (1000,)  # the one that it was made from is as it was


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_scheduler_takes_clips_and_ends_near_the_truth(cls):
    scheduler = make(cls)
    clean = torch.randn(2, 3, 4, 5, 6)
    generators = [torch.Generator().manual_seed(number) for number in range(2)]
    sampler = Sampler(scheduler, 20)
    latents = sampler.start(torch.randn(clean.shape))
    for timestep in sampler.timesteps:
        noise = true_noise(scheduler, sampler.scaled(latents, timestep), clean, timestep)
        latents = sampler.step(noise, timestep, latents, generators)
    assert (latents - clean).abs().max() < 0.12  # the last step of some leaves its noise


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_fresh_noise_of_a_clip_does_not_depend_on_its_batch(cls):
    scheduler = make(cls)

    def run(rows):
        sampler = Sampler(scheduler, 5, eta=0.5 if cls is DDIMScheduler else 0.0)
        start = torch.stack([torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(row)) for row in rows])
        latents, sources = sampler.start(start), [torch.Generator().manual_seed(100 + row) for row in rows]
        for timestep in sampler.timesteps:
            latents = sampler.step(0.3 * sampler.scaled(latents, timestep), timestep, latents, sources)
        return latents

    torch.testing.assert_close(run([4, 5])[1:], run([5]))


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler])
def test_a_part_of_the_schedule_begins_with_noise_on_the_clips(cls, strength):
    scheduler = make(cls)
    sampler = Sampler(scheduler, 10, strength=strength)
    whole = Sampler(scheduler, 10).timesteps
    count = int(10 * strength) * scheduler.order
    assert len(sampler.timesteps) in (count, count - 1) and torch.equal(
        sampler.timesteps, whole[-len(sampler.timesteps) :]
    )
    clean, noise = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    for _ in range(2):
        latents = sampler.start(noise, clean)
        scaled = sampler.scaled(latents, sampler.timesteps[0])
        torch.testing.assert_close(
            true_noise(scheduler, scaled, clean, sampler.timesteps[0]), noise, atol=2e-3, rtol=2e-3
        )
        for timestep in sampler.timesteps:
            told = true_noise(scheduler, sampler.scaled(latents, timestep), clean, timestep)
            latents = sampler.step(told, timestep, latents)
        torch.testing.assert_close(latents, clean, atol=0.06, rtol=0.06)


def test_flows_begin_between_clips_and_noise():
    scheduler = FlowMatchEulerDiscreteScheduler()
    sampler = Sampler(scheduler, 4, strength=0.5)
    clean, noise = torch.randn(1, 3, 4, 5, 6), torch.randn(1, 3, 4, 5, 6)
    latents = sampler.start(noise, clean)
    share = sampler.timesteps[0] / 1000
    torch.testing.assert_close(latents, share * noise + (1 - share) * clean)
    for timestep in sampler.timesteps:
        latents = sampler.step(noise - clean, timestep, latents)
    torch.testing.assert_close(latents, clean, atol=1e-4, rtol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match=r"Sampler: eta: expected a value from 0 to below 1, got 1\.0"):
        Sampler(DDIMScheduler(), 5, 1.0)
    with pytest.raises(ValueError, match=r"Sampler: eta: expected 0 for FlowMatchEulerDiscreteScheduler.* got 0\.5"):
        Sampler(FlowMatchEulerDiscreteScheduler(), 5, 0.5)
    for steps in (0, 2.5):
        with pytest.raises(ValueError, match=rf"Sampler: steps: expected a whole number of at least 1, got {steps}"):
            Sampler(DDIMScheduler(), steps)
    for strength in (0.0, 0.1, 1.5):
        with pytest.raises(ValueError, match=rf"Sampler: strength: expected above 0 to 1, .*5 steps.* got {strength}"):
            Sampler(DDIMScheduler(), 5, strength=strength)
