"""Averaged weights: an exponential moving average of what is trained, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from temporal_layers.recipes.training.sharding import local


class AveragedWeights:
    """Exponential moving average of the trainable parameters of a module.

    The decay warms up as ``(1 + n) / (10 + n)``, so that a short run does not average its own initialisation. The
    averages are fp32 or wider whatever the parameters are: in bf16 a step of 1e-4 of the way is no step at all.

    Args:
        module: The module whose parameters with ``requires_grad`` are averaged.
        decay: Long-run decay in (0, 1).
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.averages = [_wide(parameter.detach().clone()) for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the current parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        targets = [_wide(local(parameter.detach())) for parameter in self.parameters]
        torch._foreach_lerp_([local(average) for average in self.averages], targets, 1 - decay)

    @torch.no_grad()
    def store(self) -> None:
        """Write the averages into the module for good."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            local(parameter).copy_(local(average))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the module for the duration of a ``with`` block."""
        current = [parameter.detach().clone() for parameter in self.parameters]
        self.store()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, current, strict=True):
                    local(parameter).copy_(local(value))

    def state_dict(self) -> dict[str, Any]:
        """The state in the form of diffusers' ``EMAModel``, whose ``load_state_dict`` takes it."""
        return {
            "decay": self.decay,
            "min_decay": 0.0,
            "optimization_step": self.updates,
            "update_after_step": 0,
            "use_ema_warmup": False,
            "inv_gamma": 1.0,
            "power": 2 / 3,
            "shadow_params": self.averages,
        }


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
