"""Sampling of clips from an image model, frame by frame or with temporal layers, with or without fresh noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.recipes.bases import Conditioning, VideoBase
from temporal_layers.recipes.denoising import Sampler


@torch.no_grad()
def sample_clips(
    base: VideoBase,
    conditioning: Conditioning,
    noise: Float[Tensor, "clips channels frames height width"],
    *,
    frame_by_frame: bool = False,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    eta: float = 0.0,
    seed: int = 0,
    batch_size: int = 2,
) -> Float[Tensor, "clips 3 frames height width"]:
    """Sample clips with the base's sampler and classifier-free guidance, a few clips at a time.

    Args:
        base: The image model, with temporal layers unless ``frame_by_frame``.
        conditioning: One row a clip.
        noise: Standard normal starting point, which also says how many clips of how many frames.
        frame_by_frame: Sample every frame by itself, as an image; needs no temporal layers.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of the guidance; 1 turns it off and halves the cost.
        eta: Fresh noise in each step, from 0 (none: DDIM) to below 1 (nearly DDPM). It lets later steps mend what
            frames did not agree on in earlier ones.
        seed: Seed of that noise, which is the same with and without temporal layers.
        batch_size: Clips at a time, which bounds the memory.

    Returns:
        Frames in [0, 1].

    Raises:
        ValueError: If eta is out of range.
    """
    sampler = Sampler(base.scheduler, num_inference_steps, eta)
    num_frames = noise.shape[2]
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for first in range(0, len(noise), batch_size):
        rows = slice(first, first + batch_size)
        some, start = {name: value[rows] for name, value in conditioning.items()}, noise[rows]
        arrange = fold_frames if frame_by_frame else torch.Tensor.contiguous
        draw = functools.partial(_drawn, start.shape, generator, arrange)
        if frame_by_frame:
            some = {name: value.repeat_interleave(num_frames, dim=0) for name, value in some.items()}
            start = fold_frames(start)
        latents = _denoise(base, some, start, sampler, guidance_scale, draw)
        latents = latents if frame_by_frame else fold_frames(latents)
        parts.append(unfold_frames(base.decode(latents).cpu(), num_frames))
    return torch.cat(parts)


def _drawn(shape: Sequence[int], generator: torch.Generator, arrange: Callable[[Tensor], Tensor]) -> Tensor:
    return arrange(torch.randn(shape, generator=generator))


def _denoise(
    base: VideoBase,
    conditioning: Conditioning,
    noise: Tensor,
    sampler: Sampler,
    guidance_scale: float,
    draw: Callable[[], Tensor],
) -> Tensor:
    device = base.unet.device
    latents = sampler.start(noise.to(device, base.unet.dtype))
    conditioning = {name: value.to(device) for name, value in conditioning.items()}
    guided = guidance_scale != 1 and bool(conditioning)
    if guided:
        free = base.no_conditioning(len(noise))
        conditioning = {name: torch.cat([free[name].to(device), value]) for name, value in conditioning.items()}
    for timestep in sampler.timesteps:
        output = base.predict(torch.cat([latents, latents]) if guided else latents, timestep, conditioning)
        if guided:
            without, given = output.chunk(2)
            output = without + guidance_scale * (given - without)
        latents = sampler.step(output, timestep, latents, draw)
    return latents
