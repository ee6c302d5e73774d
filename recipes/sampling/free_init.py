"""Clips that are denoised again from the coarse parts of what they became (FreeInit, Wu et al. 2023).

In training a noisy clip keeps some of the clip, above all what is slow and large; noise that sampling begins with has
nothing of that. Here the clip of one pass gives the slow and large parts of the noise of the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.sampling.loop import denoise
from temporal_layers.recipes.sampling.noise import clips_of_noise
from temporal_layers.recipes.sampling.regions import Denoiser
from temporal_layers.recipes.sampling.sampler import Sampler

_AXES = (-3, -2, -1)


def low_pass(
    frames: int, height: int, width: int, *, in_time: float = 0.25, in_space: float = 0.25, order: int = 4
) -> Float[Tensor, "frames height width"]:
    """Butterworth low-pass over the frequencies of a clip, in the order of ``torch.fft.fftn``.

    Args:
        frames: Of the clips.
        height: Likewise.
        width: Likewise.
        in_time: Frequency at which a half goes through, as a share of the highest one.
        in_space: The same, along height and width.
        order: Steepness.

    Returns:
        Gains from 0 to 1.

    Raises:
        ValueError: If a frequency or the order is not above 0.
    """
    if min(in_time, in_space) <= 0 or order < 1:
        raise ValueError(
            "low_pass: expected in_time and in_space above 0 and an order of at least 1, got "
            f"in_time={in_time}, in_space={in_space}, order={order}"
        )
    limits = ((frames, in_time), (height, in_space), (width, in_space))
    along = [(2 * torch.fft.fftfreq(size, dtype=torch.float64) / limit).square() for size, limit in limits]
    square = along[0][:, None, None] + along[1][:, None] + along[2]
    return (1 / (1 + square**order)).float()


def mix_frequencies(
    low: Float[Tensor, "*batch frames height width"],
    high: Float[Tensor, "*batch frames height width"],
    gain: Float[Tensor, "frames height width"],
) -> Float[Tensor, "*batch frames height width"]:
    """Some frequencies of one clip, and the others of another one.

    Where both are standard normal, so is the result: the gains of the two are ``gain`` and ``sqrt(1 - gain^2)``. (In
    the paper the second is ``1 - gain``, which is the same where the filter is 0 or 1, and loses variance in between.)

    Args:
        low: Of which ``gain`` goes through.
        high: Of which the rest does.
        gain: From 0 to 1, of each frequency; equal for a frequency and its negative.

    Raises:
        ValueError: If the gains are of another shape.
    """
    if gain.shape != low.shape[-3:]:
        raise ValueError(
            f"mix_frequencies: gain: expected one gain for each of {tuple(low.shape[-3:])} frequencies, got "
            f"{tuple(gain.shape)}; make it by low_pass(*clips.shape[-3:])"
        )
    gain = gain.to(low.device)
    kept, others = (torch.fft.fftn(part.float(), dim=_AXES) for part in (low, high))
    mixed = kept * gain + others * (1 - gain.square()).sqrt()
    return torch.fft.ifftn(mixed, dim=_AXES).real.to(low.dtype)


def denoise_again(
    denoiser: Denoiser,
    sampler: Sampler,
    noise: Float[Tensor, "b c f h w"],
    generators: Sequence[torch.Generator],
    *,
    num_iters: int = 3,
    gain: Float[Tensor, "f h w"] | None = None,
) -> Float[Tensor, "b c f h w"]:
    """Go from noise to clean clips several times, each time from what the last clips have of low frequencies.

    They are made noisy with the noise that they came from, up to the sampler's first timestep, and fresh noise takes
    the place of their high frequencies.

    Args:
        denoiser: What the model says.
        sampler: The steps; from noise, not from noisy clips.
        noise: Standard normal, what the first pass begins with.
        generators: One a clip, of all that is drawn.
        num_iters: Passes; 1 is `denoise`.
        gain: Of the frequencies that are kept; `low_pass` of the clips if None.

    Raises:
        ValueError: If there is no pass, or several and the noisiest clips of the schedule have nothing of the clips.
    """
    if num_iters < 1:
        raise ValueError(f"denoise_again: num_iters: expected at least 1, got {num_iters}")
    if num_iters > 1:
        _check_signal(sampler)
    gain = low_pass(*noise.shape[2:]) if gain is None else gain
    clean = denoise(denoiser, sampler, sampler.start(noise), generators)
    for _ in range(num_iters - 1):
        noisy = _of_unit_scale(sampler, noise, clean)
        fresh = clips_of_noise(noise.shape[1:], generators).to(noise)
        clean = denoise(denoiser, sampler, sampler.start(mix_frequencies(noisy, fresh, gain)), generators)
    return clean


def _of_unit_scale(sampler: Sampler, noise: Tensor, clean: Tensor) -> Tensor:
    """Noisy clips; schedulers that count in sigmas have them larger than noise of a variance of one."""
    return sampler.start(noise, clean) / sampler.start(noise.new_ones(()))


def _check_signal(sampler: Sampler) -> None:
    one = torch.ones(1)
    if _of_unit_scale(sampler, torch.zeros_like(one), one).abs().item() < 1e-6:
        raise ValueError(
            "denoise_again: sampler: expected a schedule whose noisiest clips still have something of the clips, got "
            f"{type(sampler.scheduler).__name__} that ends in pure noise (a signal-to-noise ratio of zero, or flow "
            "matching), where another pass would learn nothing of the last; use denoise"
        )
