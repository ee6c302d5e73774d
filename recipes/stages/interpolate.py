"""Stage "interpolate": temporal layers that make three frames between two (Video LDM, section 3.3).

One model works at two rates, between key frames and between the frames that came of those, and is told which: windows
1, 0, 0, 0, 1 (1 for given) are cut from clips at a stride of 4 or of 1. So 8 key frames become 29 frames and then 113.

    temporal-layers train interpolate --out runs/interpolate
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from temporal_layers.adapters import TemporalAdapter, TemporalConfig
from temporal_layers.config import Inject, check_at_least
from temporal_layers.recipes.bases import Conditioning, VideoBase
from temporal_layers.recipes.conditioning import FACTOR, ContextPlanes, interpolation_mask
from temporal_layers.recipes.stages.clips import Clips
from temporal_layers.recipes.stages.context import (
    ContextSamples,
    context_effect,
    train_context,
    window_length,
    with_context,
)
from temporal_layers.recipes.stages.context_stage import DEFAULT_OPTIM, ContextStageConfig, run_context_stage
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import OptimConfig

STRIDES = (FACTOR, 1)
"""Between key frames, labelled 0, and between the frames that came of those, labelled 1."""

MAX_NOISE_LEVEL = 250
"""Of the given frames in the paper's text-to-video models."""


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(ContextStageConfig):
    """Stage "interpolate".

    Attributes:
        out: Folder of the run; ``adapter/`` in it is what ``TemporalAdapter.from_pretrained`` loads.
        pairs: Pairs of given frames in a training window: 1 for 1, 0, 0, 0, 1, and 2 for that twice, ends shared.
        max_noise_level: Given frames get noise of a level from 0 to this one; 0 for none.
        context_drop: Share of windows with no frame given, for context guidance. The paper guides predictions only.
    """

    out: Path = Path("runs/interpolate")
    pairs: int = 1
    max_noise_level: int = MAX_NOISE_LEVEL
    context_drop: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("InterpolateConfig.pairs", self.pairs, 1)
        check_drop("InterpolateConfig", self.context_drop)


def check_drop(who: str, context_drop: float) -> None:
    """Raise a ValueError unless some windows have given frames."""
    if not 0 <= context_drop < 1:
        raise ValueError(f"{who}: context_drop: expected a share from 0 to below 1, got {context_drop}")


def interpolate_samples(
    base: VideoBase,
    clips: Clips | None,
    *,
    pairs: int = 1,
    strides: tuple[int, ...] = STRIDES,
    max_noise_level: int = MAX_NOISE_LEVEL,
    context_drop: float = 0.0,
    temporal: TemporalConfig | None = None,
    inject: Inject = "resblock",
    label_drop: float = 0.1,
    noise_correlation: float = 0.0,
    seed: int = 0,
) -> ContextSamples:
    """Samples to train interpolation on; arguments as of `train_interpolate`. Puts the layers into the base."""
    check_drop("train_interpolate", context_drop)
    mask = interpolation_mask(FACTOR * pairs + 1)
    planes = ContextPlanes(latent_channels=base.latent_shape[0], max_noise_level=max_noise_level, rate=True)

    def draw_mask(generator: torch.Generator) -> Tensor:
        return mask * (torch.rand((), generator=generator) >= context_drop)

    samples = ContextSamples(
        clips,
        base.no_conditioning(1),
        planes,
        draw_mask,
        num_frames=len(mask),
        scheduler=base.scheduler,
        strides=strides,
        drop=label_drop,
        correlation=noise_correlation,
        seed=seed,
    )
    with_context(base, planes, temporal, inject, seed=seed)
    return samples


def train_interpolate(
    base: VideoBase,
    clips: Clips,
    config: OptimConfig = DEFAULT_OPTIM,
    *,
    pairs: int = 1,
    strides: tuple[int, ...] = STRIDES,
    max_noise_level: int = MAX_NOISE_LEVEL,
    context_drop: float = 0.0,
    temporal: TemporalConfig | None = None,
    inject: Inject = "resblock",
    label_drop: float = 0.1,
    noise_correlation: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> tuple[TemporalAdapter, list[float]]:
    """Train the temporal layers of ``base.unet`` to fill in clips; they are injected unless they are there.

    The paper's text-to-video models train all parameters here: ``train="all"``.

    Args:
        base: The image model. Temporal layers that take no frame context are made to.
        clips: Latents and conditioning at the finest rate, of at least ``4 * pairs * max(strides) + 1`` frames each.
        config: Steps, learning rate and so on.
        pairs: Pairs of given frames in a training window.
        strides: Frames of a clip from one frame of a window to the next, from the coarsest rate, labelled 0, to the
            finest, labelled 1.
        max_noise_level: Largest noise level of the given frames; 0 for no noise.
        context_drop: Share of windows with no frame given.
        temporal: What to inject; the paper's layout if None.
        inject: Where the frame context enters.
        label_drop: Share of clips trained without conditioning.
        noise_correlation: Correlation between the noise of a clip's frames; sample with the same.
        seed: Seed of the initial weights and the batches.
        **options: ``train`` and ``loss_over`` of `train_context`, ``on_checkpoint`` and further arguments of `fit`.

    Returns:
        The adapter, whose metadata tells the planes of its context, and the loss of each step.

    Raises:
        ValueError: If there are no clips, one is too short, ``context_drop`` is no share, or ``temporal`` is given for
            a UNet that has temporal layers.
    """
    samples = interpolate_samples(
        base,
        clips,
        pairs=pairs,
        strides=strides,
        max_noise_level=max_noise_level,
        context_drop=context_drop,
        temporal=temporal,
        inject=inject,
        label_drop=label_drop,
        noise_correlation=noise_correlation,
        seed=seed,
    )
    return train_context(base, samples, config, name="interpolation", seed=seed, **options)


def run_interpolate_stage(config: InterpolateConfig) -> TemporalAdapter:
    """Run the whole stage and write adapter, losses and configuration to ``config.out``."""
    mask = interpolation_mask(FACTOR * config.pairs + 1)

    def prepare(base: VideoBase, clips: Clips | None) -> ContextSamples:
        return interpolate_samples(
            base,
            clips,
            pairs=config.pairs,
            max_noise_level=config.max_noise_level,
            context_drop=config.context_drop,
            inject=config.inject,
            label_drop=config.label_drop,
            noise_correlation=config.noise_correlation,
            seed=config.seed,
        )

    def effects(base: VideoBase, latents: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        planes = ContextPlanes(latent_channels=base.latent_shape[0], max_noise_level=config.max_noise_level, rate=True)
        windows = {stride: latents[:, :, ::stride][:, :, : len(mask)] for stride in STRIDES}
        return {
            f"stride {stride}": context_effect(
                base, planes, windows[stride], conditioning, mask, rate=float(rate), seed=config.seed
            )
            for rate, stride in enumerate(STRIDES)
        }

    length = window_length(len(mask), STRIDES)
    return run_context_stage(config, name="interpolation", length=length, prepare=prepare, effects=effects)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    config = parse(InterpolateConfig, arguments, prog="temporal-layers train interpolate", description=__doc__)
    run_interpolate_stage(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
