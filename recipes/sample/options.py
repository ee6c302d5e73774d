"""What the sampling commands have in common: which model, which noise, where to; and the pipeline that follows."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from temporal_layers.recipes.bases import LabelBase, VideoBase, load_base
from temporal_layers.recipes.pipelines.components import TemporalPipeline
from temporal_layers.recipes.pipelines.context import ContextPipeline
from temporal_layers.recipes.sample.writing import check_out, numbered, write_clip

Pipeline = TypeVar("Pipeline", bound=TemporalPipeline)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What all sampling commands take.

    Attributes:
        out: File to write: .mp4, .gif, .webp or .png (animated), or without a suffix a folder of frames. A contact
            sheet and a record of how it was made stand beside it.
        seed: Of the noise. The same seed gives the same clip.
        count: Clips to make, of this seed and the ones behind it.
        steps: Denoising steps.
        guidance_scale: Towards the prompt or label; 1 turns it off. 7.5 for texts and 2 for labels if None.
        negative: Prompt or label to be guided away from.
        scheduler: Name of a scheduler of diffusers, in place of the model's own.
        eta: Fresh noise in each step, from 0 to below 1, for schedulers that have it.
        model: Folder that a pipeline of this library was saved to; or an image model: a folder, or a repository of the
            Hugging Face hub. The one that comes with the package if empty.
        adapter: Folder or repository of temporal layers, to put into an image model.
        decoder: Likewise, for its decoder.
        unet: Folder of a UNet in place of the image model's: the one that training with ``--train all`` leaves beside
            its adapter.
        device: As torch names it; a GPU if there is one, if empty.
        fps: Frames per second of the file; what the command is made for if None.
        sheet: Draw a contact sheet.
    """

    out: Path = Path("clip.mp4")
    seed: int = 0
    count: int = 1
    steps: int = 25
    guidance_scale: float | None = None
    negative: str = ""
    scheduler: str = ""
    eta: float = 0.0
    model: str = ""
    adapter: str = ""
    decoder: str = ""
    unet: str = ""
    device: str = ""
    fps: float | None = None
    sheet: bool = True

    def __post_init__(self) -> None:
        if self.count < 1 or self.steps < 1:
            raise ValueError(f"--count and --steps: expected at least 1, got {self.count} and {self.steps}")
        for out in numbered(self.out, self.count):
            check_out(out)
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"--fps: expected more than 0, got {self.fps}")

    def words(self) -> dict[str, Any]:
        """The arguments of a pipeline's call that all of them have."""
        words: dict[str, Any] = {"num_inference_steps": self.steps, "eta": self.eta}
        if self.guidance_scale is not None:
            words["guidance_scale"] = self.guidance_scale
        return {**words, "negative_prompt": _label(self.negative)} if self.negative else words


def _label(word: str) -> str | int:
    return int(word) if word.isdecimal() else word


def asked(prompt: str, pipeline: TemporalPipeline) -> str | int | None:
    """What a pipeline is asked for: a text, which may be empty; or the name or the number of a label, or nothing."""
    if pipeline.text_encoder is not None:
        return prompt
    return _label(prompt) if prompt else None


def load(kind: type[Pipeline], config: SampleConfig, shipped: Callable[[], Pipeline]) -> Pipeline:
    """The pipeline of a command.

    Args:
        kind: Its class.
        config: Which model.
        shipped: Loads the one that comes with the package.

    Raises:
        ValueError: If an image model comes without temporal layers, layers without an image model or beside a pipeline
            that has its own, or there is no such scheduler or device.
    """
    if not config.model:
        check_no_parts(config)
        pipeline = shipped()
    elif is_saved(kind, config.model):
        check_no_parts(config)
        pipeline = kind.from_pretrained(config.model)
    else:
        image = image_model(load_base(config.model))
        pipeline = kind.from_image_pipeline(image, **parts(config, image))
    return ready(pipeline, config)


def check_no_parts(config: SampleConfig) -> None:
    """Raise a ValueError if there are parts for a model that has its own: that of the package, or a saved pipeline."""
    if not (config.adapter or config.decoder or config.unet):
        return
    if not config.model:
        raise ValueError(
            "--adapter, --decoder and --unet: expected --model beside them, the image model that they are for, got none"
        )
    raise ValueError(
        f"--adapter, --decoder and --unet: expected an image model beside them, got {config.model}, which was saved "
        "with its own temporal layers; leave them out, or name the image model"
    )


def is_saved(kind: type, model: str) -> bool:
    """Whether a folder holds what a class of this library saved; pipelines with the same components read each other."""
    index = Path(model) / "model_index.json"
    kinds = TemporalPipeline.__subclasses__() + ContextPipeline.__subclasses__()
    names = [other.__name__ for other in kinds] if issubclass(kind, TemporalPipeline) else [kind.__name__]
    return index.is_file() and json.loads(index.read_text()).get("_class_name") in names


def image_model(base: VideoBase) -> Any:
    """What pipelines are made of."""
    return base.ldm if isinstance(base, LabelBase) else base.pipeline


def parts(config: SampleConfig, image: Any) -> dict[str, Any]:
    """Temporal layers that are asked for, and the UNet that goes with them.

    Args:
        config: Which.
        image: The image model whose UNet the other one takes the place of.

    Raises:
        ValueError: If the layers were trained together with a UNet which is not asked for, or that is not there.
    """
    found: dict[str, Any] = {name: getattr(config, name) for name in ("adapter", "decoder") if getattr(config, name)}
    run = Path(config.adapter).parent
    beside = run / "unet"
    # A saved pipeline has a UNet beside its layers too: the image model's, in whose place another one may be meant.
    trained_too = (beside / "config.json").is_file() and not (run / "model_index.json").is_file()
    if config.adapter and not config.unet and trained_too:
        raise ValueError(
            f"--unet: expected the UNet that was trained together with {config.adapter}, got none; pass --unet {beside}"
        )
    if config.unet:
        if not (Path(config.unet) / "config.json").is_file():
            raise ValueError(f"--unet: expected the folder of a UNet, as {beside}, got {config.unet}")
        found["unet"] = type(image.unet).from_pretrained(config.unet)
    return found


def ready(pipeline: Any, config: SampleConfig) -> Any:
    """A pipeline with the scheduler and on the device that are asked for."""
    if config.scheduler:
        pipeline.scheduler = scheduler(config.scheduler, pipeline.scheduler)
    return pipeline.to(device(config))


def scheduler(name: str, instead_of: SchedulerMixin) -> SchedulerMixin:
    """A scheduler of diffusers by its name, with the noise schedule of another one.

    Raises:
        ValueError: If there is none of that name, it does not go with the model, or needs a package that is not there.
    """
    known = sorted(cls.__name__ for cls in instead_of.compatibles)
    if name not in known:
        raise ValueError(f"--scheduler: expected one of {', '.join(known)}, got {name!r}")
    try:
        return getattr(diffusers, name).from_config(instead_of.config)
    except ImportError as error:
        raise ValueError(f"--scheduler: {' '.join(str(error).split())}") from error


def device(config: SampleConfig) -> str:
    """Where to run.

    Raises:
        ValueError: If torch knows no device of that name, or there is none.
    """
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device: expected a device that is there, such as 'cpu', got {name!r}: {reason}") from error
    return name


def run(
    command: str,
    config: SampleConfig,
    make: Callable[[torch.Generator, Path], Iterator[Tensor]],
    *,
    fps: float,
    **facts: Any,
) -> int:
    """Make clips one after the other, and write each as soon as it is there.

    Args:
        command: Name of the command.
        config: Its settings.
        make: Yields parts of a clip ``(3, frames, height, width)`` in [0, 1], as they come, of a source of noise; it is
            also told where the clip goes. What has come is written even if the rest does not.
        fps: Frames per second, unless the settings say so.
        **facts: For the record of each clip.

    Returns:
        Exit code: 0, or 130 after Ctrl-C.
    """
    for index, out in enumerate(numbered(config.out, config.count)):
        out.parent.mkdir(parents=True, exist_ok=True)  # what fails is to fail before the sampling
        seed, parts, started = config.seed + index, [], time.perf_counter()
        stopped = False
        try:
            for part in make(torch.Generator().manual_seed(seed), out):
                parts.append(part.cpu())
        except KeyboardInterrupt:
            stopped = True
        if parts:
            took = {"seconds": round(time.perf_counter() - started, 1), "complete": not stopped}
            rate = config.fps or fps
            written = write_clip(
                out,
                torch.cat(parts, dim=1),
                rate,
                command=f"temporal-layers {command}",
                settings=dataclasses.replace(config, seed=seed, count=1, out=out),
                seed=seed,
                sheet=config.sheet,
                **took,
                **facts,
            )
            print(written.clip)
        if stopped:
            finished = f"{out} has what was finished" if parts else f"nothing of {out} was finished"
            print(f"temporal-layers {command}: stopped; {finished}", file=sys.stderr)
            return INTERRUPTED
    return 0
