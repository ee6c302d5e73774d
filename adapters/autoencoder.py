"""Mixin of the swapped root autoencoder: clips through encode and decode."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from temporal_layers.adapters.chunks import InPieces
from temporal_layers.adapters.registry import MODELS, find
from temporal_layers.adapters.roots import PerFrame, VideoModel, check_axes
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
        self._check_axes(x, "in_channels")
        return _unfold_output(super().encode(fold_frames(x), *args, **kwargs), x.shape[2])

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Decode clips ``(batch, channels, frames, height, width)`` or images.

        Tensors among the other arguments (the mask and the image of an inpainting decoder) are folded like clips or
        repeated for each frame. With ``enable_slicing()`` clips are decoded one at a time, which is exact; slicing
        into frames would not be. With the adapter's ``enable_temporal_chunking()`` they are cut further.
        """
        state = self._temporal_state
        num_frames = state.begin(type(self).__name__, z)
        if num_frames is None or (not state.active and z.ndim == 4):
            return super().decode(z, *args, **kwargs)
        if z.ndim == 5:
            self._check_axes(z, "vq_embed_dim", "latent_channels")
        with state.block():
            return self._decode_in_pieces(z, num_frames, args, kwargs)

    def _check_axes(self, clips: Tensor, *names: str) -> None:
        known = (getattr(getattr(self, "config", None), name, None) for name in names)
        check_axes(type(self).__name__, clips, next((value for value in known if value is not None), None))

    def _decode_in_pieces(self, z: Tensor, num_frames: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        state = self._temporal_state
        slicing = getattr(self, "use_slicing", False)
        if not slicing and state.chunking is None:
            return self._decode_clips(z, num_frames, args, kwargs)
        total = z.shape[0] if z.ndim == 4 else z.shape[0] * num_frames
        pieces = functools.partial(InPieces, state=state, num_frames=num_frames, chunking=state.chunking)
        if slicing:
            self.use_slicing = False  # it would cut clips into frames
        try:
            if total == num_frames and (state.chunking is None or num_frames <= state.chunking.num_frames):
                return self._decode_clips(z, num_frames, args, kwargs)
            with _standing_in(self, pieces):
                return self._decode_clips(z, num_frames, args, kwargs)
        finally:
            if slicing:
                self.use_slicing = True

    def _decode_clips(self, z: Tensor, num_frames: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if z.ndim == 4:
            return super().decode(z, *args, **kwargs)
        repeat = PerFrame(type(self).__name__, z.shape[0], num_frames)
        args = tuple(repeat("decode", value) for value in args)
        kwargs = {name: repeat(name, value) for name, value in kwargs.items()}
        return _unfold_output(super().decode(fold_frames(z), *args, **kwargs), num_frames)


@contextmanager
def _standing_in(model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    """Put what ``make`` makes of the decoder in its place while the body runs."""
    part = find(MODELS, type(model)).part
    if part is None:
        raise ValueError(
            f"{type(model).__name__}: expected a registration that names the part with the layers, for slicing, got "
            "none; pass it to register_model, or call disable_slicing()"
        )
    path, _, name = part.rpartition(".")
    owner = model.get_submodule(path)
    decoder = owner._modules[name]
    owner._modules[name] = make(decoder)
    try:
        yield
    finally:
        owner._modules[name] = decoder


def _unfold_output(output: Any, num_frames: Any) -> Any:
    """Unfold the maps and the posterior that an autoencoder returned for folded frames."""

    def unfold(value: Any) -> Any:
        if isinstance(value, DiagonalGaussianDistribution):
            return ClipDistribution(unfold_frames(value.parameters, num_frames))
        return unfold_frames(value, num_frames) if torch.is_tensor(value) and value.ndim == 4 else value

    if torch.is_tensor(output):
        return unfold(output)
    if isinstance(output, tuple):
        return tuple(map(unfold, output))
    for name, value in output.items():
        output[name] = unfold(value)
    return output
