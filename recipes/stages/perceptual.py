"""Perceptual losses of frames behind one interface: two that need no download, and LPIPS if you have it.

A perceptual loss is a module; called with two batches of frames ``(n, 3, height, width)`` in [-1, 1], output and
target, it returns one tensor of any shape, whose mean is the loss. Clips are folded into frames first: what happens
over time is the business of the discriminator.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers import fold_frames
from temporal_layers.recipes.stages.image_objectives import detail_loss

Frames = Float[Tensor, "n 3 height width"]

_FEATURE_EPS = 1e-6


class EdgeLoss(nn.Module):
    """Mean absolute error of the differences of neighbouring pixels, on three scales.

    Keeps edges crisp where L1 alone would have a small decoder blur them. It compares pixels at the same place, so it
    is no measure of likeness: a texture that is moved by a pixel counts as wrong.
    """

    def forward(self, output: Frames, target: Frames) -> Float[Tensor, ""]:
        """The loss of two batches of frames."""
        return detail_loss(output, target)


class EncoderFeatureLoss(nn.Module):
    """LPIPS's distance with the features of the frozen image encoder instead of a network trained for recognition.

    The maps behind the encoder's first convolution and behind each of its blocks are normalised to unit length at each
    place, and their squared distances are averaged over places and summed over levels. The encoder is that of the
    autoencoder being tuned, so the loss asks that the output *encodes* as the target does. It has not been calibrated
    on what people see, unlike LPIPS.

    Args:
        vae: An autoencoder of diffusers whose ``encoder`` has ``conv_in`` and ``down_blocks``. It is kept by reference
            and is no child of this module.

    Raises:
        ValueError: If the encoder is built otherwise.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        encoder = getattr(vae, "encoder", None)
        if not (hasattr(encoder, "conv_in") and hasattr(encoder, "down_blocks")):
            raise ValueError(
                f"EncoderFeatureLoss: expected an autoencoder whose encoder has conv_in and down_blocks, got "
                f"{type(vae).__name__}; choose the perceptual loss 'edges'"
            )
        self.encoder = [encoder]

    def forward(self, output: Frames, target: Frames) -> Float[Tensor, ""]:
        """The loss of two batches of frames."""
        with torch.no_grad():
            wanted = self._features(target)
        pairs = zip(self._features(output), wanted, strict=True)
        return sum((made - want).square().sum(1).mean() for made, want in pairs)

    def _features(self, frames: Frames) -> list[Tensor]:
        encoder = self.encoder[0]
        maps = [encoder.conv_in(frames)]
        for block in encoder.down_blocks:
            maps.append(block(maps[-1]))
        return [_unit(widened(values)) for values in maps]


def _unit(maps: Tensor) -> Tensor:
    return maps / (maps.square().sum(1, keepdim=True) + _FEATURE_EPS).sqrt()


class LearnedLoss(nn.Module):
    """A loss that somebody trained: LPIPS from its package, or a file. Frozen, and kept in evaluation mode.

    Args:
        network: Called with output and target frames in [-1, 1].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for parameter in network.parameters():  # TorchScript's modules have no requires_grad_
            parameter.requires_grad_(False)
        if not isinstance(network, torch.fx.GraphModule):  # exported in one mode, which it cannot leave
            network.eval()
        self.training = False

    def train(self, mode: bool = True) -> LearnedLoss:
        """Stay in evaluation mode: LPIPS's dropout is for its own training."""
        return self

    def forward(self, output: Frames, target: Frames) -> Tensor:
        """The loss of two batches of frames."""
        return self.network(output, target)


def perceptual_loss(name: str, vae: nn.Module) -> nn.Module | None:
    """The perceptual loss of a name.

    Args:
        name: ``edges``, ``encoder``, ``none``; ``lpips`` (needs the package of that name, with a VGG); or a file: a
            TorchScript archive or a program of ``torch.export`` (``.pt2``) that takes output and target frames in
            [-1, 1].
        vae: The autoencoder being tuned, for ``encoder``.

    Returns:
        The loss, or None for ``none``.

    Raises:
        ValueError: If the name is neither, the package is missing, or the file cannot be read.
    """
    plain: dict[str, Callable[[], nn.Module | None]] = {
        "none": lambda: None,
        "edges": EdgeLoss,
        "encoder": lambda: EncoderFeatureLoss(vae),
        "lpips": _lpips,
    }
    if name in plain:
        return plain[name]()
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"perceptual_loss: expected one of {', '.join(plain)} or the path of a file, got {name!r}; a file holds a "
            "TorchScript archive or a program of torch.export"
        )
    return LearnedLoss(_from_file(path))


def _lpips() -> nn.Module:
    try:
        import lpips
    except ImportError as error:
        raise ValueError(
            f"perceptual_loss: lpips: expected the package lpips to be importable, got {error}; install it together "
            "with the torchvision that fits your torch, pass a TorchScript file of it, or choose 'edges' or 'encoder'"
        ) from error
    return LearnedLoss(lpips.LPIPS(net="vgg", verbose=False))


def _from_file(path: Path) -> nn.Module:
    try:
        if path.suffix == ".pt2":
            return torch.export.load(path).module()
        with warnings.catch_warnings():
            # Deprecated in favour of torch.export, yet what published files are.
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(path, map_location="cpu")
    except Exception as error:  # the loaders raise whatever their parsers do
        raise ValueError(
            f"perceptual_loss: expected {path} to hold a TorchScript archive (any suffix) or a program of torch.export "
            f"(.pt2), got {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; a state dict "
            "alone is not enough: save the scripted module"
        ) from error


def widened(values: Tensor) -> Tensor:
    """Values in float32, or in float64 if they are: what losses are added up in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def apply_to_clips(loss: nn.Module, output: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """Mean of a perceptual loss over the frames of clips ``(batch, 3, frames, height, width)`` in [-1, 1].

    Raises:
        ValueError: If the loss returns something that depends on no output.
    """
    value = widened(loss(fold_frames(output), fold_frames(target))).mean()
    if output.requires_grad and not value.requires_grad:
        raise ValueError(
            f"apply_to_clips: expected a perceptual loss with a gradient, got one from {type(loss).__name__} that "
            "depends on no output; trace or script it without torch.no_grad"
        )
    return value
