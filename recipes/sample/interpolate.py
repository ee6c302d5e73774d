"""Make three frames between every two of a clip; twice, 8 frames become 29 and then 113.

temporal-layers sample interpolate keys.mp4 --prompt "day clear" --out smooth.mp4
temporal-layers sample interpolate clip.mp4 --levels 1 --first-level 1    # between frames that are close already
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

from temporal_layers.recipes.conditioning import FACTOR
from temporal_layers.recipes.pipelines.interpolation import LEVELS, VideoInterpolationPipeline
from temporal_layers.recipes.pipelines.shipped import load_interpolation_pipeline
from temporal_layers.recipes.sample.inputs import read_clip
from temporal_layers.recipes.sample.options import SampleConfig, asked, load, run
from temporal_layers.recipes.training.configs import parse


@dataclass(frozen=True, kw_only=True)
class InterpolateSampleConfig(SampleConfig):
    """A clip at a higher rate.

    Attributes:
        clip: A video, or a folder of images in the order of their names.
        prompt: What it shows: a text, or the name or number of a label.
        levels: How many times three frames are made between two.
        first_level: What the first time is: 0 between key frames, 1 between the frames that came of them.
        num_frames: The first frames of the clip; all if None.
        context_noise_level: Of noise on what the model is told of given frames.
        latents: Folder that latents are kept in as they come; the same command then goes on where it was.
    """

    clip: Annotated[Path, tyro.conf.Positional] = Path("keys.mp4")
    prompt: str = ""
    levels: int = LEVELS
    first_level: int = 0
    num_frames: int | None = None
    context_noise_level: int = 0
    latents: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse(InterpolateSampleConfig, arguments, prog="temporal-layers sample interpolate", description=__doc__)
    pipeline = load(VideoInterpolationPipeline, config, load_interpolation_pipeline)
    clip = read_clip(config.clip, pipeline.base.frame_size, num_frames=config.num_frames)

    def make(generator: torch.Generator, out: Path) -> Iterator[Tensor]:
        made: list[Tensor] = []
        parts = pipeline.stream(
            asked(config.prompt, pipeline),
            clip.frames.transpose(0, 1),
            levels=config.levels,
            first_level=config.first_level,
            context_noise_level=config.context_noise_level,
            folder=None if config.latents is None else config.latents / out.stem,
            generator=generator,
            **config.words(),
        )
        try:
            made.extend(parts)
        finally:
            if made:
                yield pipeline.decode_clips(torch.cat(made, dim=2).to(pipeline.device))[0]

    return run("sample interpolate", config, make, fps=clip.fps * FACTOR**config.levels)


if __name__ == "__main__":
    sys.exit(main())
