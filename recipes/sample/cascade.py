"""The whole Video LDM: key frames, interpolation twice, temporal decoder, upscaling; 8 key frames become 113 frames.

temporal-layers sample cascade "night rain" --out night.mp4
temporal-layers sample cascade "day clear" --image start.png --key-frames 12 --count 3   # futures of one start
temporal-layers sample cascade --model my-cascade --no-upscale --keep
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from temporal_layers.recipes.data.video_io import write_video
from temporal_layers.recipes.pipelines.cascade import KEY_FRAME_RATE, VideoCascade
from temporal_layers.recipes.pipelines.shipped import load_cascade
from temporal_layers.recipes.sample.inputs import read_frames, save_latents
from temporal_layers.recipes.sample.options import SampleConfig, asked, check_no_parts, device, run, scheduler
from temporal_layers.recipes.training.configs import parse


@dataclass(frozen=True, kw_only=True)
class CascadeSampleConfig(SampleConfig):
    """A long clip.

    Attributes:
        prompt: What it is to show: a text, or the name or number of a label; nothing for any.
        model: Folder that a ``VideoCascade`` was saved to; the models that come with the package if empty.
        image: First key frames as image files, one or two.
        key_frames: Key frames; 8 become 29 and then 113 frames.
        levels: How many times three frames are made between two.
        steps: Denoising steps of key frames.
        interpolation_steps: Of interpolation.
        upscale: Make the frames larger, where there is an upscaler.
        upscale_steps: Of that.
        chunk: Frames that are decoded at a time; all if None.
        keep: Keep what the stages before the last one made, in a folder beside the clip: latents for ``sample
            decode``, and the clip before it was made larger.
    """

    prompt: Annotated[str, tyro.conf.Positional] = ""
    image: tuple[Path, ...] = ()
    key_frames: int = 8
    levels: int = 2
    steps: int = 25
    interpolation_steps: int = 4
    upscale: bool = True
    upscale_steps: int = 3
    chunk: int | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_parts(self)


def load(config: CascadeSampleConfig) -> VideoCascade:
    """The cascade of the command."""
    if not config.model:
        cascade = load_cascade(upscaling=config.upscale)
    else:
        cascade = VideoCascade.from_pretrained(config.model)
        cascade.upscaling = cascade.upscaling if config.upscale else None
    if config.scheduler:
        for pipeline in filter(None, (cascade.key_frames, cascade.interpolation, cascade.upscaling)):
            pipeline.scheduler = scheduler(config.scheduler, pipeline.scheduler)
    return cascade.to(device(config))


class _Kept:
    """Writes what each stage made into a folder as soon as it is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, stage: str, result: Tensor, fps: float) -> None:
        if stage in ("key frames", "interpolation"):
            save_latents(self.folder / f"{stage.replace(' ', '-')}.safetensors", result, fps)
        elif stage == "decoding":
            write_video(self.folder / "decoding.mp4", result[0], fps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse(CascadeSampleConfig, arguments, prog="temporal-layers sample cascade", description=__doc__)
    cascade = load(config)
    words: dict[str, Any] = config.words()
    guidance = {name: words[name] for name in ("guidance_scale", "negative_prompt") if name in words}
    image = read_frames(config.image) if config.image else None

    def make(generator: torch.Generator, out: Path) -> Iterator[Tensor]:
        kept = _Kept(out.with_name(f"{out.stem}.stages"))
        found = cascade(
            asked(config.prompt, cascade.key_frames),
            image,
            num_key_frames=config.key_frames,
            levels=config.levels,
            generator=generator,
            key_frames=words,
            interpolation={"num_inference_steps": config.interpolation_steps, "batch_size": 8, **guidance},
            upscaling={"num_inference_steps": config.upscale_steps, "window_overlap": 2},
            decode_chunk_size=config.chunk,
            on_stage=kept,
            output_type="pt",
        )
        yield found.frames[0].transpose(0, 1)
        if not config.keep:  # only now: what was done is there after Ctrl-C
            shutil.rmtree(kept.folder)

    fps = (cascade.fps or KEY_FRAME_RATE) * 4**config.levels
    return run("sample cascade", config, make, fps=fps)


if __name__ == "__main__":
    sys.exit(main())
