"""Images whose things have boxes: frames of the generated corpus, or a folder with annotations as COCO writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from temporal_layers.recipes.boxes import Boxes
from temporal_layers.recipes.driving import DrivingConfig, DrivingCorpus, caption
from temporal_layers.recipes.stages.stills import render_stills

LEAST_VISIBLE = 0.5
"""Share of a thing's box that has to be in the cropped image."""


@dataclass(frozen=True, kw_only=True)
class BoxDataConfig:
    """Which images.

    Attributes:
        images: Folder of images; frames of the generated corpus, with the boxes of their cars, if None.
        annotations: File of their boxes in the format of COCO (``instances_*.json``).
        category: Which of its categories.
        caption: Text of all images, for a model with text.
        label: Label of all images, for a model with labels.
    """

    images: Path | None = None
    annotations: Path | None = None
    category: str = "car"
    caption: str = "a photo"
    label: int = 0

    def __post_init__(self) -> None:
        if (self.images is None) != (self.annotations is None):
            raise ValueError(
                "BoxDataConfig: expected images and annotations together, got only one of them; leave out both for "
                "the generated corpus"
            )


@dataclass(frozen=True, kw_only=True)
class BoxedImages:
    """Images, what they are called, and the boxes of what is in them.

    Attributes:
        frames: Bytes.
        labels: One an image.
        captions: One an image.
        boxes: Of each image: left, top, right and bottom as shares of width and height.
    """

    frames: UInt8[Tensor, "images 3 height width"]
    labels: list[int]
    captions: list[str]
    boxes: list[Boxes]

    def __len__(self) -> int:
        return len(self.frames)

    def chosen(self, rows: Sequence[int]) -> BoxedImages:
        """Some of them."""
        rows = list(rows)
        labels, captions, boxes = ([kind[row] for row in rows] for kind in (self.labels, self.captions, self.boxes))
        return BoxedImages(frames=self.frames[rows], labels=labels, captions=captions, boxes=boxes)


def driving_images(size: tuple[int, int], count: int, *, first: int = 0, seed: int = 0) -> BoxedImages:
    """A frame from each of ``count`` clips of the generated corpus, with the boxes of its cars."""
    corpus = DrivingCorpus(DrivingConfig(height=size[0], width=size[1]), seed=seed)
    frames, labels = render_stills(corpus, count, first=first)
    numbers = range(first, first + count)
    return BoxedImages(
        frames=frames,
        labels=labels.tolist(),
        captions=[caption(corpus.scene(number)) for number in numbers],
        boxes=[corpus.boxes(number, corpus.still_frame(number)) for number in numbers],
    )


def annotated_images(data: BoxDataConfig, size: tuple[int, int], max_boxes: int) -> BoxedImages:
    """Images of a folder with the boxes of one category, in the middle of which an image of ``size`` is cut out.

    A thing of which less than half is left is left out, and so are groups (``iscrowd``). Of more than ``max_boxes`` the
    largest are taken.

    Args:
        data: Folder, file and category.
        size: Height and width.
        max_boxes: Of an image.

    Raises:
        ValueError: If the file has no images or no such category.
    """
    found = json.loads(data.annotations.read_text())
    categories = {entry["name"]: entry["id"] for entry in found.get("categories", ())}
    if data.category not in categories:
        raise ValueError(
            f"annotated_images: category: expected one of {data.annotations}: {', '.join(sorted(categories)) or 'none'}"
            f", got {data.category!r}"
        )
    if not found.get("images"):
        raise ValueError(f"annotated_images: annotations: expected images, got none in {data.annotations}")
    by_image: dict[int, list[list[float]]] = {}
    for entry in found["annotations"]:
        if entry["category_id"] == categories[data.category] and not entry.get("iscrowd"):
            by_image.setdefault(entry["image_id"], []).append(entry["bbox"])
    frames, boxes = [], []
    for entry in found["images"]:
        with Image.open(data.images / entry["file_name"]) as image:
            cut = ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.LANCZOS)
        frames.append(torch.from_numpy(np.array(cut)).permute(2, 0, 1))
        boxes.append(cut_boxes(by_image.get(entry["id"], []), (entry["height"], entry["width"]), size)[:max_boxes])
    count = len(frames)
    return BoxedImages(
        frames=torch.stack(frames), labels=[data.label] * count, captions=[data.caption] * count, boxes=boxes
    )


def cut_boxes(boxes: Sequence[Sequence[float]], size: tuple[int, int], target: tuple[int, int]) -> Boxes:
    """Boxes after an image has been brought to another size, with what sticks out cut off on both sides alike.

    Args:
        boxes: Left, top, width and height in pixels.
        size: Height and width of the image.
        target: Those that it is brought to.

    Returns:
        Left, top, right and bottom as shares, the largest first.
    """
    (height, width), scale = size, max(target[0] / size[0], target[1] / size[1])
    shown = np.array([target[1], target[0]]) / scale  # in pixels of the image
    corner = (np.array([width, height]) - shown) / 2
    given = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    edges = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1)
    shares = (edges - np.tile(corner, 2)) / np.tile(shown, 2)
    inside = shares.clip(0, 1)
    area, left = ((part[:, 2:] - part[:, :2]).prod(1) for part in (shares, inside))
    kept = inside[(left > 0) & (left >= LEAST_VISIBLE * area)]
    order = np.argsort(-(kept[:, 2:] - kept[:, :2]).prod(1), kind="stable")
    return torch.from_numpy(kept[order]).float()
