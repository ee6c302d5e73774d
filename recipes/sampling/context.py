"""Sampling of clips some of whose frames are given (Video LDM, sections 3.2 and 3.3).

This is one window of frames; `sampling.prediction` and `sampling.interpolation` go from window to window. Everything
here works on latents; ``base.decode`` makes frames of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.bases import Conditioning, VideoBase, on_device
from temporal_layers.recipes.conditioning import ContextPlanes, augment, signal_levels
from temporal_layers.recipes.digests import tensors_digest
from temporal_layers.recipes.sampling.loop import Branch, GuidedModel, OnStep, denoise
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
        seed: Of everything drawn, in which every clip has a part of its own; or one seed a clip.
        batch_size: Clips at a time, which bounds the memory.
    """

    num_inference_steps: int = 25
    context_scale: float = 1.0
    guidance_scale: float = 1.0
    noise_level: int = 0
    eta: float = 0.0
    noise_correlation: float = 0.0
    seed: int | tuple[int, ...] = 0
    batch_size: int = 2

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1 or self.batch_size < 1 or self.noise_level < 0 or not 0 <= self.eta < 1:
            raise ValueError(
                "ContextSampling: expected num_inference_steps and batch_size of at least 1, noise_level of at least 0 "
                f"and eta from 0 to below 1, got {self}"
            )

    def check_seeds(self, clips: int) -> None:
        """Raise a ValueError if there are seeds of clips, but not one for each."""
        if isinstance(self.seed, tuple) and len(self.seed) != clips:
            raise ValueError(
                f"ContextSampling: seed: expected one number, or one for each of {clips} clips, got {self.seed}"
            )

    def sources(self, clips: Iterable[int], purpose: str = "sampling") -> list[torch.Generator]:
        """Sources of noise, which depend on the seed, the number of the clip and the purpose alone."""
        if isinstance(self.seed, int):
            return clip_generators(self.seed, clips, purpose)
        return [source for clip in clips for source in clip_generators(self.seed[clip], [0], purpose)]


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
    negative: Conditioning | None = None,
    sources: Sequence[torch.Generator] | None = None,
    on_step: OnStep | None = None,
    device: torch.device | str | None = None,
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
        negative: What ``guidance_scale`` guides away from, one row a clip; what says nothing if None.
        sources: Of noise, one a clip; those of ``options`` if None.
        on_step: Called after each step of each batch.
        device: Where the model runs; that of the UNet if None, which is another one while it is offloaded.

    Returns:
        Latents on the CPU, the given frames as they came.

    Raises:
        ValueError: If ``options`` has seeds of clips, but not one for each.
    """
    options = options or ContextSampling()
    if sources is None:
        options.check_seeds(len(known))
        sources = options.sources(range(len(known)))
    device = base.unet.device if device is None else torch.device(device)
    parts = []
    for first in range(0, len(known), options.batch_size):
        rows = slice(first, first + options.batch_size)
        part, own = known[rows].float().cpu(), sources[rows]
        noise = clips_of_noise(part.shape[1:], own)
        noisy = augment(part, options.noise_level, noise, signal_levels(base.scheduler))
        context = planes.build(noisy, given.expand(len(part), -1), level=options.noise_level, rate=rate)
        context = context.to(device)
        told = Branch(_rows(conditioning, rows, context), context)
        free = base.no_conditioning(len(part)) if negative is None else _rows(negative, rows, context)
        model = GuidedModel(
            base,
            told,
            without_text=Branch(on_device(free, context.device), context),
            without_context=Branch(told.conditioning, planes.without(context)) if given.any() else None,
            text_scale=options.guidance_scale,
            context_scale=options.context_scale,
        )
        noise = clips_of_noise((planes.latent_channels, *context.shape[2:]), own, correlation=options.noise_correlation)
        sampler = Sampler(base.scheduler, options.num_inference_steps, options.eta)
        start = sampler.start(noise.to(device, base.unet.dtype))
        made = denoise(model, sampler, start, list(own), on_step=on_step)
        parts.append(torch.where(given[:, None, None] > 0, part, made.float().cpu()))
    return torch.cat(parts)


def _rows(conditioning: Conditioning, rows: slice, like: Tensor) -> Conditioning:
    return {name: value[rows].to(like.device) for name, value in conditioning.items()}


def settings_of(base: VideoBase, planes: ContextPlanes, options: ContextSampling) -> dict[str, Any]:
    """What latents depend on besides what is given and told, for a `LatentStore`: the model and the options."""
    # What diffusers notes down about a configuration, such as its version, makes no difference.
    schedule = {name: value for name, value in base.scheduler.config.items() if not name.startswith("_")}
    parts = {"scheduler": schedule, "planes": asdict(planes), "options": asdict(options)}
    flat = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return {"unet": tensors_digest(base.unet.state_dict()), "scheduler": type(base.scheduler).__name__, **flat}


def made_of(known: Tensor, told: Conditioning, negative: Conditioning | None = None) -> dict[str, Tensor]:
    """What is given and told, by name, for a `LatentStore`."""
    parts = {"told": told, "negative": negative or {}}
    return {"known": known} | {f"{part}.{name}": value for part, rows in parts.items() for name, value in rows.items()}
