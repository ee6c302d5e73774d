"""Noise on clips, the target that an image model's scheduler asks for, and the steps back to clean clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers import fold_frames, unfold_frames

KINDS = ("epsilon", "v_prediction", "sample", "flow")


def matches_flows(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching (``FlowMatchEulerDiscreteScheduler``)."""
    return "FlowMatch" in scheduler.config.get("_class_name", type(scheduler).__name__)


def kind_of_prediction(scheduler: Any) -> str:
    """What a UNet trained with this scheduler says: noise, velocity, the clean latents, or the flow.

    Raises:
        ValueError: If the kind of prediction is unknown.
    """
    kind = "flow" if matches_flows(scheduler) else scheduler.config.prediction_type
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


class Sampler:
    """The steps from noise to clean latents, with a scheduler's noise schedule.

    Args:
        scheduler: DDIM, or one that matches flows; it is copied.
        steps: Denoising steps.
        eta: Fresh noise in each step, from 0 (none) to below 1.

    Attributes:
        timesteps: To be told to the model, one after the other.

    Raises:
        ValueError: If ``eta`` is out of range, or not 0 with flow matching, which has no such steps.
    """

    def __init__(self, scheduler: Any, steps: int, eta: float = 0.0) -> None:
        if not 0 <= eta < 1:  # at 1, rounding takes a step from a signal of zero to the root of a negative number
            raise ValueError(f"Sampler: eta: expected a value from 0 to below 1, got {eta}; use 0.99 in place of 1")
        if eta and matches_flows(scheduler):
            raise ValueError(f"Sampler: eta: expected 0 for a model that matches flows, got {eta}")
        self.scheduler = type(scheduler).from_config(scheduler.config)
        self.scheduler.set_timesteps(steps)
        self.timesteps, self.eta = self.scheduler.timesteps, eta

    def start(self, noise: Tensor) -> Tensor:
        """What to begin with, from standard normal noise; begins anew."""
        self.scheduler.set_timesteps(len(self.timesteps))  # those of flow matching count their steps
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def step(self, output: Tensor, timestep: Tensor, latents: Tensor, fresh: Callable[[], Tensor]) -> Tensor:
        """Latents after a step.

        Args:
            output: What the model said of the latents.
            timestep: Of this step.
            latents: Before it.
            fresh: Draws standard normal noise of their shape; called if ``eta`` is above 0.
        """
        options: dict[str, Any] = {}
        if self.eta:
            options = {"eta": self.eta, "variance_noise": fresh().to(latents)}
        return self.scheduler.step(output, timestep, latents, **options).prev_sample
