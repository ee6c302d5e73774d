"""Continue a start frame, or make a clip of any length from nothing, window by window.

temporal-layers sample predict "day clear" --image start.png --num-frames 40 --count 3     # three futures
temporal-layers sample predict "night rain" --num-frames 200 --latents runs/night          # goes on after a kill
temporal-layers sample predict "a road" --model my-pipeline --clip start.mp4 --context-guidance-scale 1.5
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from temporal_layers.recipes.embedded import KEY_FPS, KEY_FRAMES
from temporal_layers.recipes.pipelines.prediction import VideoPredictionPipeline
from temporal_layers.recipes.pipelines.shipped import load_prediction_pipeline
from temporal_layers.recipes.sample.inputs import read_clip, read_frames
from temporal_layers.recipes.sample.options import SampleConfig, asked, load, run
from temporal_layers.recipes.training.configs import parse


@dataclass(frozen=True, kw_only=True)
class PredictSampleConfig(SampleConfig):
    """A clip of any length.

    Attributes:
        prompt: What it is to show: a text, or the name or number of a label; nothing for any.
        image: First frames as image files, one or two.
        clip: Or a clip that is continued.
        num_frames: Frames in the end, given ones included.
        window: Frames that the model sees at a time, as in its training.
        overlap: Frames of a window that are given, once there are so many.
        context_guidance_scale: Guidance towards the given frames; 1 turns it off.
        context_noise_level: Of noise on what the model is told of given frames, for models trained with it.
        latents: Folder that latents are kept in as they come; the same command then goes on where it was.
    """

    prompt: Annotated[str, tyro.conf.Positional] = ""
    image: tuple[Path, ...] = ()
    clip: Path | None = None
    num_frames: int = 16
    window: int = KEY_FRAMES
    overlap: int = 2
    context_guidance_scale: float = 1.0
    context_noise_level: int = 0
    latents: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image and self.clip is not None:
            raise ValueError("--image and --clip: expected one of them, got both")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse(PredictSampleConfig, arguments, prog="temporal-layers sample predict", description=__doc__)
    pipeline = load(VideoPredictionPipeline, config, load_prediction_pipeline)
    image, fps = None, KEY_FPS
    if config.image:
        image = read_frames(config.image)
    elif config.clip is not None:
        clip = read_clip(config.clip, pipeline.base.frame_size)
        image, fps = clip.frames.transpose(0, 1), clip.fps

    def make(generator: torch.Generator, out: Path) -> Iterator[Tensor]:
        parts = pipeline.stream(
            asked(config.prompt, pipeline),
            image,
            num_frames=config.num_frames,
            window=config.window,
            window_overlap=config.overlap,
            context_guidance_scale=config.context_guidance_scale,
            context_noise_level=config.context_noise_level,
            folder=None if config.latents is None else config.latents / out.stem,
            generator=generator,
            **config.words(),
        )
        made: list[Tensor] = []
        try:
            made.extend(parts)
        finally:  # decoded together: temporal layers of the decoder look over the borders of windows
            if made:
                yield pipeline.decode_clips(torch.cat(made, dim=2).to(pipeline.device))[0]

    return run("sample predict", config, make, fps=fps)


if __name__ == "__main__":
    sys.exit(main())
