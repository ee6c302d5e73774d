"""Training samples of the stages that denoise clips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from temporal_layers.recipes.bases import Conditioning
from temporal_layers.recipes.denoising import clip_noise
from temporal_layers.recipes.stages.clips import Clips
from temporal_layers.recipes.training.streams import Batch, Shuffled, generator_at


class ClipSamples:
    """Draws training samples from clips: a window, noise, a timestep, conditioning or, at times, none.

    A sample is ``(window, noise, timestep, *conditioning)`` and, with ``image_share``, ``(window, noise, timesteps,
    image_only, *conditioning)`` with one timestep a frame. The window is ``(channels, num_frames, height, width)``.

    Args:
        clips: Of at least ``num_frames`` frames each; None if windows come from elsewhere (`complete_batch`).
        dropped: One row of conditioning that says nothing; its names are those of the conditioning, in order.
        num_frames: Frames of a window.
        num_timesteps: Timesteps of the noise schedule, drawn uniformly.
        drop: Share of clips whose conditioning is dropped, for classifier-free guidance.
        correlation: Correlation between the noise of a clip's frames; see `clip_noise`.
        image_share: Share of samples whose frames are drawn from all over a clip, each with a noise level of its own,
            and bypass the temporal layers.
        seed: Of the order of the clips and of everything drawn.
    """

    def __init__(
        self,
        clips: Clips | None,
        dropped: Conditioning,
        *,
        num_frames: int,
        num_timesteps: int,
        drop: float = 0.1,
        correlation: float = 0.0,
        image_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.clips, self.dropped, self.num_frames, self.num_timesteps = clips, dropped, num_frames, num_timesteps
        self.drop, self.correlation, self.image_share, self.seed = drop, correlation, image_share, seed
        self.order = None if clips is None else Shuffled(len(clips), seed)

    def __call__(self, position: int) -> tuple[Tensor, ...]:
        """The sample at a position of the run."""
        row, generator = self.order[position], generator_at(self.seed, position)
        spare = self.clips.num_frames(row) - self.num_frames
        as_images = bool(torch.rand((), generator=generator) < self.image_share)
        if as_images:
            chosen = torch.randperm(spare + self.num_frames, generator=generator)[: self.num_frames]
            window = torch.cat([self.clips.latents(row, frame, frame + 1) for frame in chosen.tolist()], dim=1)
        else:
            start = int(torch.randint(spare + 1, (), generator=generator))
            window = self.clips.latents(row, start, start + self.num_frames)
        return self.complete(window.float(), self.clips.conditioning(row), generator, as_images=as_images)

    def complete(
        self, window: Tensor, conditioning: Conditioning, generator: torch.Generator, *, as_images: bool = False
    ) -> tuple[Tensor, ...]:
        """The sample of a window that has been drawn.

        Args:
            window: ``(channels, num_frames, height, width)``.
            conditioning: One row.
            generator: Of the position.
            as_images: Whether its frames are images of their own.
        """
        noise = clip_noise(window.shape, correlation=self.correlation, generator=generator)
        timesteps = torch.randint(self.num_timesteps, (window.shape[1],) if as_images else (), generator=generator)
        marks: tuple[Tensor, ...] = ()
        if self.image_share:
            timesteps = timesteps.expand(window.shape[1])
            marks = (torch.full((window.shape[1],), as_images),)
        source = self.dropped if torch.rand((), generator=generator) < self.drop else conditioning
        return (window, noise, timesteps, *marks, *(source[name][0] for name in self.dropped))

    def complete_batch(self, latents: Tensor, conditioning: Conditioning, positions: Sequence[int]) -> Batch:
        """The batch of windows that came from elsewhere, at some positions of the run."""
        samples = []
        for row, position in enumerate(positions):
            given = {name: conditioning[name][row : row + 1].cpu() for name in self.dropped}
            samples.append(self.complete(latents[row], given, generator_at(self.seed, position)))
        return tuple(torch.stack(column) for column in zip(*samples, strict=True))
