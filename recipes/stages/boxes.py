"""Stage "boxes": teaches a frozen image model to put things where boxes say (Video LDM, section 4.1).

An adapter that reads a map of the boxes is trained on single images; the image model stays bit for bit. What is
sampled with it are start frames for the video model.

    temporal-layers train boxes --out runs/boxes
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from temporal_layers.config import check_at_least
from temporal_layers.recipes.bases import Conditioning, load_base
from temporal_layers.recipes.boxes import BOXES, BoxBase, Boxes, BoxMap, add_boxes, load_boxes
from temporal_layers.recipes.stages.box_judge import train_judge
from temporal_layers.recipes.stages.box_measures import box_effect, outlined, placement
from temporal_layers.recipes.stages.box_samples import BoxObjective, BoxSamples, encoded
from temporal_layers.recipes.stages.boxed_images import BoxDataConfig, BoxedImages, annotated_images, driving_images
from temporal_layers.recipes.stages.image import HELD_OUT, save_grid
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, fit, make_accelerator
from temporal_layers.recipes.training.streams import SampleStream

DEFAULT_OPTIM = OptimConfig(
    steps=1200, batch_size=8, lr=2e-3, warmup=0.1, weight_decay=0.0, ema_decay=0.99, checkpoint_every=200
)


@dataclass(frozen=True, kw_only=True)
class BoxesConfig:
    """Stage "boxes".

    Attributes:
        out: Folder of the run; ``boxes/`` in it is what `load_boxes` loads.
        seed: Seed of the data, the initial weights and the batches.
        model: Folder or repository of the image model, see `load_base`; empty for the one that comes with the package.
        start_from: Folder of an adapter to go on from, in place of a fresh one.
        max_boxes: Boxes of an image at most.
        data: Images with boxes.
        num_images: How many frames of the generated corpus to train on, if those are the data.
        optim: Training.
        engine: How the run is carried out.
        label_drop: Share of images trained without label or text.
        box_drop: Share of images trained without their boxes.
        box_weight: Weight of the error in the boxes beside that of the whole image.
        held_out: Images to measure the result on, as far as they have boxes; 0 for none. Of annotated images the last.
    """

    out: Path = Path("runs/boxes")
    seed: int = 0
    model: str = ""
    start_from: Path | None = None
    max_boxes: int = 8
    data: BoxDataConfig = BoxDataConfig()
    num_images: int = 4096
    optim: OptimConfig = DEFAULT_OPTIM
    engine: EngineConfig = EngineConfig()
    label_drop: float = 0.1
    box_drop: float = 0.1
    box_weight: float = 1.0
    held_out: int = 24

    def __post_init__(self) -> None:
        check_at_least("BoxesConfig.num_images", self.num_images, 1)
        check_at_least("BoxesConfig.max_boxes", self.max_boxes, 1)
        check_at_least("BoxesConfig.held_out", self.held_out, 0)
        if self.box_weight < 0:
            raise ValueError(f"BoxesConfig.box_weight: expected at least 0, got {self.box_weight}")
        for name in ("label_drop", "box_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"BoxesConfig.{name}: expected a value from 0 to 1, got {getattr(self, name)}")


def train_boxes(
    base: BoxBase,
    frames: Tensor,
    conditioning: Conditioning,
    boxes: Sequence[Boxes],
    config: OptimConfig = DEFAULT_OPTIM,
    *,
    label_drop: float = 0.1,
    box_drop: float = 0.1,
    box_weight: float = 1.0,
    seed: int = 0,
    **engine: Any,
) -> list[float]:
    """Train the adapter of ``base`` alone; the image model stays bit for bit.

    Args:
        base: Of `add_boxes` or `load_boxes`.
        frames: (images, 3, height, width), uint8 or float in [0, 1].
        conditioning: One row an image, of ``base.conditioning``.
        boxes: Of each image, as shares of width and height.
        config: Steps, learning rate and so on.
        label_drop: Share of images trained without label or text.
        box_drop: Share of images trained without their boxes, for guidance towards them.
        box_weight: Weight of the error in the boxes beside that of the whole image.
        seed: Seed of the batches.
        **engine: Further arguments of `fit`: accelerator, run, engine, progress, validate, on_checkpoint.

    Returns:
        The loss of each step.

    Raises:
        ValueError: If there are no images, or frames, rows and boxes are not as many, or a box is bad.
    """
    if not isinstance(base.reader, BoxMap):
        raise ValueError(
            "train_boxes: base: expected one of add_boxes or load_boxes, whose adapter is trained, got one with "
            f"{type(base.reader).__name__}"
        )
    if not len(frames) == len(boxes) > 0:
        raise ValueError(
            f"train_boxes: expected boxes for each of at least one image, got {len(frames)} images and {len(boxes)} "
            "sets of boxes; an image without any has an empty one"
        )
    samples = BoxSamples(
        encoded(base, frames),
        base.with_boxes(conditioning, boxes),
        base.no_conditioning(1),
        num_timesteps=base.scheduler.config.num_train_timesteps,
        label_drop=label_drop,
        box_drop=box_drop,
        seed=seed,
    )
    adapter = base.reader.adapter.requires_grad_(True).train()
    before = [(parameter, parameter.requires_grad) for parameter in base.unet.parameters()]
    base.unet.requires_grad_(False)
    objective = BoxObjective(base, list(samples.nothing), box_weight=box_weight)
    try:
        return fit(objective, SampleStream(samples), config, name="boxes", seed=seed, **engine)
    finally:
        adapter.requires_grad_(False).eval()
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def run_boxes_stage(config: BoxesConfig) -> BoxBase:
    """Run the whole stage and write adapter, losses and what came out to ``config.out``."""
    started = time.perf_counter()
    accelerator = make_accelerator(config.engine, config.out)
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    base = _base(config).to(accelerator.device)
    images, held_out = _images(config, base)
    history = train_boxes(
        base,
        images.frames,
        base.conditioning(images.labels, images.captions),
        images.boxes,
        config.optim,
        label_drop=config.label_drop,
        box_drop=config.box_drop,
        box_weight=config.box_weight,
        seed=config.seed,
        accelerator=accelerator,
        run=run,
        engine=config.engine,
        on_checkpoint=lambda step: base.reader.save_pretrained(config.out / f"boxes-{step}") if run else None,
    )
    if run is not None:
        base.reader.save_pretrained(config.out / "boxes")
        run.finish(history, started=started, **(_measured(base, images, held_out, config) if len(held_out) else {}))
    return base


def _base(config: BoxesConfig) -> BoxBase:
    image = load_base(config.model)
    if config.start_from is not None:
        return load_boxes(image, config.start_from, max_boxes=config.max_boxes)
    return add_boxes(image, max_boxes=config.max_boxes, seed=config.seed)


def _images(config: BoxesConfig, base: BoxBase) -> tuple[BoxedImages, BoxedImages]:
    """Images to train on, and those with boxes among the ones held out."""
    if config.data.images is None:
        images = driving_images(base.frame_size, config.num_images, seed=config.seed)
        if not config.held_out:
            return images, images.chosen([])
        others = driving_images(base.frame_size, config.held_out, first=HELD_OUT, seed=config.seed)
    else:
        found = annotated_images(config.data, base.frame_size, base.max_boxes)
        count = len(found) - config.held_out
        if count < 1:
            raise ValueError(
                f"BoxesConfig: held_out: expected fewer than all {len(found)} images, got {config.held_out}; 0 trains "
                "on all and measures nothing"
            )
        images, others = found.chosen(range(count)), found.chosen(range(count, len(found)))
    return images, others.chosen([row for row, boxes in enumerate(others.boxes) if len(boxes)])


def _measured(base: BoxBase, images: BoxedImages, held_out: BoxedImages, config: BoxesConfig) -> dict[str, Any]:
    """Numbers on held-out images, and a sheet of samples without boxes and with them."""
    judge = train_judge(images.frames, base.with_boxes({}, images.boxes)[BOXES], seed=config.seed)
    conditioning = base.conditioning(held_out.labels, held_out.captions)
    given = (held_out.frames, conditioning, held_out.boxes)
    numbers, (untold, told) = placement(base, judge, *given, seed=config.seed)
    shown = min(8, len(held_out))
    sheet = [untold[:shown], told[:shown], outlined(told[:shown], held_out.boxes[:shown])]
    save_grid(config.out / "samples.png", torch.cat(sheet), columns=shown)
    return {"error in boxes": box_effect(base, *given, seed=config.seed), "placement": numbers}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    run_boxes_stage(parse(BoxesConfig, arguments, prog="temporal-layers train boxes", description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
