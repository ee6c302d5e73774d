"""Mixins of the swapped root models: they accept clips, fold them into the batch and unfold the result."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from temporal_layers import TemporalAttention
from temporal_layers.adapters.state import wrap_checkpointing
from temporal_layers.adapters.swap import Swapped
from temporal_layers.frames import fold_frames, unfold_frames

__all__ = ["PerFrame", "VideoModel", "VideoUNet", "check_axes"]

# Of what attention processors get, only GLIGEN's boxes are known to have the batch in front; the rest is passed on.
FOR_ATTENTION, WITH_BATCH = "cross_attention_kwargs", frozenset({"gligen"})


def check_axes(who: str, clips: Tensor, channels: int | None) -> None:
    """Raise a ``ValueError`` if 5-D ``clips`` have the frames where the channels belong.

    Args:
        who: name of the model.
        clips: what it was called with.
        channels: that it takes; ``None`` if that is not known.
    """
    if channels is not None and clips.shape[1] != channels and clips.shape[2] == channels:
        raise ValueError(
            f"{who}: expected clips (batch, channels, frames, height, width) with {channels} channels, got shape "
            f"{tuple(clips.shape)}; the frames stand in front of the channels: pass clips.transpose(1, 2)"
        )


class KeepsTrainable:
    """A method of the image model that freezes what is there, with the temporal layers left as trainable as they were.

    PEFT freezes a model when it adds a LoRA to it, which would end the training of the temporal layers in silence. If
    the LoRA is on temporal layers, those are the frozen base, as PEFT means it. Models without the method have none.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self
        method = getattr(super(self.owner, model), self.name)

        @functools.wraps(method)
        def keeping(*args: Any, **kwargs: Any) -> Any:
            before = [(parameter, parameter.requires_grad) for parameter in _temporal_parameters(model)]
            result = method(*args, **kwargs)
            if len(list(_temporal_parameters(model))) == len(before):
                for parameter, trainable in before:
                    parameter.requires_grad_(trainable)
            return result

        return keeping


def _temporal_parameters(model: Any) -> Iterator[nn.Parameter]:
    for site in model._temporal_state.sites:
        yield from model.get_submodule(site.name).temporal.parameters()


class VideoModel(Swapped):
    """Mixin of every root model."""

    add_adapter = KeepsTrainable()
    load_lora_adapter = KeepsTrainable()

    def set_attention_backend(self, backend: str) -> None:
        """As in diffusers, for attention over frames too, as far as it has the backend."""
        super().set_attention_backend(backend)
        for module in self.modules():
            if isinstance(module, TemporalAttention):
                module.set_attention_backend(backend.lower())

    def reset_attention_backend(self) -> None:
        """As in diffusers; attention over frames chooses its implementation itself again."""
        super().reset_attention_backend()
        for module in self.modules():
            if isinstance(module, TemporalAttention):
                module.impl = "auto"

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
        self,
        sample: Tensor | None = None,
        *args: Any,
        image_only: Tensor | None = None,
        frame_context: Tensor | None = None,
        temporal_encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Denoise clips or images.

        Args:
            sample: clips ``(batch, channels, frames, height, width)``, or images ``(batch, channels, height, width)``,
                which are clips folded into the batch if the adapter's ``num_frames`` is set. By name, under the
                name that it has in the image model.
            *args: as in the image model; first the timestep: a number, ``()``, ``(1,)``, ``(batch,)``,
                ``(batch, frames)`` or ``(batch * frames,)``. With clips, every tensor with ``batch`` in front is
                repeated for each frame and 5-D ones are folded.
            image_only: ``(batch, frames)`` bool, true for frames that bypass the temporal layers.
            frame_context: ``(batch, planes, frames, height, width)``, what is given of each frame; ``None`` for
                nothing, which is the same as zeros. Only for an adapter with a ``context``. With 4-D clips also
                ``(batch * frames, planes, height, width)``.
            temporal_encoder_hidden_states: ``(batch, tokens, channels)``, a text for the temporal layers alone, or one
                a frame, of which the first of each clip counts, as with ``encoder_hidden_states``, which ``None``
                takes. For an image model whose text encoder was tuned after the temporal layers were trained: they go
                on with the text that they know. As wide as the text that reaches the model's cross-attentions.
            **kwargs: as ``args``.

        Returns:
            What the image model returns, with clips if clips came in.
        """
        if sample is None:
            sample = kwargs.pop(type(self).argument_names[0], None)
        if sample is None:
            return super().forward(*args, **kwargs)  # says what is missing
        state, text = self._temporal_state, temporal_encoder_hidden_states
        if text is not None:
            self._check_text(text)
        num_frames = state.begin(type(self).__name__, sample, image_only, frame_context, text)
        with state.block():
            return self._denoise(sample, num_frames, args, kwargs)

    def _denoise(self, sample: Tensor, num_frames: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if sample.ndim == 4:
            return super().forward(sample, *args, **kwargs)
        conv = getattr(self, "conv_in", None)
        conv = getattr(conv, "base_layer", conv)  # PEFT wraps layers
        check_axes(type(self).__name__, sample, getattr(conv, "in_channels", None))
        names = type(self).argument_names[1:]
        repeat = PerFrame(type(self).__name__, sample.shape[0], num_frames, timestep=names[0] if names else None)
        names += ("arguments",) * len(args)  # those of a forward with *arguments, which may be more than it has names
        args = tuple(repeat(name, value) for name, value in zip(names, args, strict=False))
        kwargs = {name: repeat(name, value) for name, value in kwargs.items()}
        return self._unfold(super().forward(fold_frames(sample), *args, **kwargs), num_frames)

    def _unfold(self, output: Any, num_frames: Any) -> Any:
        if torch.is_tensor(output):
            return unfold_frames(output, num_frames)
        if isinstance(output, tuple):
            return (unfold_frames(output[0], num_frames), *output[1:])
        if not torch.is_tensor(getattr(output, "sample", None)):
            raise ValueError(
                f"{type(self).__name__}: expected a model that returns a tensor, a tuple that begins with one, or an "
                f"object with the attribute 'sample', got a {type(output).__name__}; return one of these"
            )
        output.sample = unfold_frames(output.sample, num_frames)
        return output

    def _check_text(self, text: Tensor) -> None:
        layers = (self.get_submodule(site.name).temporal for site in self._temporal_state.sites)
        if all(getattr(layer, "context_dim", None) is None for layer in layers):
            raise ValueError(
                f"{type(self).__name__}: temporal_encoder_hidden_states: expected None, since no temporal layer takes "
                f"a text, got shape {tuple(text.shape)}; leave it out"
            )


class PerFrame:
    """Repeats conditioning for every frame of its clip.

    Args:
        who: name of the model, for the error texts.
        batch: clips.
        num_frames: frames of each.
        timestep: name of the argument that may also be one number for all.
    """

    def __init__(self, who: str, batch: Any, num_frames: Any, *, timestep: str | None = None) -> None:
        self.who, self.batch, self.num_frames, self.timestep = who, batch, num_frames, timestep

    def __call__(self, name: str, value: Any) -> Any:
        """The value of an argument as the image model takes it for ``batch * num_frames`` images."""
        if name == FOR_ATTENTION:
            return self._for_attention(name, value)
        if name == self.timestep:
            return self._timestep(name, value)
        if torch.is_tensor(value):
            return self._tensor(name, value)
        if isinstance(value, dict):
            return {key: self(f"{name}[{key!r}]", item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self(f"{name}[{index}]", item) for index, item in enumerate(value))
        return value

    def _for_attention(self, name: str, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        items = value.items()
        return {key: self(f"{name}[{key!r}]", item) if key in WITH_BATCH else item for key, item in items}

    def _timestep(self, name: str, value: Any) -> Any:
        if not torch.is_tensor(value) or value.ndim == 0 or tuple(value.shape) == (1,):
            return value
        if value.ndim == 2:
            if tuple(value.shape) != (self.batch, self.num_frames):
                raise ValueError(
                    f"{self.who}: {name}: expected ({self.batch}, {self.num_frames}), one for each frame of each "
                    f"clip, got {tuple(value.shape)}; or pass (), (1,), ({self.batch},)"
                )
            value = value.flatten()
        return self._tensor(name, value)

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
        # repeat_interleave would fix the clip length under torch.compile in torch 2.11. Not a view with a stride of 0,
        # which a single clip would give: linear layers round otherwise for it.
        repeated = value[:, None].expand(-1, self.num_frames, *value.shape[1:]).flatten(0, 1)
        return repeated.contiguous()
