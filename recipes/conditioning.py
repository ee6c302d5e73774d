"""Conditioning on given frames: masks, the planes of a frame context, its noise, and guidance (Video LDM, 3.2, 3.3).

Everything here is a function of tensors. ``f`` stands for frames and ``b`` for clips; a mask is 1 where a frame is
given and 0 where it is to be made.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from temporal_layers import ContextConfig
from temporal_layers.adapters import TemporalAdapter

METADATA_KEY = "frame_context"
FACTOR = 4
"""How many times more frames a level of interpolation makes: three between two."""


@dataclass(frozen=True, kw_only=True)
class ContextPlanes:
    """What the planes of a frame context are, in order: latents, mask, noise level, frame rate.

    Attributes:
        latent_channels: Planes of the given frames' latents, zero in the others.
        max_noise_level: Largest noise level of the given frames; its plane holds the level divided by it, in given
            frames. 0 for no such plane. The paper's text-to-video models go to 250.
        rate: Whether there is a plane with a label of the frame rate, in all frames: one model for several rates.
    """

    latent_channels: int = 4
    max_noise_level: int = 0
    rate: bool = False

    def __post_init__(self) -> None:
        if self.latent_channels < 1 or self.max_noise_level < 0:
            raise ValueError(
                "ContextPlanes: expected latent_channels of at least 1 and max_noise_level of at least 0, got "
                f"latent_channels={self.latent_channels} and max_noise_level={self.max_noise_level}; 0 levels turn "
                "the noise off"
            )

    @property
    def channels(self) -> int:
        """All planes together."""
        return self.latent_channels + 1 + (self.max_noise_level > 0) + self.rate

    def config(self, inject: str = "resblock") -> ContextConfig:
        """The option of an adapter that takes these planes."""
        return ContextConfig(channels=self.channels, inject=inject)

    def build(
        self,
        latents: Float[Tensor, "*b c f h w"],
        given: Float[Tensor, "*b f"],
        *,
        level: int | Int[Tensor, "*b"] = 0,
        rate: float | Float[Tensor, "*b"] = 0.0,
    ) -> Float[Tensor, "*b planes f h w"]:
        """The planes of clips, or of one clip without an axis for clips.

        Args:
            latents: Of all frames, noise added; those that are not given are not looked at.
            given: Mask of the frames.
            level: Of the noise that was added.
            rate: Label of the frame rate.

        Raises:
            ValueError: If the shapes do not fit, or a level or a rate is told that there is no plane for.
        """
        if latents.shape[-4] != self.latent_channels or given.shape != (*latents.shape[:-4], latents.shape[-3]):
            raise ValueError(
                f"ContextPlanes.build: expected latents (..., {self.latent_channels}, frames, height, width) and a "
                f"mask (..., frames), got {tuple(latents.shape)} and {tuple(given.shape)}"
            )
        level, rate = torch.as_tensor(level, device=latents.device), torch.as_tensor(rate, device=latents.device)
        if level.max() > self.max_noise_level or level.min() < 0 or (not self.rate and rate.any()):
            raise ValueError(
                f"ContextPlanes.build: expected levels from 0 to {self.max_noise_level} and "
                f"{'any rate' if self.rate else 'no rate'}, got level={level.tolist()} and rate={rate.tolist()}; set "
                "max_noise_level and rate of the planes the model is trained with"
            )
        mask = given.to(latents)[..., None, :, None, None].expand(*latents.shape[:-4], 1, *latents.shape[-3:])
        parts = [torch.where(mask > 0, latents, 0.0), mask]
        if self.max_noise_level:
            parts.append(mask * (level.to(latents) / self.max_noise_level)[..., None, None, None, None])
        if self.rate:
            parts.append(torch.ones_like(mask) * rate.to(latents)[..., None, None, None, None])
        return torch.cat(parts, dim=-4)

    def without(self, context: Float[Tensor, "*b planes f h w"]) -> Float[Tensor, "*b planes f h w"]:
        """The same with no frame given: zeros, but for the rate."""
        if not self.rate:
            return torch.zeros_like(context)
        return torch.cat([torch.zeros_like(context[..., :-1, :, :, :]), context[..., -1:, :, :, :]], dim=-4)

    def given(self, context: Float[Tensor, "*b planes f h w"]) -> Float[Tensor, "*b f"]:
        """The mask of a context."""
        return context[..., self.latent_channels, :, 0, 0]

    def note(self, adapter: TemporalAdapter) -> None:
        """Write the planes into the notes that are saved with an adapter."""
        adapter.metadata[METADATA_KEY] = json.dumps(dataclasses.asdict(self))

    @classmethod
    def of(cls, adapter: TemporalAdapter) -> ContextPlanes:
        """The planes that an adapter was trained with.

        Raises:
            ValueError: If it was trained without a frame context, or not by these recipes.
        """
        text = adapter.metadata.get(METADATA_KEY)
        if text is None:
            raise ValueError(
                f"ContextPlanes.of: expected an adapter with {METADATA_KEY!r} in its metadata, got "
                f"{sorted(adapter.metadata)}; train one with `temporal-layers train predict`, or pass ContextPlanes"
            )
        return cls(**json.loads(text))


def prediction_mask(given: int | Int[Tensor, "*b"], num_frames: int) -> Float[Tensor, "*b f"]:
    """Mask with the first ``given`` frames given.

    Raises:
        ValueError: If all frames are given, or fewer than none.
    """
    given = torch.as_tensor(given)
    if given.min() < 0 or given.max() >= num_frames:
        raise ValueError(
            f"prediction_mask: expected from 0 to {num_frames - 1} given frames of {num_frames}, got {given.tolist()}"
        )
    return (torch.arange(num_frames) < given[..., None]).float()


def interpolation_mask(num_frames: int, factor: int = FACTOR) -> Float[Tensor, " f"]:
    """Mask with every ``factor``-th frame given, both ends among them: 1, 0, 0, 0, 1.

    Raises:
        ValueError: If the last frame is not one of them, or no frame is to be made.
    """
    if factor < 2 or num_frames <= factor or (num_frames - 1) % factor:
        raise ValueError(
            f"interpolation_mask: expected num_frames of {factor} n + 1 with n of at least 1 (both ends are given) and "
            f"a factor of at least 2, got num_frames={num_frames} and factor={factor}"
        )
    return (torch.arange(num_frames) % factor == 0).float()


def interpolated_length(num_frames: int, *, levels: int = 1, factor: int = FACTOR) -> int:
    """Frames after ``levels`` levels of interpolation: 8 become 29 and then 113."""
    return (num_frames - 1) * factor**levels + 1


def draw_given(probabilities: Sequence[float], generator: torch.Generator | None = None) -> int:
    """Number of given frames, ``S``, of which ``probabilities[S]`` is the probability, or proportional to it.

    Raises:
        ValueError: If these are no probabilities.
    """
    weights = torch.tensor(probabilities, dtype=torch.float64)
    if weights.ndim != 1 or not len(weights) or not weights.isfinite().all() or weights.min() < 0 or not weights.any():
        raise ValueError(
            "draw_given: probabilities: expected numbers of at least 0, one of them above, for 0, 1, ... given frames, "
            f"got {tuple(probabilities)}"
        )
    return int(torch.multinomial(weights, 1, generator=generator))


def signal_levels(scheduler: Any) -> Float[Tensor, " levels"]:
    """Share of the signal's power at each noise level of a frame context; level 0 is without noise.

    Level ``t`` is step ``t`` of the forward process of the image model, counted from 1, or of DDPM's (Ho et al. 2020)
    where its schedule has no such process (flow matching).
    """
    bars = getattr(scheduler, "alphas_cumprod", None)
    if bars is None:
        bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return torch.cat([torch.ones(1), bars.float().cpu()])


def augment(
    latents: Float[Tensor, "*b c f h w"],
    level: int | Int[Tensor, "*b"],
    noise: Float[Tensor, "*b c f h w"],
    levels: Float[Tensor, " levels"],
) -> Float[Tensor, "*b c f h w"]:
    """Noise on the given frames, by the forward process: the model learns to trust them less than they look.

    Args:
        latents: Given frames.
        level: Noise level of each clip.
        noise: Standard normal.
        levels: Of `signal_levels`.
    """
    share = levels[torch.as_tensor(level).cpu()].to(latents)[..., None, None, None, None]
    return share.sqrt() * latents + (1 - share).sqrt() * noise.to(latents)


def context_guidance(without: Tensor, given: Tensor, scale: float) -> Tensor:
    """Guidance towards the given frames (equation 4): ``f + s (f_S - f)``.

    Args:
        without: The model's output with no frame given, ``f``.
        given: With the frames given, ``f_S``.
        scale: ``s``; 1 is the latter.
    """
    return without + scale * (given - without)


def joint_guidance(
    given: Tensor,
    *,
    without_context: Tensor | None = None,
    without_text: Tensor | None = None,
    context_scale: float = 1.0,
    text_scale: float = 1.0,
) -> Tensor:
    """Guidance towards given frames and text at once: each adds what leaving it out takes away.

    ``f + (s_c - 1)(f - f_without_context) + (s_t - 1)(f - f_without_text)``, which is `context_guidance` where
    ``s_t`` is 1, and the usual classifier-free guidance where ``s_c`` is 1.

    Args:
        given: The model's output with both.
        without_context: With the text and no frame given; needed unless ``context_scale`` is 1.
        without_text: With the frames and no text; needed unless ``text_scale`` is 1.
        context_scale: ``s_c``.
        text_scale: ``s_t``.
    """
    guided = given
    if without_context is not None:
        guided = guided + (context_scale - 1) * (given - without_context)
    if without_text is not None:
        guided = guided + (text_scale - 1) * (given - without_text)
    return guided
