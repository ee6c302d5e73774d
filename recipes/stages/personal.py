"""What personalisation shares: the image model inside an injected UNet, its text encoders, and two texts at once.

A subject is taught to the image model and its text encoder; the temporal layers stay as they are and go on reading the
text encoder that they were trained with (Video LDM, section 4.2.1 and appendix).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.adapters import adapter_of
from temporal_layers.recipes.bases import Conditioning, LabelBase, VideoBase

Prompt = str | int
"""What a model is asked for: a caption for a pipeline, the number of a label for the label model."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

TEMPORAL_TEXT = "temporal_encoder_hidden_states"


def is_injected(unet: nn.Module) -> bool:
    """Whether there are temporal layers in a UNet."""
    return getattr(unet, "_temporal_state", None) is not None


@contextmanager
def as_image_model(unet: nn.Module) -> Iterator[None]:
    """Make 4-D input mean images, which bypass the temporal layers, whatever the adapter's clip length is set to."""
    if not is_injected(unet):
        yield
        return
    adapter = adapter_of(unet)
    before, adapter.num_frames = adapter.num_frames, None
    try:
        yield
    finally:
        adapter.num_frames = before


def spatial_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """Parameters of the image model in a UNet, without those of temporal layers."""
    if not is_injected(unet):
        return list(unet.parameters())
    return [parameter for _, parameter in adapter_of(unet).named_parameters("spatial")]


def image_model(unet: nn.Module) -> nn.Module:
    """The image model in a UNet, as an object of its own that shares its weights and has no temporal layers."""
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    trainable = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    twin = copy.deepcopy(unet, shared)
    if is_injected(twin):
        adapter_of(twin).remove()
    for parameter, flag in trainable:  # removal undoes freeze(), and the parameters are those of the original, too
        parameter.requires_grad_(flag)
    return twin


def text_parts(base: VideoBase) -> dict[str, nn.Module]:
    """The text encoders of a base, or what turns its labels into tokens, by name; nothing for other bases."""
    if isinstance(base, LabelBase):
        return {"conditioner": base.ldm.conditioner}
    parts = {name: getattr(getattr(base, "pipeline", None), name, None) for name in TEXT_ENCODERS}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def ask(base: VideoBase, prompts: Sequence[Prompt]) -> Conditioning:
    """Conditioning of prompts, with the gradients of the text encoders.

    Raises:
        ValueError: If the base knows no text, or prompts of another kind.
    """
    kind = int if isinstance(base, LabelBase) else str
    if not all(isinstance(prompt, kind) for prompt in prompts):
        raise ValueError(
            f"ask: prompts: expected {'numbers of labels' if kind is int else 'captions'} for a "
            f"{type(base).__name__}, got {list(prompts)!r}"
        )
    if kind is int:
        return base.conditioning(list(prompts), [""] * len(prompts))
    labels, speak = [0] * len(prompts), getattr(base, "text", None)
    conditioning = base.conditioning(labels, list(prompts)) if speak is None else speak(list(prompts))
    if not conditioning:
        raise ValueError(
            "ask: base: expected a model with text or labels, got one without; there is no word to tie a subject to: "
            "train it on the subject's frames as on any others"
        )
    return conditioning


def frozen_text(base: VideoBase) -> VideoBase:
    """The base with copies of its text encoders, which stay what they are when those of ``base`` are tuned.

    Everything else is shared, so that the copy costs no more than a text encoder.

    Raises:
        ValueError: If the base has no text encoder.
    """
    parts = text_parts(base)
    if not parts:
        raise ValueError(
            f"frozen_text: base: expected one with text encoders or labels, got {type(base).__name__} without"
        )
    copies = {name: copy.deepcopy(part).eval().requires_grad_(False) for name, part in parts.items()}
    twin = copy.copy(base)
    if isinstance(base, LabelBase):
        twin.ldm = dataclasses.replace(base.ldm, **copies)
        return twin
    twin.pipeline = copy.copy(base.pipeline)
    for name, part in copies.items():
        setattr(twin.pipeline, name, part)
    return twin


class TwoTexts:
    """A base whose temporal layers read the text of another base: that of the text encoder they were trained with.

    Args:
        base: The tuned image model, temporal layers injected.
        original: What `frozen_text` gave before the tuning, or the original model, loaded again.
    """

    def __init__(self, base: VideoBase, original: VideoBase) -> None:
        self.base, self.original = base, original
        self.unet, self.scheduler = base.unet, base.scheduler
        self.frame_size, self.latent_shape = base.frame_size, base.latent_shape
        self.encode, self.decode = base.encode, base.decode

    def to(self, device: str) -> TwoTexts:
        """Move everything to a device, in place."""
        self.base.to(device)
        for part in text_parts(self.original).values():
            part.to(device)
        return self

    def conditioning(self, labels: Sequence[int], captions: Sequence[str]) -> Conditioning:
        """That of the base, and the tokens of the original."""
        return self._with(self.base.conditioning(labels, captions), self.original.conditioning(labels, captions))

    def no_conditioning(self, count: int) -> Conditioning:
        """Conditioning that says nothing, to either."""
        return self._with(self.base.no_conditioning(count), self.original.no_conditioning(count))

    def predict(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **temporal: Tensor | None
    ) -> Tensor:
        """As that of the base; images, which bypass the temporal layers, leave their text out."""
        conditioning = dict(conditioning)
        text = conditioning.pop(TEMPORAL_TEXT)
        extra = {TEMPORAL_TEXT: text} if noisy.ndim == 5 else {}
        return self.base.predict(noisy, timesteps, conditioning, **extra, **temporal)

    def _with(self, own: Conditioning, original: Conditioning) -> Conditioning:
        return {**own, TEMPORAL_TEXT: self._tokens(original)}

    @torch.no_grad()
    def _tokens(self, conditioning: Conditioning) -> Float[Tensor, "clips tokens channels"]:
        if isinstance(self.original, LabelBase):
            conditioner = self.original.ldm.conditioner
            return conditioner(conditioning["labels"].to(conditioner.tokens.weight.device))
        return conditioning["encoder_hidden_states"]
