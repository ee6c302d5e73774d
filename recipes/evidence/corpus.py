"""Clips for the comparisons: rendered and encoded once, shared by all runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from temporal_layers.recipes.bases import LabelBase
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.stages.clips import DRIVING_FPS, driving_clips, encode_clips
from temporal_layers.recipes.stages.image import HELD_OUT


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Clips of the driving corpus.

    Attributes:
        latents: Training clips, ``(clips, channels, frames, height, width)``.
        labels: Of the training clips.
        frames: The training clips themselves, uint8, ``(clips, 3, frames, height, width)``.
        real: Held-out clips to measure against, in [0, 1].
        others: Held-out clips of which none is among ``real``: what a perfect model would make.
        other_labels: Of ``others``.
    """

    latents: Tensor
    labels: Tensor
    frames: Tensor
    real: Tensor
    others: Tensor
    other_labels: Tensor

    def save(self, path: Path) -> None:
        """Write it; frames as bytes."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("real", "others"):
            values[name] = (values[name] * 255).round().to(torch.uint8)
        save_file(values, path)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """What `save` wrote."""
        values = load_file(path)
        for name in ("real", "others"):
            values[name] = values[name].float() / 255
        return cls(**values)


def render_corpus(*, train: int, held_out: int, num_frames: int) -> Corpus:
    """Render and encode.

    Args:
        train: Training clips.
        held_out: Clips each in ``real`` and in ``others``.
        num_frames: Of every clip.
    """
    base = LabelBase(load_shipped())
    clips = driving_clips(base.frame_size, train, num_frames, fps=DRIVING_FPS)
    frames = torch.stack([clip.frames for clip in clips])
    held = driving_clips(base.frame_size, 2 * held_out, num_frames, fps=DRIVING_FPS, first=HELD_OUT)
    return Corpus(
        latents=encode_clips(base, frames),
        labels=torch.tensor([clip.label for clip in clips]),
        frames=(frames * 255).round().to(torch.uint8),
        real=torch.stack([clip.frames for clip in held[:held_out]]),
        others=torch.stack([clip.frames for clip in held[held_out:]]),
        other_labels=torch.tensor([clip.label for clip in held[held_out:]]),
    )
