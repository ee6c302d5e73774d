"""Pipelines of the models that come with the package: driving clips of a label, with no download."""

from __future__ import annotations

from temporal_layers.recipes import embedded
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.pipelines.cascade import VideoCascade
from temporal_layers.recipes.pipelines.interpolation import VideoInterpolationPipeline
from temporal_layers.recipes.pipelines.prediction import VideoPredictionPipeline
from temporal_layers.recipes.pipelines.upscaling import VideoUpscalePipeline
from temporal_layers.recipes.pipelines.video_ldm import VideoLDMPipeline
from temporal_layers.recipes.stages.video import SHIPPED_ADAPTER

__all__ = [
    "load_cascade",
    "load_interpolation_pipeline",
    "load_prediction_pipeline",
    "load_upscale_pipeline",
    "load_video_pipeline",
]


def load_video_pipeline() -> VideoLDMPipeline:
    """Clips of 16 frames at 10 frames per second, 64 x 96 pixels, of a label of ``driving.LABELS``."""
    return VideoLDMPipeline.from_image_pipeline(load_shipped(), adapter=SHIPPED_ADAPTER)


def load_prediction_pipeline() -> VideoPredictionPipeline:
    """Key frames at 1.875 frames per second, of a label, and of first frames.

    They are decoded one by one: the temporal layers of the shipped decoder know 30 frames per second.
    """
    return VideoPredictionPipeline.from_image_pipeline(load_shipped(), adapter=embedded.WEIGHTS / "driving_prediction")


def load_interpolation_pipeline() -> VideoInterpolationPipeline:
    """Three frames between two, from 1.875 frames per second to 7.5 and to 30; the decoder has temporal layers for 30.

    With ``levels=1`` decode inside of ``pipeline.decoder.disabled()``: at 7.5 frames per second these layers do harm.
    """
    return VideoInterpolationPipeline.from_image_pipeline(
        load_shipped(),
        adapter=embedded.WEIGHTS / "driving_interpolation",
        decoder=embedded.WEIGHTS / "driving_decoder",
    )


def load_upscale_pipeline() -> VideoUpscalePipeline:
    """Driving clips of 64 x 96 pixels at 30 frames per second to 256 x 384."""
    upscaler, _ = embedded.load_shipped_video_upscaler()
    return VideoUpscalePipeline.from_image_pipeline(upscaler)


def load_cascade(*, upscaling: bool = True) -> VideoCascade:
    """A label to 113 frames of 256 x 384 pixels at 30 per second.

    Args:
        upscaling: With the last stage; 64 x 96 pixels without.
    """
    return VideoCascade(
        load_prediction_pipeline(),
        load_interpolation_pipeline(),
        load_upscale_pipeline() if upscaling else None,
        fps=embedded.KEY_FPS,
    )
