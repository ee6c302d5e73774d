"""FreeInit: against diffusers' own, formulas and the law of what it makes."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.free_init_utils import FreeInitMixin

from temporal_layers.recipes.sampling.free_init import denoise_again, low_pass, mix_frequencies
from temporal_layers.recipes.sampling.loop import denoise
from temporal_layers.recipes.sampling.noise import clip_generators, clips_of_noise
from temporal_layers.recipes.sampling.sampler import Sampler

# Euler's scheduler makes numpy arrays of tensors in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

SIZES = (4, 6, 8)


def theirs(in_time, in_space, order):
    return FreeInitMixin()._get_free_init_freq_filter(
        shape=(1, 1, *SIZES),
        device="cpu",
        filter_type="butterworth",
        order=order,
        spatial_stop_frequency=in_space,
        temporal_stop_frequency=in_time,
    )


@pytest.mark.parametrize(("in_time", "in_space", "order"), [(0.25, 0.25, 4), (0.5, 0.3, 2)])
def test_the_filter_is_that_of_diffusers(in_time, in_space, order):
    mine = low_pass(*SIZES, in_time=in_time, in_space=in_space, order=order)
    torch.testing.assert_close(torch.fft.fftshift(mine), theirs(in_time, in_space, order)[0, 0])


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_the_filter_lets_the_mean_through_and_is_even(size):
    gain = low_pass(size, size + 1, size + 2)
    assert gain[0, 0, 0] == 1 and gain.min() >= 0 and gain.max() == 1
    mirrored = gain.flip((0, 1, 2)).roll((1, 1, 1), dims=(0, 1, 2))
    torch.testing.assert_close(gain, mirrored)


def test_with_a_sharp_filter_frequencies_are_mixed_as_by_diffusers():
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randn(2, 3, *SIZES, generator=generator) for _ in range(2))
    sharp = (low_pass(*SIZES) > 0.5).float()
    expected = FreeInitMixin()._apply_freq_filter(low, high, low_pass_filter=torch.fft.fftshift(sharp))
    torch.testing.assert_close(mix_frequencies(low, high, sharp), expected)
    torch.testing.assert_close(mix_frequencies(low, high, torch.ones(SIZES)), low)
    torch.testing.assert_close(mix_frequencies(low, high, torch.zeros(SIZES)), high)
    assert mix_frequencies(low.bfloat16(), high.bfloat16(), sharp).dtype == torch.bfloat16


def test_mixed_noise_is_standard_normal_and_white():
    """The mix as a matrix: with M of one clip and N of the other, M M' + N N' is the identity."""
    gain, size = low_pass(2, 3, 4, in_time=0.6, in_space=0.6, order=1), 24
    units, zero = torch.eye(size).reshape(size, 2, 3, 4), torch.zeros(size, 2, 3, 4)
    of_low, of_high = mix_frequencies(units, zero, gain).flatten(1), mix_frequencies(zero, units, gain).flatten(1)
    assert of_low.abs().max() > 0.1 and of_high.abs().max() > 0.1
    torch.testing.assert_close(of_low.T @ of_low + of_high.T @ of_high, torch.eye(size), rtol=0, atol=1e-5)


class Shrinking:
    """A model that remembers what it was asked, and says something of its own."""

    def __init__(self):
        self.asked = []

    def __call__(self, noisy, timestep, region):
        self.asked.append((int(timestep), noisy))
        return 0.3 * noisy.tanh()


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(clip_sample=False), EulerDiscreteScheduler(timestep_spacing="leading")]
)
def test_each_pass_begins_with_the_low_frequencies_of_the_last(scheduler):
    sampler, model, gain = Sampler(scheduler, 3), Shrinking(), low_pass(*SIZES)
    shape = (2, *SIZES)
    noise = clips_of_noise(shape, clip_generators(0, range(2)))
    result = denoise_again(model, sampler, noise, clip_generators(1, range(2)), num_iters=3, gain=gain)
    assert len(model.asked) == 9
    generators, expected = clip_generators(1, range(2)), noise
    for number in range(3):
        timestep, start = model.asked[3 * number]
        first = sampler.timesteps[0]
        torch.testing.assert_close(start, expected, rtol=1e-4, atol=1e-5)
        assert timestep == int(first)
        clean = denoise(Shrinking(), sampler, sampler.start(expected))
        signal = DDIMScheduler().alphas_cumprod[int(first)].sqrt()
        noisy = signal * clean + (1 - signal**2).sqrt() * noise
        if isinstance(scheduler, EulerDiscreteScheduler):  # the same in sigmas, over its own scale
            sigma = (1 - signal**2).sqrt() / signal
            noisy = (clean + sigma * noise) / (sigma**2 + 1).sqrt()
        expected = mix_frequencies(noisy, clips_of_noise(shape, generators), gain)
    torch.testing.assert_close(result, clean, rtol=1e-4, atol=1e-5)


def test_one_pass_is_plain_and_clips_do_not_depend_on_their_batch():
    sampler = Sampler(DDIMScheduler(clip_sample=False), 2)
    noise = clips_of_noise((2, *SIZES), clip_generators(0, range(3)))
    plain = denoise(Shrinking(), sampler, sampler.start(noise))
    assert torch.equal(denoise_again(Shrinking(), sampler, noise, clip_generators(1, range(3)), num_iters=1), plain)
    three = denoise_again(Shrinking(), sampler, noise, clip_generators(1, range(3)))
    last = denoise_again(Shrinking(), sampler, noise[2:], clip_generators(1, [2]))
    torch.testing.assert_close(three[2:], last)
    assert (three - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(),
    ],
)
def test_a_schedule_that_ends_in_pure_noise_is_refused(scheduler):
    noise, generators = torch.randn(1, 2, *SIZES), clip_generators(0, [0])
    sampler = Sampler(scheduler, 2)
    denoise_again(Shrinking(), sampler, noise, generators, num_iters=1)
    with pytest.raises(ValueError, match=r"denoise_again: sampler: expected a schedule .* got \w+Scheduler that ends"):
        denoise_again(Shrinking(), sampler, noise, generators)


def test_other_arguments_out_of_range_are_refused():
    sampler = Sampler(DDIMScheduler(), 2)
    with pytest.raises(ValueError, match=r"denoise_again: num_iters: expected at least 1, got 0"):
        denoise_again(Shrinking(), sampler, torch.randn(1, 2, *SIZES), clip_generators(0, [0]), num_iters=0)
    with pytest.raises(ValueError, match=r"low_pass: expected in_time and .* got in_time=0, in_space=0.25, order=4"):
        low_pass(*SIZES, in_time=0)
    with pytest.raises(ValueError, match=r"mix_frequencies: gain: .* each of \(4, 6, 8\) .*, got \(4, 6, 9\)"):
        mix_frequencies(torch.randn(1, *SIZES), torch.randn(1, *SIZES), low_pass(4, 6, 9))
