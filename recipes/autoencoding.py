"""Frames to latents and back, by any image autoencoder of diffusers, with temporal layers in its decoder or without."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers import fold_frames, unfold_frames


def pixels_per_latent(vae: nn.Module) -> int:
    """Pixels per latent along height and width."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _shift(config: Any) -> float:
    return getattr(config, "shift_factor", None) or 0.0


@torch.no_grad()
def encode_frames(
    vae: nn.Module, frames: Float[Tensor, "n 3 height width"], *, batch_size: int = 16
) -> Float[Tensor, "n c h w"]:
    """Latents of unit scale: the mode of the posterior, or what is in front of the codebook.

    Args:
        vae: An image autoencoder.
        frames: In [-1, 1], on its device and in its precision.
        batch_size: Frames per pass, which bounds the memory.
    """
    parts = []
    for part in frames.split(batch_size):
        encoded = vae.encode(part)
        parts.append(encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents)
    return (torch.cat(parts) - _shift(vae.config)) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: nn.Module, latents: Tensor, *, batch_size: int = 16) -> Tensor:
    """Frames in [0, 1], fp32, of latents of unit scale.

    A clip goes through the temporal layers of the decoder as a whole, or in the chunks that its adapter was told of
    (``enable_temporal_chunking``), and one clip after the other.

    Args:
        vae: An image autoencoder.
        latents: ``(n, c, h, w)`` for images, or ``(b, c, f, h, w)`` for clips, on its device.
        batch_size: Images per pass, and frames of clips where there are no temporal layers.

    Returns:
        ``(n, 3, height, width)`` or ``(b, 3, f, height, width)``.
    """
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor + _shift(vae.config)
    if latents.ndim == 4:
        return torch.cat([_frames(vae.decode(part).sample) for part in scaled.split(batch_size)])
    if getattr(vae, "_temporal_state", None) is not None:
        return torch.cat([_frames(vae.decode(clip).sample) for clip in scaled.split(1)])
    frames = [_frames(vae.decode(part).sample) for part in fold_frames(scaled).split(batch_size)]
    return unfold_frames(torch.cat(frames), latents.shape[2])


def _frames(decoded: Tensor) -> Tensor:
    return (decoded / 2 + 0.5).clamp(0, 1).float()
