"""The commands that make a clip of a text, a label or nothing in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from temporal_layers.recipes.pipelines.shipped import load_video_pipeline
from temporal_layers.recipes.pipelines.video_ldm import VideoLDMPipeline
from temporal_layers.recipes.sample.inputs import read_clip, read_frames
from temporal_layers.recipes.sample.options import SampleConfig, asked, load, run
from temporal_layers.recipes.stages.clips import DRIVING_FPS


@dataclass(frozen=True, kw_only=True)
class VideoSampleConfig(SampleConfig):
    """A clip in one piece.

    Attributes:
        prompt: What it is to show: a text, or the name or number of a label; nothing for any.
        num_frames: Frames of the clip.
        height: In pixels; that of the model's training if None.
        width: Likewise.
        image: First frame, or two, as image files, for temporal layers that were trained to predict.
        video: A clip to begin with, in part noise.
        strength: How much of it is noise; 0.8 if None.
        window: Frames that the model sees at a time, for clips longer than those of its training.
    """

    prompt: Annotated[str, tyro.conf.Positional] = ""
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    image: tuple[Path, ...] = ()
    video: Path | None = None
    strength: float | None = None
    window: int | None = None


def sample_video(command: str, config: VideoSampleConfig, pipeline: VideoLDMPipeline, fps: float = DRIVING_FPS) -> int:
    """Make clips with a pipeline that is there.

    Args:
        command: Name of the command, for its messages.
        config: Its settings.
        pipeline: What makes clips.
        fps: Frames per second.

    Returns:
        Exit code.
    """
    words = {**config.words(), "height": config.height, "width": config.width, "window": config.window}
    words["strength"] = config.strength
    if config.image:
        words["image"] = read_frames(config.image)
    if config.video is not None:
        size = pipeline.base.frame_size
        size = (config.height or size[0], config.width or size[1])
        clip = read_clip(config.video, size, num_frames=config.num_frames)
        words["video"] = clip.frames.transpose(0, 1)
        fps = clip.fps
    else:
        words["num_frames"] = config.num_frames

    def make(generator: torch.Generator, out: Path) -> Iterator[Tensor]:
        made = pipeline(asked(config.prompt, pipeline), generator=generator, output_type="pt", **words)
        yield made.frames[0].transpose(0, 1)

    return run(command, config, make, fps=fps)


def load_video(config: VideoSampleConfig) -> VideoLDMPipeline:
    """The pipeline of these commands."""
    return load(VideoLDMPipeline, config, load_video_pipeline)
