"""What the pipelines share that go from window to window of frames, some of which are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.bases import Conditioning, VideoBase
from temporal_layers.recipes.conditioning import ContextPlanes
from temporal_layers.recipes.pipelines.components import TemporalPipeline
from temporal_layers.recipes.pipelines.injected import OnStepEnd
from temporal_layers.recipes.pipelines.outputs import Frames, VideoOutput, check_output_type, clips_of
from temporal_layers.recipes.pipelines.prompts import Asked, Conditionings, Prompts, conditionings
from temporal_layers.recipes.sampling.context import ContextSampling
from temporal_layers.recipes.sampling.loop import OnStep
from temporal_layers.recipes.sampling.noise import check_generators
from temporal_layers.recipes.sampling.sampler import Generators, Sampler
from temporal_layers.recipes.sampling.timeline import Timeline
from temporal_layers.recipes.stages.personal import Prompt


class Interrupted(RuntimeError):
    """A callback has set ``pipeline._interrupt`` in the middle of a window, whose frames are lost."""


class Prepared(NamedTuple):
    """What the clips of a call are told, and how they are sampled.

    Attributes:
        base: The model.
        given: Latents of given frames of all clips.
        timeline: What they are to show in the course of time, one row a clip.
        negative: What is not wanted, or says nothing, likewise.
        options: Of the sampler, with a seed a clip.
    """

    base: VideoBase
    given: Float[Tensor, "clips c f h w"]
    timeline: Timeline
    negative: Conditioning
    options: ContextSampling


class ContextPipeline(TemporalPipeline):
    """Base of pipelines whose temporal layers take given frames, which hand out clips window by window (``stream``)."""

    def __call__(
        self,
        prompt: Prompts = None,
        *given: Frames,
        decode_chunk_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **how: Any,
    ) -> VideoOutput | tuple[Any]:
        """Make clips.

        Args:
            prompt: As of ``stream``.
            *given: Frames, likewise.
            decode_chunk_size: Frames that are decoded at a time; see `decode_clips`.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``; see `VideoOutput`.
            return_dict: Return a `VideoOutput`, or a tuple.
            **how: Further arguments of ``stream``.

        Returns:
            The clips; up to the last whole window if a callback has interrupted them.

        Raises:
            ValueError: As ``stream``; if there is no such output type.
            Interrupted: If a callback has, before there was a frame.
        """
        check_output_type(type(self).__name__, output_type)
        self.check_decoding(decode_chunk_size)
        parts = list(self.stream(prompt, *given, **how))
        if not parts:
            raise Interrupted(f"{type(self).__name__}: interrupted before there was a frame")
        latents = torch.cat(parts, dim=2).to(self._execution_device)
        return self.finish(
            latents, output_type=output_type, return_dict=return_dict, decode_chunk_size=decode_chunk_size
        )

    def stream(self, prompt: Prompts = None, *given: Frames, **how: Any) -> Iterator[Float[Tensor, "b c some h w"]]:
        """Make clips, and hand out latents as they come."""
        raise NotImplementedError

    @property
    def planes(self) -> ContextPlanes:
        """What the temporal layers are told of given frames.

        Raises:
            ValueError: If they were not trained for that.
        """
        return ContextPlanes.of(self.adapter)

    def _given(
        self, name: str, frames: Frames | None, latents: Tensor | None, size: tuple[int, int]
    ) -> Float[Tensor, "b c f h w"]:
        """Latents of given frames.

        Args:
            name: Of the argument that they came as.
            frames: The frames.
            latents: Their latents, in place of them.
            size: Height and width in pixels.

        Raises:
            ValueError: If there are both or none, or they do not fit.
        """
        who = f"{type(self).__name__}: {name}"
        if (frames is None) == (latents is None):
            raise ValueError(f"{who}: expected it or {name}_latents, got {'none' if frames is None else 'both'}")
        if latents is None:
            return self.encode_clips(clips_of(who, frames, size))
        channels = self.unet.config.in_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(
                f"{who}_latents: expected (clips, {channels}, frames, height, width), got {tuple(latents.shape)}"
            )
        return latents

    def prepare(
        self,
        prompt: Prompts,
        given: Float[Tensor, "clips c f h w"],
        *,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        context_guidance_scale: float = 1.0,
        context_noise_level: int = 0,
        noise_correlation: float = 0.0,
        eta: float = 0.0,
        negative_prompt: Prompt | Sequence[Prompt] | None = None,
        num_videos_per_prompt: int = 1,
        batch_size: int = 2,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
    ) -> Prepared:
        """What the clips of a call are told, and how they are sampled.

        Args:
            prompt: What clips are to show: a text, or for the label model the name or the number of a label; a list for
                several clips. Where it changes in the course of a clip, a dictionary from the first frame of each
                prompt to the prompt; a window is told one prompt. None for an unconditional model, or no label.
            given: Latents of given frames: of as many clips as there are prompts, or of one; a single prompt goes for
                all of them.
            num_inference_steps: Denoising steps of a window.
            guidance_scale: Guidance towards the prompt; 1 turns it off. 7.5 for texts and 2 for labels if not given.
            context_guidance_scale: Guidance towards the given frames (equation 4), likewise. Beside the other guidance
                each adds its own part.
            context_noise_level: Of noise on what the model is told of given frames, for models trained with it.
            noise_correlation: Correlation between the noise of a clip's frames, as in training.
            eta: Fresh noise in each step, from 0 (none: DDIM) to below 1, for schedulers that have it as an option.
            negative_prompt: To be guided away from, one for all clips or one each.
            num_videos_per_prompt: Clips of each prompt and its given frames: as many futures of one start.
            batch_size: Clips, or windows of clips, at a time, which bounds the memory.
            generator: One for all clips, or one a clip, so that a clip does not depend on its batch. One number is
                drawn for each clip, which stands for all of its noise.
            prompt_embeds: In place of ``prompt``, as `Asked` says of this and the arguments like it.
            negative_prompt_embeds: Likewise.
            pooled_prompt_embeds: Likewise.
            negative_pooled_prompt_embeds: Likewise.

        Raises:
            ValueError: If an argument is out of range, does not fit the others, or the model does not know it.
        """
        asked = Asked(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
        )
        if num_videos_per_prompt < 1:
            raise ValueError(
                f"{type(self).__name__}: num_videos_per_prompt: expected 1 or more, got {num_videos_per_prompt}"
            )
        height, width = (side * self._factor for side in given.shape[-2:])
        parts = self._parts_in_time(asked, (height, width))
        clips = max(parts[0].clips, len(given))
        if {parts[0].clips, len(given)} - {1, clips}:
            raise ValueError(
                f"{type(self).__name__}: expected as many prompts as clips of given frames, or one of either, got "
                f"{parts[0].clips} and {len(given)}"
            )

        def of_all(value: Tensor) -> Tensor:
            return value.expand(clips, *value.shape[1:]).repeat_interleave(num_videos_per_prompt, dim=0)

        told = {start: {name: of_all(value) for name, value in part.told.items()} for start, part in parts.items()}
        options = ContextSampling(
            num_inference_steps=num_inference_steps,
            context_scale=context_guidance_scale,
            guidance_scale=self._guidance(guidance_scale),
            noise_level=context_noise_level,
            eta=eta,
            noise_correlation=noise_correlation,
            seed=self._seeds(generator, clips * num_videos_per_prompt),
            batch_size=batch_size,
        )
        negative = {name: of_all(value) for name, value in parts[0].without.items()}
        return Prepared(parts[0].base, of_all(given), Timeline(told), negative, options)

    def _parts_in_time(self, asked: Asked, size: tuple[int, int]) -> dict[int, Conditionings]:
        """What clips are told, by the frame from which they are."""
        prompts = list(asked.prompt) if _several(asked.prompt) else [asked.prompt]
        travels = [prompt if isinstance(prompt, Mapping) else {0: prompt} for prompt in prompts]
        if any(min(travel, default=-1) != 0 for travel in travels):
            raise ValueError(
                f"{type(self).__name__}: prompt: expected prompts by the frame from which they hold, the first from "
                f"frame 0, got {prompts}"
            )
        parts = {}
        for start in sorted({start for travel in travels for start in travel}):
            now = [travel[max(frame for frame in travel if frame <= start)] for travel in travels]
            asked_now = asked if asked.prompt is None else dataclasses.replace(asked, prompt=now)
            parts[start] = conditionings(self, asked_now, num_frames=1, size=size)
        return parts

    def _seeds(self, generator: Generators, clips: int) -> tuple[int, ...]:
        check_generators(type(self).__name__, generator)
        sources = list(generator) if isinstance(generator, Sequence) else [generator] * clips
        if len(sources) != clips:
            raise ValueError(
                f"{type(self).__name__}: generator: expected one, or one for each of {clips} clips, got {len(sources)}"
            )
        places = ["cpu" if source is None else source.device for source in sources]
        drawn = zip(sources, places, strict=True)
        return tuple(int(torch.randint(2**62, (), generator=source, device=place)) for source, place in drawn)

    def _reported(
        self,
        make: Callable[[OnStep], Iterator[Tensor]],
        loops: int,
        options: ContextSampling,
        callback_on_step_end: OnStepEnd | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> Iterator[Float[Tensor, "b c f h w"]]:
        """Parts of clips, with one progress bar and callbacks over all their steps.

        Args:
            make: Hands out the parts; gets what is to be called after each step.
            loops: How many times the sampler goes through all of its steps.
            options: Of the sampler.
            callback_on_step_end: Called after each step; if it sets ``_interrupt``, there are no more parts.
            callback_on_step_end_tensor_inputs: What it gets.
        """
        steps = len(Sampler(self.scheduler, options.num_inference_steps, options.eta).timesteps)
        with self.reporting(loops * steps, callback_on_step_end, callback_on_step_end_tensor_inputs) as report:

            def on_step(number: int, timestep: Tensor, latents: Tensor) -> Tensor:
                latents = report(number, timestep, latents)
                if self.interrupt and number < steps - 1:
                    raise Interrupted(f"{type(self).__name__}: interrupted in the middle of a window")
                return latents

            try:
                for part in make(on_step):
                    yield part
                    if self.interrupt:
                        return
            except Interrupted:
                return
            finally:
                self.maybe_free_model_hooks()


def _several(prompts: Any) -> bool:
    return isinstance(prompts, Sequence) and not isinstance(prompts, str)
