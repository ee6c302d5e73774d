"""Options of the decoder's training, and its batches: patches of clips, and noise for their latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.recipes.stages.decoder_loss import encode_mode
from temporal_layers.recipes.stages.decoder_metrics import as_unit, latent_scale
from temporal_layers.recipes.stages.discriminator import DiscriminatorConfig
from temporal_layers.recipes.training.streams import Batch, SampleStream, Shuffled, Stream, generator_at, positions


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """How a decoder is tuned.

    Attributes:
        train: ``temporal`` trains the temporal layers alone, so that the image decoder is still there with the layers
            switched off; ``decoder`` trains everything behind the latents. The encoder is frozen either way.
        num_frames: Frames of a training clip.
        crop: Height and width of the patches to train on, in pixels; 0 for whole frames.
        latent_noise: Largest standard deviation of the noise on the latents, in units of that of the latents, drawn
            anew for each clip, independent in each frame. Teaches the decoder to smooth out what a sampler gets wrong.
        perceptual: ``edges``, ``encoder``, ``lpips``, ``none``, or a file; see ``perceptual.perceptual_loss``.
        perceptual_weight: Its weight beside L1.
        disc_weight: Weight of the adversarial loss beside the adaptive weight; 0 for no discriminator.
        disc_start: Step from which on the decoder gets the adversarial loss. The discriminator learns from the start.
        disc_lr: Learning rate of the discriminator; that of the decoder if None.
        discriminator: Its sizes.
    """

    train: Literal["temporal", "decoder"] = "temporal"
    num_frames: int = 8
    crop: int = 0
    latent_noise: float = 0.0
    perceptual: str = "edges"
    perceptual_weight: float = 1.0
    disc_weight: float = 0.5
    disc_start: int = 0
    disc_lr: float | None = None
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def __post_init__(self) -> None:
        if self.train not in ("temporal", "decoder"):
            raise ValueError(f"DecoderOptions: expected train 'temporal' or 'decoder', got {self.train!r}")
        if self.num_frames < 2:
            raise ValueError(
                f"DecoderOptions: expected num_frames of at least 2, got {self.num_frames}; temporal layers learn "
                "nothing from single frames"
            )
        for name in ("crop", "latent_noise", "perceptual_weight", "disc_weight", "disc_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"DecoderOptions: expected {name} of at least 0, got {getattr(self, name)}")


class DecoderStream:
    """Batches of a `DecoderObjective`: patches of clips, noise for the latents, and whether the decoder is judged yet.

    Args:
        source: Batches whose first item is clips ``(batch, 3, frames, height, width)``, values in [0, 1] or bytes.
        vae: Says what shape and scale the latents of a patch have.
        options: Frames, crop, noise, start of the adversarial loss.
        seed: Of the patches and the noise.
        accumulation: Batches of an optimiser step.
    """

    def __init__(
        self, source: Stream, vae: nn.Module, options: DecoderOptions, *, seed: int, accumulation: int = 1
    ) -> None:
        self.source, self.vae, self.options, self.seed = source, vae, options, seed
        self.first_judged = options.disc_start * accumulation
        self._shapes: dict[tuple[int, int], tuple[int, int, int]] = {}

    def batches(self, first: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """As in `Stream`."""
        source = self.source.batches(first, batch_size=batch_size, rank=rank, world_size=world_size)
        for number, (clips, *_) in enumerate(source, start=first):
            samples = [
                self._sample(clip, position)
                for clip, position in zip(clips, positions(number, batch_size, rank, world_size), strict=True)
            ]
            frames, noise = (torch.stack(column) for column in zip(*samples, strict=True))
            yield frames, noise, torch.full((batch_size,), float(number >= self.first_judged))

    def _sample(self, clip: Tensor, position: int) -> tuple[Tensor, Tensor]:
        generator, options = generator_at(self.seed, position, "decoder"), self.options
        sizes = (options.num_frames, options.crop or clip.shape[2], options.crop or clip.shape[3])
        if any(have < want for have, want in zip(clip.shape[1:], sizes, strict=True)):
            raise ValueError(
                f"DecoderStream: expected clips of at least {sizes[0]} frames of {sizes[1]} x {sizes[2]} pixels, got "
                f"(channels, frames, height, width) = {tuple(clip.shape)}; lower num_frames or crop"
            )
        starts = [
            int(torch.randint(have - want + 1, (), generator=generator))
            for have, want in zip(clip.shape[1:], sizes, strict=True)
        ]
        cut = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        frames = as_unit(clip[(slice(None), *cut)])
        if not options.latent_noise:
            return frames, torch.zeros(1, 1, 1, 1)
        channels, height, width = self._latent_shape(sizes[1:])
        level = options.latent_noise * torch.rand((), generator=generator) * latent_scale(self.vae)
        return frames, level * torch.randn(channels, sizes[0], height, width, generator=generator)

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        if size not in self._shapes:
            self._shapes[size] = check_frame_size(self.vae, size)
        return self._shapes[size]


@torch.no_grad()
def check_frame_size(vae: nn.Module, size: tuple[int, int]) -> tuple[int, int, int]:
    """Channels, height and width of the latent of a frame of a size.

    Raises:
        ValueError: If the autoencoder does not give back frames of that size.
    """
    place = next(vae.parameters())
    latent = encode_mode(vae, torch.zeros(1, 3, *size, device=place.device, dtype=place.dtype))
    made = tuple(vae.decode(latent).sample.shape[-2:])
    if made != tuple(size):
        raise ValueError(
            f"check_frame_size: expected height and width in multiples of the autoencoder's factor, got {size}, which "
            f"it makes {made}; choose another crop, or crop the clips"
        )
    return tuple(latent.shape[1:])


def clip_stream(clips: Float[Tensor, "clips 3 frames height width"], *, seed: int) -> SampleStream:
    """Whole clips of a tensor, each once an epoch, in random order.

    Raises:
        ValueError: If the tensor has another shape, or there are none.
    """
    if clips.ndim != 5 or clips.shape[1] != 3 or len(clips) == 0:
        raise ValueError(
            f"clip_stream: expected clips (clips, 3, frames, height, width), at least one, got {tuple(clips.shape)}"
        )
    order = Shuffled(len(clips), seed)
    return SampleStream(lambda position: (clips[order[position]],))
