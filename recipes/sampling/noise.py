"""The noise that clips are sampled from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.denoising import clip_noise
from temporal_layers.recipes.training.streams import generator_at


def clip_generators(seed: int, numbers: Iterable[int], purpose: str = "sampling") -> list[torch.Generator]:
    """A source of noise for each clip, which is the same however clips are batched.

    Args:
        seed: Of the sampling.
        numbers: Of the clips.
        purpose: Keeps apart what is drawn for different purposes.
    """
    return [generator_at(seed, number, purpose) for number in numbers]


def clips_of_noise(
    shape: Sequence[int], generators: Sequence[torch.Generator], *, correlation: float = 0.0
) -> Float[Tensor, "clips channels frames height width"]:
    """Standard normal noise, every clip from a source of its own.

    Args:
        shape: Of one clip.
        generators: One a clip.
        correlation: Of the frames of a clip; see `clip_noise`.
    """
    return torch.stack([clip_noise(shape, correlation=correlation, generator=source) for source in generators])
