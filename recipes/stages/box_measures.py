"""What boxes do: to the error of a model, and to its samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import ImageDraw
from torch import Tensor

from temporal_layers.recipes.bases import Conditioning
from temporal_layers.recipes.boxes import BOXES, BoxBase, Boxes, sample_boxes
from temporal_layers.recipes.stages.box_judge import BoxJudge, found
from temporal_layers.recipes.stages.box_samples import BoxObjective, encoded, inside_error
from temporal_layers.recipes.stages.image_objectives import as_float
from temporal_layers.recipes.stages.personal_files import as_frame, to_image


@torch.no_grad()
def box_effect(
    base: BoxBase,
    frames: Tensor,
    conditioning: Conditioning,
    boxes: Sequence[Boxes],
    *,
    timesteps: tuple[int, ...] = (400, 700, 950),
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, float]:
    """What boxes are worth: the error in them with the boxes of an image, of another one and with none.

    Args:
        base: The image model with a trained adapter.
        frames: Not trained on, each with a box at least.
        conditioning: One row an image.
        boxes: Of each image.
        timesteps: Noise levels, over which the errors are averaged.
        seed: Of the noise, the same throughout.
        batch_size: Images at a time.

    Returns:
        Mean squared error in the boxes with the ``given`` ones, with those of another image (``swapped``), and with
        ``none``.
    """
    latents = encoded(base, frames)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    told = base.with_boxes(conditioning, boxes)
    objective = BoxObjective(base, list(told))
    tried = {"given": told[BOXES], "swapped": told[BOXES].roll(1, 0), "none": torch.zeros_like(told[BOXES])}
    device, errors = base.unet.device, {}
    for name, used in tried.items():
        total = torch.zeros(())
        for timestep in timesteps:
            for part in torch.arange(len(latents)).split(batch_size):
                rows = [(used if key == BOXES else value)[part] for key, value in told.items()]
                batch = (latents[part], noise[part], torch.full((len(part),), timestep), *rows)
                found = objective.errors(*(value.to(device) for value in batch)).cpu()
                total += inside_error(found, told[BOXES][part]).sum()
        errors[name] = (total / (len(timesteps) * len(latents))).item()
    return errors


@torch.no_grad()
def placement(
    base: BoxBase,
    judge: BoxJudge,
    frames: Tensor,
    conditioning: Conditioning,
    boxes: Sequence[Boxes],
    *,
    seed: int = 0,
    **sampling: Any,
) -> tuple[dict[str, float], Float[Tensor, "2 images 3 height width"]]:
    """Whether things appear where they were asked for, as a judge sees it.

    Args:
        base: The image model with a trained adapter.
        judge: Of `train_judge`, not trained on these images.
        frames: Real images, uint8 or float in [0, 1].
        conditioning: One row an image.
        boxes: Of each image, one at least.
        seed: Of the noise.
        **sampling: Further arguments of `sample_boxes`.

    Returns:
        Intersection over union of the boxes with what the judge finds (see `found`): in the ``real`` images, which is
        as good as it gets; in samples ``told`` of the boxes; in those with the boxes of another image (``swapped``),
        and in samples ``untold``, from the same noise, which is what chance gets. And the samples, untold and told.
    """
    noise = torch.randn(len(boxes), *base.latent_shape, generator=torch.Generator().manual_seed(seed))
    nowhere = [torch.empty(0, 4)] * len(boxes)
    untold, told = (sample_boxes(base, conditioning, some, noise=noise, **sampling) for some in (nowhere, boxes))
    wanted = base.with_boxes({}, boxes)[BOXES]
    numbers = {
        "real": found(judge, as_float(frames), wanted),
        "told": found(judge, told, wanted),
        "swapped": found(judge, told, wanted.roll(1, 0)),
        "untold": found(judge, untold, wanted),
    }
    return numbers, torch.stack([untold, told])


def outlined(
    frames: Float[Tensor, "images 3 height width"], boxes: Sequence[Boxes]
) -> Float[Tensor, "images 3 height width"]:
    """The frames with the outlines of boxes drawn in red."""
    images = []
    for frame, some in zip(frames, boxes, strict=True):
        image = to_image(frame)
        for box in some.tolist():
            corners = [share * side for share, side in zip(box, image.size * 2, strict=True)]
            ImageDraw.Draw(image).rectangle([round(value) for value in corners], outline=(255, 32, 32))
        images.append(as_frame(image))
    return torch.stack(images)
