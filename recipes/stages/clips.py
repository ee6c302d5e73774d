"""The image model and the clips of a stage: which model, which videos, latents from memory, a cache or on the fly."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.recipes.bases import Conditioning, VideoBase
from temporal_layers.recipes.data.cache import CacheConfig, CachedClips
from temporal_layers.recipes.data.cache_writer import base_identity, write_cache
from temporal_layers.recipes.data.loader import ClipBatch, LoaderConfig, open_stream
from temporal_layers.recipes.data.sampling import Bucket, SamplingConfig
from temporal_layers.recipes.data.sources import DataConfig, make_source
from temporal_layers.recipes.driving import DrivingClip, DrivingConfig, DrivingCorpus
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
        cache: Folder of the latents, which other runs and ``temporal-layers data cache`` share; ``cache`` in the folder
            of the run if None.
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


class ChosenClips:
    """Some of the clips of others.

    Args:
        clips: All of them.
        indices: Of those to take.
    """

    def __init__(self, clips: Clips, indices: Sequence[int]) -> None:
        self.clips, self.indices = clips, indices

    def __len__(self) -> int:
        return len(self.indices)

    def num_frames(self, index: int) -> int:
        """As in `Clips`."""
        return self.clips.num_frames(self.indices[index])

    def latents(self, index: int, start: int = 0, stop: int | None = None) -> Float[Tensor, "c frames h w"]:
        """As in `Clips`."""
        return self.clips.latents(self.indices[index], start, stop)

    def conditioning(self, index: int) -> Conditioning:
        """As in `Clips`."""
        return self.clips.conditioning(self.indices[index])


def check_clips(who: str, clips: Clips, num_frames: int) -> None:
    """Raise a ValueError unless there are clips, all of ``num_frames`` frames or more."""
    shortest = min((clips.num_frames(index) for index in range(len(clips))), default=None)
    if shortest is None or shortest < num_frames:
        got = "no clip" if shortest is None else f"one of {shortest}"
        raise ValueError(
            f"{who}: clips: expected at least one, and all of at least {num_frames} frames, got {got}; leave out short "
            "ones, or ask for fewer frames"
        )


def open_clips(base: VideoBase, config: ClipsConfig, *, out: Path, min_frames: int, accelerator: Accelerator) -> Clips:
    """The cached clips of a stage, encoded now if no stage and no ``temporal-layers data cache`` did before.

    Args:
        base: The image model.
        config: Which videos, at which rate.
        out: Folder of the run.
        min_frames: Shorter clips are left out and reported.
        accelerator: Processes, which share the work.

    Raises:
        ValueError: If the cache is of something else, too many videos are bad, or no clip is long enough.
    """
    source, folder = make_source(config.data), config.cache or out / "cache"
    wanted = _cache_config(base, config, folder)
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
    clips = CachedClips(folder, config=wanted, source=source)
    long = [index for index in range(len(clips)) if clips.num_frames(index) >= min_frames]
    if len(long) == len(clips):
        return clips
    accelerator.print(f"{len(clips) - len(long)} of {len(clips)} clips have fewer than {min_frames} frames: left out")
    return ChosenClips(clips, long)


def _cache_config(base: VideoBase, config: ClipsConfig, folder: Path) -> CacheConfig:
    """What a cache must hold; what says nothing about whether it can be used is as it is in one that is there."""
    free: dict[str, Any] = {}
    if (folder / "cache.json").is_file():
        stored = json.loads((folder / "cache.json").read_text())
        names = ("min_frames", "dtype", "items_per_file", *(() if config.max_frames else ("max_frames",)))
        free = {name: stored[name] for name in names if name in stored}
    return CacheConfig(
        base=base_identity(base),
        size=base.frame_size,
        fps=config.fps,
        stride=config.stride,
        **{"max_frames": config.max_frames, **free},
    )


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
