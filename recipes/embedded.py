"""The small video models that come with the package, loaded and ready: every stage of a cascade for driving clips.

A label becomes eight key frames of 64 x 96 pixels at 1.875 frames per second (`load_shipped_prediction`), these 29
frames and then 113 at 30 per second (`load_shipped_interpolation`, twice), pixels of them (`load_shipped_decoder`), and
those 256 x 384 pixels (`load_shipped_video_upscaler`): the rates of the paper, sections 4 and 7. Each function loads
copies of its own, so that the layers of one do not get into the models of another. How the models were made:
``temporal-layers train embedded``.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL

from temporal_layers.adapters import TemporalAdapter
from temporal_layers.recipes.bases import LabelBase
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.upscaler import Upscaler, load_shipped_latent_upscaler

__all__ = [
    "KEY_FPS",
    "KEY_FRAMES",
    "VIDEO_FPS",
    "WEIGHTS",
    "load_shipped_decoder",
    "load_shipped_interpolation",
    "load_shipped_prediction",
    "load_shipped_video_upscaler",
]

WEIGHTS = Path(__file__).parent / "weights"
"""Folder with one folder for each model."""

KEY_FPS = 1.875
"""Frames per second of the key frames: a sixteenth of the final rate."""

KEY_FRAMES = 8
"""Frames of a window of key frames."""

VIDEO_FPS = 30.0
"""Frames per second after both interpolations."""


def load_shipped_prediction() -> tuple[LabelBase, TemporalAdapter]:
    """The model of key frames, which makes eight at 1.875 frames per second of a label and of none, one or two frames.

    Returns:
        The shipped image model with temporal layers in it, and these; ``ContextPlanes.of(adapter)`` tells what frame
        context they take.
    """
    return _in_base("driving_prediction")


def load_shipped_interpolation() -> tuple[LabelBase, TemporalAdapter]:
    """The model that makes three frames between two: rate 0 from 1.875 to 7.5 frames per second, rate 1 from 7.5 to 30.

    Returns:
        As `load_shipped_prediction`.
    """
    return _in_base("driving_interpolation")


def load_shipped_decoder() -> tuple[AutoencoderKL, TemporalAdapter]:
    """The autoencoder of the shipped image model, its decoder with temporal layers for clips at 30 frames per second.

    Returns:
        The autoencoder, whose ``decode`` takes latents of clips ``(clips, 4, frames, height, width)``, divided by its
        ``scaling_factor``; and the layers. Inside of ``adapter.disabled()`` it decodes frame by frame, as key frames
        and what was interpolated once need it: at their rates the layers do harm.
    """
    vae = load_shipped().vae
    return vae, TemporalAdapter.from_pretrained(vae, WEIGHTS / "driving_decoder")


def load_shipped_video_upscaler() -> tuple[Upscaler, TemporalAdapter]:
    """The upscaler of clips from 64 x 96 pixels to 256 x 384, in latents, for windows of 8 frames at 30 per second.

    Returns:
        The shipped upscaler in latents with temporal layers in its UNet, and these.
    """
    upscaler = load_shipped_latent_upscaler()
    return upscaler, TemporalAdapter.from_pretrained(upscaler.unet, WEIGHTS / "driving_latent_upscaler_video")


def _in_base(name: str) -> tuple[LabelBase, TemporalAdapter]:
    base = LabelBase(load_shipped())
    return base, TemporalAdapter.from_pretrained(base.unet, WEIGHTS / name)
