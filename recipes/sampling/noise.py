"""The noise that clips are sampled from, whose frames are independent, in part the same, or those of one window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.denoising import clip_noise
from temporal_layers.recipes.sampling.sampler import Generators
from temporal_layers.recipes.training.streams import generator_at


def clip_generators(seed: int, numbers: Iterable[int], purpose: str = "sampling") -> list[torch.Generator]:
    """A source of noise for each clip, which is the same however clips are batched.

    Args:
        seed: Of the sampling.
        numbers: Of the clips.
        purpose: Keeps apart what is drawn for different purposes.
    """
    return [generator_at(seed, number, purpose) for number in numbers]


def check_generators(who: str, generator: Generators) -> None:
    """Raise a ValueError unless a pipeline was given no source of noise, one, or several."""
    several = generator if isinstance(generator, Sequence) else [generator]
    if generator is not None and not all(isinstance(source, torch.Generator) for source in several):
        raise ValueError(
            f"{who}: generator: expected a torch.Generator or a list of them, got {generator!r}; make one of a seed "
            "with torch.Generator().manual_seed(seed)"
        )


def one_a_clip(who: str, generator: Generators, clips: int) -> list[torch.Generator]:
    """Sources of noise for clips, from what a pipeline was given: none, one for all, or one a clip.

    Raises:
        ValueError: If there are too few or too many, one is not on the CPU, or it is something else.
    """
    if generator is None:
        generator = torch.default_generator
    check_generators(who, generator)
    sources = [generator] * clips if isinstance(generator, torch.Generator) else list(generator)
    if len(sources) != clips or any(source.device.type != "cpu" for source in sources):
        raise ValueError(
            f"{who}: generator: expected one on the CPU, or one for each of {clips} clips, got {len(sources)} on "
            f"{', '.join(sorted({source.device.type for source in sources}))}"
        )
    return sources


def clips_of_noise(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    correlation: float = 0.0,
    progressive: bool = False,
) -> Float[Tensor, "clips channels frames height width"]:
    """Standard normal noise, every clip from a source of its own.

    Args:
        shape: Of one clip.
        generators: One a clip.
        correlation: Of the frames of a clip; see `clip_noise`.
        progressive: Whether it falls off with their distance; likewise.
    """
    options = {"correlation": correlation, "progressive": progressive}
    return torch.stack([clip_noise(shape, generator=source, **options) for source in generators])


def windows_of_noise(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    window: int,
    step: int,
    correlation: float = 0.0,
    progressive: bool = False,
) -> Float[Tensor, "clips channels frames height width"]:
    """As `clips_of_noise`, of the frames of one window, shuffled again and again (FreeNoise, Qiu et al. 2024).

    Every ``step`` frames behind the first window are those of a window earlier in another order. So each window that
    begins at a multiple of ``step`` has all the frames of the first one, and windows that are denoised one by one
    (`InRegions`) have much in common, however far apart. Each frame is standard normal; a frame and its copies are
    equal.

    Args:
        shape: Of one clip.
        generators: One a clip, of the frames and of their orders.
        window: Frames that the model sees at a time.
        step: Frames from one window to the next, at most a window.
        correlation: Of the frames of the first window; see `clip_noise`.
        progressive: Whether it falls off with their distance; likewise.

    Raises:
        ValueError: If the step is out of range.
    """
    if not 1 <= step <= window:
        raise ValueError(f"windows_of_noise: step: expected 1 to the {window} frames of a window, got {step}")
    channels, num_frames, *size = shape
    options = {"correlation": correlation, "progressive": progressive}
    first = clips_of_noise((channels, min(window, num_frames), *size), generators, **options)
    orders = [_order(window, num_frames, step, generator) for generator in generators]
    return torch.stack([clip[:, order] for clip, order in zip(first, orders, strict=True)])


def _order(window: int, num_frames: int, step: int, generator: torch.Generator) -> list[int]:
    """Which frame of the window each frame is."""
    order = list(range(window))
    while len(order) < num_frames:
        earlier = order[len(order) - window :][:step]
        order += [earlier[place] for place in torch.randperm(step, generator=generator).tolist()]
    return order[:num_frames]
