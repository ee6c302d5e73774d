"""What the temporal decoder is trained on: reconstruction, perceptual and adversarial loss, and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.recipes.stages.discriminator import (
    PatchDiscriminator3D,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from temporal_layers.recipes.stages.perceptual import apply_to_clips, widened

TURNS = ("generator", "discriminator")
"""Turns of each step of a run with a discriminator, in order."""

LARGEST_WEIGHT = 1e4
_WEIGHT_EPS = 1e-4

_GRADIENT_SCALE = 1024.0
"""Losses are enlarged by this while the two gradients are measured, so that a mean over a large clip does not sink
below the smallest numbers of half precision; a power of two changes no digit of the result."""


class LastLayer:
    """The gradient of a loss at the weights of a decoder's last layer, whether these are trained or frozen.

    The gradient is taken at the layer's output and carried through that layer alone, on a copy of its weight. So it
    costs no backward pass through the decoder, leaves ``.grad`` alone and fires no hook of a distributed wrapper.

    Args:
        vae: An autoencoder with temporal layers. With a temporal convolution behind its last convolution (Stable Video
            Diffusion's layout) that one is the last layer.

    Raises:
        ValueError: If the decoder does not end with a convolution.
    """

    def __init__(self, vae: nn.Module) -> None:
        decoder = getattr(vae, "decoder", None)
        layer = getattr(decoder, "conv_out", None)
        layer = getattr(getattr(layer, "temporal", None), "conv", layer)
        if layer is None and decoder is not None:
            layer = list(decoder.modules())[-1]  # decoders that are a plain chain
        if not isinstance(layer, nn.Conv2d):
            raise ValueError(
                f"LastLayer: expected an autoencoder whose decoder ends with a 2-D convolution, got "
                f"{type(vae).__name__}; train it without a discriminator (disc_weight=0)"
            )
        self.layer = layer
        self.calls: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Note down what goes into and comes out of the layer; the notes last until `forget`."""
        self.forget()

        def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.calls.append((inputs[0].detach(), output))

        handle = self.layer.register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def forget(self) -> None:
        """Let go of the notes, and of the graph they hold."""
        self.calls.clear()

    def gradient(self, loss: Float[Tensor, ""]) -> Tensor:
        """Gradient at the layer's weight, in float32 or wider; the graph of the loss is kept.

        Args:
            loss: A function of what was recorded.
        """
        outputs = [output for _, output in self.calls]
        at_output = torch.autograd.grad(loss * _GRADIENT_SCALE, outputs, retain_graph=True)
        with torch.enable_grad():
            weight = self.layer.weight.detach().requires_grad_()
            again = [torch.func.functional_call(self.layer, {"weight": weight}, (inputs,)) for inputs, _ in self.calls]
        (gradient,) = torch.autograd.grad(again, weight, at_output)
        return widened(gradient) / _GRADIENT_SCALE


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Float[Tensor, ""]:
    """VQGAN's weight of the adversarial loss: it then pulls at the last layer as hard as the reconstruction does.

    Args:
        reconstruction: Gradient of the reconstruction loss at the last layer.
        adversarial: That of the adversarial loss.

    Returns:
        ``|reconstruction| / (|adversarial| + 1e-4)``, at most 1e4. In a distributed run the gradients are first
        averaged over the processes, so that the weight is that of one process with the whole batch. Where a step takes
        several batches, each has a weight of its own.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        both = torch.stack([reconstruction, adversarial])
        dist.all_reduce(both)
        reconstruction, adversarial = both / dist.get_world_size()
    return (reconstruction.norm() / (adversarial.norm() + _WEIGHT_EPS)).clamp(0.0, LARGEST_WEIGHT).detach()


def encode_mode(vae: nn.Module, frames: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
    """Latents of frames in [-1, 1] as the decoder takes them: the posterior's mode, or what is to be quantised.

    Args:
        vae: An autoencoder of diffusers.
        frames: Of the model's dtype.
    """
    encoded: Any = vae.encode(frames)
    for name in ("latent_dist", "latents", "latent"):
        if hasattr(encoded, name):
            found = getattr(encoded, name)
            return found.mode() if name == "latent_dist" else found
    raise ValueError(
        f"encode_mode: expected an autoencoder whose encode returns latent_dist, latents or latent, got "
        f"{type(vae).__name__}, which returns {type(encoded).__name__}"
    )


class DecoderObjective(nn.Module):
    """Reconstruction of clips by a decoder with temporal layers, and the discriminator's view of it.

    Losses of the turn ``generator``: L1, the perceptual loss of each frame, and the hinge loss of the clip, weighed by
    `adaptive_weight`. Those of the turn ``discriminator``: hinge loss on the true and the decoded clip. Without a
    discriminator there are no turns.

    Args:
        vae: The autoencoder, temporal layers injected; what is trained of it is what requires gradients.
        discriminator: Sees clips; None for none.
        perceptual: A loss as in the module ``perceptual``; None for none.
        perceptual_weight: Its weight.
        disc_weight: Weight of the adversarial loss besides the adaptive one.
    """

    def __init__(
        self,
        vae: nn.Module,
        discriminator: PatchDiscriminator3D | None = None,
        *,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        disc_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.vae, self.discriminator, self.perceptual = vae, discriminator, perceptual
        self.perceptual_weight, self.disc_weight = perceptual_weight, disc_weight
        self.encoded: tuple[Tensor, Tensor] | None = None
        if discriminator is not None:
            self.turns = TURNS
            self.last_layer = LastLayer(vae)

    def forward(
        self,
        frames: Float[Tensor, "batch 3 frames height width"],
        latent_noise: Float[Tensor, "batch c frames h w"],
        adversarial: Float[Tensor, " batch"],
        *,
        turn: str = "generator",
    ) -> dict[str, Tensor]:
        """Losses of a turn.

        Args:
            frames: Clips in [0, 1].
            latent_noise: Added to the latents; of any shape that broadcasts.
            adversarial: 1 where the decoder gets the adversarial loss, 0 before that begins; equal for all of a batch,
                on all processes.
            turn: ``generator`` or ``discriminator``.
        """
        target = 2 * frames - 1
        latents = self._encode(frames)
        latents = latents + latent_noise.to(latents.dtype)
        if turn == "discriminator":
            with torch.no_grad():
                output = self.vae.decode(latents).sample
            return self._judge(target, output)
        if self.discriminator is None:
            return self._reconstruct(self.vae.decode(latents).sample, target)
        with self.last_layer.recorded():
            output = self.vae.decode(latents).sample
        losses = self._reconstruct(output, target)
        if adversarial.min() > 0:
            losses = self._deceive(output, losses)
        self.last_layer.forget()
        return losses

    @torch.no_grad()
    def _encode(self, frames: Tensor) -> Tensor:
        # Both turns of a step get the same tensor, and the encoder is frozen.
        if self.encoded is None or self.encoded[0] is not frames:
            pixels = (2 * frames - 1).to(next(self.vae.parameters()).dtype)
            self.encoded = frames, encode_mode(self.vae, pixels)
        return self.encoded[1]

    def _reconstruct(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        output = widened(output)
        losses = {"l1": F.l1_loss(output, target)}
        loss = losses["l1"]
        if self.perceptual is not None and self.perceptual_weight > 0:
            losses["perceptual"] = apply_to_clips(self.perceptual, output, target)
            loss = loss + self.perceptual_weight * losses["perceptual"]
        return {"loss": loss, **losses}

    def _deceive(self, output: Tensor, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        with _without_gradients(self.discriminator):
            adversarial = hinge_generator_loss(widened(self.discriminator(widened(output))))
        gradients = (self.last_layer.gradient(loss) for loss in (losses["loss"], adversarial))
        weight = self.disc_weight * adaptive_weight(*gradients)
        loss = losses["loss"] + weight * adversarial
        return {**losses, "loss": loss, "adversarial": adversarial, "adversarial_weight": weight}

    def _judge(self, target: Tensor, output: Tensor) -> dict[str, Tensor]:
        output = widened(output)
        real, fake = (widened(self.discriminator(clips)) for clips in (target.to(output.dtype), output))
        loss = hinge_discriminator_loss(real, fake)
        return {"loss": loss, "real_logits": real.mean(), "fake_logits": fake.mean()}


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """Treat the trainable parameters of a module as constants, which saves their part of the backward pass."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
