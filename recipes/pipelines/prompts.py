"""What clips are to show: texts or labels, for whole clips or from frame to frame, as the conditioning of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DModel
from torch import Tensor

from temporal_layers.recipes.bases import Conditioning, VideoBase, on_device
from temporal_layers.recipes.pipelines.components import TemporalPipeline
from temporal_layers.recipes.stages.personal import TEMPORAL_TEXT, Prompt, TwoTexts

TEXT = "encoder_hidden_states"

Travel = Mapping[int, Prompt]
"""Prompts by the frame from which they hold; frame 0 among them."""

Prompts = Prompt | Travel | Sequence[Prompt | Travel] | None
"""What one clip is to show, or several; None for nothing in particular, where the model knows that."""


class Span(NamedTuple):
    """What a frame is told: a prompt, by its number, and a share of the next one."""

    prompt: int
    next: int
    share: float


def spans(starts: Sequence[int], num_frames: int, blend: int = 0) -> list[Span]:
    """Which prompts each frame is told.

    Args:
        starts: Frames from which prompts hold, in order.
        num_frames: Of the clip.
        blend: Frames in front of each start in which the prompt before turns into the new one, in equal steps; the
            frame at the start is the first one that is told the new prompt alone.

    Raises:
        ValueError: If nothing is said of frame 0, a start is not in the clip, or a prompt has no frame of its own.
    """
    starts = list(starts)
    if not starts or starts[0] != 0 or starts[-1] >= num_frames:
        raise ValueError(
            f"prompt: expected prompts by the frame from which they hold, the first from frame 0, the others from "
            f"frames below num_frames={num_frames}, got {starts}"
        )
    ends = [*starts[1:], num_frames]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    if blend < 0 or min(lengths[:-1], default=blend + 1) <= blend:
        raise ValueError(
            f"prompt_blend: expected 0 or more, and fewer frames than every prompt but the last one holds for "
            f"({lengths[:-1]}), got {blend}"
        )
    result = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        fade = 0 if number == len(starts) - 1 else blend
        result += [Span(number, number, 0.0)] * (end - start - fade)
        result += [Span(number, number + 1, step / (fade + 1)) for step in range(1, fade + 1)]
    return result


def tokens_of(pipeline: TemporalPipeline, prompts: Sequence[Prompt]) -> Conditioning:
    """Tokens of texts, or of labels by name or number, with one row each.

    Raises:
        ValueError: If the model knows no text, or no such label.
    """
    if pipeline.conditioner is not None:
        labels = torch.tensor([_label(pipeline, prompt) for prompt in prompts])
        return {TEXT: pipeline.conditioner(labels.to(pipeline.conditioner.device))}
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompt: expected texts, got {list(prompts)!r}; numbers are for models of labels")
    embeddings, _, *pooled = pipeline.encode_prompt(
        list(prompts), device=pipeline._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {TEXT: embeddings} | ({"text_embeds": pooled[0]} if pooled else {})


def _label(pipeline: TemporalPipeline, prompt: Prompt) -> int:
    names, known = list(pipeline.config.labels), pipeline.conditioner.null_label
    null = len(names)
    # An original conditioner may know fewer: labels that were taught since are none to it.
    if isinstance(prompt, str) and prompt in names:
        return min(names.index(prompt), known)
    if isinstance(prompt, int) and 0 <= prompt <= null:
        return min(prompt, known)
    raise ValueError(
        f"prompt: expected a label, one of {', '.join(map(repr, names))} or its number, or {null} for no label, got "
        f"{prompt!r}"
    )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What clips are to show and what not, as the arguments of a pipeline say it.

    Attributes:
        prompt: Texts, or labels by name or number, one a clip.
        negative_prompt: To be guided away from, one for all or one a clip; None for what says nothing.
        prompt_blend: Of `spans`, where prompts change within a clip.
        temporal_prompt: For the temporal layers alone, one for all or one a clip; None for ``prompt``.
        prompt_embeds: In place of ``prompt``, ``(clips, tokens, channels)``, or one a frame: ``(clips, frames, tokens,
            channels)``.
        negative_prompt_embeds: In place of ``negative_prompt``, likewise.
        pooled_prompt_embeds: For Stable Diffusion XL, ``(clips, channels)`` or ``(clips, frames, channels)``.
        negative_pooled_prompt_embeds: Likewise.
        temporal_prompt_embeds: In place of ``temporal_prompt``, as ``prompt_embeds``.
        negative_temporal_prompt_embeds: Likewise.
    """

    prompt: Prompts = None
    negative_prompt: Prompt | Sequence[Prompt] | None = None
    prompt_blend: int = 0
    temporal_prompt: Prompts = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    temporal_prompt_embeds: Tensor | None = None
    negative_temporal_prompt_embeds: Tensor | None = None


class Conditionings(NamedTuple):
    """What a model is told.

    Attributes:
        clips: How many.
        told: Conditioning with one row a clip, or one a frame.
        without: The same that says nothing, or what is not wanted; for guidance.
        base: The model that takes it.
    """

    clips: int
    told: Conditioning
    without: Conditioning
    base: VideoBase


def conditionings(
    pipeline: TemporalPipeline, asked: Asked, *, num_frames: int, size: tuple[int, int], num_videos_per_prompt: int = 1
) -> Conditionings:
    """The conditioning of clips.

    Args:
        pipeline: Whose text encoders or labels count.
        asked: What the clips are to show.
        num_frames: Of a clip.
        size: Height and width in pixels, which Stable Diffusion XL is told.
        num_videos_per_prompt: Clips of each prompt, one after the other.

    Raises:
        ValueError: If something is asked that the model does not know, twice, or not of all clips.
    """
    if isinstance(pipeline.unet, UNet2DModel):
        if asked != Asked():
            raise ValueError("prompt: expected None for an unconditional model; leave out all that says what to show")
        return Conditionings(num_videos_per_prompt, {}, {}, pipeline.base)
    builder = _Builder(pipeline, asked, num_frames)
    told = builder.told()
    without = builder.without(told)
    clips = builder.clips
    if "text_embeds" in told:
        ids = StableDiffusionXLPipeline._get_add_time_ids(
            pipeline, size, (0, 0), size, told[TEXT].dtype, told["text_embeds"].shape[-1]
        )
        told["time_ids"] = without["time_ids"] = ids.expand(clips, -1)
    base = pipeline.base
    if TEMPORAL_TEXT in told and not isinstance(base, TwoTexts):
        base = TwoTexts(base, base)
    device = pipeline._execution_device
    repeated = [
        {
            name: value.unflatten(0, (clips, -1)).repeat_interleave(num_videos_per_prompt, 0).flatten(0, 1)
            for name, value in on_device(conditioning, device).items()
        }
        for conditioning in (told, without)
    ]
    return Conditionings(clips * num_videos_per_prompt, *repeated, base)


class _Builder:
    """Tokens of what is asked, by the text encoder of the image model and by that of the temporal layers."""

    def __init__(self, pipeline: TemporalPipeline, asked: Asked, num_frames: int) -> None:
        self.pipeline, self.asked, self.num_frames = pipeline, asked, num_frames
        self.original = pipeline.original_text()
        self.nothing = "" if pipeline.conditioner is None else len(pipeline.config.labels)
        self.travels = self._travels("prompt", asked.prompt, asked.prompt_embeds)
        self.clips = len(asked.prompt_embeds if self.travels is None else self.travels)
        own_text = self.original is not pipeline
        self.two_texts = own_text or asked.temporal_prompt is not None or asked.temporal_prompt_embeds is not None

    def told(self) -> Conditioning:
        asked = self.asked
        if self.travels is None:
            told = self._given(prompt_embeds=asked.prompt_embeds, pooled_prompt_embeds=asked.pooled_prompt_embeds)
        else:
            told = self._rows(self.pipeline, self.travels)
        if not self.two_texts:
            return told
        if asked.temporal_prompt_embeds is not None:
            self._not_twice("temporal_prompt", asked.temporal_prompt)
            return told | {TEMPORAL_TEXT: self._flat("temporal_prompt_embeds", asked.temporal_prompt_embeds)}
        travels = self.travels
        if asked.temporal_prompt is not None:
            travels = self._for_clips("temporal_prompt", self._travels("temporal_prompt", asked.temporal_prompt, None))
        if travels is None:
            raise ValueError(
                "temporal_prompt: expected a prompt for the text encoder of the temporal layers, got None and "
                "prompt_embeds of the other one; pass temporal_prompt or temporal_prompt_embeds as well"
            )
        return told | {TEMPORAL_TEXT: self._rows(self.original, travels)[TEXT]}

    def without(self, told: Conditioning) -> Conditioning:
        asked, wanted = self.asked, self.asked.negative_prompt
        prompts = [self.nothing if wanted is None else wanted] if not _several(wanted) else list(wanted)
        negative = self._for_clips("negative_prompt", [{0: prompt} for prompt in prompts])
        zeros = wanted is None and self.pipeline.config.force_zeros_for_empty_prompt
        if asked.negative_prompt_embeds is not None:
            self._not_twice("negative_prompt", wanted)
            without = self._given(
                negative_prompt_embeds=asked.negative_prompt_embeds,
                negative_pooled_prompt_embeds=asked.negative_pooled_prompt_embeds,
            )
        elif zeros:
            without = {name: torch.zeros_like(told[name]) for name in (TEXT, "text_embeds") if name in told}
        else:
            without = self._rows(self.pipeline, negative)
        if not self.two_texts:
            return without
        embeds = asked.negative_temporal_prompt_embeds
        if embeds is not None:
            return without | {TEMPORAL_TEXT: self._flat("negative_temporal_prompt_embeds", embeds)}
        if zeros:
            return without | {TEMPORAL_TEXT: torch.zeros_like(told[TEMPORAL_TEXT])}
        return without | {TEMPORAL_TEXT: self._rows(self.original, negative)[TEXT]}

    def _travels(self, name: str, prompts: Prompts, embeds: Tensor | None) -> list[Travel] | None:
        """One a clip; None if there are tokens in place of prompts."""
        if embeds is not None:
            self._not_twice(name, prompts)
            return None
        if prompts is None:
            if self.pipeline.conditioner is None:
                raise ValueError(f"{name}: expected a text or {name}_embeds, got neither; '' asks for nothing")
            prompts = self.nothing
        prompts = list(prompts) if _several(prompts) else [prompts]
        if not prompts:
            raise ValueError(f"{name}: expected at least one, got an empty list")
        return [prompt if isinstance(prompt, Mapping) else {0: prompt} for prompt in prompts]

    def _not_twice(self, name: str, prompts: Prompts) -> None:
        if prompts is not None:
            raise ValueError(f"{name}: expected it or {name}_embeds, got both; leave one of them out")

    def _for_clips(self, name: str, values: list[Travel]) -> list[Travel]:
        if len(values) not in (1, self.clips):
            raise ValueError(f"{name}: expected one for all or one for each of {self.clips} clips, got {len(values)}")
        return values * self.clips if len(values) == 1 else values

    def _given(self, **embeds: Tensor | None) -> Conditioning:
        """Tokens that came, and the pooled ones where the model takes these."""
        (name, tokens), (pooled_name, pooled) = embeds.items()
        wanted = self.pipeline.unet.config.addition_embed_type == "text_time"
        if wanted != (pooled is not None):
            raise ValueError(
                f"{pooled_name}: expected {'a tensor' if wanted else 'None'} beside {name} for this model, got "
                f"{'None' if wanted else 'a tensor'}; encode_prompt of the pipeline returns both for models with both"
            )
        given = {TEXT: self._flat(name, tokens)}
        return given | ({"text_embeds": self._flat(pooled_name, pooled, axes=2)} if wanted else {})

    def _flat(self, name: str, value: Tensor, axes: int = 3) -> Tensor:
        per_frame = value.ndim == axes + 1
        shape = (self.clips, self.num_frames) if per_frame else (self.clips,)
        if value.ndim not in (axes, axes + 1) or tuple(value.shape[: len(shape)]) != shape:
            rest = "tokens, channels" if axes == 3 else "channels"
            raise ValueError(
                f"{name}: expected ({self.clips}, {rest}), one row a clip, or ({self.clips}, {self.num_frames}, {rest})"
                f", one a frame, got {tuple(value.shape)}"
            )
        return value.flatten(0, 1) if per_frame else value

    def _rows(self, pipeline: TemporalPipeline, travels: list[Travel]) -> Conditioning:
        """Conditioning with one row a clip, or one a frame if a prompt changes within a clip."""
        prompts = list(dict.fromkeys(prompt for travel in travels for prompt in travel.values()))
        encoded = tokens_of(pipeline, prompts)
        places = [[prompts.index(travel[start]) for start in sorted(travel)] for travel in travels]
        frames = [spans(sorted(travel), self.num_frames, self.asked.prompt_blend) for travel in travels]
        if all(len(travel) == 1 for travel in travels):
            return {name: value[[own[0] for own in places]] for name, value in encoded.items()}
        clips = zip(places, frames, strict=True)
        told = [(own[span.prompt], own[span.next], span.share) for own, clip in clips for span in clip]
        first, second, shares = (list(column) for column in zip(*told, strict=True))
        return {name: _between(value[first], value[second], shares) for name, value in encoded.items()}


def _several(prompts: Prompts) -> bool:
    return isinstance(prompts, Sequence) and not isinstance(prompts, str)


def _between(first: Tensor, second: Tensor, shares: list[float]) -> Tensor:
    """A lerp, which at a share of 0 is the first bit for bit."""
    return first.lerp(second, first.new_tensor(shares).reshape(-1, *[1] * (first.ndim - 1)))
