"""Losses and batches of the image stage, each loss a function of its batch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from temporal_layers.recipes.image_ldm import ImageLDM
from temporal_layers.recipes.training.streams import Shuffled, generator_at


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


class AutoencoderSamples:
    """Draws (frame in [0, 1], posterior noise) from stored frames.

    Args:
        frames: (count, 3, height, width), uint8 or float in [0, 1].
        latent_shape: Of the latent of one frame.
        seed: Of the order and the noise.
    """

    def __init__(self, frames: Tensor, *, latent_shape: tuple[int, int, int], seed: int) -> None:
        self.frames, self.latent_shape, self.seed = frames, latent_shape, seed
        self.order = Shuffled(len(frames), seed)

    def __call__(self, position: int) -> tuple[Tensor, ...]:
        """The sample at a position of the run."""
        noise = torch.randn(*self.latent_shape, generator=generator_at(self.seed, position))
        return as_float(self.frames[self.order[position]]), noise


class DenoisingSamples:
    """Draws (latent, label, noise, timestep) from latents; labels are dropped at random.

    Args:
        latents: (count, channels, h, w).
        labels: (count,), int64.
        null_label: What a dropped label becomes.
        label_drop: Share of dropped labels.
        num_timesteps: Timesteps of the noise schedule, drawn uniformly.
        seed: Of the order and of everything drawn.
    """

    def __init__(
        self, latents: Tensor, labels: Tensor, *, null_label: int, label_drop: float, num_timesteps: int, seed: int
    ) -> None:
        self.latents, self.labels, self.null_label = latents, labels, null_label
        self.label_drop, self.num_timesteps, self.seed = label_drop, num_timesteps, seed
        self.order = Shuffled(len(latents), seed)

    def __call__(self, position: int) -> tuple[Tensor, ...]:
        """The sample at a position of the run."""
        row, generator = self.order[position], generator_at(self.seed, position)
        dropped = bool(torch.rand((), generator=generator) < self.label_drop)
        return (
            self.latents[row],
            torch.tensor(self.null_label) if dropped else self.labels[row],
            torch.randn(self.latents.shape[1:], generator=generator),
            torch.randint(self.num_timesteps, (), generator=generator),
        )


def as_float(frames: Tensor) -> Tensor:
    """Frames in [0, 1] from frames stored as bytes; float frames pass unchanged."""
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames
