"""Training samples of the upscale stage, patches of clips at both resolutions, and the loss on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.recipes.bases import Conditioning
from temporal_layers.recipes.denoising import noised
from temporal_layers.recipes.stages.image_objectives import as_float
from temporal_layers.recipes.training.streams import Batch, Shuffled, generator_at
from temporal_layers.recipes.upscaler import Upscaler, shrunk


class UpscaleSamples:
    """Draws patches of clips: the result and the low-resolution frames of one place, with their noise.

    A sample is ``(frames, noise, timestep, given, given_noise, level, *conditioning)``: pixels ``(3, num_frames, patch,
    patch)`` in [-1, 1], noise of their place on the UNet's grid, one timestep; low-resolution frames enlarged to the
    grid, their noise, one noise level. Whole frames are enlarged before the patch is cut, so that it has what a whole
    frame has there; patches begin on a low-resolution pixel, as whole frames do.

    Args:
        upscaler: Says what the grid is.
        clips: In [0, 1], or bytes, of at least ``num_frames`` frames; None to complete batches of a stream only.
        low_res: The same clips, small, if they are not to be the mean over areas.
        conditioning: One row a clip.
        num_frames: Frames of a window.
        patch: Height and width of a patch in pixels of the result; None for whole frames.
        drop: Share of clips whose conditioning is dropped, for classifier-free guidance.
        seed: Of the order of the clips and of everything drawn.
    """

    def __init__(
        self,
        upscaler: Upscaler,
        clips: Tensor | None,
        low_res: Tensor | None = None,
        conditioning: Conditioning | None = None,
        *,
        num_frames: int,
        patch: int | None,
        drop: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.upscaler, self.clips, self.low_res = upscaler, clips, low_res
        self.dropped = {name: value.cpu() for name, value in upscaler.conditioning([""]).items()}
        self.conditioning = {} if conditioning is None else {name: row.cpu() for name, row in conditioning.items()}
        self.num_frames, self.patch, self.drop, self.seed = num_frames, patch, drop, seed
        self.num_timesteps = upscaler.scheduler.config.num_train_timesteps
        self.order = None if clips is None else Shuffled(len(clips), seed)

    def __call__(self, position: int) -> tuple[Tensor, ...]:
        """The sample at a position of the run."""
        row, generator = self.order[position], generator_at(self.seed, position)
        start = int(torch.randint(self.clips.shape[2] - self.num_frames + 1, (), generator=generator))
        window = slice(start, start + self.num_frames)
        frames = as_float(self.clips[row][:, window])
        low_res = None if self.low_res is None else as_float(self.low_res[row][:, window])
        return self._complete(frames, low_res, {name: r[row] for name, r in self.conditioning.items()}, generator)

    def complete_batch(self, frames: Tensor, conditioning: Conditioning, positions: Sequence[int]) -> Batch:
        """A batch of windows ``(b, 3, num_frames, height, width)``, for example of a stream of videos.

        Args:
            frames: In [0, 1], or bytes.
            conditioning: One row a window.
            positions: Of the samples in the run.
        """
        samples = [
            self._complete(
                as_float(window),
                None,
                {name: value[row].cpu() for name, value in conditioning.items()},
                generator_at(self.seed, position),
            )
            for row, (window, position) in enumerate(zip(frames, positions, strict=True))
        ]
        return tuple(torch.stack(column) for column in zip(*samples, strict=True))

    def _complete(
        self, frames: Tensor, low_res: Tensor | None, conditioning: Conditioning, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        frames, given = self._patch(frames, low_res, generator)
        timestep = torch.randint(self.num_timesteps, (), generator=generator)
        level = torch.randint(self.upscaler.max_noise_level, (), generator=generator)
        noise = torch.randn(self.upscaler.channels, *given.shape[1:], generator=generator)
        given_noise = torch.randn(given.shape, generator=generator)
        if not conditioning or torch.rand((), generator=generator) < self.drop:
            conditioning = {name: value[0] for name, value in self.dropped.items()}
        extra = (conditioning[name] for name in self.dropped)
        return (2 * frames - 1, noise, timestep, 2 * given - 1, given_noise, level, *extra)

    def _patch(
        self, frames: Tensor, low_res: Tensor | None, generator: torch.Generator
    ) -> tuple[Float[Tensor, "3 frames patch patch"], Float[Tensor, "3 frames grid_patch grid_patch"]]:
        """One place of a window in pixels and on the grid, both in [0, 1]."""
        factor, whole = self.upscaler.factor, frames.shape[-2:]
        low_res = shrunk(frames, factor) if low_res is None else low_res
        given = self.upscaler.enlarged(low_res.transpose(0, 1)).transpose(0, 1)
        if self.patch is None:
            return frames, given
        corner = [
            factor * int(torch.randint((side - self.patch) // factor + 1, (), generator=generator)) for side in whole
        ]
        return _cut(frames, corner, self.patch), _cut(given, corner, self.patch, self.upscaler.cell)


def _cut(frames: Tensor, corner: Sequence[int], patch: int, cell: int = 1) -> Tensor:
    top, left, side = corner[0] // cell, corner[1] // cell, patch // cell
    return frames[..., top : top + side, left : left + side]


class UpscaleObjective(nn.Module):
    """The denoising loss of an upscaler on clips, the low-resolution frames of each with noise of one level.

    Args:
        upscaler: With temporal layers or without.
        names: Names of the conditioning tensors, in the order in which ``forward`` gets them.
    """

    def __init__(self, upscaler: Upscaler, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.unet = upscaler.unet  # registered, so that its trainable parameters are found
        self.upscaler = [upscaler]  # not registered
        self.names = tuple(names)

    def forward(
        self,
        frames: Float[Tensor, "batch 3 frames height width"],
        noise: Float[Tensor, "batch c frames grid_height grid_width"],
        timesteps: Tensor,
        given: Float[Tensor, "batch 3 frames grid_height grid_width"],
        given_noise: Float[Tensor, "batch 3 frames grid_height grid_width"],
        levels: Tensor,
        *conditioning: Tensor,
    ) -> dict[str, Tensor]:
        """Squared error of the prediction, averaged over everything."""
        upscaler = self.upscaler[0]
        result = unfold_frames(upscaler.encode(fold_frames(frames)), frames.shape[2]).to(noise)
        noisy, told, target = noised(upscaler.scheduler, result, noise, timesteps)
        given = upscaler.augmented(given, given_noise, levels)
        output = upscaler.predict(noisy, told, given, levels, dict(zip(self.names, conditioning, strict=True)))
        return {"loss": F.mse_loss(output.float(), target.float())}
