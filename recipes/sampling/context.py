"""Sampling of clips some of whose frames are given: continuing them, filling them in (Video LDM, sections 3.2, 3.3).

Everything here works on latents; ``base.decode`` makes frames of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.bases import Conditioning, VideoBase, on_device
from temporal_layers.recipes.conditioning import (
    FACTOR,
    ContextPlanes,
    augment,
    interpolated_length,
    interpolation_mask,
    prediction_mask,
    signal_levels,
)
from temporal_layers.recipes.sampling.loop import Branch, GuidedModel, denoise
from temporal_layers.recipes.sampling.noise import clip_generators, clips_of_noise
from temporal_layers.recipes.sampling.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class ContextSampling:
    """How clips with given frames are sampled.

    Attributes:
        num_inference_steps: Denoising steps.
        context_scale: Guidance towards the given frames (equation 4), for models trained with none given as well; 1
            turns it off.
        guidance_scale: Guidance towards the conditioning; 1 turns it off. Each guidance costs a pass of the UNet.
        noise_level: Of noise put on the given frames, for models trained with it: they are trusted less.
        eta: Fresh noise in each step, from 0 (DDIM) to below 1.
        noise_correlation: Correlation between the noise of a clip's frames, as in training.
        seed: Of everything drawn.
        batch_size: Clips at a time, which bounds the memory.
    """

    num_inference_steps: int = 25
    context_scale: float = 1.0
    guidance_scale: float = 1.0
    noise_level: int = 0
    eta: float = 0.0
    noise_correlation: float = 0.0
    seed: int = 0
    batch_size: int = 2

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1 or self.batch_size < 1 or self.noise_level < 0 or not 0 <= self.eta < 1:
            raise ValueError(
                "ContextSampling: expected num_inference_steps and batch_size of at least 1, noise_level of at least 0 "
                f"and eta from 0 to below 1, got {self}"
            )


@torch.no_grad()
def sample_given(
    base: VideoBase,
    planes: ContextPlanes,
    conditioning: Conditioning,
    known: Float[Tensor, "clips channels frames height width"],
    given: Float[Tensor, " frames"],
    options: ContextSampling | None = None,
    *,
    rate: float = 0.0,
) -> Float[Tensor, "clips channels frames height width"]:
    """Sample the frames of clips that are not given.

    Args:
        base: The image model, with temporal layers that take a frame context.
        planes: Of the context: ``ContextPlanes.of(adapter)``.
        conditioning: One row a clip.
        known: Latents of the given frames; the others are not looked at.
        given: Mask of the frames, the same for all clips.
        options: Of the sampler.
        rate: Label of the frame rate, for models of several.

    Returns:
        Latents on the CPU, the given frames as they came.
    """
    options = options or ContextSampling()
    parts = []
    for first in range(0, len(known), options.batch_size):
        rows = slice(first, first + options.batch_size)
        some = {name: value[rows].to(base.unet.device) for name, value in conditioning.items()}
        part = known[rows].float().cpu()
        generators = clip_generators(options.seed, range(first, first + len(part)))
        noise = clips_of_noise(part.shape[1:], generators)
        noisy = augment(part, options.noise_level, noise, signal_levels(base.scheduler))
        context = planes.build(noisy, given.expand(len(part), -1), level=options.noise_level, rate=rate)
        made = _denoise(base, planes, Branch(some, context.to(base.unet.device)), options, generators).float().cpu()
        parts.append(torch.where(given[:, None, None] > 0, part, made))
    return torch.cat(parts)


def _denoise(
    base: VideoBase,
    planes: ContextPlanes,
    told: Branch,
    options: ContextSampling,
    generators: list[torch.Generator],
) -> Tensor:
    clips, device = len(generators), base.unet.device
    shape = (planes.latent_channels, *told.context.shape[2:])
    noise = clips_of_noise(shape, generators, correlation=options.noise_correlation)
    sampler = Sampler(base.scheduler, options.num_inference_steps, options.eta)
    model = GuidedModel(
        base,
        told,
        without_text=Branch(on_device(base.no_conditioning(clips), device), told.context),
        without_context=Branch(told.conditioning, planes.without(told.context)),
        text_scale=options.guidance_scale,
        context_scale=options.context_scale,
    )
    return denoise(model, sampler, sampler.start(noise.to(device, base.unet.dtype)), generators)


def prediction_windows(num_frames: int, *, first: int, window: int, overlap: int = 2) -> list[tuple[int, int]]:
    """Where the windows of a roll-out begin, and how many frames are given in each.

    The first one continues ``first`` frames, at most ``overlap``; those behind it continue the last ``overlap``, which
    tell which way things move.

    Args:
        num_frames: Frames in the end.
        first: Frames that are there.
        window: Frames of a window; the last one may reach beyond the end.
        overlap: Given frames of a window, once there are so many.

    Raises:
        ValueError: If no frame is there, or a window has no new frame.
    """
    if first < 1 or not 1 <= overlap < window:
        raise ValueError(
            f"prediction_windows: expected at least one frame to begin with, and an overlap from 1 to below window="
            f"{window}, got first={first} and overlap={overlap}"
        )
    windows, there = [], first
    while there < num_frames:
        given = min(there, overlap)
        windows.append((there - given, given))
        there += window - given
    return windows


def sample_prediction(
    base: VideoBase,
    planes: ContextPlanes,
    conditioning: Conditioning,
    first: Float[Tensor, "clips channels first height width"],
    num_frames: int,
    options: ContextSampling | None = None,
    *,
    window: int = 8,
    overlap: int = 2,
) -> Float[Tensor, "clips channels frames height width"]:
    """Continue clips, window by window.

    Args:
        base: The image model, with temporal layers trained to predict.
        planes: Of their context.
        conditioning: One row a clip.
        first: Latents of the first frames, one or more.
        num_frames: Frames in the end, the first ones included.
        options: Of the sampler.
        window: Frames of a window, as in training.
        overlap: Given frames of a window, once there are so many.

    Returns:
        Latents on the CPU, ``first`` in front.

    Raises:
        ValueError: As `prediction_windows`.
    """
    options = options or ContextSampling()
    clips = first.float().cpu()
    windows = prediction_windows(num_frames, first=clips.shape[2], window=window, overlap=overlap)
    for number, (start, given) in enumerate(windows):
        known = torch.zeros(*clips.shape[:2], window, *clips.shape[3:])
        known[:, :, :given] = clips[:, :, start:]
        mask = prediction_mask(given, window)
        made = sample_given(base, planes, conditioning, known, mask, replace(options, seed=options.seed + number))
        clips = torch.cat([clips, made[:, :, given:]], dim=2)
    return clips[:, :, :num_frames]


def interpolation_windows(count: int, pairs: int = 1) -> list[int]:
    """The given frames, of ``count``, at which windows of ``pairs`` pairs begin; the last two may overlap.

    Raises:
        ValueError: If there are too few frames.
    """
    if pairs < 1 or count <= pairs:
        raise ValueError(
            f"interpolation_windows: expected more than pairs={pairs} given frames and at least one pair, got {count}"
        )
    starts = list(range(0, count - pairs, pairs))
    return starts if starts[-1] + pairs == count - 1 else [*starts, count - 1 - pairs]


def sample_interpolation(
    base: VideoBase,
    planes: ContextPlanes,
    conditioning: Conditioning,
    keys: Float[Tensor, "clips channels keys height width"],
    options: ContextSampling | None = None,
    *,
    rate: float,
    pairs: int = 1,
) -> Float[Tensor, "clips channels frames height width"]:
    """Make three frames between every two of some clips; twice, at rates 0 and 1, 8 frames become 29 and then 113.

    Args:
        base: The image model, with temporal layers trained to interpolate.
        planes: Of their context.
        conditioning: One row a clip.
        keys: Latents of two frames or more.
        options: Of the sampler.
        rate: Label of the frame rate: 0 between key frames, 1 between those that came of them.
        pairs: Pairs of given frames in a window, as in training.

    Returns:
        Latents on the CPU, ``keys`` among them as they came.

    Raises:
        ValueError: As `interpolation_windows`.
    """
    count = keys.shape[2]
    starts = interpolation_windows(count, pairs)
    keys, mask = keys.float().cpu(), interpolation_mask(FACTOR * pairs + 1)
    known = torch.zeros(len(keys), len(starts), keys.shape[1], len(mask), *keys.shape[3:])
    for number, start in enumerate(starts):
        known[:, number, :, ::FACTOR] = keys[:, :, start : start + pairs + 1]
    rows = {name: value.repeat_interleave(len(starts), 0) for name, value in conditioning.items()}
    made = sample_given(base, planes, rows, known.flatten(0, 1), mask, options, rate=rate)
    made = made.unflatten(0, (len(keys), len(starts)))
    result = torch.empty(*keys.shape[:2], interpolated_length(count), *keys.shape[3:])
    for number, start in reversed(list(enumerate(starts))):
        result[:, :, FACTOR * start : FACTOR * (start + pairs) + 1] = made[:, number]
    return result
