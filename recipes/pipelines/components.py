"""The components of an image model with temporal layers: Stable Diffusion, the label model, or an unconditional one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin, TextualInversionLoaderMixin
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.adapters import TemporalAdapter
from temporal_layers.config import check_at_least
from temporal_layers.recipes.autoencoding import decode_latents, encode_frames, pixels_per_latent
from temporal_layers.recipes.bases import LabelBase, PipelineBase, VideoBase
from temporal_layers.recipes.image_ldm import ImageLDM, LabelConditioner
from temporal_layers.recipes.pipelines.injected import AdapterSource, InjectedPipeline, put_layers
from temporal_layers.recipes.pipelines.outputs import VideoOutput, frames_of
from temporal_layers.recipes.sampling.loop import Scale
from temporal_layers.recipes.stages.personal import TwoTexts, is_injected

TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "conditioner")
"""Components that turn a text or a label into tokens."""

TEMPORAL = "temporal_"
"""In front of the name of such a component: the original one, whose tokens the temporal layers go on reading."""

GUIDANCE = {"text": 7.5, "labels": 2.0}
"""Usual strength of the guidance towards a prompt."""


class TemporalPipeline(InjectedPipeline, TextualInversionLoaderMixin, StableDiffusionXLLoraLoaderMixin):
    """Base of pipelines with the components of one image model, temporal layers in its UNet and perhaps its decoder.

    Args:
        unet: With temporal layers.
        scheduler: Any of diffusers with continuous latents.
        vae: Perhaps with temporal layers in its decoder; None for a model of pixels.
        text_encoder: Of Stable Diffusion 1.x, 2.x or XL; None for other models.
        tokenizer: Its tokenizer.
        text_encoder_2: The second one of Stable Diffusion XL.
        tokenizer_2: Its tokenizer.
        conditioner: Of the label model of this library, in place of text encoders.
        temporal_text_encoder: The text encoder that the temporal layers were trained with, where ``text_encoder`` was
            tuned since (DreamBooth; Video LDM, section 4.2.1): the temporal layers read its tokens.
        temporal_tokenizer: Its tokenizer.
        temporal_text_encoder_2: Likewise.
        temporal_tokenizer_2: Likewise.
        temporal_conditioner: Likewise.
        labels: Names of the labels, for the label model.
        frame_size: Height and width of its frames.
        force_zeros_for_empty_prompt: As in ``StableDiffusionXLPipeline``: no negative prompt is zeros, not the tokens
            of the empty text.
    """

    model_cpu_offload_seq = (
        "text_encoder->text_encoder_2->temporal_text_encoder->temporal_text_encoder_2->conditioner->"
        "temporal_conditioner->unet->vae"
    )
    _optional_components: ClassVar[list[str]] = ["vae", *TEXT_PARTS, *(TEMPORAL + name for name in TEXT_PARTS)]

    def __init__(
        self,
        unet: UNet2DConditionModel | UNet2DModel,
        scheduler: Any,
        vae: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        text_encoder_2: nn.Module | None = None,
        tokenizer_2: Any = None,
        conditioner: LabelConditioner | None = None,
        temporal_text_encoder: nn.Module | None = None,
        temporal_tokenizer: Any = None,
        temporal_text_encoder_2: nn.Module | None = None,
        temporal_tokenizer_2: Any = None,
        temporal_conditioner: LabelConditioner | None = None,
        labels: list = (),
        frame_size: list = (),
        force_zeros_for_empty_prompt: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            conditioner=conditioner,
            temporal_text_encoder=temporal_text_encoder,
            temporal_tokenizer=temporal_tokenizer,
            temporal_text_encoder_2=temporal_text_encoder_2,
            temporal_tokenizer_2=temporal_tokenizer_2,
            temporal_conditioner=temporal_conditioner,
        )
        self.register_to_config(
            labels=list(labels),
            frame_size=list(frame_size),
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        )

    @classmethod
    def from_image_pipeline(
        cls,
        image_pipeline: DiffusionPipeline | ImageLDM,
        *,
        adapter: AdapterSource | None = None,
        decoder: AdapterSource | None = None,
        temporal_text: DiffusionPipeline | ImageLDM | None = None,
        **components: Any,
    ) -> TemporalPipeline:
        """Make a video pipeline of an image pipeline, whose components it shares: they get the temporal layers too.

        Args:
            image_pipeline: Stable Diffusion 1.x, 2.x or XL, an unconditional DDPM or LDM, or the label model of this
                library. Its UNet and autoencoder may have temporal layers already.
            adapter: For the UNet; None if its layers are there.
            decoder: For the decoder of the autoencoder; None for the layers that are there, or none.
            temporal_text: The original image pipeline, if the text encoder of this one was tuned: the temporal layers
                go on reading its tokens.
            **components: Others of the pipeline's components, and in place of those of ``image_pipeline``. The
                scheduler is DDIM if not given, with the noise schedule of ``image_pipeline``.

        Raises:
            ValueError: If the image pipeline is of another kind, an adapter does not fit, or the UNet is left without
                temporal layers.
        """
        parts = _parts(image_pipeline)
        if temporal_text is not None:
            parts |= {TEMPORAL + name: part for name, part in _text_parts(temporal_text).items()}
        parts |= components
        put_layers(cls.__name__, parts, adapter, decoder)
        return cls(**parts)

    @property
    def adapter(self) -> TemporalAdapter:
        """The temporal layers of the UNet."""
        return self._adapter("unet")

    @property
    def decoder(self) -> TemporalAdapter:
        """The temporal layers of the autoencoder's decoder."""
        return self._adapter("vae")

    def _adapter(self, name: str) -> TemporalAdapter:
        found = self.adapters().get(name)
        if found is None:
            raise ValueError(
                f"{type(self).__name__}: {name}: expected temporal layers, got none; make the pipeline with "
                f"from_image_pipeline, or call TemporalAdapter.from_pretrained(pipeline.{name}, ...)"
            )
        return found

    @property
    def base(self) -> VideoBase:
        """The image model as ``temporal_layers.recipes.sampling`` takes it, with the scheduler of now."""
        own = self._base()
        original = self.original_text()
        return own if original is self else TwoTexts(own, original._base())

    def _base(self) -> VideoBase:
        if self.conditioner is None:
            base = PipelineBase(self, freeze=False)
            base.scheduler = self.scheduler
            return base
        return LabelBase(
            ImageLDM(
                vae=self.vae,
                unet=self.unet,
                conditioner=self.conditioner,
                scheduler=self.scheduler,
                labels=tuple(self.config.labels),
                frame_size=tuple(self.config.frame_size),
            )
        )

    def original_text(self) -> TemporalPipeline:
        """The pipeline with the text encoders that the temporal layers read; itself if there are no others."""
        others = {name: getattr(self, TEMPORAL + name) for name in TEXT_PARTS}
        others = {name: part for name, part in others.items() if part is not None}
        if not others:
            return self
        twin = copy.copy(self)
        for name, part in others.items():
            setattr(twin, name, part)
        return twin

    @property
    def _factor(self) -> int:
        return 1 if self.vae is None else pixels_per_latent(self.vae)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        default, factor = self.base.frame_size, self._factor
        size = (default[0] if height is None else height, default[1] if width is None else width)
        if min(size) < 1 or size[0] % factor or size[1] % factor:
            raise ValueError(
                f"{type(self).__name__}: height and width: expected multiples of {factor}, got {size[0]} and {size[1]}"
            )
        return size

    def _guidance(self, scale: Scale | None) -> Scale:
        return GUIDANCE["text" if self.conditioner is None else "labels"] if scale is None else scale

    def encode_prompt(self, prompt: str | list[str], **options: Any) -> tuple[Tensor | None, ...]:
        """Tokens of texts, by the code of ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``.

        Args:
            prompt: One, or one a clip.
            **options: Of their ``encode_prompt``.

        Returns:
            What that returns.
        """
        kind = StableDiffusionPipeline if self.text_encoder_2 is None else StableDiffusionXLPipeline
        return kind.encode_prompt(self, prompt=prompt, **options)

    @torch.no_grad()
    def encode_clips(self, frames: Float[Tensor, "b 3 f height width"]) -> Float[Tensor, "b c f h w"]:
        """Latents of unit scale of frames in [0, 1], each by itself, on the device that the models run on."""
        pixels = 2 * fold_frames(frames).to(self._execution_device) - 1
        if self.vae is None:
            return unfold_frames(pixels.to(self.unet.dtype), frames.shape[2])
        with self._vae_in_range():
            return unfold_frames(encode_frames(self.vae, pixels.to(self.vae.dtype)), frames.shape[2])

    @torch.no_grad()
    def decode_clips(
        self, latents: Float[Tensor, "b c f h w"], *, decode_chunk_size: int | None = None
    ) -> Float[Tensor, "b 3 f height width"]:
        """Frames in [0, 1] of latents of unit scale.

        Args:
            latents: Of clips.
            decode_chunk_size: Frames that are decoded at a time, which bounds the memory: without temporal layers in
                the decoder any number, and with some as in ``pipeline.decoder.enable_temporal_chunking``, which can
                also be called before, with an overlap. None for 16 without and whole clips with them.

        Raises:
            ValueError: As there.
        """
        self.check_decoding(decode_chunk_size)
        if self.vae is None:
            return self.base.decode(latents)
        options = {} if decode_chunk_size is None else {"batch_size": decode_chunk_size}
        with self._vae_in_range(), self._in_chunks(decode_chunk_size):
            return decode_latents(self.vae, latents, **options)

    def check_decoding(self, decode_chunk_size: int | None) -> None:
        """Raise a ValueError unless `decode_clips` takes such chunks: before there are clips that would be lost."""
        if decode_chunk_size is None:
            return
        check_at_least(f"{type(self).__name__}: decode_chunk_size", decode_chunk_size, 1)
        if self.vae is not None:
            with self._in_chunks(decode_chunk_size):
                pass

    def finish(
        self, latents: Float[Tensor, "b c f h w"], *, output_type: str, return_dict: bool, **decoding: Any
    ) -> VideoOutput | tuple[Any]:
        """What a call of the pipeline returns.

        Args:
            latents: Clean ones.
            output_type: Of `VideoOutput`.
            return_dict: Or a tuple.
            **decoding: Of `decode_clips`.
        """
        frames = latents if output_type == "latent" else frames_of(self.decode_clips(latents, **decoding), output_type)
        self.maybe_free_model_hooks()
        return VideoOutput(frames=frames) if return_dict else (frames,)

    @contextmanager
    def _vae_in_range(self) -> Iterator[None]:
        """Single precision for the autoencoder of Stable Diffusion XL, which leaves the range of fp16."""
        narrow = self.vae.dtype == torch.float16 and self.text_encoder_2 is not None and self.vae.config.force_upcast
        if narrow:
            self.vae.to(torch.float32)
        try:
            yield
        finally:
            if narrow:
                self.vae.to(torch.float16)

    @contextmanager
    def _in_chunks(self, size: int | None) -> Iterator[None]:
        if size is None or not is_injected(self.vae):
            yield
            return
        state = self.vae._temporal_state
        before = state.chunking
        self.decoder.enable_temporal_chunking(size)
        try:
            yield
        finally:
            state.chunking = before


def _text_parts(pipeline: DiffusionPipeline | ImageLDM) -> dict[str, Any]:
    found = {name: getattr(pipeline, name, None) for name in TEXT_PARTS}
    return {name: part for name, part in found.items() if part is not None}


def _parts(pipeline: DiffusionPipeline | ImageLDM) -> dict[str, Any]:
    """Components of an image pipeline by the names of ours."""
    if isinstance(pipeline, ImageLDM):
        parts = {name: getattr(pipeline, name) for name in ("unet", "vae", "scheduler")}
        names = {"labels": list(pipeline.labels), "frame_size": list(pipeline.frame_size)}
        return {**parts, **_text_parts(pipeline), **names}
    base = PipelineBase(pipeline, freeze=False)
    zeros = getattr(pipeline.config, "force_zeros_for_empty_prompt", False)
    parts = {"unet": base.unet, "vae": base.vae, "scheduler": base.scheduler}
    return {**parts, **_text_parts(pipeline), "force_zeros_for_empty_prompt": zeros}
