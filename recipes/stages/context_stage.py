"""What the stages "predict" and "interpolate" share as commands: settings, data, what a run leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from temporal_layers.adapters import TemporalAdapter
from temporal_layers.config import Inject, check_at_least, check_choice
from temporal_layers.recipes.bases import Conditioning, VideoBase, load_base
from temporal_layers.recipes.stages.clips import ChosenClips, Clips, ClipsConfig, open_clips, open_pixels
from temporal_layers.recipes.stages.context import ContextSamples, LossOver, train_context
from temporal_layers.recipes.stages.temporal import Trained, alphas, save_trained
from temporal_layers.recipes.stages.video import SHIPPED_ADAPTER
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, make_accelerator

DEFAULT_OPTIM = OptimConfig(steps=400, batch_size=2, lr=2e-3, weight_decay=0.0, ema_decay=0.98)


@dataclass(frozen=True, kw_only=True)
class ContextStageConfig:
    """What the stages that train with a frame context have in common.

    Attributes:
        out: Folder of the run; ``adapter/`` in it is what ``TemporalAdapter.from_pretrained`` loads.
        seed: Seed of the initial weights, the batches and the noise.
        clips: The image model and the videos.
        start_from: Temporal layers to begin with: ``shipped``, ``scratch``, or a folder of saved ones. Layers that
            take no frame context are made to.
        inject: Where the context enters: in front of the convolutions over frames (``resblock``, the paper), at the
            ``input`` of the UNet, or ``both``.
        train: ``temporal`` layers alone, or ``all`` parameters of the UNet, which is then saved too.
        optim: Training of the layers.
        engine: How the run is carried out.
        loss_over: ``all`` frames, as in the paper, or the ``unknown`` ones.
        label_drop: Share of clips trained without conditioning, for classifier-free guidance.
        noise_correlation: Correlation between the noise of a clip's frames; 0 as in the paper.
        max_noise_level: Given frames get noise of a level from 0 to this one; 0 for none.
        held_out: Clips, the last ones, that are not trained on: ``result.json`` says what given frames are worth there.
            0 for none; cached clips only.
    """

    out: Path = Path("runs/context")
    seed: int = 0
    clips: ClipsConfig = ClipsConfig()
    start_from: str = "shipped"
    inject: Inject = "resblock"
    train: Trained = "temporal"
    optim: OptimConfig = DEFAULT_OPTIM
    engine: EngineConfig = EngineConfig()
    loss_over: LossOver = "all"
    label_drop: float = 0.1
    noise_correlation: float = 0.0
    max_noise_level: int = 0
    held_out: int = 8

    def __post_init__(self) -> None:
        who = type(self).__name__
        for name, kind in (("inject", Inject), ("train", Trained), ("loss_over", LossOver)):
            check_choice(f"{who}.{name}", getattr(self, name), get_args(kind))
        check_at_least(f"{who}.max_noise_level", self.max_noise_level, 0)
        for name in ("label_drop", "noise_correlation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{who}.{name}: expected a value from 0 to 1, got {getattr(self, name)}")
        if self.held_out == 1 or self.held_out < 0:
            raise ValueError(f"{who}.held_out: expected 0, or at least two clips to compare, got {self.held_out}")
        if self.start_from not in ("shipped", "scratch") and not Path(self.start_from).is_dir():
            raise ValueError(
                f"{who}.start_from: expected 'shipped', 'scratch' or a folder of saved temporal layers, got "
                f"{self.start_from!r}, which is no folder"
            )
        if self.engine.validate_every and (self.clips.latents == "streamed" or not self.held_out):
            raise ValueError(
                f"{who}.engine.validate_every: expected 0 without held-out clips, got {self.engine.validate_every}; "
                "set held_out, with cached latents"
            )
        if self.start_from == "shipped" and self.clips.model:
            raise ValueError(
                f"{who}.start_from: expected 'scratch' or a folder with clips.model={self.clips.model!r}, got "
                "'shipped', whose layers are for the image model that comes with the package"
            )


def run_context_stage(
    config: ContextStageConfig,
    *,
    name: str,
    length: int,
    prepare: Callable[[VideoBase, Clips | None], ContextSamples],
    effects: Callable[[VideoBase, Tensor, Conditioning], dict[str, Any]],
) -> TemporalAdapter:
    """Run a stage and write adapter, losses and what came out to ``config.out``.

    Args:
        config: Of the stage.
        name: Of the training, in the log.
        length: Frames of a clip from the first to the last frame of the longest window.
        prepare: Gets the clips to train on, None for windows that are decoded as they are needed; puts temporal layers
            that take a context into the base.
        effects: Called with latents and conditioning of held-out clips of ``length`` frames; its result goes into
            ``result.json``.

    Returns:
        The adapter, image model included.
    """
    accelerator = make_accelerator(config.engine, config.out)
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    started = time.perf_counter()
    base = load_base(config.clips.model).to(accelerator.device)
    if config.start_from != "scratch":
        folder = SHIPPED_ADAPTER if config.start_from == "shipped" else config.start_from
        TemporalAdapter.from_pretrained(base.unet, folder)
    if config.clips.latents == "streamed":
        samples, rest = prepare(base, None), None
        stream = open_pixels(base, config.clips, samples.complete_batch, num_frames=length, seed=config.seed)
    else:
        clips = open_clips(base, config.clips, out=config.out, min_frames=length, accelerator=accelerator)
        used, rest = split_clips(clips, config.held_out, length)
        samples, stream = prepare(base, used), None
    adapter, history = train_context(
        base,
        samples,
        config.optim,
        name=name,
        stream=stream,
        train=config.train,
        loss_over=config.loss_over,
        seed=config.seed,
        accelerator=accelerator,
        run=run,
        engine=config.engine,
        on_checkpoint=lambda made, step: made.save_pretrained(config.out / f"adapter-{step}") if run else None,
        validate=None if rest is None else lambda step: _numbers(effects, base, rest),
    )
    if run is not None:
        adapter = save_trained(adapter, config.out, train=config.train)
        run.write("alphas.json", alphas(adapter))
        run.finish(history, started=started, held_out=None if rest is None else effects(base, *rest))
    return adapter


def _numbers(
    effects: Callable[[VideoBase, Tensor, Conditioning], dict[str, Any]],
    base: VideoBase,
    held_out: tuple[Tensor, Conditioning],
) -> dict[str, float]:
    """The effects during training, by flat names."""
    base.unet.eval()
    try:
        found = effects(base, *held_out)
    finally:
        base.unet.train()
    return {f"{name}/{key}": value for name, row in found.items() for key, value in row.items()}


def split_clips(clips: Clips, held_out: int, length: int) -> tuple[Clips, tuple[Tensor, Conditioning] | None]:
    """Clips to train on, and the first ``length`` frames and the conditioning of the last ``held_out`` ones.

    Raises:
        ValueError: If none would be left to train on.
    """
    if held_out == 0:
        return clips, None
    count = len(clips) - held_out
    if count < 1:
        raise ValueError(
            f"held_out: expected fewer than all {len(clips)} clips, got {held_out}; 0 trains on all and measures "
            "nothing"
        )
    rows = [clips.conditioning(index) for index in range(count, len(clips))]
    latents = torch.stack([clips.latents(index, 0, length).float() for index in range(count, len(clips))])
    return ChosenClips(clips, range(count)), (latents, {key: torch.cat([row[key] for row in rows]) for key in rows[0]})
