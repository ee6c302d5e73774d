"""Diffusion upscalers (Video LDM, section 3.4): in pixels or in latents, for images, and for clips once injected.

The UNet gets the low-resolution frame beside the noisy one, on channels, with noise added to it and told how much:
trained so, it forgives what a generated low-resolution frame has that a real one has not. A UNet that temporal layers
were injected into does the same for the frames of a clip together.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.adapters import adapter_of
from temporal_layers.recipes.autoencoding import decode_latents, encode_frames, pixels_per_latent
from temporal_layers.recipes.bases import Conditioning, load_image_pipeline
from temporal_layers.recipes.image_ldm import load_shipped, make_scheduler

SHIPPED_UPSCALER = Path(__file__).parent / "weights" / "driving_upscaler"
SHIPPED_LATENT_UPSCALER = Path(__file__).parent / "weights" / "driving_latent_upscaler"

Conditioner = Callable[[Sequence[str]], Conditioning]


@dataclass(kw_only=True)
class Upscaler:
    """A UNet that makes frames ``factor`` times as high and wide, and what belongs to it.

    "The grid" is what the UNet works on: pixels of the result, or latents of it where there is an autoencoder.

    Attributes:
        unet: Takes the noisy frame and the low-resolution one on channels, and the noise level of the latter as
            ``class_labels``. With a learned variance behind the prediction, that is left unused.
        scheduler: Noise schedule and sampler of the result.
        low_res_scheduler: Noise schedule of the low-resolution frames.
        vae: Autoencoder of the result; None for an upscaler in pixels.
        factor: How many times larger the result is.
        max_noise_level: Noise levels below this one are trained on, as timesteps of ``low_res_scheduler``.
        align_corners: How low-resolution frames are enlarged to the grid, bilinearly, where they are smaller: false
            puts every pixel where its area was, true is what DeepFloyd IF was trained with.
        conditioner: Captions to conditioning; None if the UNet takes none.
    """

    unet: nn.Module
    scheduler: Any
    low_res_scheduler: Any
    vae: nn.Module | None = None
    factor: int = 4
    max_noise_level: int = 350
    align_corners: bool = False
    conditioner: Conditioner | None = None

    def __post_init__(self) -> None:
        last = self.low_res_scheduler.config.num_train_timesteps
        if not 1 <= self.max_noise_level <= last:
            raise ValueError(
                f"Upscaler: max_noise_level: expected 1 to {last}, the timesteps of low_res_scheduler, got "
                f"{self.max_noise_level}"
            )
        if self.factor % self.cell:
            raise ValueError(
                f"Upscaler: factor: expected a multiple of the autoencoder's {self.cell}, so that a low-resolution "
                f"frame is no larger than the grid; got {self.factor}"
            )

    @property
    def cell(self) -> int:
        """Pixels of the result per cell of the grid, along height and width."""
        return 1 if self.vae is None else pixels_per_latent(self.vae)

    @property
    def channels(self) -> int:
        """Channels of the result on the grid."""
        return 3 if self.vae is None else self.vae.config.latent_channels

    @property
    def device(self) -> torch.device:
        """Device of the UNet, taken as that of the whole."""
        return next(self.unet.parameters()).device

    def to(self, device: torch.device | str) -> Upscaler:
        """Move everything to a device, in place."""
        self.unet.to(device)
        if self.vae is not None:
            self.vae.to(device)
        return self

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
        """Frames in [-1, 1] on the grid: as they are, or latents of unit scale."""
        if self.vae is None:
            return frames
        return encode_frames(self.vae, frames.to(self.vae.dtype), batch_size=8)

    @torch.no_grad()
    def decode(self, result: Tensor) -> Tensor:
        """Frames in [0, 1] of what is on the grid: of images, or of clips ``(b, c, f, h, w)``, see `decode_latents`."""
        if self.vae is None:
            return (result / 2 + 0.5).clamp(0, 1).float()
        return decode_latents(self.vae, result, batch_size=8)

    def enlarged(self, low_res: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 grid_h grid_w"]:
        """Low-resolution frames on the grid."""
        times = self.factor // self.cell
        if times == 1:
            return low_res
        size = (low_res.shape[-2] * times, low_res.shape[-1] * times)
        return F.interpolate(low_res, size, mode="bilinear", align_corners=self.align_corners)

    def augmented(
        self, given: Float[Tensor, "b 3 f h w"], noise: Float[Tensor, "b 3 f h w"], levels: Int[Tensor, " b"]
    ) -> Float[Tensor, "b 3 f h w"]:
        """Enlarged low-resolution clips with noise of one level a clip: equation 5 of the paper."""
        num_frames = given.shape[2]
        per_frame = levels.repeat_interleave(num_frames)
        noisy = self.low_res_scheduler.add_noise(fold_frames(given), fold_frames(noise), per_frame)
        return unfold_frames(noisy, num_frames)

    def predict(
        self,
        noisy: Float[Tensor, "b c f h w"],
        timesteps: Tensor,
        given: Float[Tensor, "b 3 f h w"],
        levels: Int[Tensor, " b"],
        conditioning: Conditioning,
        *,
        frame_by_frame: bool = False,
    ) -> Float[Tensor, "b c f h w"]:
        """What the UNet says of noisy clips.

        Args:
            noisy: On the grid.
            timesteps: ``()`` or ``(b,)``.
            given: What `augmented` returns.
            levels: The noise level in it.
            conditioning: One row a clip.
            frame_by_frame: Leave the temporal layers out, if there are any.
        """
        num_frames = noisy.shape[2]
        sample = torch.cat([noisy, given], dim=1)
        if frame_by_frame or getattr(self.unet, "_temporal_state", None) is None:
            if timesteps.ndim:
                timesteps = timesteps.repeat_interleave(num_frames)
            some = {name: value.repeat_interleave(num_frames, dim=0) for name, value in conditioning.items()}
            labels = levels.repeat_interleave(num_frames)
            output = self.unet(fold_frames(sample), timesteps, class_labels=labels, **some).sample
            output = unfold_frames(output, num_frames)
        else:
            output = self.unet(sample, timesteps, class_labels=levels, **conditioning).sample
        return output[:, : noisy.shape[1]]

    def conditioning(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of clips, one row each; of empty captions, what says nothing."""
        return {} if self.conditioner is None else self.conditioner(captions)

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline) -> Upscaler:
        """The parts of ``StableDiffusionUpscalePipeline`` (x4, in latents) or ``IFSuperResolutionPipeline`` (pixels).

        The sampler becomes DDIM with the schedule that is there.

        Raises:
            ValueError: If it is neither.
        """
        low_res = getattr(pipeline, "low_res_scheduler", None) or getattr(pipeline, "image_noising_scheduler", None)
        if low_res is None or not hasattr(pipeline, "encode_prompt"):
            raise ValueError(
                "Upscaler.from_pipeline: expected a StableDiffusionUpscalePipeline or IFSuperResolutionPipeline, got "
                f"{type(pipeline).__name__}; build an Upscaler from the parts of another pipeline"
            )
        vae = getattr(pipeline, "vae", None)
        for part in (pipeline.unet, vae):
            if part is not None:
                part.eval().requires_grad_(False)
        factor = 4 if vae is None else pixels_per_latent(vae)

        @torch.no_grad()
        def conditioner(captions: Sequence[str]) -> Conditioning:
            words = {"device": pipeline.unet.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
            embeddings, *_ = pipeline.encode_prompt(list(captions), **words)
            return {"encoder_hidden_states": embeddings}

        return cls(
            unet=pipeline.unet,
            scheduler=DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False),
            low_res_scheduler=low_res,
            vae=vae,
            factor=factor,
            max_noise_level=getattr(pipeline.config, "max_noise_level", None) or 350,
            align_corners=vae is None,
            conditioner=conditioner,
        )

    def save_pretrained(self, folder: Path | str, *, with_vae: bool = True) -> None:
        """Write diffusers' folder layout with half-precision weights; temporal layers are left out: save the adapter.

        Args:
            folder: Is made if it is not there.
            with_vae: Whether an autoencoder is written too; without, `from_pretrained` has to be given it.

        Raises:
            ValueError: If there is a conditioner, which belongs to a pipeline that can save it.
        """
        if self.conditioner is not None:
            raise ValueError(
                "Upscaler.save_pretrained: expected an upscaler without captions, got one with a conditioner; save the "
                "pipeline that it came from"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Any] = {
            "unet": _plain_half(self.unet),
            "scheduler": self.scheduler,
            "low_res_scheduler": self.low_res_scheduler,
        }
        if self.vae is not None and with_vae:
            parts["vae"] = _plain_half(self.vae)
        index: dict[str, Any] = {
            "_class_name": "Upscaler",
            "factor": self.factor,
            "max_noise_level": self.max_noise_level,
            "align_corners": self.align_corners,
            "latents": self.vae is not None,
        }
        for name, part in parts.items():
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
            part.save_pretrained(folder / name)
            for path in (folder / name).glob("*.json"):  # a loaded part would note down where it came from
                config = json.loads(path.read_text())
                config.pop("_name_or_path", None)
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, vae: nn.Module | None = None) -> Upscaler:
        """Load what `save_pretrained` wrote, in single precision and in evaluation mode.

        Args:
            folder: Of the upscaler.
            vae: Autoencoder of an upscaler in latents; None for the one in the folder.

        Raises:
            ValueError: If the folder does not hold an upscaler, or one in latents without an autoencoder, or one in
                pixels, which takes none.
        """
        folder = Path(folder)
        path = folder / "model_index.json"
        index = json.loads(path.read_text()) if path.is_file() else {}
        if index.get("_class_name") != "Upscaler":
            raise ValueError(
                f"Upscaler.from_pretrained: expected a folder with a model_index.json of class Upscaler, got {folder}; "
                "write one with Upscaler.save_pretrained"
            )
        if vae is None and "vae" in index:
            vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
        if index.get("latents", False) != (vae is not None):
            raise ValueError(
                f"Upscaler.from_pretrained: vae: expected {'None' if vae else 'an autoencoder'}, as {folder} holds an "
                f"upscaler in {'pixels' if vae else 'latents without one'}, got {type(vae).__name__}"
            )
        unet = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        return cls(
            unet=unet.eval().requires_grad_(False),
            vae=vae,
            scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
            low_res_scheduler=DDPMScheduler.from_pretrained(folder / "low_res_scheduler"),
            factor=index["factor"],
            max_noise_level=index["max_noise_level"],
            align_corners=index["align_corners"],
        )


def _plain_half(model: nn.Module) -> nn.Module:
    """A copy in half precision, without temporal layers."""
    plain = copy.deepcopy(model)
    if getattr(plain, "_temporal_state", None) is not None:
        adapter_of(plain).remove()
    return plain.half()


@dataclass(frozen=True, kw_only=True)
class UpscalerConfig:
    """Sizes of a small upscaler, in pixels or in latents.

    Attributes:
        channels: Channels of the UNet's levels, the last with attention.
        layers: Residual blocks per level.
        head_dim: Channels of an attention head.
        norm_groups: Groups of the norms.
        factor: How many times larger the result is.
        max_noise_level: Noise levels of the low-resolution frames, of 1000; training goes up to this one.
    """

    channels: tuple[int, ...] = (24, 32, 64)
    layers: int = 1
    head_dim: int = 16
    norm_groups: int = 8
    factor: int = 4
    max_noise_level: int = 200


def build_upscaler(config: UpscalerConfig, vae: nn.Module | None = None, *, seed: int = 0) -> Upscaler:
    """An untrained upscaler without text: channels of the noisy frame, and three of the low-resolution one.

    Args:
        config: Sizes.
        vae: Autoencoder of the result, in whose latents the upscaler works, as Stable Diffusion's does; None for one in
            pixels.
        seed: Seed of the initial weights; the global generator is left as it was.

    Raises:
        ValueError: If the factor is no multiple of the autoencoder's.
    """
    plain = len(config.channels) - 1
    channels = 3 if vae is None else vae.config.latent_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            in_channels=channels + 3,
            out_channels=channels,
            block_out_channels=config.channels,
            layers_per_block=config.layers,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
            attention_head_dim=config.head_dim,
            norm_num_groups=config.norm_groups,
            # Of a level's number, a sinusoid: a table of levels would have to be trained row by row.
            class_embed_type="timestep",
        )
    return Upscaler(
        unet=unet.eval(),
        scheduler=make_scheduler(),
        low_res_scheduler=DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear"),
        vae=vae,
        factor=config.factor,
        max_noise_level=config.max_noise_level,
    )


def shrunk(frames: Float[Tensor, "*batch height width"], factor: int) -> Float[Tensor, "*batch h w"]:
    """Frames a ``factor`` smaller in height and width, each pixel the mean of the area that it covers."""
    return F.avg_pool2d(frames.flatten(0, -4), factor).unflatten(0, frames.shape[:-3])


def load_upscaler(name: str | Path = "") -> Upscaler:
    """Load an upscaler for images.

    Args:
        name: Folder written by `Upscaler.save_pretrained`; or folder, or repository on the Hugging Face hub, of a
            pipeline that `Upscaler.from_pipeline` takes; of those that come with the package, ``latent`` for the one in
            latents, and empty for the one in pixels.
    """
    if str(name) in ("", "latent"):
        return load_shipped_latent_upscaler() if name else load_shipped_upscaler()
    index = Path(name) / "model_index.json"
    if index.is_file() and json.loads(index.read_text()).get("_class_name") == "Upscaler":
        return Upscaler.from_pretrained(name)
    return Upscaler.from_pipeline(load_image_pipeline(name))


def load_shipped_upscaler() -> Upscaler:
    """The upscaler that comes with the package: driving frames of 16 x 24 pixels to 64 x 96; it knows images only."""
    return Upscaler.from_pretrained(SHIPPED_UPSCALER)


def load_shipped_latent_upscaler() -> Upscaler:
    """The upscaler in latents that comes with the package: driving frames of 64 x 96 pixels to 256 x 384.

    It knows images only, and works in latents of the shipped image model's autoencoder, of which it gets a copy.
    """
    return Upscaler.from_pretrained(SHIPPED_LATENT_UPSCALER, vae=load_shipped().vae)
