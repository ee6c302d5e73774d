"""Make frames of latents, through the temporal layers of a decoder if there are any.

temporal-layers sample decode clip.stages/interpolation.safetensors --out clip.mp4
temporal-layers sample decode latents.safetensors --model my-pipeline --frame-by-frame
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from temporal_layers.recipes.embedded import VIDEO_FPS
from temporal_layers.recipes.pipelines.interpolation import VideoInterpolationPipeline
from temporal_layers.recipes.pipelines.shipped import load_interpolation_pipeline
from temporal_layers.recipes.sample.inputs import read_latents
from temporal_layers.recipes.sample.options import SampleConfig, load, run
from temporal_layers.recipes.training.configs import parse


@dataclass(frozen=True, kw_only=True)
class DecodeSampleConfig(SampleConfig):
    """Frames of latents.

    Attributes:
        latents: A .safetensors file with ``latents`` of clips, as ``sample cascade --keep`` writes it; one file is
            written for each clip.
        frame_by_frame: Leave the temporal layers of the decoder out.
        chunk: Frames that are decoded at a time; all if None.
    """

    latents: Annotated[Path, tyro.conf.Positional] = Path("latents.safetensors")
    frame_by_frame: bool = False
    chunk: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse(DecodeSampleConfig, arguments, prog="temporal-layers sample decode", description=__doc__)
    latents, fps = read_latents(config.latents)
    pipeline = load(VideoInterpolationPipeline, config, load_interpolation_pipeline)
    left_out = config.frame_by_frame and "vae" in pipeline.adapters()
    clips = iter(latents.split(1))

    def make(generator: torch.Generator, out: Path) -> Iterator[Tensor]:
        with pipeline.decoder.disabled() if left_out else contextlib.nullcontext():
            yield pipeline.decode_clips(next(clips).to(pipeline.device), decode_chunk_size=config.chunk)[0]

    return run("sample decode", dataclasses.replace(config, count=len(latents)), make, fps=fps or VIDEO_FPS)


if __name__ == "__main__":
    sys.exit(main())
