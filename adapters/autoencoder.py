"""Mixin of the swapped root autoencoder: clips through encode and decode."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from temporal_layers.adapters.roots import PerFrame, VideoModel
from temporal_layers.frames import fold_frames, unfold_frames

__all__ = ["ClipDistribution", "VideoAutoencoder"]


class ClipDistribution(DiagonalGaussianDistribution):
    """The posterior of clips ``(batch, channels, frames, height, width)``; diffusers' own sums over three axes only."""

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Kullback-Leibler divergence to ``other``, or to the standard normal: ``(batch,)``, in nats."""
        return _sum_rest(super().kl(other))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3, 4)) -> Tensor:
        """Negative log-likelihood of ``sample``, summed over ``dims``: ``(batch,)`` for all, in nats."""
        return super().nll(sample, dims)


def _sum_rest(value: Tensor) -> Tensor:
    return value if value.ndim == 1 else value.flatten(1).sum(1)


class VideoAutoencoder(VideoModel):
    """Mixin of an autoencoder: clips in, clips out; the encoder works frame by frame."""

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Encode clips ``(batch, channels, frames, height, width)`` or images, to latents of as many axes."""
        if x.ndim != 5:
            return super().encode(x, *args, **kwargs)
        return _unfold_output(super().encode(fold_frames(x), *args, **kwargs), x.shape[2])

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Decode clips ``(batch, channels, frames, height, width)`` or images.

        Tensors among the other arguments (the mask and the image of an inpainting decoder) are folded like clips or
        repeated for each frame. With ``enable_slicing()`` clips are decoded one at a time, which is exact; slicing
        into frames would not be.
        """
        state = self._temporal_state
        num_frames = state.begin(type(self).__name__, z)
        if not state.active and z.ndim == 4:
            return super().decode(z, *args, **kwargs)
        slicing = getattr(self, "use_slicing", False)
        if slicing:
            self.use_slicing = False  # it would cut clips into frames
        try:
            if z.ndim == 4:
                return self._decode_folded(z, args, kwargs, num_frames if slicing else None)
            repeat = PerFrame(type(self).__name__, z.shape[0], num_frames)
            args = tuple(repeat("decode", value) for value in args)
            kwargs = {name: repeat(name, value) for name, value in kwargs.items()}
            decoded = self._decode_folded(fold_frames(z), args, kwargs, num_frames if slicing else None)
            return _unfold_output(decoded, num_frames)
        finally:
            if slicing:
                self.use_slicing = True

    def _decode_folded(self, z: Tensor, args: tuple, kwargs: dict[str, Any], at_a_time: int | None) -> Any:
        """Decode frames folded into the batch: all at once, or ``at_a_time`` of them."""
        if at_a_time is None or len(z) == at_a_time:
            return super().decode(z, *args, **kwargs)
        total, pieces = len(z), []

        def part(value: Any, rows: slice) -> Any:
            return value[rows] if torch.is_tensor(value) and value.ndim > 0 and len(value) == total else value

        for start in range(0, total, at_a_time):
            rows = slice(start, start + at_a_time)
            some = {name: part(value, rows) for name, value in kwargs.items()}
            pieces.append(super().decode(z[rows], *(part(value, rows) for value in args), **some))
        if isinstance(pieces[0], tuple):
            return (torch.cat([piece[0] for piece in pieces]), *pieces[0][1:])
        pieces[0].sample = torch.cat([piece.sample for piece in pieces])
        return pieces[0]


def _unfold_output(output: Any, num_frames: Any) -> Any:
    """Unfold the maps and the posterior that an autoencoder returned for folded frames."""

    def unfold(value: Any) -> Any:
        if isinstance(value, DiagonalGaussianDistribution):
            return ClipDistribution(unfold_frames(value.parameters, num_frames))
        return unfold_frames(value, num_frames) if torch.is_tensor(value) and value.ndim == 4 else value

    if isinstance(output, tuple):
        return tuple(map(unfold, output))
    for name, value in output.items():
        output[name] = unfold(value)
    return output
