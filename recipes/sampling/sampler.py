"""The steps from noise to clean latents, by any scheduler of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from temporal_layers.config import check_at_least
from temporal_layers.recipes.denoising import matches_flows

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Source of fresh noise: one for all clips, or one a clip, so that a clip does not depend on its batch."""


class Sampler:
    """The steps from noise to clean latents, with a scheduler's noise schedule.

    Args:
        scheduler: Of diffusers, with continuous latents (DDIM, DPM-Solver++, Euler, flow matching, ...); it is copied.
        steps: Denoising steps.
        eta: Fresh noise in each step of a scheduler that has it as an option (DDIM), from 0 (none) to below 1.
        strength: Share of the schedule that is gone through: below 1 begins with noisy clips in place of noise.

    Attributes:
        timesteps: To be told to the model, one after the other.

    Raises:
        ValueError: If ``steps``, ``eta`` or ``strength`` is out of range, or ``eta`` not 0 where the scheduler has no
            use for it.
    """

    def __init__(self, scheduler: Any, steps: int, eta: float = 0.0, *, strength: float = 1.0) -> None:
        check_at_least("Sampler: steps", steps, 1)
        if not 0 <= eta < 1:  # at 1, rounding takes a step from a signal of zero to the root of a negative number
            raise ValueError(f"Sampler: eta: expected a value from 0 to below 1, got {eta}; use 0.99 in place of 1")
        self.scheduler = type(scheduler).from_config(scheduler.config)
        known = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in known:
            raise ValueError(
                f"Sampler: eta: expected 0 for {type(scheduler).__name__}, which has no such option, got {eta}"
            )
        if not 0 < strength <= 1 or int(steps * strength) < 1:
            raise ValueError(
                f"Sampler: strength: expected above 0 to 1, and one of the {steps} steps at least, got {strength}"
            )
        self.steps, self.options = steps, {"eta": eta} if eta else {}
        self._takes_generator = "generator" in known
        self._skipped = (steps - int(steps * strength)) * getattr(self.scheduler, "order", 1)
        self.timesteps = self._set()

    def _set(self) -> Tensor:
        self.scheduler.set_timesteps(self.steps)  # begins anew: many schedulers count their steps
        if self._skipped and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self._skipped)
        return self.scheduler.timesteps[self._skipped :]

    def start(self, noise: Tensor, clean: Tensor | None = None) -> Tensor:
        """What to begin with; begins anew.

        Args:
            noise: Standard normal.
            clean: Latents that it is put on, as much of it as the first step expects; None for noise alone.
        """
        self.timesteps = self._set()
        if clean is None:
            return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        first = self.timesteps[:1].to(clean.device)
        if matches_flows(self.scheduler):
            return self.scheduler.scale_noise(clean, first, noise)
        return self.scheduler.add_noise(clean, noise, first)

    def scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Latents as the model takes them, of unit scale for schedulers that count in sigmas."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return latents if scale is None else scale(latents, timestep)

    def step(self, output: Tensor, timestep: Tensor, latents: Tensor, generator: Generators = None) -> Tensor:
        """Latents after a step.

        Args:
            output: What the model said of the latents.
            timestep: Of this step.
            latents: Before it.
            generator: Of fresh noise, where the scheduler draws any.
        """
        options = dict(self.options)
        if self._takes_generator:
            options["generator"] = list(generator) if isinstance(generator, Sequence) else generator
        return self.scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
