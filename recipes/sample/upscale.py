"""Make the frames of a clip four times as high and wide.

    temporal-layers sample upscale clip.mp4 --out large.mp4
    temporal-layers sample upscale clip.mp4 --model stabilityai/stable-diffusion-x4-upscaler --adapter my-layers \\
        --prompt "a road at night" --tile 128 128 --tile-overlap 32
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

from temporal_layers.recipes.bases import load_image_pipeline
from temporal_layers.recipes.pipelines.shipped import load_upscale_pipeline
from temporal_layers.recipes.pipelines.upscaling import VideoUpscalePipeline
from temporal_layers.recipes.sample.inputs import read_clip
from temporal_layers.recipes.sample.options import SampleConfig, check_no_parts, is_saved, parts, ready, run
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.upscaler import Upscaler


@dataclass(frozen=True, kw_only=True)
class UpscaleSampleConfig(SampleConfig):
    """A larger clip.

    Attributes:
        clip: A video, or a folder of images in the order of their names.
        prompt: What it shows, for upscalers that read text.
        steps: Denoising steps.
        num_frames: The first frames of the clip; all if None.
        noise_level: Of noise put on the frames: more makes up for worse ones, and invents more.
        window: Frames that the model sees at a time.
        overlap: Frames that a window shares with the one before.
        tile: Height and width of what it sees at a time, in latents, or pixels where there is no autoencoder.
        tile_overlap: Of tiles.
    """

    clip: Annotated[Path, tyro.conf.Positional] = Path("clip.mp4")
    prompt: str = ""
    steps: int = 4
    num_frames: int | None = None
    noise_level: int = 20
    window: int = 8
    overlap: int = 2
    tile: tuple[int, int] | None = None
    tile_overlap: int = 0


def load_upscale(config: SampleConfig) -> VideoUpscalePipeline:
    """The pipeline of the command; as `load` for those of other classes."""
    if not config.model:
        check_no_parts(config)
        return ready(load_upscale_pipeline(), config)
    if is_saved(VideoUpscalePipeline, config.model):
        check_no_parts(config)
        return ready(VideoUpscalePipeline.from_pretrained(config.model), config)
    if is_saved(Upscaler, config.model):
        image = Upscaler.from_pretrained(config.model)
    else:
        image = load_image_pipeline(config.model)
    return ready(VideoUpscalePipeline.from_image_pipeline(image, **parts(config, image)), config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse(UpscaleSampleConfig, arguments, prog="temporal-layers sample upscale", description=__doc__)
    pipeline = load_upscale(config)
    clip = read_clip(config.clip, num_frames=config.num_frames)

    def make(generator: torch.Generator, out: Path) -> Iterator[Tensor]:
        large = pipeline(
            clip.frames.transpose(0, 1),
            config.prompt or None,
            noise_level=config.noise_level,
            window=config.window,
            window_overlap=config.overlap,
            tile=config.tile,
            tile_overlap=config.tile_overlap,
            generator=generator,
            output_type="pt",
            **config.words(),
        )
        yield large.frames[0].transpose(0, 1)

    return run("sample upscale", config, make, fps=clip.fps)


if __name__ == "__main__":
    sys.exit(main())
