"""Larger clips, by an image upscaler with temporal layers, in pixels or in latents (Video LDM, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import T5EncoderModel

from temporal_layers.recipes.autoencoding import pixels_per_latent
from temporal_layers.recipes.bases import Conditioning
from temporal_layers.recipes.pipelines.injected import AdapterSource, InjectedPipeline, OnStepEnd, put_layers
from temporal_layers.recipes.pipelines.outputs import Frames, VideoOutput, check_output_type, clips_of, frames_of
from temporal_layers.recipes.sampling.noise import clips_of_noise, one_a_clip
from temporal_layers.recipes.sampling.regions import in_parts
from temporal_layers.recipes.sampling.sampler import Generators, Sampler
from temporal_layers.recipes.sampling.upscaling import UpscalerModel, check_upscaling, on_grid
from temporal_layers.recipes.upscaler import Upscaler

_WHO = "VideoUpscalePipeline"
TEXT = "encoder_hidden_states"


class VideoUpscalePipeline(InjectedPipeline, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin):
    """An image upscaler with temporal layers, which makes the frames of a clip larger together.

    Make it with `from_image_pipeline`, or load what was saved with `from_pretrained`. Large clips go through the UNet
    in windows over time and tiles over space. The autoencoder works frame by frame, unless there are temporal layers in
    its decoder; its own ``vae.enable_tiling()``, and ``enable_temporal_chunking`` of the decoder's adapter, bound the
    memory that it takes.

    Args:
        unet: With temporal layers.
        scheduler: Of the result; any of diffusers with continuous latents.
        low_res_scheduler: Of the noise that is put on the low-resolution frames.
        vae: Perhaps with temporal layers in its decoder; None for an upscaler in pixels.
        text_encoder: Of Stable Diffusion's upscaler (CLIP) or DeepFloyd's (T5); None for one without text.
        tokenizer: Its tokenizer.
        factor: How many times larger frames become; None for that of the autoencoder, or 4 in pixels.
        max_noise_level: Noise levels below this one are trained on.
        align_corners: How frames are enlarged to pixels; see `Upscaler`.

    Example:
        >>> image_pipeline = StableDiffusionUpscalePipeline.from_pretrained(...)  # doctest: +SKIP
        >>> pipeline = VideoUpscalePipeline.from_image_pipeline(image_pipeline, adapter="my-layers")  # doctest: +SKIP
        >>> clip = pipeline(frames, "a road at night", tile=(64, 64), tile_overlap=16).frames[0]  # doctest: +SKIP
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["vae", "text_encoder", "tokenizer"]
    # What DeepFloyd's encode_prompt calls on itself.
    _text_preprocessing = IFSuperResolutionPipeline._text_preprocessing

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        low_res_scheduler: DDPMScheduler,
        vae: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        factor: int | None = None,
        max_noise_level: int = 350,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            low_res_scheduler=low_res_scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        if factor is None:
            factor = 4 if vae is None else pixels_per_latent(vae)
        self.register_to_config(factor=factor, max_noise_level=max_noise_level, align_corners=align_corners)

    @classmethod
    def from_image_pipeline(
        cls,
        image_pipeline: Upscaler | DiffusionPipeline,
        *,
        adapter: AdapterSource | None = None,
        decoder: AdapterSource | None = None,
        **components: Any,
    ) -> VideoUpscalePipeline:
        """Make it of an upscaler for images, whose models it shares: they get the temporal layers too, and are frozen.

        Args:
            image_pipeline: ``StableDiffusionUpscalePipeline`` (x4, in latents), ``IFSuperResolutionPipeline`` (x4, in
                pixels), or an `Upscaler` without text. Its models may have temporal layers already.
            adapter: For the UNet; None if its layers are there.
            decoder: For the decoder of the autoencoder; None for the layers that are there, or none.
            **components: In place of those of ``image_pipeline``. The scheduler is DDIM if not given.

        Raises:
            ValueError: If it is something else, an adapter does not fit, or the UNet is left without temporal layers.
        """
        upscaler, parts = image_pipeline, {}
        if not isinstance(upscaler, Upscaler):
            upscaler = Upscaler.from_pipeline(image_pipeline)
            parts = {name: getattr(image_pipeline, name) for name in ("text_encoder", "tokenizer")}
        elif upscaler.conditioner is not None:
            raise ValueError(
                f"{_WHO}.from_image_pipeline: expected an Upscaler without a conditioner, got one with; pass the "
                "pipeline that it came from, which has the text encoder"
            )
        for name in ("unet", "scheduler", "low_res_scheduler", "vae", "factor", "max_noise_level", "align_corners"):
            parts[name] = getattr(upscaler, name)
        parts |= components
        put_layers(_WHO, parts, adapter, decoder)
        return cls(**parts)

    @property
    def upscaler(self) -> Upscaler:
        """The models as ``temporal_layers.recipes.sampling`` takes them, with the scheduler of now."""
        config = self.config
        return Upscaler(
            unet=self.unet,
            scheduler=self.scheduler,
            low_res_scheduler=self.low_res_scheduler,
            vae=self.vae,
            factor=config.factor,
            max_noise_level=config.max_noise_level,
            align_corners=config.align_corners,
            conditioner=None if self.text_encoder is None else self._tokens,
        )

    def encode_prompt(self, prompt: str | list[str], **options: Any) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of texts, by the code of ``StableDiffusionUpscalePipeline`` or ``IFSuperResolutionPipeline``.

        Args:
            prompt: One, or one a clip.
            **options: Of their ``encode_prompt``.
        """
        deep = isinstance(self.text_encoder, T5EncoderModel)
        kind = IFSuperResolutionPipeline if deep else StableDiffusionUpscalePipeline
        return kind.encode_prompt(self, prompt=prompt, **options)

    def _tokens(self, texts: Sequence[str]) -> Conditioning:
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        return {TEXT: self.encode_prompt(list(texts), device=self._execution_device, **options)[0]}

    @torch.no_grad()
    def __call__(
        self,
        video: Frames,
        prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        noise_level: int = 20,
        negative_prompt: str | Sequence[str] | None = None,
        eta: float = 0.0,
        window: int = 8,
        window_overlap: int = 0,
        tile: tuple[int, int] | None = None,
        tile_overlap: int = 0,
        generator: Generators = None,
        latents: Float[Tensor, "b c f h w"] | None = None,
        prompt_embeds: Float[Tensor, "b tokens dim"] | None = None,
        negative_prompt_embeds: Float[Tensor, "b tokens dim"] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> VideoOutput | tuple[Any]:
        """Make clips larger.

        Args:
            video: Low-resolution frames in [0, 1]; see `Frames`.
            prompt: What they show, one text for all clips or one a clip; None for models without text, or no text.
            num_inference_steps: Denoising steps.
            guidance_scale: Towards the text; 1 turns it off and halves the cost. Without text there is none.
            noise_level: Of the noise put on the low-resolution frames, the same for all frames of a clip: more makes up
                for worse ones, and invents more.
            negative_prompt: To be guided away from, likewise; None for no text.
            eta: Fresh noise in each step, for schedulers that have it.
            window: Frames that the UNet sees at a time: those of its training.
            window_overlap: Frames that a window shares with the one before; there the predictions are averaged.
            tile: Height and width of what the UNet sees at a time, in latents, or pixels of the result where there is
                no autoencoder; None for whole frames.
            tile_overlap: Rows, and columns, that a tile shares with the one before; see `in_parts`.
            generator: Of all noise: one for all clips, or one a clip, so that a clip does not depend on its batch. On
                the CPU, whatever the device of the models.
            latents: Standard normal noise to begin with, in place of drawn one.
            prompt_embeds: In place of ``prompt``, one row a clip.
            negative_prompt_embeds: Likewise.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``; see `VideoOutput`.
            return_dict: Return a `VideoOutput`, or a tuple.
            callback_on_step_end: Called as ``callback(pipeline, step, timestep, {"latents": latents})`` after each
                step. It may return a dictionary with other latents, and set ``pipeline._interrupt`` to end the run.
            callback_on_step_end_tensor_inputs: What it gets.

        Returns:
            The clips, ``factor`` times as high and wide.

        Raises:
            ValueError: If arguments do not fit each other, the model or the clips; the text says which.
        """
        check_output_type(_WHO, output_type)
        upscaler, device = self.upscaler, self._execution_device
        low_res = clips_of(f"{_WHO}: video", video, _size_of(video))
        check_upscaling(_WHO, upscaler, low_res, noise_level, tile)
        told = self._told("prompt", prompt, prompt_embeds, len(low_res))
        without = None
        if guidance_scale != 1:
            without = self._told("negative_prompt", negative_prompt, negative_prompt_embeds, len(low_res))
        sources = one_a_clip(_WHO, generator, len(low_res))
        given = on_grid(upscaler, low_res).to(device)
        noise = clips_of_noise(given.shape[1:], sources).to(device)
        shape = (upscaler.channels, *given.shape[2:])
        if latents is None:
            latents = clips_of_noise(shape, sources)
        if tuple(latents.shape) != (len(sources), *shape):
            raise ValueError(f"{_WHO}: latents: expected shape {(len(sources), *shape)}, got {tuple(latents.shape)}")
        model = UpscalerModel(
            upscaler,
            given,
            noise,
            noise_level,
            told,
            without=without,
            guidance_scale=guidance_scale,
        )
        sampler = Sampler(self.scheduler, num_inference_steps, eta)
        result = self.denoise(
            in_parts(model, shape[1:], window=window, overlap=window_overlap, tile=tile, tile_overlap=tile_overlap),
            sampler,
            sampler.start(latents.to(given)),
            sources,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        frames = result if output_type == "latent" else frames_of(upscaler.decode(result), output_type)
        self.maybe_free_model_hooks()
        return VideoOutput(frames=frames) if return_dict else (frames,)

    def _told(self, name: str, texts: str | Sequence[str] | None, embeds: Tensor | None, clips: int) -> Conditioning:
        """What clips are told, or what guidance leads away from; nothing for a model without text."""
        if not isinstance(self.unet, UNet2DConditionModel):
            if texts is not None or embeds is not None:
                raise ValueError(f"{_WHO}: {name}: expected None for an upscaler that reads no text; leave it out")
            return {}
        if embeds is not None:
            if texts is not None or len(embeds) != clips:
                raise ValueError(
                    f"{_WHO}: {name}_embeds: expected one row for each of {clips} clips, and no {name} beside it, got "
                    f"{len(embeds)} rows and {name}={texts!r}"
                )
            return {TEXT: embeds.to(self._execution_device)}
        if self.text_encoder is None:
            raise ValueError(
                f"{_WHO}: {name}_embeds: expected a tensor, since there is no text encoder, got None; encode the text "
                "with the pipeline that has one, or set guidance_scale=1 if it is the negative one"
            )
        texts = [texts or ""] * clips if texts is None or isinstance(texts, str) else list(texts)
        if len(texts) != clips:
            raise ValueError(f"{_WHO}: {name}: expected one for all or one for each of {clips} clips, got {len(texts)}")
        return self._tokens(texts)


def _size_of(video: Frames) -> tuple[int, int]:
    """Height and width of the first frame."""
    while isinstance(video, list | tuple) and video:
        video = video[0]
    if isinstance(video, Image.Image):
        return video.height, video.width
    shape = tuple(getattr(video, "shape", ()))
    shape = shape[:-1] if isinstance(video, np.ndarray) else shape
    if len(shape) < 2:
        raise ValueError(f"{_WHO}: video: expected frames, got {type(video).__name__}; pass images, arrays or tensors")
    return shape[-2:]
