"""Losses and batches of the image stage, each loss a function of its batch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from temporal_layers.recipes.image_ldm import ImageLDM
from temporal_layers.recipes.training.engine import Batch, OptimConfig


class AutoencoderObjective(nn.Module):
    """Reconstruction with L1, squared and edge losses plus a light KL term, for frames in [0, 1].

    Args:
        vae: The autoencoder.
        kl_weight: Weight of the KL term.
        detail_weight: Weight of the edge loss.
    """

    def __init__(self, vae: nn.Module, *, kl_weight: float, detail_weight: float) -> None:
        super().__init__()
        self.vae, self.kl_weight, self.detail_weight = vae, kl_weight, detail_weight

    def forward(
        self, frames: Float[Tensor, "batch 3 height width"], noise: Float[Tensor, "batch channels h w"]
    ) -> dict[str, Tensor]:
        """Losses of one batch; the noise samples the posterior."""
        target = 2 * frames - 1
        posterior = self.vae.encode(target).latent_dist
        output = self.vae.decode(posterior.mean + posterior.std * noise).sample
        l1, mse = F.l1_loss(output, target), F.mse_loss(output, target)
        detail = detail_loss(output, target)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = l1 + mse + self.detail_weight * detail + self.kl_weight * kl
        return {"loss": loss, "mse": mse, "detail": detail, "kl": kl}


def detail_loss(
    output: Float[Tensor, "batch 3 height width"], target: Float[Tensor, "batch 3 height width"], *, scales: int = 3
) -> Float[Tensor, ""]:
    """Mean absolute error of the differences between neighbouring pixels, over several scales.

    A plain L1 or squared loss asks a small decoder for the mean of all plausible edges, which is blur.
    """
    error = output - target
    total = error.new_zeros(())
    for scale in range(scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return total / scales


class DenoisingObjective(nn.Module):
    """Velocity prediction (Salimans & Ho 2022; the paper's v objective) on scaled latents.

    Args:
        ldm: Supplies the UNet, the conditioner and the noise schedule.
    """

    def __init__(self, ldm: ImageLDM) -> None:
        super().__init__()
        self.unet, self.conditioner, self.scheduler = ldm.unet, ldm.conditioner, ldm.scheduler

    def forward(
        self,
        latents: Float[Tensor, "batch channels h w"],
        labels: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch channels h w"],
        timesteps: Int[Tensor, " batch"],
    ) -> dict[str, Tensor]:
        """Mean squared error of the velocity."""
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        velocity = self.scheduler.get_velocity(latents, noise, timesteps)
        output = self.unet(noisy, timesteps, encoder_hidden_states=self.conditioner(labels)).sample
        return {"loss": F.mse_loss(output, velocity)}


def autoencoder_batches(
    frames: Tensor, config: OptimConfig, *, latent_shape: tuple[int, int, int], seed: int
) -> Iterator[Batch]:
    """Endless batches (frames in [0, 1], posterior noise) from stored uint8 or float frames."""
    generator = torch.Generator().manual_seed(seed)
    for rows in _row_batches(len(frames), config.batch_size, generator):
        batch = as_float(frames[rows])
        yield batch, torch.randn(len(batch), *latent_shape, generator=generator)


def denoising_batches(
    latents: Tensor,
    labels: Tensor,
    config: OptimConfig,
    *,
    null_label: int,
    label_drop: float,
    num_timesteps: int,
    seed: int,
) -> Iterator[Batch]:
    """Endless batches (latents, labels, noise, timesteps); labels are dropped at random."""
    generator = torch.Generator().manual_seed(seed)
    for rows in _row_batches(len(latents), config.batch_size, generator):
        dropped = torch.rand(len(rows), generator=generator) < label_drop
        yield (
            latents[rows],
            labels[rows].masked_fill(dropped, null_label),
            torch.randn(len(rows), *latents.shape[1:], generator=generator),
            torch.randint(num_timesteps, (len(rows),), generator=generator),
        )


def _row_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Every row once per epoch, in random order, never a short batch; small sets are repeated."""
    queue = torch.empty(0, dtype=torch.long)
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def as_float(frames: Tensor) -> Tensor:
    """Frames in [0, 1] from frames stored as bytes; float frames pass unchanged."""
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames
