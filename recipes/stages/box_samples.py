"""Losses and batches of the stage "boxes"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.recipes.bases import Conditioning
from temporal_layers.recipes.boxes import BOXES, BoxBase, box_coverage
from temporal_layers.recipes.denoising import noised
from temporal_layers.recipes.stages.image_objectives import as_float
from temporal_layers.recipes.training.streams import Shuffled, generator_at


class BoxObjective(nn.Module):
    """The image model's denoising loss, with what is in the boxes counted once more.

    A car covers a few percent of a frame: in the plain mean its error would drown in that of all the rest, which the
    frozen model has settled already.

    Args:
        base: The image model with its adapter, the trained part.
        names: Names of the conditioning tensors, in the order in which ``forward`` gets them; boxes among them.
        box_weight: Weight of the mean error in the boxes of an image.
    """

    def __init__(self, base: BoxBase, names: Sequence[str], *, box_weight: float = 1.0) -> None:
        super().__init__()
        self.adapter = getattr(base.reader, "adapter", None)  # registered, so that its parameters are found
        self.unet = base.unet  # registered, so that it counts as memory
        self.base, self.names, self.box_weight = [base], tuple(names), box_weight

    def errors(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, *conditioning: Tensor
    ) -> Float[Tensor, "batch h w"]:
        """Squared error of the prediction at each place."""
        base = self.base[0]
        noisy, told, target = noised(base.scheduler, latents.unsqueeze(2), noise.unsqueeze(2), timesteps)
        output = base.predict(noisy.squeeze(2), told, dict(zip(self.names, conditioning, strict=True)))
        return (output.float() - target.squeeze(2).float()).square().mean(1)

    def forward(
        self,
        latents: Float[Tensor, "batch channels h w"],
        noise: Float[Tensor, "batch channels h w"],
        timesteps: Tensor,
        *conditioning: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of a batch of latents, standard normal noise, timesteps and conditioning."""
        errors = self.errors(latents, noise, timesteps, *conditioning)
        boxes = conditioning[self.names.index(BOXES)]
        inside = inside_error(errors, boxes)
        return {"loss": errors.mean() + self.box_weight * inside.mean(), "inside": inside.mean()}


def inside_error(errors: Float[Tensor, "batch h w"], boxes: Float[Tensor, "batch boxes 4"]) -> Float[Tensor, " batch"]:
    """Mean error in the boxes of each image; 0 for one without."""
    coverage = box_coverage(boxes.to(errors), *errors.shape[1:])
    return (errors * coverage).sum((1, 2)) / coverage.sum((1, 2)).clamp(min=1e-6)


class BoxSamples:
    """Draws (latent, noise, timestep, *conditioning) from images; text and boxes are dropped, each by itself.

    Args:
        latents: Of the images.
        conditioning: One row an image, boxes included.
        nothing: One row that says nothing.
        num_timesteps: Timesteps of the noise schedule, drawn uniformly.
        label_drop: Share of images without label or text.
        box_drop: Share of images without boxes.
        seed: Of the order and of everything drawn.
    """

    def __init__(
        self,
        latents: Float[Tensor, "images channels h w"],
        conditioning: Conditioning,
        nothing: Conditioning,
        *,
        num_timesteps: int,
        label_drop: float,
        box_drop: float,
        seed: int,
    ) -> None:
        self.latents, self.conditioning, self.nothing = latents, conditioning, nothing
        self.num_timesteps, self.seed = num_timesteps, seed
        self.label_drop, self.box_drop = label_drop, box_drop
        self.order = Shuffled(len(latents), seed)

    def __call__(self, position: int) -> tuple[Tensor, ...]:
        """The sample at a position of the run."""
        row, generator = self.order[position], generator_at(self.seed, position)
        noise = torch.randn(self.latents.shape[1:], generator=generator)
        timestep = torch.randint(self.num_timesteps, (), generator=generator)
        label_gone, boxes_gone = torch.rand(2, generator=generator) < torch.tensor([self.label_drop, self.box_drop])
        gone = {name: boxes_gone if name == BOXES else label_gone for name in self.nothing}
        rows = (self.nothing[name][0] if gone[name] else self.conditioning[name][row] for name in self.nothing)
        return (self.latents[row], noise, timestep, *rows)


@torch.no_grad()
def encoded(base: BoxBase, frames: Tensor, *, batch_size: int = 32) -> Float[Tensor, "images channels h w"]:
    """Latents of images, on the CPU."""
    return torch.cat([base.encode(as_float(part)).float().cpu() for part in frames.split(batch_size)])
