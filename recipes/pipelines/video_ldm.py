"""Clips of a text, a label or nothing, from given first frames on, or out of another clip (Video LDM, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.config import check_at_least
from temporal_layers.recipes.conditioning import ContextPlanes, augment, prediction_mask, signal_levels
from temporal_layers.recipes.pipelines.components import TemporalPipeline
from temporal_layers.recipes.pipelines.injected import OnStepEnd
from temporal_layers.recipes.pipelines.outputs import Frames, VideoOutput, check_output_type, clips_of
from temporal_layers.recipes.pipelines.prompts import Asked, Conditionings, Prompts, conditionings
from temporal_layers.recipes.sampling.loop import Branch, GuidedModel, Scale, is_on
from temporal_layers.recipes.sampling.noise import clips_of_noise, one_a_clip
from temporal_layers.recipes.sampling.regions import Denoiser, InRegions, regions, windows
from temporal_layers.recipes.sampling.sampler import Generators, Sampler
from temporal_layers.recipes.stages.personal import Prompt

_WHO = "VideoLDMPipeline"
NUM_FRAMES = 8
STRENGTH = 0.8

Noise = Callable[[Sequence[int], Sequence[torch.Generator]], Tensor]
"""Makes standard normal noise of the shape of one clip, and a generator for each clip; as `clips_of_noise`."""


def guidance_ramp(first: float, last: float, num_frames: int) -> list[float]:
    """A guidance scale for each frame, in equal steps from the first frame to the last (Stable Video Diffusion)."""
    return torch.linspace(first, last, num_frames, dtype=torch.float64).tolist()


class Given(NamedTuple):
    """First frames of clips.

    Attributes:
        latents: Of all frames, zeros where none is given.
        mask: 1 where a frame is given.
        context: What the temporal layers are told of them.
        without: The same with no frame given.
    """

    latents: Float[Tensor, "b c f h w"]
    mask: Float[Tensor, " f"]
    context: Float[Tensor, "b planes f h w"]
    without: Float[Tensor, "b planes f h w"]


class VideoLDMPipeline(TemporalPipeline):
    """An image model with temporal layers as a video model.

    Make it of an image pipeline with `from_image_pipeline`, or load what was saved with `from_pretrained`.

    Example:
        >>> pipeline = VideoLDMPipeline.from_image_pipeline(image_pipeline, adapter="my-motion")  # doctest: +SKIP
        >>> clip = pipeline("a road at night", num_frames=16).frames[0]  # doctest: +SKIP
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts = None,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: Scale | None = None,
        negative_prompt: Prompt | Sequence[Prompt] | None = None,
        prompt_blend: int = 0,
        temporal_prompt: Prompts = None,
        num_videos_per_prompt: int = 1,
        image: Frames | None = None,
        context_guidance_scale: Scale = 1.0,
        context_noise_level: int = 0,
        video: Frames | None = None,
        strength: float | None = None,
        eta: float = 0.0,
        window: int | None = None,
        window_overlap: int | None = None,
        generator: Generators = None,
        noise: Noise | None = None,
        latents: Float[Tensor, "b c f h w"] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        temporal_prompt_embeds: Tensor | None = None,
        negative_temporal_prompt_embeds: Tensor | None = None,
        decode_chunk_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> VideoOutput | tuple[Any]:
        """Make clips.

        Args:
            prompt: What they are to show: a text, or for the label model the name or the number of a label; a list for
                several clips. Where it changes within a clip, a dictionary from the first frame of each prompt to the
                prompt: ``{0: "a road by day", 12: "a road at night"}``. The image model is told the prompt of each
                frame; the temporal layers are told that of the first frame, of each window where there are windows.
                None for an unconditional model, or no label.
            num_frames: Of a clip, given ones included; 8 if not given, or those of ``video``.
            height: In pixels; that of the image model's training if not given.
            width: Likewise.
            num_inference_steps: Denoising steps.
            guidance_scale: Guidance towards the prompt, for all frames or one number a frame (`guidance_ramp`); 1 turns
                it off and halves the cost. 7.5 for texts and 2 for labels if not given.
            negative_prompt: To be guided away from, one for all clips or one each.
            prompt_blend: Frames in front of a change of prompt in which its tokens turn linearly into those of the new
                one.
            temporal_prompt: For the temporal layers alone. ``prompt`` if not given, read by the text encoder that the
                temporal layers were trained with, if the pipeline has one of its own for them.
            num_videos_per_prompt: Clips of each prompt.
            image: First frames of the clips, one or two in the paper, for temporal layers that were trained to predict:
                an image for all clips, a list of the first images, or a list of lists with one for each clip.
            context_guidance_scale: Guidance towards them (equation 4), for all frames or one number a frame; 1 turns it
                off. Beside the other guidance each adds its own part.
            context_noise_level: Of noise put on what the temporal layers are told of them, for layers that were trained
                with it.
            video: Clips to begin with, in part noise: one for all or one each.
            strength: How much of it is noise, from just above 0 to 1: the share of the steps that are taken. 0.8 if not
                given.
            eta: Fresh noise in each step, from 0 (none: DDIM) to below 1, for schedulers that have it as an option.
            window: Frames that the model sees at a time, for clips longer than those of its training: in every step
                the predictions of all windows are averaged, those in the middle of a window weighed more.
            window_overlap: Frames that a window shares with the one before; half of a window if not given.
            generator: Of all noise: one for all clips, or one a clip, so that a clip does not depend on its batch. On
                the CPU, whatever the device of the models.
            noise: Makes the noise to begin with: `clips_of_noise`, independent from frame to frame, if not given.
            latents: Standard normal noise to begin with, in place of drawn one.
            prompt_embeds: In place of ``prompt``, as `Asked` says of this and the arguments like it.
            negative_prompt_embeds: Likewise.
            pooled_prompt_embeds: Likewise.
            negative_pooled_prompt_embeds: Likewise.
            temporal_prompt_embeds: Likewise.
            negative_temporal_prompt_embeds: Likewise.
            decode_chunk_size: Frames that are decoded at a time; see `decode_clips`.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``; see `VideoOutput`.
            return_dict: Return a `VideoOutput`, or a tuple.
            callback_on_step_end: Called as ``callback(pipeline, step, timestep, {"latents": latents})`` after each
                step. It may return a dictionary with other latents, and set ``pipeline._interrupt`` to end the run.
            callback_on_step_end_tensor_inputs: What it gets.

        Returns:
            The clips.

        Raises:
            ValueError: If arguments do not fit each other, the model or the clips; the text says which.
        """
        check_output_type(_WHO, output_type)
        _check_pairs(image, context_guidance_scale, context_noise_level, video, strength, window, window_overlap)
        self.adapter  # noqa: B018 - says what to do if there is none
        check_at_least(f"{_WHO}: num_videos_per_prompt", num_videos_per_prompt, 1)
        self.check_decoding(decode_chunk_size)
        size = self._size(height, width)
        clean = None if video is None else clips_of(f"{_WHO}: video", video, size)
        num_frames = _num_frames(num_frames, clean)
        asked = Asked(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_blend=prompt_blend,
            temporal_prompt=temporal_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            temporal_prompt_embeds=temporal_prompt_embeds,
            negative_temporal_prompt_embeds=negative_temporal_prompt_embeds,
        )
        what = conditionings(self, asked, num_frames=num_frames, size=size, num_videos_per_prompt=num_videos_per_prompt)
        sources = one_a_clip(_WHO, generator, what.clips)
        share = 1.0 if video is None else STRENGTH if strength is None else strength
        sampler = Sampler(self.scheduler, num_inference_steps, eta, strength=share)
        start = sampler.start(*self._noise_and_clean(latents, noise, clean, num_frames, size, sources))
        given = None
        if image is not None:
            given = self._given(clips_of(f"{_WHO}: image", image, size), start, context_noise_level, sources)
        scales = (self._guidance(guidance_scale), context_guidance_scale)
        model = _model(what, given, *(_scale(scale, num_frames) for scale in scales))
        if window is not None:
            overlap = window // 2 if window_overlap is None else window_overlap
            model = InRegions(model, regions(windows(num_frames, window, overlap)), ramp=True)
        result = self.denoise(
            model,
            sampler,
            start,
            sources,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if given is not None:
            result = torch.where(given.mask[:, None, None] > 0, given.latents.to(result), result)
        return self.finish(
            result, output_type=output_type, return_dict=return_dict, decode_chunk_size=decode_chunk_size
        )

    def _noise_and_clean(
        self,
        latents: Tensor | None,
        noise: Noise | None,
        clean: Tensor | None,
        num_frames: int,
        size: tuple[int, int],
        sources: list[torch.Generator],
    ) -> tuple[Tensor, Tensor | None]:
        """What the sampler begins with."""
        shape = (self.unet.config.in_channels, num_frames, *(side // self._factor for side in size))
        if latents is not None and noise is not None:
            raise ValueError(f"{_WHO}: noise: expected it or latents, got both; leave one of them out")
        name = "noise" if latents is None else "latents"
        latents = (noise or clips_of_noise)(shape, sources) if latents is None else latents
        if tuple(latents.shape) != (len(sources), *shape):
            raise ValueError(f"{_WHO}: {name}: expected shape {(len(sources), *shape)}, got {tuple(latents.shape)}")
        latents = latents.to(self._execution_device, self.unet.dtype)
        if clean is not None:
            clean = _for_clips("video", self.encode_clips(clean), len(sources)).to(latents)
        return latents, clean

    def _given(
        self, frames: Float[Tensor, "b 3 s height width"], start: Tensor, level: int, sources: list[torch.Generator]
    ) -> Given:
        """First frames, and what the temporal layers are told of them."""
        if self.adapter.config.context is None:
            raise ValueError(
                f"{_WHO}: image: expected None, since the temporal layers take no given frames, got some; train layers "
                "that do with `temporal-layers train predict`"
            )
        planes = ContextPlanes.of(self.adapter)
        if not 0 <= level <= planes.max_noise_level:
            raise ValueError(
                f"{_WHO}: context_noise_level: expected 0 to {planes.max_noise_level}, which the temporal layers were "
                f"trained with, got {level}"
            )
        clips, channels, num_frames, height, width = start.shape
        first = _for_clips("image", self.encode_clips(frames), clips).float()
        known = first.new_zeros(clips, channels, num_frames, height, width)
        mask = prediction_mask(first.shape[2], num_frames).to(known.device)
        known[:, :, : first.shape[2]] = first
        told = known
        if level:
            told = augment(known, level, clips_of_noise(start.shape[1:], sources), signal_levels(self.scheduler))
        context = planes.build(told, mask.expand(clips, -1), level=level)
        return Given(known, mask, context, planes.without(context))


def _model(what: Conditionings, given: Given | None, text_scale: Scale, context_scale: Scale) -> Denoiser:
    context = None if given is None else given.context
    return GuidedModel(
        what.base,
        Branch(what.told, context),
        without_text=Branch(what.without, context),
        without_context=None if given is None else Branch(what.told, given.without),
        text_scale=text_scale,
        context_scale=context_scale,
    )


def _check_pairs(
    image: Any, scale: Scale, level: int, video: Any, strength: Any, window: int | None, overlap: int | None
) -> None:
    """Arguments that mean nothing without another one."""
    pairs = {
        "context_guidance_scale": (is_on(scale), "image", image),
        "context_noise_level": (level != 0, "image", image),
        "strength": (strength is not None, "video", video),
        "window_overlap": (overlap is not None, "window", window),
    }
    for name, (is_set, needed, value) in pairs.items():
        if is_set and value is None:
            raise ValueError(f"{_WHO}: {name}: expected {needed} beside it, got none; pass {needed}, or leave it out")


def _num_frames(wanted: int | None, clean: Tensor | None) -> int:
    if clean is not None and wanted not in (None, clean.shape[2]):
        raise ValueError(
            f"{_WHO}: num_frames: expected the {clean.shape[2]} frames of the video, got {wanted}; cut the video"
        )
    number = clean.shape[2] if clean is not None else NUM_FRAMES if wanted is None else wanted
    check_at_least(f"{_WHO}: num_frames", number, 1)
    return number


def _scale(scale: Scale, num_frames: int) -> Scale:
    if isinstance(scale, int | float):
        return float(scale)
    scales = [float(value) for value in scale]
    if len(scales) != num_frames:
        raise ValueError(
            f"{_WHO}: guidance scale: expected one number, or one for each of {num_frames} frames, got {len(scales)}"
        )
    return scales


def _for_clips(name: str, latents: Tensor, clips: int) -> Tensor:
    if len(latents) not in (1, clips):
        raise ValueError(f"{_WHO}: {name}: expected one for all or one for each of {clips} clips, got {len(latents)}")
    return latents.expand(clips, *latents.shape[1:])
