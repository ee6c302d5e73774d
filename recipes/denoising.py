"""Noise on clips, and the target that an image model's scheduler asks for."""

from __future__ import annotations

from collections.abc import Sequence
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
    shape: Sequence[int],
    *,
    correlation: float = 0.0,
    progressive: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch channels frames height width"]:
    """Standard normal noise whose frames have something in common (PYoCo, Ge et al. 2023, section 4).

    "Mixed" noise has a part that all frames of a clip share: any two have the same correlation. "Progressive" noise
    goes on from frame to frame: the correlation of two is ``correlation`` to the power of their distance. With the
    paper's ``alpha`` it is ``alpha^2 / (1 + alpha^2)`` of mixed noise, and the root of that of progressive noise.

    Args:
        shape: ``(..., channels, frames, height, width)``.
        correlation: Between the frames of a clip, neighbours where it is progressive, from 0 (independent, as in the
            Video LDM) to 1 (equal).
        progressive: Whether frames follow from those before, in place of sharing a part.
        generator: Source of the noise.

    Raises:
        ValueError: If the correlation is out of range.
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"clip_noise: correlation: expected a value from 0 to 1, got {correlation}")
    own = torch.randn(*shape, generator=generator)
    if correlation == 0:
        return own
    if progressive:
        frames = list(own.unbind(-3))
        for number in range(1, len(frames)):
            new = (1 - correlation**2) ** 0.5 * frames[number]
            frames[number] = correlation * frames[number - 1] + new
        return torch.stack(frames, dim=-3)
    shared = torch.randn(*shape[:-3], 1, *shape[-2:], generator=generator)
    return correlation**0.5 * shared + (1 - correlation) ** 0.5 * own
