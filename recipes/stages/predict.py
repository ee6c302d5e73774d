"""Stage "predict": temporal layers that continue a clip from its first frames (Video LDM, section 3.2).

Of each training window the first S frames are given, S drawn from {0, 1, 2}; with none the model is the unconditional
branch of context guidance. A single frame begins a video; two tell which way things move.

    temporal-layers train predict --out runs/predict
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
from temporal_layers.recipes.conditioning import ContextPlanes, draw_given, prediction_mask
from temporal_layers.recipes.stages.clips import Clips
from temporal_layers.recipes.stages.context import ContextSamples, context_effect, train_context, with_context
from temporal_layers.recipes.stages.context_stage import DEFAULT_OPTIM, ContextStageConfig, run_context_stage
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import OptimConfig

GIVEN = (0.2, 0.4, 0.4)
"""Probabilities of 0, 1 and 2 given frames. The paper draws from these three and does not say how often which."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ContextStageConfig):
    """Stage "predict".

    Attributes:
        out: Folder of the run; ``adapter/`` in it is what ``TemporalAdapter.from_pretrained`` loads.
        num_frames: Frames of a training window. The paper predicts key frames: see ``clips.stride`` and ``clips.fps``.
        given: Probabilities of 0, 1, 2, ... given frames, or numbers proportional to them.
    """

    out: Path = Path("runs/predict")
    num_frames: int = 8
    given: tuple[float, ...] = GIVEN

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("PredictConfig.num_frames", self.num_frames, 2)
        check_given("PredictConfig", self.given, self.num_frames)


def check_given(who: str, given: Sequence[float], num_frames: int) -> None:
    """Raise a ValueError unless these are probabilities that leave a frame to predict."""
    draw_given(given)
    if len(given) > num_frames:
        raise ValueError(
            f"{who}: given: expected probabilities of 0 to at most {num_frames - 1} given frames, so that one of "
            f"num_frames={num_frames} is left to predict, got {len(given)}"
        )


def predict_samples(
    base: VideoBase,
    clips: Clips | None,
    *,
    num_frames: int,
    given: Sequence[float] = GIVEN,
    max_noise_level: int = 0,
    temporal: TemporalConfig | None = None,
    inject: Inject = "resblock",
    label_drop: float = 0.1,
    noise_correlation: float = 0.0,
    seed: int = 0,
) -> ContextSamples:
    """Samples to train prediction on; arguments as those of `train_predict`. Puts the temporal layers into the base."""
    check_given("train_predict", given, num_frames)
    planes = ContextPlanes(latent_channels=base.latent_shape[0], max_noise_level=max_noise_level)

    def draw_mask(generator: torch.Generator) -> Tensor:
        return prediction_mask(draw_given(given, generator), num_frames)

    samples = ContextSamples(
        clips,
        base.no_conditioning(1),
        planes,
        draw_mask,
        num_frames=num_frames,
        scheduler=base.scheduler,
        drop=label_drop,
        correlation=noise_correlation,
        seed=seed,
    )
    with_context(base, planes, temporal, inject, seed=seed)
    return samples


def train_predict(
    base: VideoBase,
    clips: Clips,
    config: OptimConfig = DEFAULT_OPTIM,
    *,
    num_frames: int,
    given: Sequence[float] = GIVEN,
    max_noise_level: int = 0,
    temporal: TemporalConfig | None = None,
    inject: Inject = "resblock",
    label_drop: float = 0.1,
    noise_correlation: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> tuple[TemporalAdapter, list[float]]:
    """Train the temporal layers of ``base.unet`` to continue clips; they are injected unless they are there.

    Args:
        base: The image model. Temporal layers that take no frame context are made to.
        clips: Latents and conditioning, of at least ``num_frames`` frames each.
        config: Steps, learning rate and so on.
        num_frames: Frames of a training window.
        given: Probabilities of 0, 1, 2, ... given frames.
        max_noise_level: Largest noise level of the given frames; 0 for no noise.
        temporal: What to inject; the paper's layout if None.
        inject: Where the frame context enters.
        label_drop: Share of clips trained without conditioning.
        noise_correlation: Correlation between the noise of a clip's frames; sample with the same.
        seed: Seed of the initial weights and the batches.
        **options: ``train`` and ``loss_over`` of `train_context`, ``on_checkpoint`` and further arguments of `fit`.

    Returns:
        The adapter, whose metadata tells the planes of its context, and the loss of each step.

    Raises:
        ValueError: If there are no clips, one is too short, no frame would be left to predict, or ``temporal`` is
            given for a UNet that has temporal layers.
    """
    samples = predict_samples(
        base,
        clips,
        num_frames=num_frames,
        given=given,
        max_noise_level=max_noise_level,
        temporal=temporal,
        inject=inject,
        label_drop=label_drop,
        noise_correlation=noise_correlation,
        seed=seed,
    )
    return train_context(base, samples, config, name="prediction", seed=seed, **options)


def run_predict_stage(config: PredictConfig) -> TemporalAdapter:
    """Run the whole stage and write adapter, losses and configuration to ``config.out``."""

    def prepare(base: VideoBase, clips: Clips | None) -> ContextSamples:
        return predict_samples(
            base,
            clips,
            num_frames=config.num_frames,
            given=config.given,
            max_noise_level=config.max_noise_level,
            inject=config.inject,
            label_drop=config.label_drop,
            noise_correlation=config.noise_correlation,
            seed=config.seed,
        )

    def effects(base: VideoBase, latents: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        planes = ContextPlanes(latent_channels=base.latent_shape[0], max_noise_level=config.max_noise_level)
        masks = {count: prediction_mask(count, config.num_frames) for count in range(1, len(config.given))}
        return {
            f"{count} given": context_effect(base, planes, latents, conditioning, mask, seed=config.seed)
            for count, mask in masks.items()
        }

    return run_context_stage(config, name="prediction", length=config.num_frames, prepare=prepare, effects=effects)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    run_predict_stage(parse(PredictConfig, arguments, prog="temporal-layers train predict", description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
