"""What the video stages need of an image model, whatever it is: the shipped label LDM or any diffusers pipeline.

A base offers a UNet, a scheduler, frames to latents and back, and the conditioning as tensors with one row a clip, so
that it can be cached, dropped and repeated like any other tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.recipes.autoencoding import decode_latents, encode_frames, pixels_per_latent
from temporal_layers.recipes.denoising import matches_flows
from temporal_layers.recipes.image_ldm import ImageLDM, load_shipped

Conditioning = dict[str, Tensor]
"""Tensors by name, each with one row a clip; empty for an unconditional model."""


def on_device(conditioning: Conditioning, device: torch.device | str) -> Conditioning:
    """The same on a device."""
    return {name: value.to(device) for name, value in conditioning.items()}


class VideoBase(Protocol):
    """An image model that temporal layers can be trained on.

    Attributes:
        unet: Gets the temporal layers.
        scheduler: Noise schedule, kind of prediction, and sampler.
        frame_size: Height and width of its frames in pixels.
        latent_shape: Channels, height and width of the latent of one frame.
    """

    unet: nn.Module
    scheduler: DDIMScheduler
    frame_size: tuple[int, int]
    latent_shape: tuple[int, int, int]

    def to(self, device: str) -> VideoBase:
        """Move everything to a device, in place."""

    def encode(self, frames: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
        """Latents of unit scale of frames in [0, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Frames in [0, 1] of latents of unit scale: of images, or of clips ``(b, c, f, h, w)``."""

    def conditioning(self, labels: Sequence[int], captions: Sequence[str]) -> Conditioning:
        """Conditioning of clips, from whichever of label and caption the model knows."""

    def no_conditioning(self, count: int) -> Conditioning:
        """Conditioning that says nothing, for guidance and dropping."""

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **temporal: Any) -> Tensor:
        """What the UNet says of noisy clips ``(b, c, f, h, w)`` or images ``(b, c, h, w)``; same shape.

        Args:
            noisy: Noisy latents.
            timesteps: ``()``, ``(b,)`` or ``(b, f)``.
            conditioning: One row a clip.
            **temporal: What the UNet gets by name besides: ``image_only`` and others for its temporal layers, features
                of adapters.
        """


class LabelBase:
    """The image LDM of this repository, conditioned on a label.

    Args:
        ldm: The image model.
    """

    def __init__(self, ldm: ImageLDM) -> None:
        self.ldm = ldm
        self.unet, self.scheduler = ldm.unet, ldm.scheduler
        self.frame_size, self.latent_shape = ldm.frame_size, ldm.latent_shape
        self.decode = ldm.decode

    def to(self, device: str) -> LabelBase:
        """Move everything to a device, in place."""
        self.ldm.to(device)
        return self

    def encode(self, frames: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
        """Latents by the autoencoder."""
        return self.ldm.encode(frames.to(self.ldm.device))

    def conditioning(self, labels: Sequence[int], captions: Sequence[str]) -> Conditioning:
        """The labels; captions are not used."""
        return {"labels": torch.as_tensor(labels, dtype=torch.int64)}

    def no_conditioning(self, count: int) -> Conditioning:
        """The null label."""
        return {"labels": torch.full((count,), self.ldm.conditioner.null_label)}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **temporal: Any) -> Tensor:
        """Velocity; the label, or what is given as ``encoder_hidden_states``, enters through cross-attention."""
        context = conditioning.get("encoder_hidden_states")
        if context is None:
            context = self.ldm.conditioner(conditioning["labels"])
        return self.unet(noisy, timesteps, encoder_hidden_states=context, **temporal).sample


class PipelineBase:
    """An image pipeline of diffusers: Stable Diffusion 1.x, 2.x or XL, or an unconditional DDPM or LDM.

    Args:
        pipeline: With a ``unet`` that temporal layers can be injected into. Its scheduler is replaced by DDIM with the
            same noise schedule, so that sampling is deterministic; one that matches flows stays.
        freeze: Stop gradients of the UNet and the autoencoder and put them into evaluation mode.

    Raises:
        ValueError: If the pipeline has no UNet of a known kind, or one that takes more than noisy latents and a text,
            or its text encoder cannot be called.
    """

    def __init__(self, pipeline: DiffusionPipeline, *, freeze: bool = True) -> None:
        unet = getattr(pipeline, "unet", None)
        if not isinstance(unet, UNet2DConditionModel | UNet2DModel):
            raise ValueError(
                "PipelineBase: expected a pipeline whose unet is a UNet2DConditionModel or UNet2DModel, got "
                f"{type(pipeline).__name__} with {type(unet).__name__}; choose a Stable Diffusion, DDPM or LDM pipeline"
            )
        if isinstance(unet, UNet2DConditionModel) and not hasattr(pipeline, "encode_prompt"):
            raise ValueError(
                f"PipelineBase: expected a text-to-image pipeline with encode_prompt, got {type(pipeline).__name__}"
            )
        _check_call(unet)
        self.pipeline = pipeline
        self.unet = unet
        self.vae = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
        for part in (self.unet, self.vae) if freeze else ():
            if part is not None:
                part.eval().requires_grad_(False)
        self.scheduler = pipeline.scheduler
        if not matches_flows(self.scheduler):
            self.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        factor = 1 if self.vae is None else pixels_per_latent(self.vae)
        self.latent_shape = (unet.config.in_channels, height, width)
        self.frame_size = (height * factor, width * factor)

    def to(self, device: str) -> PipelineBase:
        """Move everything to a device, in place."""
        self.pipeline.to(device)
        return self

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
        """Latents by the pipeline's autoencoder; without one, pixels in [-1, 1]."""
        pixels = (2 * frames - 1).to(self.unet.device, self.unet.dtype)
        if self.vae is None:
            return pixels
        return encode_frames(self.vae, pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames by the pipeline's autoencoder; without one, pixels. Of images, or of clips ``(b, c, f, h, w)``."""
        if self.vae is None:
            return (latents / 2 + 0.5).clamp(0, 1).float()
        return decode_latents(self.vae, latents)

    @torch.no_grad()
    def conditioning(self, labels: Sequence[int], captions: Sequence[str]) -> Conditioning:
        """Text embeddings of the captions; nothing for an unconditional model."""
        return self.text(captions)

    def text(self, captions: Sequence[str]) -> Conditioning:
        """As `conditioning`, with the gradients of the text encoders, for tuning them."""
        if isinstance(self.unet, UNet2DModel):
            return {}
        embeddings, _, *pooled = self.pipeline.encode_prompt(
            prompt=list(captions),
            device=self.unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        if not pooled:
            return {"encoder_hidden_states": embeddings}
        height, width = self.frame_size
        time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(captions))
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled[0], "time_ids": time_ids.to(embeddings)}

    def no_conditioning(self, count: int) -> Conditioning:
        """The empty text; zeros for a Stable Diffusion XL that was trained with these (its pipeline says so)."""
        nothing = self.conditioning([0] * count, [""] * count)
        if not getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False):
            return nothing
        zeros = ("encoder_hidden_states", "text_embeds")
        return {name: torch.zeros_like(value) if name in zeros else value for name, value in nothing.items()}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **temporal: Any) -> Tensor:
        """What the UNet predicts: noise, velocity, sample or flow, as the scheduler's configuration says."""
        if isinstance(self.unet, UNet2DModel):
            return self.unet(noisy, timesteps, **temporal).sample
        extra: dict[str, Any] = dict(temporal)
        if "text_embeds" in conditioning:
            extra["added_cond_kwargs"] = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        return self.unet(noisy, timesteps, encoder_hidden_states=conditioning["encoder_hidden_states"], **extra).sample


def _check_call(unet: UNet2DConditionModel | UNet2DModel) -> None:
    """Raise a ValueError if the UNet has to be told something that this file does not tell it."""
    takes, predicts = unet.config.in_channels, unet.config.out_channels
    instead = "inject into the UNet and run its own pipeline with adapter.num_frames"
    if takes != predicts:
        raise ValueError(
            f"PipelineBase: expected a UNet that takes what it predicts, got {takes} channels in and {predicts} out "
            f"(as those for inpainting and editing have); choose the text-to-image model, or {instead}"
        )
    width = unet.config.get("time_cond_proj_dim")
    if width is not None:
        raise ValueError(
            f"PipelineBase: expected a UNet without time_cond_proj_dim, got {width}: a latent consistency model, which "
            "is told its guidance scale; use its LoRA on the model that it was made of, with "
            f"scheduler=LCMScheduler(...) and guidance_scale=1, or {instead}"
        )
    if unet.config.sample_size is None:
        raise ValueError(
            "PipelineBase: expected a UNet that says its sample_size, got None; set it with "
            "unet.register_to_config(sample_size=64)"
        )


def load_base(name: str | Path = "") -> VideoBase:
    """Load an image model: a folder written by ``ImageLDM.save_pretrained``, or any pipeline diffusers can load.

    Args:
        name: Folder, or repository on the Hugging Face hub; empty for the model that comes with the package.

    Raises:
        ValueError: As `load_image_pipeline` and `PipelineBase`.
    """
    if not str(name):
        return LabelBase(load_shipped())
    if _class_of(name) == "ImageLDM":
        return LabelBase(ImageLDM.from_pretrained(name))
    return PipelineBase(load_image_pipeline(name))


def load_image_pipeline(name: str | Path) -> DiffusionPipeline:
    """Load a pipeline of diffusers.

    Args:
        name: Folder, or repository on the Hugging Face hub.

    Raises:
        ValueError: If there is no such folder and it is no name of a repository, or it holds something else.
    """
    if not Path(name).exists() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)):
        raise ValueError(
            "load_image_pipeline: expected a folder, or a repository of the hub such as 'user/model', got "
            f"{str(name)!r}: there is no such folder; check the path"
        )
    kind = _class_of(name)
    if isinstance(kind, str) and not hasattr(diffusers, kind):
        raise ValueError(
            f"load_image_pipeline: expected an image pipeline of diffusers, got {name}, which holds a {kind}; name the "
            "image model that it was made of"
        )
    return DiffusionPipeline.from_pretrained(name)


def _class_of(name: str | Path) -> Any:
    """What the folder of a pipeline says that it is; None if it says nothing."""
    index = Path(name) / "model_index.json"
    return json.loads(index.read_text()).get("_class_name") if index.is_file() else None
