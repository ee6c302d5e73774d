"""Training samples of the upscale stage, patches of clips at both resolutions, and the loss on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.recipes.bases import Conditioning
from temporal_layers.recipes.stages.denoising import noised
from temporal_layers.recipes.stages.image_objectives import as_float
from temporal_layers.recipes.training.streams import Shuffled, generator_at
from temporal_layers.recipes.upscaler import Upscaler


def shrunk(frames: Float[Tensor, "*batch height width"], factor: int) -> Float[Tensor, "*batch h w"]:
    """Frames a ``factor`` smaller in height and width, each pixel the mean of the area it covers."""
    return F.avg_pool2d(frames.flatten(0, -4), factor).unflatten(0, frames.shape[:-3])


class UpscaleSamples:
    """Draws patches of clips in memory: the result and the low-resolution frames of one place, with their noise.

    A sample is ``(frames, noise, timestep, given, given_noise, level, *conditioning)``: pixels ``(3, num_frames, patch,
    patch)`` in [-1, 1], noise of their place on the UNet's grid, one timestep; low-resolution frames enlarged to the
    grid, their noise, one noise level. Whole frames are enlarged before the patch is cut, so that it has what a whole
    frame has there; patches begin on a low-resolution pixel, as whole frames do.

    Args:
        upscaler: Says what the grid is.
        clips: In [0, 1], or bytes, of at least ``num_frames`` frames.
        low_res: The same clips, small, if they are not to be the mean over areas.
        conditioning: One row a clip.
        dropped: One row that says nothing.
        num_frames: Frames of a window.
        patch: Height and width of a patch in pixels of the result; None for whole frames.
        drop: Share of clips whose conditioning is dropped, for classifier-free guidance.
        seed: Of the order of the clips and of everything drawn.
    """

    def __init__(
        self,
        upscaler: Upscaler,
        clips: Tensor,
        low_res: Tensor | None = None,
        conditioning: Conditioning | None = None,
        dropped: Conditioning | None = None,
        *,
        num_frames: int,
        patch: int | None,
        drop: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.upscaler, self.clips, self.low_res = upscaler, clips, low_res
        self.conditioning, self.dropped = conditioning or {}, dropped or {}
        self.num_frames, self.drop, self.seed = num_frames, drop, seed
        self.size = tuple(clips.shape[-2:]) if patch is None else (patch, patch)
        self.num_timesteps = upscaler.scheduler.config.num_train_timesteps
        self.order = Shuffled(len(clips), seed)

    def __call__(self, position: int) -> tuple[Tensor, ...]:
        """The sample at a position of the run."""
        row, generator = self.order[position], generator_at(self.seed, position)
        frames, given = self._patch(row, generator)
        timestep = torch.randint(self.num_timesteps, (), generator=generator)
        level = torch.randint(self.upscaler.max_noise_level, (), generator=generator)
        noise = torch.randn(self.upscaler.channels, *given.shape[1:], generator=generator)
        given_noise = torch.randn(given.shape, generator=generator)
        source = self.conditioning
        if self.dropped and torch.rand((), generator=generator) < self.drop:
            source, row = self.dropped, 0
        extra = (source[name][row] for name in self.conditioning)
        return (2 * frames - 1, noise, timestep, 2 * given - 1, given_noise, level, *extra)

    def _patch(self, row: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same place of the clip in pixels and on the grid, both in [0, 1]."""
        factor, cell = self.upscaler.factor, self.upscaler.cell
        count, (height, width) = self.num_frames, self.clips.shape[-2:]
        start = int(torch.randint(self.clips.shape[2] - count + 1, (), generator=generator))
        frames = as_float(self.clips[row][:, start : start + count])
        if self.low_res is None:
            low_res = shrunk(frames, factor)
        else:
            low_res = as_float(self.low_res[row][:, start : start + count])
        given = self.upscaler.enlarged(low_res.transpose(0, 1)).transpose(0, 1)
        corner = [
            factor * int(torch.randint((whole - side) // factor + 1, (), generator=generator))
            for whole, side in zip((height, width), self.size, strict=True)
        ]
        return _cut(frames, corner, self.size), _cut(given, corner, self.size, cell)


def _cut(frames: Tensor, corner: Sequence[int], size: Sequence[int], cell: int = 1) -> Tensor:
    (top, left), (height, width) = ([value // cell for value in pair] for pair in (corner, size))
    return frames[..., top : top + height, left : left + width]


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
