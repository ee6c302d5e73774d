"""How well a decoder reconstructs clips: every frame by itself, and over time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.recipes.metrics import NUM_FEATURES, WINDOW_FRAMES, WINDOW_STEP, clip_frechet, frame_difference
from temporal_layers.recipes.stages.decoder_loss import encode_mode
from temporal_layers.recipes.training.streams import generator_at

Clips = Float[Tensor, "clips 3 frames height width"]


def latent_scale(vae: nn.Module) -> float:
    """Standard deviation of the latents of an autoencoder, as its configuration has it."""
    return 1.0 / (getattr(vae.config, "scaling_factor", None) or 1.0)


@torch.no_grad()
def decode_clips(vae: nn.Module, clips: Clips, *, latent_noise: float = 0.0, seed: int = 0) -> Clips:
    """Encode clips frame by frame and decode them as clips, one at a time.

    Args:
        vae: An autoencoder of diffusers; without temporal layers it decodes frame by frame.
        clips: Values in [0, 1], floating or bytes.
        latent_noise: Standard deviation of independent noise on every latent, in units of that of the latents: the
            errors that a sampler makes, which differ from frame to frame.
        seed: Of the noise.

    Returns:
        float32 clips in [0, 1], on the CPU.
    """
    place = next(vae.parameters())
    made = []
    for index, clip in enumerate(clips):
        pixels = as_unit(clip).to(place.device, place.dtype)
        latents = encode_mode(vae, fold_frames(2 * pixels[None] - 1))
        if latent_noise:
            noise = torch.randn(latents.shape, generator=generator_at(seed, index, "decode_clips"))
            latents = latents + latent_noise * latent_scale(vae) * noise.to(latents)
        made.append((_decoded(vae, latents).float().cpu() / 2 + 0.5).clamp(0, 1))
    return torch.stack(made)


def _decoded(vae: nn.Module, latents: Float[Tensor, "frames c h w"]) -> Float[Tensor, "3 frames height width"]:
    if getattr(vae, "_temporal_state", None) is None:
        return vae.decode(latents).sample.transpose(0, 1)
    return vae.decode(unfold_frames(latents, len(latents))).sample[0]


def as_unit(clips: Tensor) -> Tensor:
    """float32 in [0, 1] from clips stored as bytes; floating clips pass unchanged."""
    return clips.float() / 255 if clips.dtype == torch.uint8 else clips


def measure_reconstruction(output: Clips, target: Clips) -> dict[str, float]:
    """Compare decoded clips with the true ones.

    Args:
        output: Decoded clips in [0, 1].
        target: True clips in [0, 1], of the same shape.

    Returns:
        ``psnr``: decibels, the mean over frames. ``flicker``: mean of ``|(output[t + 1] - output[t]) - (target[t + 1] -
        target[t])|``, which is 0 if whatever is wrong stays the same from frame to frame. ``frame_difference_error``:
        difference of the mean change from frame to frame, above 0 for an output that changes more than it should.
        ``clip_frechet``: the library's small Frechet distance between output and target, which stands in for the
        paper's FVD; left out if there are too few frames for it.

    Raises:
        ValueError: If the shapes differ, or a clip has a single frame.
    """
    if output.shape != target.shape or target.ndim != 5 or target.shape[2] < 2:
        raise ValueError(
            "measure_reconstruction: expected output and target of one shape (clips, 3, frames, height, width) with "
            f"two frames or more, got {tuple(output.shape)} and {tuple(target.shape)}"
        )
    errors = (output - target).square().mean((1, 3, 4)).clamp_min(1e-10)
    values = {
        "psnr": (-10 * torch.log10(errors)).mean().item(),
        "flicker": (output - target).diff(dim=2).abs().mean().item(),
        "frame_difference_error": frame_difference(output) - frame_difference(target),
    }
    windows = len(target) * max(0, (target.shape[2] - WINDOW_FRAMES) // WINDOW_STEP + 1)
    if windows > NUM_FEATURES:
        values["clip_frechet"] = clip_frechet(output, target)
    return values


def measure_decoder(vae: nn.Module, clips: Clips, *, latent_noise: float = 0.0, seed: int = 0) -> dict[str, float]:
    """Reconstruction of clips by an autoencoder, as it is: with its temporal layers or without.

    Args:
        vae: An autoencoder of diffusers; inside of its adapter's ``disabled()`` it is that before training, unless the
            image decoder was trained as well.
        clips: Clips that it was not trained on, values in [0, 1], floating or bytes.
        latent_noise: As in `decode_clips`.
        seed: Of that noise.

    Returns:
        As `measure_reconstruction`.
    """
    return measure_reconstruction(decode_clips(vae, clips, latent_noise=latent_noise, seed=seed), as_unit(clips))
