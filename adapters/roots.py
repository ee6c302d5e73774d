"""Mixins of the swapped root models: they accept clips, fold them into the batch and unfold the result."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from temporal_layers.adapters.state import wrap_checkpointing
from temporal_layers.adapters.swap import Swapped
from temporal_layers.frames import fold_frames, unfold_frames

__all__ = ["ROOT_MIXINS"]

# Their tensors do not have the batch in front, so they are passed on as they are.
UNTOUCHED = frozenset({"cross_attention_kwargs"})


class VideoModel(Swapped):
    """Mixin of every root model."""

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """As in diffusers, with a function that also remembers the clip length."""
        super().enable_gradient_checkpointing(gradient_checkpointing_func)
        wrap_checkpointing(self, self._temporal_state)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in the image model, plus the temporal layers."""
        with self._temporal_state.collecting_root():
            return super().state_dict(*args, **kwargs)


class VideoUNet(VideoModel):
    """Mixin of a UNet: clips in, clips out; images as before."""

    def forward(
        self, sample: Tensor, timestep: Any, *args: Any, image_only: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Denoise clips or images.

        Args:
            sample: clips ``(batch, channels, frames, height, width)``, or images ``(batch, channels, height, width)``,
                which are clips folded into the batch if the adapter's ``num_frames`` is set.
            timestep: a number, ``()``, ``(1,)``, ``(batch,)``, ``(batch, frames)`` or ``(batch * frames,)``.
            *args: as in the image model. With clips, every tensor with ``batch`` in front is repeated for each frame
                and 5-D ones are folded.
            image_only: ``(batch, frames)`` bool, true for frames that bypass the temporal layers.
            **kwargs: as ``args``.

        Returns:
            What the image model returns, with clips if clips came in.
        """
        state = self._temporal_state
        num_frames = state.begin(type(self).__name__, sample, image_only)
        if sample.ndim == 4:
            return super().forward(sample, timestep, *args, **kwargs)
        repeat = _PerFrame(type(self).__name__, sample.shape[0], num_frames)
        names = type(self).argument_names[2 : 2 + len(args)]
        args = tuple(repeat(name, value) for name, value in zip(names, args, strict=True))
        kwargs = {name: repeat(name, value) for name, value in kwargs.items()}
        output = super().forward(fold_frames(sample), repeat.timestep(timestep), *args, **kwargs)
        if isinstance(output, tuple):
            return (unfold_frames(output[0], num_frames), *output[1:])
        output.sample = unfold_frames(output.sample, num_frames)
        return output


class _PerFrame:
    """Repeats conditioning for every frame of its clip."""

    def __init__(self, who: str, batch: Any, num_frames: Any) -> None:
        self.who, self.batch, self.num_frames = who, batch, num_frames

    def __call__(self, name: str, value: Any) -> Any:
        if name in UNTOUCHED:
            return value
        if torch.is_tensor(value):
            return self._tensor(name, value)
        if isinstance(value, dict):
            return {key: self(f"{name}[{key!r}]", item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self(f"{name}[{index}]", item) for index, item in enumerate(value))
        return value

    def timestep(self, value: Any) -> Any:
        if not torch.is_tensor(value) or value.ndim == 0 or tuple(value.shape) == (1,):
            return value
        if value.ndim == 2:
            if tuple(value.shape) != (self.batch, self.num_frames):
                raise ValueError(
                    f"{self.who}: timestep: expected ({self.batch}, {self.num_frames}), one for each frame of each "
                    f"clip, got {tuple(value.shape)}; or pass (), (1,), ({self.batch},)"
                )
            value = value.flatten()
        return self._tensor("timestep", value)

    def _tensor(self, name: str, value: Tensor) -> Tensor:
        if value.ndim == 0:
            return value
        if value.ndim == 5 and value.shape[0] == self.batch and value.shape[2] == self.num_frames:
            return fold_frames(value)
        total = self.batch * self.num_frames
        if value.shape[0] == total:
            return value
        if value.shape[0] != self.batch:
            raise ValueError(
                f"{self.who}: {name}: expected {self.batch} (clips) or {total} (clips times frames) in front, "
                f"got shape {tuple(value.shape)}; the image model would repeat it in silence or fail"
            )
        return value.repeat_interleave(self.num_frames, dim=0, output_size=total)


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

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode clips ``(batch, channels, frames, height, width)`` or images, to a posterior of as many axes."""
        if x.ndim != 5:
            return super().encode(x, return_dict=return_dict)
        (posterior,) = super().encode(fold_frames(x), return_dict=False)
        posterior = ClipDistribution(unfold_frames(posterior.parameters, x.shape[2]))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Decode clips ``(batch, channels, frames, height, width)`` or images.

        With ``enable_slicing()`` clips are decoded one at a time, which is exact; slicing into frames would not be.
        """
        num_frames = self._temporal_state.begin(type(self).__name__, z)
        if not self._temporal_state.active and z.ndim == 4:
            return super().decode(z, return_dict=return_dict, generator=generator)
        folded = fold_frames(z) if z.ndim == 5 else z
        pieces = folded.split(num_frames) if self.use_slicing else (folded,)
        decoded = torch.cat([self._decode(piece).sample for piece in pieces])
        if z.ndim == 5:
            decoded = unfold_frames(decoded, num_frames)
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)


ROOT_MIXINS: dict[str, type] = {
    "UNet2DConditionModel": VideoUNet,
    "UNet2DModel": VideoUNet,
    "AutoencoderKL": VideoAutoencoder,
}
