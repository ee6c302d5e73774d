"""The image latent diffusion model that the video model is built on: ordinary diffusers parts, small enough for a CPU.

Everything here knows single images only.  The autoencoder and the UNet are plain ``AutoencoderKL`` and
``UNet2DConditionModel``, so whatever is injected into them can be injected into a large model in the same way.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn

from temporal_layers.recipes.autoencoding import decode_latents, encode_frames, pixels_per_latent

SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "driving"


class LabelConditioner(ModelMixin, ConfigMixin):
    """Turns class labels into the tokens that the UNet's cross-attention reads.

    The label after the last one, ``null_label``, stands for "no label"; it is what classifier-free guidance and
    label dropping use.

    Args:
        num_labels: Number of classes.
        dim: Width of a token: the UNet's ``cross_attention_dim``.
        num_tokens: Tokens per label.
    """

    @register_to_config
    def __init__(self, *, num_labels: int, dim: int, num_tokens: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_labels + 1, num_tokens * dim)

    @property
    def null_label(self) -> int:
        """The label that means "no label"."""
        return self.config.num_labels

    def forward(self, labels: Int[Tensor, " batch"]) -> Float[Tensor, "batch tokens dim"]:
        """Look the tokens up.

        Raises:
            ValueError: If a label is negative or larger than ``null_label``.
        """
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= self.null_label:
            raise ValueError(
                f"LabelConditioner: expected labels from 0 to {self.null_label} (the null label), got "
                f"{int(labels.min())} to {int(labels.max())}"
            )
        return self.tokens(labels).unflatten(1, (self.config.num_tokens, self.config.dim))

    @torch.no_grad()
    def add_label(self, like: int) -> int:
        """Make room for one label more, a copy of ``like``, in front of the null label, which moves up by one."""
        new, rows = self.null_label, self.tokens.weight
        self.tokens = nn.Embedding.from_pretrained(
            torch.cat([rows[:new], rows[like][None], rows[new:]]), freeze=not rows.requires_grad
        )
        self.register_to_config(num_labels=new + 1)
        return new


@dataclass(frozen=True, kw_only=True)
class ImageLDMConfig:
    """Sizes of the image LDM.

    Attributes:
        height: Frame height in pixels.
        width: Frame width in pixels.
        vae_channels: Channels of the autoencoder's levels; each but the last halves the resolution.
        latent_channels: Channels of the latent space.
        unet_channels: Channels of the UNet's levels; all but the first have attention.
        unet_layers: Residual blocks per level of the UNet.
        num_heads: Heads of the UNet's attention.
        context_dim: Width of the label tokens.
        num_tokens: Tokens per label.
    """

    height: int = 64
    width: int = 96
    vae_channels: tuple[int, ...] = (16, 32, 64)
    latent_channels: int = 4
    unet_channels: tuple[int, ...] = (48, 96, 96)
    unet_layers: int = 1
    num_heads: int = 4
    context_dim: int = 64
    num_tokens: int = 4

    def __post_init__(self) -> None:
        divisor = 2 ** (len(self.vae_channels) + len(self.unet_channels) - 2)
        if min(len(self.vae_channels), len(self.unet_channels)) < 2:
            raise ValueError(
                "ImageLDMConfig: expected at least two levels in vae_channels and unet_channels, got "
                f"{self.vae_channels} and {self.unet_channels}"
            )
        # The UNet rounds odd sizes by itself, so only the autoencoder's factor is a hard limit.
        factor = 2 ** (len(self.vae_channels) - 1)
        if self.height % factor or self.width % factor or min(self.height, self.width) < divisor:
            raise ValueError(
                f"ImageLDMConfig: expected height and width in multiples of {factor} and at least {divisor}, got "
                f"{self.height}x{self.width}"
            )


@dataclass(kw_only=True)
class ImageLDM:
    """An autoencoder, a UNet, a label conditioner and a scheduler that belong together.

    Attributes:
        vae: Encodes frames in [-1, 1] to latents; ``config.scaling_factor`` brings these to unit variance.
        unet: Predicts the velocity v of noisy scaled latents.
        conditioner: Labels to tokens for the UNet.
        scheduler: Noise schedule and DDIM sampler.
        labels: Names of the classes.
        frame_size: Height and width of the frames that the model was made for.
    """

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    conditioner: LabelConditioner
    scheduler: DDIMScheduler
    labels: tuple[str, ...]
    frame_size: tuple[int, int]

    @property
    def factor(self) -> int:
        """Pixels per latent along height and width."""
        return pixels_per_latent(self.vae)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latent of one frame."""
        height, width = self.frame_size
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

    @property
    def device(self) -> torch.device:
        """Device of the UNet, taken as that of the whole."""
        return self.unet.device

    def to(self, device: torch.device | str) -> ImageLDM:
        """Move all parts to a device, in place."""
        for part in (self.vae, self.unet, self.conditioner):
            part.to(device)
        return self

    @torch.no_grad()
    def encode(
        self, frames: Float[Tensor, "batch 3 height width"], *, batch_size: int = 32
    ) -> Float[Tensor, "batch channels latent_height latent_width"]:
        """Latents of unit variance: the posterior's mode times the scaling factor.

        Args:
            frames: Values in [0, 1]; height and width in multiples of ``factor``.
            batch_size: Frames per pass, which bounds the memory.

        Raises:
            ValueError: If the frames have another shape than expected.
        """
        if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[2] % self.factor or frames.shape[3] % self.factor:
            raise ValueError(
                "ImageLDM.encode: expected frames (batch, 3, height, width) with sides in multiples of "
                f"{self.factor}, got {tuple(frames.shape)}"
            )
        return encode_frames(self.vae, 2 * frames - 1, batch_size=batch_size)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, batch_size: int = 32) -> Tensor:
        """Frames in [0, 1] from scaled latents: ``(batch, 3, height, width)``, or of clips with an axis for frames.

        Args:
            latents: What ``encode`` or a sampler returns, ``(batch, channels, height, width)``, or clips
                ``(batch, channels, frames, height, width)``, which go through temporal layers of the decoder.
            batch_size: Frames per pass, which bounds the memory.

        Raises:
            ValueError: If the latents have another number of axes or channels than expected.
        """
        channels = self.vae.config.latent_channels
        if latents.ndim not in (4, 5) or latents.shape[1] != channels:
            raise ValueError(
                f"ImageLDM.decode: expected latents (batch, {channels}, height, width), or with an axis for frames "
                f"behind the channels, got {tuple(latents.shape)}"
            )
        return decode_latents(self.vae, latents, batch_size=batch_size)

    def add_label(self, name: str, *, like: str) -> int:
        """Add a class that starts out as a copy of another; images of all others stay what they were.

        Args:
            name: Of the new class.
            like: Name of the class whose tokens it starts with.

        Returns:
            Its label.

        Raises:
            ValueError: If there is a class of that name already, or none of the name ``like``.
        """
        if name in self.labels or like not in self.labels:
            raise ValueError(
                f"ImageLDM.add_label: expected a new name and, for like, one of {', '.join(map(repr, self.labels))}, "
                f"got {name!r} and like={like!r}"
            )
        label = self.conditioner.add_label(self.labels.index(like))
        self.labels = (*self.labels, name)
        return label

    def save_pretrained(self, folder: Path | str) -> None:
        """Write diffusers' folder layout with half-precision safetensors (each part loads by itself, too)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        index = {"_class_name": "ImageLDM", "labels": list(self.labels), "frame_size": list(self.frame_size)}
        for name, part in self._parts().items():
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
            if isinstance(part, nn.Module):
                part = copy.deepcopy(part).half()
            part.save_pretrained(folder / name)
            _forget_origin(folder / name)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> ImageLDM:
        """Load what ``save_pretrained`` wrote, in single precision and in evaluation mode.

        Raises:
            ValueError: If the folder does not hold an image LDM.
        """
        folder = Path(folder)
        path = folder / "model_index.json"
        index = json.loads(path.read_text()) if path.is_file() else {}
        if index.get("_class_name") != "ImageLDM":
            raise ValueError(
                f"ImageLDM.from_pretrained: expected a folder with a model_index.json of class ImageLDM, got {folder}; "
                "write one with ImageLDM.save_pretrained"
            )
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        classes = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "conditioner": LabelConditioner}
        parts = {
            name: part.from_pretrained(folder / name, torch_dtype=torch.float32).eval()
            for name, part in classes.items()
        }
        return cls(**parts, scheduler=scheduler, labels=tuple(index["labels"]), frame_size=tuple(index["frame_size"]))

    def _parts(self) -> dict[str, nn.Module | DDIMScheduler]:
        return {"vae": self.vae, "unet": self.unet, "conditioner": self.conditioner, "scheduler": self.scheduler}


def _forget_origin(folder: Path) -> None:
    """Remove the path that diffusers notes down when a saved model was itself loaded from somewhere."""
    for path in folder.glob("*.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make_scheduler() -> DDIMScheduler:
    """Velocity prediction on a schedule that ends in pure noise (Lin et al. 2024), sampled from its last step on.

    Without a signal-to-noise ratio of zero at the end, and without "trailing" steps that start there, a sampler
    begins at a noise level that still told the network the mean colour in training: nights come out purple.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        # Trailing steps ignore the offset; pipelines warn of any other value.
        steps_offset=1,
    )


def build_image_ldm(config: ImageLDMConfig, labels: tuple[str, ...], *, seed: int = 0) -> ImageLDM:
    """An untrained image LDM.

    Args:
        config: Sizes.
        labels: Names of the classes.
        seed: Seed of the initial weights; the global generator is left as it was.

    Raises:
        ValueError: If there are no labels.
    """
    if not labels:
        raise ValueError("build_image_ldm: expected at least one label, got none; use ('scene',) for unlabelled data")
    levels, depth = len(config.vae_channels), len(config.unet_channels)
    latent_size = (config.height >> (levels - 1), config.width >> (levels - 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=config.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=config.latent_channels,
            norm_num_groups=8,
            sample_size=max(config.height, config.width),
        )
        unet = UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            block_out_channels=config.unet_channels,
            layers_per_block=config.unet_layers,
            # Attention at the full latent resolution costs more than it brings on frames this small.
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (depth - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (depth - 1) + ("UpBlock2D",),
            cross_attention_dim=config.context_dim,
            # Named attention_head_dim, this is diffusers' number of heads.
            attention_head_dim=config.num_heads,
            norm_num_groups=16,
        )
        conditioner = LabelConditioner(num_labels=len(labels), dim=config.context_dim, num_tokens=config.num_tokens)
    return ImageLDM(
        vae=vae.eval(),
        unet=unet.eval(),
        conditioner=conditioner.eval(),
        scheduler=make_scheduler(),
        labels=labels,
        frame_size=(config.height, config.width),
    )


def load_shipped() -> ImageLDM:
    """The driving image LDM that comes with the package (64 x 96 frames, labels of ``driving.LABELS``)."""
    return ImageLDM.from_pretrained(SHIPPED_WEIGHTS)


@torch.no_grad()
def sample_images(
    ldm: ImageLDM,
    labels: Int[Tensor, " batch"],
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "batch channels latent_height latent_width"] | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float = 2.0,
) -> Float[Tensor, "batch 3 height width"]:
    """Sample images with DDIM and classifier-free guidance (Ho & Salimans 2022).

    Args:
        ldm: The image model.
        labels: One label per image; ``ldm.conditioner.null_label`` asks for no label.
        generator: Source of the noise if none is given.
        noise: Standard normal starting point, if it is to be chosen.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of the guidance; 1 turns it off and halves the cost.

    Returns:
        Frames in [0, 1].

    Raises:
        ValueError: If the noise does not fit the labels and the model.
    """
    labels = labels.to(ldm.device)
    if noise is None:
        noise = torch.randn(len(labels), *ldm.latent_shape, generator=generator)
    if noise.ndim != 4 or len(noise) != len(labels) or noise.shape[1] != ldm.latent_shape[0]:
        raise ValueError(
            f"sample_images: expected noise of shape {(len(labels), *ldm.latent_shape)} for {len(labels)} labels, "
            f"got {tuple(noise.shape)}"
        )
    latents = noise.to(ldm.device)
    guided = guidance_scale != 1
    if guided:
        labels = torch.cat([torch.full_like(labels, ldm.conditioner.null_label), labels])
    context = ldm.conditioner(labels)
    scheduler = copy.deepcopy(ldm.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    for timestep in scheduler.timesteps:
        inputs = torch.cat([latents, latents]) if guided else latents
        velocity = ldm.unet(inputs, timestep, encoder_hidden_states=context).sample
        if guided:
            free, conditioned = velocity.chunk(2)
            velocity = free + guidance_scale * (conditioned - free)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    return ldm.decode(latents)
