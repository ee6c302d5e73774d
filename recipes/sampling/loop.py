"""The denoising loop, and the model that it asks: conditioned, told of given frames, guided towards either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.recipes.bases import Conditioning, VideoBase
from temporal_layers.recipes.conditioning import joint_guidance
from temporal_layers.recipes.sampling.regions import Denoiser, Region
from temporal_layers.recipes.sampling.sampler import Generators, Sampler

Scale = float | Sequence[float]
"""Strength of a guidance: one number, or one a frame."""

OnStep = Callable[[int, Tensor, Tensor], Tensor]
"""Called with the number of a step, its timestep and the latents after it; returns the latents to go on with."""


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    sampler: Sampler,
    start: Float[Tensor, "b c f h w"],
    generator: Generators = None,
    *,
    on_step: OnStep | None = None,
    stop: Callable[[], bool] | None = None,
) -> Float[Tensor, "b c f h w"]:
    """Go from noisy clips to clean ones.

    Args:
        denoiser: What the model says.
        sampler: The steps.
        start: Of ``sampler.start``.
        generator: Of fresh noise, where the scheduler draws any.
        on_step: Called after each step.
        stop: Asked before each step; true ends the loop with the latents of now.
    """
    latents, whole = start, Region.of(start)
    for number, timestep in enumerate(sampler.timesteps):
        if stop is not None and stop():
            break
        output = denoiser(sampler.scaled(latents, timestep), timestep, whole)
        latents = sampler.step(output.to(latents.dtype), timestep, latents, generator)
        if on_step is not None:
            latents = on_step(number, timestep, latents)
    return latents


class Branch(NamedTuple):
    """What a model is told of clips.

    Attributes:
        conditioning: One row a clip, or one a frame, those of a clip one after the other.
        context: Planes of given frames; None for a model that takes none.
    """

    conditioning: Conditioning
    context: Float[Tensor, "b planes f h w"] | None = None

    def of(self, region: Region, clips: int) -> Branch:
        """What is told of a region of ``clips`` clips."""

        def cut(value: Tensor) -> Tensor:
            if len(value) == clips:
                return value
            return value.unflatten(0, (clips, -1))[:, region.frames].flatten(0, 1)

        context = None if self.context is None else region.cut(self.context)
        return Branch({name: cut(value) for name, value in self.conditioning.items()}, context)


class GuidedModel:
    """An image model with temporal layers, as a `Denoiser`.

    Args:
        base: The image model.
        told: What it is told.
        without_text: The same with conditioning that says nothing, or a negative one; needed unless ``text_scale`` is
            1.
        without_context: The same with no frame given; needed unless ``context_scale`` is 1.
        text_scale: Guidance towards the conditioning, for all frames or each.
        context_scale: Guidance towards the given frames (equation 4), likewise.
        frame_by_frame: Take every frame by itself, as an image, without temporal layers.
    """

    def __init__(
        self,
        base: VideoBase,
        told: Branch,
        *,
        without_text: Branch | None = None,
        without_context: Branch | None = None,
        text_scale: Scale = 1.0,
        context_scale: Scale = 1.0,
        frame_by_frame: bool = False,
    ) -> None:
        self.base, self.frame_by_frame = base, frame_by_frame
        self.text_scale, self.context_scale = text_scale, context_scale
        self.by_context = is_on(context_scale) and without_context is not None
        self.by_text = is_on(text_scale) and without_text is not None and bool(told.conditioning)
        wanted = [(True, told), (self.by_context, without_context), (self.by_text, without_text)]
        self.branches = [branch for asked, branch in wanted if asked]

    def __call__(self, noisy: Float[Tensor, "b c f h w"], timestep: Tensor, region: Region) -> Tensor:
        """As in `Denoiser`."""
        outputs = list(self._outputs(noisy, timestep, region).chunk(len(self.branches)))
        frames = region.frames
        return joint_guidance(
            outputs[0],
            without_context=outputs[1] if self.by_context else None,
            without_text=outputs[-1] if self.by_text else None,
            context_scale=per_frame(self.context_scale, frames, noisy),
            text_scale=per_frame(self.text_scale, frames, noisy),
        )

    def _outputs(self, noisy: Tensor, timestep: Tensor, region: Region) -> Tensor:
        """What the model says in all branches, which are one batch of its."""
        clips, frames = len(noisy), noisy.shape[2]
        branches = [branch.of(region, clips) for branch in self.branches]
        rows = {
            name: _joined([branch.conditioning[name] for branch in branches], clips, frames, self.frame_by_frame)
            for name in branches[0].conditioning
        }
        extra = {}
        if branches[0].context is not None and not self.frame_by_frame:
            extra["frame_context"] = torch.cat([branch.context for branch in branches])
        noisy = torch.cat([noisy.to(self.base.unet.dtype)] * len(branches))
        if not self.frame_by_frame:
            return self.base.predict(noisy, timestep, rows, **extra)
        return unfold_frames(self.base.predict(fold_frames(noisy), timestep, rows), frames)


def _joined(values: list[Tensor], clips: int, frames: int, by_frame: bool) -> Tensor:
    """One batch of all branches, with one row a clip, or one a frame where a branch has that."""
    if by_frame or any(len(value) != clips for value in values):
        values = [value.repeat_interleave(frames, dim=0) if len(value) == clips else value for value in values]
    return torch.cat(values)


def is_on(scale: Scale) -> bool:
    """Whether a guidance of this strength changes anything."""
    return any(value != 1 for value in (scale if isinstance(scale, Sequence) else [scale]))


def per_frame(scale: Scale, frames: slice, like: Tensor) -> float | Float[Tensor, "f 1 1"]:
    """A strength as a factor of clips: that of some frames, where there is one a frame."""
    if not isinstance(scale, Sequence):
        return scale
    return like.new_tensor(list(scale)[frames])[:, None, None]
