"""What denoising stages share: noise on clips, the target that the scheduler asks for, training samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.recipes.bases import Conditioning
from temporal_layers.recipes.stages.clips import Clips
from temporal_layers.recipes.training.streams import Batch, Shuffled, generator_at

KINDS = ("epsilon", "v_prediction", "sample", "flow")


def kind_of_prediction(scheduler: Any) -> str:
    """What a UNet trained with this scheduler says: noise, velocity, the clean latents, or the flow.

    Raises:
        ValueError: If the kind of prediction is unknown.
    """
    config = scheduler.config
    kind = "flow" if "FlowMatch" in config.get("_class_name", type(scheduler).__name__) else config.prediction_type
    if kind not in KINDS:
        raise ValueError(f"kind_of_prediction: expected one of {', '.join(KINDS)}, got prediction_type={kind!r}")
    return kind


def noised(
    scheduler: Any,
    latents: Float[Tensor, "batch channels frames height width"],
    noise: Float[Tensor, "batch channels frames height width"],
    timesteps: Tensor,
) -> tuple[Float[Tensor, "batch channels frames height width"], Tensor, Tensor]:
    """Noisy clips, the timesteps to tell the UNet, and what it is to answer.

    Args:
        scheduler: Of diffusers, with the noise schedule of the image model: any with ``add_noise`` and a
            ``prediction_type``, or one that matches flows (``FlowMatchEulerDiscreteScheduler``).
        latents: Clean clips.
        noise: Standard normal.
        timesteps: Whole numbers below ``num_train_timesteps``, larger for more noise: ``(batch,)``, one a clip, or
            ``(batch, frames)``.

    Returns:
        Noisy clips, timesteps of the same shape as given, and the target: ``noise`` (epsilon), ``a noise - s latents``
        (v, Salimans and Ho 2022, with ``a latents + s noise`` the noisy clip), ``latents`` (sample) or
        ``noise - latents`` (flow, with ``(1 - s) latents + s noise`` the noisy clip).

    Raises:
        ValueError: If the kind of prediction is unknown.
    """
    kind, num_frames = kind_of_prediction(scheduler), latents.shape[2]
    per_frame = timesteps if timesteps.ndim == 2 else timesteps[:, None].expand(-1, num_frames)
    if kind == "flow":
        places = len(scheduler.timesteps) - 1 - timesteps  # its table begins with the noisiest
        sigmas = scheduler.sigmas.to(latents)[len(scheduler.timesteps) - 1 - per_frame.cpu()]
        sigmas = sigmas.to(latents.device)[:, None, :, None, None]
        told = scheduler.timesteps.to(timesteps.device)[places]
        return (1 - sigmas) * latents + sigmas * noise, told, noise - latents
    flat = per_frame.reshape(-1)
    clean, added = fold_frames(latents), fold_frames(noise)
    noisy = unfold_frames(scheduler.add_noise(clean, added, flat), num_frames)
    if kind == "v_prediction":
        return noisy, timesteps, unfold_frames(scheduler.get_velocity(clean, added, flat), num_frames)
    return noisy, timesteps, noise if kind == "epsilon" else latents


def clip_noise(
    shape: Sequence[int], *, correlation: float = 0.0, generator: torch.Generator | None = None
) -> Float[Tensor, "*batch channels frames height width"]:
    """Standard normal noise whose frames share a part: "mixed" noise (PYoCo, Ge et al. 2023, section 4).

    Args:
        shape: ``(..., channels, frames, height, width)``.
        correlation: Correlation between the frames of a clip, from 0 (independent, as in the Video LDM) to 1 (equal).
        generator: Source of the noise.

    Raises:
        ValueError: If the correlation is out of range.
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"clip_noise: correlation: expected a value from 0 to 1, got {correlation}")
    own = torch.randn(*shape, generator=generator)
    if correlation == 0:
        return own
    shared = torch.randn(*shape[:-3], 1, *shape[-2:], generator=generator)
    return correlation**0.5 * shared + (1 - correlation) ** 0.5 * own


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
