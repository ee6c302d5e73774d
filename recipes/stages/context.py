"""Training with a frame context, whichever frames are given: samples, loss, the layers that take it, what it is worth.

The stages "predict" and "interpolate" are this with different masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.adapters import TemporalAdapter, TemporalConfig, adapter_of, inject
from temporal_layers.recipes.bases import Conditioning, VideoBase
from temporal_layers.recipes.conditioning import ContextPlanes, augment, signal_levels
from temporal_layers.recipes.denoising import noised
from temporal_layers.recipes.stages.clip_samples import ClipSamples
from temporal_layers.recipes.stages.clips import Clips, check_clips
from temporal_layers.recipes.stages.temporal import Trained, fit_adapter, trainable_adapter
from temporal_layers.recipes.stages.video import VideoObjective
from temporal_layers.recipes.training.engine import OptimConfig
from temporal_layers.recipes.training.streams import SampleStream, Stream, generator_at

LossOver = Literal["all", "unknown"]
DrawMask = Callable[[torch.Generator], Tensor]


class ContextObjective(VideoObjective):
    """The image model's denoising loss on clips some of whose frames are given (Video LDM, equation 3).

    Args:
        base: The image model, with temporal layers that take a frame context.
        names: Names of the conditioning tensors, in the order in which ``forward`` gets them.
        planes: Of the frame context.
        loss_over: ``all`` frames, as in the paper, or the ``unknown`` ones, which are not given.
    """

    def __init__(self, base: VideoBase, names: list[str], planes: ContextPlanes, loss_over: LossOver = "all") -> None:
        super().__init__(base, names)
        self.planes, self.loss_over = planes, loss_over

    def forward(
        self,
        latents: Float[Tensor, "batch channels frames height width"],
        noise: Float[Tensor, "batch channels frames height width"],
        timesteps: Tensor,
        frame_context: Float[Tensor, "batch planes frames height width"],
        *conditioning: Tensor,
    ) -> dict[str, Tensor]:
        """Squared error of the prediction: the loss, and that of the frames that are not given."""
        errors = self.errors(latents, noise, timesteps, frame_context, *conditioning)
        unknown = 1 - self.planes.given(frame_context).float()
        of_unknown = (errors * unknown).sum() / unknown.sum()
        return {"loss": errors.mean() if self.loss_over == "all" else of_unknown, "unknown": of_unknown.detach()}

    def errors(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, frame_context: Tensor, *conditioning: Tensor
    ) -> Float[Tensor, "batch frames"]:
        """Squared error of each frame, arguments as those of ``forward``."""
        base = self.base[0]
        noisy, told, target = noised(base.scheduler, latents, noise, timesteps)
        named = dict(zip(self.names, conditioning, strict=True))
        output = base.predict(noisy, told, named, frame_context=frame_context)
        return (output.float() - target.float()).square().mean((1, 3, 4))


class ContextSamples(ClipSamples):
    """Draws training samples from clips: ``(window, noise, timestep, frame context, *conditioning)``.

    Args:
        clips: Long enough for a window at the largest stride; None if windows of that length come from elsewhere
            (``complete_batch``).
        dropped: One row of conditioning that says nothing.
        planes: Of the frame context.
        draw_mask: Draws which frames of a window are given: ``(num_frames,)``.
        num_frames: Frames of a window.
        scheduler: Of the image model.
        strides: Frames of a clip from one frame of a window to the next, drawn uniformly. With a plane for the rate,
            its label goes from 0 for the first to 1 for the last.
        **options: ``drop``, ``correlation`` and ``seed`` of `ClipSamples`.

    Raises:
        ValueError: If there are no clips, or one is too short.
    """

    def __init__(
        self,
        clips: Clips | None,
        dropped: Conditioning,
        planes: ContextPlanes,
        draw_mask: DrawMask,
        *,
        num_frames: int,
        scheduler: Any,
        strides: tuple[int, ...] = (1,),
        **options: Any,
    ) -> None:
        if clips is not None:
            check_clips("ContextSamples", clips, window_length(num_frames, strides))
        steps = scheduler.config.num_train_timesteps
        super().__init__(clips, dropped, num_frames=num_frames, num_timesteps=steps, **options)
        self.planes, self.draw_mask, self.strides = planes, draw_mask, strides
        self.levels = signal_levels(scheduler)

    def __call__(self, position: int) -> tuple[Tensor, ...]:
        """The sample at a position of the run."""
        row, generator = self.order[position], generator_at(self.seed, position)
        which, frames = self._cut(self.clips.num_frames(row), generator)
        window = self.clips.latents(row, frames.start, frames.stop)[:, :: frames.step].float()
        return self._finished(window, which, self.clips.conditioning(row), generator)

    def complete(
        self, window: Tensor, conditioning: Conditioning, generator: torch.Generator, *, as_images: bool = False
    ) -> tuple[Tensor, ...]:
        """The sample of a long window that has been drawn: a part of it, at one of the strides."""
        which, frames = self._cut(window.shape[1], generator)
        return self._finished(window[:, frames], which, conditioning, generator)

    def _cut(self, length: int, generator: torch.Generator) -> tuple[int, slice]:
        """Which stride, and which frames of ``length``."""
        which = int(torch.randint(len(self.strides), (), generator=generator))
        stride = self.strides[which]
        span = (self.num_frames - 1) * stride + 1
        start = int(torch.randint(length - span + 1, (), generator=generator))
        return which, slice(start, start + span, stride)

    def _finished(
        self, window: Tensor, which: int, conditioning: Conditioning, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        latents, noise, timestep, *rest = super().complete(window, conditioning, generator)
        given, level = self.draw_mask(generator), 0
        if self.planes.max_noise_level:
            level = int(torch.randint(self.planes.max_noise_level + 1, (), generator=generator))
            window = augment(window, level, torch.randn(window.shape, generator=generator), self.levels)
        rate = which / max(len(self.strides) - 1, 1) if self.planes.rate else 0.0
        return (latents, noise, timestep, self.planes.build(window, given, level=level, rate=rate), *rest)


def window_length(num_frames: int, strides: tuple[int, ...] = (1,)) -> int:
    """Frames of a clip from the first to the last frame of the longest window."""
    return (num_frames - 1) * max(strides) + 1


def with_context(
    base: VideoBase, planes: ContextPlanes, temporal: TemporalConfig | None, inject_at: str, *, seed: int = 0
) -> TemporalAdapter:
    """Temporal layers of ``base.unet`` that take a frame context.

    Layers that take none are made to: they stay as they are, and what lets the context in starts at zero.

    Args:
        base: Its UNet may have temporal layers.
        planes: Of the frame context.
        temporal: What to inject into a UNet that has none; the paper's layout if None.
        inject_at: Where the context enters; see `ContextConfig`.
        seed: Of the initial weights.

    Raises:
        ValueError: If ``temporal`` is given for a UNet that has temporal layers, or these take another context.
    """
    context = planes.config(inject_at)
    if getattr(base.unet, "_temporal_state", None) is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = inject(base.unet, dataclasses.replace(temporal or TemporalConfig(), context=context))
    elif temporal is not None:
        raise ValueError(
            "with_context: temporal: expected None for a UNet that has temporal layers, which say what they are; got a "
            "configuration: remove() them first, or leave it out to go on with them"
        )
    else:
        adapter = adapter_of(base.unet)
        if adapter.config.context is None:
            weights = adapter.snapshot()
            adapter.remove()
            adapter = TemporalAdapter.from_pretrained(base.unet, weights, context=context)
        elif adapter.config.context != context:
            raise ValueError(
                f"with_context: expected temporal layers with {context}, got some with {adapter.config.context}; train "
                "with the planes and the place that they were made for"
            )
    planes.note(adapter)
    return adapter


def train_context(
    base: VideoBase,
    samples: ContextSamples,
    config: OptimConfig,
    *,
    name: str,
    stream: Stream | None = None,
    train: Trained = "temporal",
    loss_over: LossOver = "all",
    **engine: Any,
) -> tuple[TemporalAdapter, list[float]]:
    """Train temporal layers that take a frame context.

    Args:
        base: The image model, with the layers in it (`with_context`).
        samples: What to train on.
        config: Steps, learning rate and so on.
        name: Of the training, in the log.
        stream: Of batches that ``samples`` completes; drawn from its clips if None.
        train: ``temporal`` layers alone, or ``all`` parameters of the UNet.
        loss_over: ``all`` frames, or the ``unknown`` ones.
        **engine: ``seed``, ``on_checkpoint`` and further arguments of `fit_adapter`.

    Returns:
        The adapter and the loss of each step.
    """
    adapter = trainable_adapter(base.unet, None, train)
    objective = ContextObjective(base, list(samples.dropped), samples.planes, loss_over)
    return fit_adapter(adapter, objective, stream or SampleStream(samples), config, name=name, train=train, **engine)


@torch.no_grad()
def context_effect(
    base: VideoBase,
    planes: ContextPlanes,
    latents: Float[Tensor, "clips channels frames height width"],
    conditioning: Conditioning,
    given: Float[Tensor, " frames"],
    *,
    rate: float = 0.0,
    timesteps: tuple[int, ...] = (400, 700, 950),
    seed: int = 0,
) -> dict[str, float]:
    """What given frames are worth: the error in the other frames, with the same noise throughout.

    Args:
        base: The image model, with trained temporal layers.
        planes: Of the frame context.
        latents: At least two clips, not trained on.
        conditioning: One row a clip.
        given: Mask of the frames.
        rate: Label of the frame rate.
        timesteps: Noise levels, over which the errors are averaged.
        seed: Of the noise.

    Returns:
        The mean squared error with the ``given`` frames, with those of another clip (``swapped``), and with ``none``.

    Raises:
        ValueError: If there are fewer than two clips.
    """
    if len(latents) < 2:
        raise ValueError(f"context_effect: latents: expected at least two clips, got {len(latents)}")
    device = base.unet.device
    objective = ContextObjective(base, list(conditioning), planes, "unknown")
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    context = planes.build(latents, given.expand(len(latents), -1), rate=rate)
    contexts = {"given": context, "swapped": context.roll(1, 0), "none": planes.without(context)}
    unknown = planes.given(context) == 0
    errors = {}
    for name, value in contexts.items():
        total = torch.zeros(unknown.shape)
        for timestep in timesteps:
            batch = (latents, noise, torch.full((len(latents),), timestep), value, *conditioning.values())
            total += objective.errors(*(part.to(device) for part in batch)).cpu()
        errors[name] = (total[unknown].mean() / len(timesteps)).item()
    return errors
