"""Sampling of clips from an image model, frame by frame or with temporal layers, with or without fresh noise."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.bases import Conditioning, VideoBase, on_device
from temporal_layers.recipes.sampling.loop import Branch, GuidedModel, denoise
from temporal_layers.recipes.sampling.sampler import Sampler


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
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for first in range(0, len(noise), batch_size):
        rows = slice(first, first + batch_size)
        start = noise[rows].to(base.unet.device, base.unet.dtype)
        model = GuidedModel(
            base,
            Branch({name: value[rows].to(start.device) for name, value in conditioning.items()}),
            without_text=Branch(on_device(base.no_conditioning(len(start)), start.device)),
            text_scale=guidance_scale,
            frame_by_frame=frame_by_frame,
        )
        latents = denoise(model, sampler, sampler.start(start), generator)
        parts.append(base.decode(latents).cpu())
    return torch.cat(parts)
