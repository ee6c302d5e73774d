"""Single frames to train an image model on, from the generated corpus or from videos."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from temporal_layers.recipes.data.loader import LoaderConfig, open_stream
from temporal_layers.recipes.data.sampling import Bucket, SamplingConfig
from temporal_layers.recipes.data.sources import DataConfig
from temporal_layers.recipes.driving import DrivingCorpus


def render_stills(corpus: DrivingCorpus, count: int, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """Render one frame from each of ``count`` clips, as bytes to save memory.

    Returns:
        Frames (count, 3, height, width), uint8, and labels (count,), int64.
    """
    frames, labels = [], []
    for start in range(first, first + count, 64):
        part, part_labels = corpus.stills(range(start, min(start + 64, first + count)))
        frames.append((part * 255).round().to(torch.uint8))
        labels.append(part_labels)
    return torch.cat(frames), torch.cat(labels)


def read_stills(
    data: DataConfig, count: int, size: tuple[int, int], *, loader: LoaderConfig | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Frames from all over some videos, which come round as often as is needed.

    Args:
        data: The videos.
        count: Frames.
        size: Height and width to which they are brought, with random crops.
        loader: How videos are decoded.
        seed: Of which frames, and of the crops.

    Returns:
        Frames (count, 3, height, width), uint8, and labels (count,), int64.
    """
    stream = open_stream(data, SamplingConfig(buckets=(Bucket(1, *size),)), loader, seed=seed)
    batches = stream.batches(0, batch_size=1)
    try:
        drawn = list(itertools.islice(batches, count))
    finally:
        batches.close()
    return torch.cat([batch.frames[:, :, 0] for batch in drawn]), torch.cat([batch.labels for batch in drawn])
