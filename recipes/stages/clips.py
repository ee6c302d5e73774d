"""The image model and the clips of a stage: which model, which videos, latents from memory, a cache or on the fly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.recipes.bases import Conditioning, LabelBase, VideoBase, load_base
from temporal_layers.recipes.data.cache import CacheConfig, CachedClips
from temporal_layers.recipes.data.cache_writer import write_cache
from temporal_layers.recipes.data.loader import ClipBatch, LoaderConfig, open_stream
from temporal_layers.recipes.data.sampling import Bucket, SamplingConfig
from temporal_layers.recipes.data.sources import DataConfig, make_source
from temporal_layers.recipes.driving import DrivingClip, DrivingConfig, DrivingCorpus
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.training.streams import Batch, Stream

DRIVING_FPS = 10.0
"""Rate of the driving clips in the video stages: a whole number of hundredths of a second a frame, as GIF needs."""

DRIVING = DataConfig(path="driving", clips=256, clip_frames=24, driving=DrivingConfig(fps=DRIVING_FPS))


@dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """Which image model is trained on which videos.

    Attributes:
        model: Folder or repository of an image model, see `load_base`; empty for the one that comes with the package.
        data: The videos.
        latents: ``cached`` encodes every video once, before the training; ``streamed`` decodes and encodes windows as
            they are needed, with random crops, which suits a corpus too large for a cache.
        cache: Folder of the latents, kept for other runs; ``cache`` in the folder of the run if None.
        fps: Rate of the clips; None keeps that of the videos.
        stride: Or: every ``stride``-th frame.
        max_frames: Frames of a video that are cached, from its beginning; None for all.
        buckets: Of streamed clips: frames, height and width of batches; each video goes to the bucket that suits its
            length and its proportions. The stage's frames at the size of the image model if empty.
        loader: How videos are decoded.
    """

    model: str = ""
    data: DataConfig = DRIVING
    latents: Literal["cached", "streamed"] = "cached"
    cache: Path | None = None
    fps: float | None = None
    stride: int = 1
    max_frames: int | None = None
    buckets: tuple[tuple[int, int, int], ...] = ()
    loader: LoaderConfig = LoaderConfig()

    def __post_init__(self) -> None:
        if self.latents not in ("cached", "streamed"):
            raise ValueError(f"ClipsConfig: latents: expected 'cached' or 'streamed', got {self.latents!r}")
        if self.buckets and self.latents == "cached":
            raise ValueError(
                f"ClipsConfig: buckets: expected none with cached latents, which have one size, got {self.buckets}; "
                "set latents='streamed'"
            )


class Clips(Protocol):
    """Clips as latents, with one row of conditioning each."""

    def __len__(self) -> int:
        """Number of clips."""

    def num_frames(self, index: int) -> int:
        """Length of a clip."""

    def latents(self, index: int, start: int = 0, stop: int | None = None) -> Float[Tensor, "c frames h w"]:
        """Latents of some frames of a clip."""

    def conditioning(self, index: int) -> Conditioning:
        """Conditioning of a clip, with one row."""


class TensorClips:
    """Clips in memory.

    Args:
        latents: All of one length.
        conditioning: One row a clip.
    """

    def __init__(
        self, latents: Float[Tensor, "clips channels frames height width"], conditioning: Conditioning
    ) -> None:
        self.values, self.rows = latents, conditioning

    def __len__(self) -> int:
        return len(self.values)

    def num_frames(self, index: int) -> int:
        """As in `Clips`."""
        return self.values.shape[2]

    def latents(self, index: int, start: int = 0, stop: int | None = None) -> Float[Tensor, "c frames h w"]:
        """As in `Clips`."""
        return self.values[index, :, start:stop]

    def conditioning(self, index: int) -> Conditioning:
        """As in `Clips`."""
        return {name: value[index : index + 1] for name, value in self.rows.items()}


def check_clips(who: str, clips: Clips, num_frames: int) -> None:
    """Raise a ValueError unless there are clips, all of ``num_frames`` frames or more."""
    shortest = min((clips.num_frames(index) for index in range(len(clips))), default=None)
    if shortest is None or shortest < num_frames:
        got = "no clip" if shortest is None else f"one of {shortest}"
        raise ValueError(
            f"{who}: clips: expected at least one, and all of at least {num_frames} frames, got {got}; leave out short "
            "ones, or ask for fewer frames"
        )


def open_base(model: str) -> VideoBase:
    """The image model of a name; the one that comes with the package for an empty one."""
    return load_base(model) if model else LabelBase(load_shipped())


def open_clips(
    base: VideoBase, config: ClipsConfig, *, out: Path, min_frames: int, accelerator: Accelerator
) -> CachedClips:
    """The cached clips of a stage, encoded now if they were not before.

    Args:
        base: The image model.
        config: Which videos, at which rate.
        out: Folder of the run.
        min_frames: Shorter videos are left out and reported.
        accelerator: Processes, which share the work.

    Raises:
        ValueError: If the cache is of something else, or too many videos are bad.
    """
    source = make_source(config.data)
    wanted = CacheConfig(
        base=config.model or "shipped",
        size=base.frame_size,
        fps=config.fps,
        stride=config.stride,
        max_frames=config.max_frames,
        min_frames=min_frames,
    )
    folder = config.cache or out / "cache"
    if not (folder / "index.json").is_file():
        accelerator.print(f"encoding {len(source)} videos into {folder}")
    bad = write_cache(
        base,
        source,
        folder,
        wanted,
        loader=config.loader,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    if bad.reasons:
        print(bad)
    accelerator.wait_for_everyone()
    return CachedClips(folder, config=wanted, source=source)


def open_pixels(
    base: VideoBase,
    config: ClipsConfig,
    complete: Callable[[Tensor, Conditioning, list[int]], Batch],
    *,
    num_frames: int,
    seed: int,
) -> Stream:
    """Windows of videos, decoded in workers and encoded on the device of the model as they are needed.

    Args:
        base: The image model.
        config: Which videos, at which rate.
        complete: Makes a batch of latents ``(b, c, f, h, w)``, conditioning and the positions of the samples.
        num_frames: Frames of a window, without buckets.
        seed: Of the order and of the windows.
    """

    def prepare(batch: ClipBatch) -> Batch:
        frames = fold_frames(batch.frames.float() / 255)
        latents = unfold_frames(base.encode(frames), batch.frames.shape[2]).cpu()
        return complete(latents, base.conditioning(batch.labels.tolist(), batch.captions), batch.positions)

    buckets = config.buckets or ((num_frames, *base.frame_size),)
    sampling = SamplingConfig(buckets=tuple(Bucket(*each) for each in buckets), fps=config.fps, stride=config.stride)
    with torch.no_grad():
        return open_stream(config.data, sampling, config.loader, seed=seed, prepare=prepare)


def encode_clips(
    base: VideoBase, clips: Float[Tensor, "clips 3 frames height width"]
) -> Float[Tensor, "clips channels frames height width"]:
    """Latents of clips, frame by frame (the encoder is the image model's, as in the paper), on the CPU."""
    return torch.stack([base.encode(clip.transpose(0, 1)).transpose(0, 1).cpu() for clip in clips])


def driving_clips(
    size: tuple[int, int], count: int, num_frames: int, *, fps: float = DRIVING_FPS, first: int = 0, seed: int = 0
) -> list[DrivingClip]:
    """Clips ``first`` to ``first + count - 1`` of the driving corpus at a frame size ``(height, width)``."""
    corpus = DrivingCorpus(DrivingConfig(height=size[0], width=size[1], fps=fps), seed=seed)
    return [corpus.clip(index, num_frames) for index in range(first, first + count)]
