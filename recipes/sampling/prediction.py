"""Roll-outs: clips that are continued window by window, to any length (Video LDM, section 3.2).

The first window continues what there is, or begins with nothing; each one behind it continues the last two frames of
the one before, which tell which way things move. Frames are handed out window by window, and only the last ones are
held: memory does not grow with the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.bases import Conditioning, VideoBase
from temporal_layers.recipes.conditioning import ContextPlanes, prediction_mask
from temporal_layers.recipes.sampling.context import ContextSampling, made_of, sample_given, settings_of
from temporal_layers.recipes.sampling.latent_store import LatentStore
from temporal_layers.recipes.sampling.timeline import Timeline


def prediction_windows(num_frames: int, *, first: int, window: int, overlap: int = 2) -> list[tuple[int, int]]:
    """Where the windows of a roll-out begin, and how many frames are given in each.

    The first one continues ``first`` frames, at most ``overlap``; those behind it continue the last ``overlap``, which
    tell which way things move.

    Args:
        num_frames: Frames in the end.
        first: Frames that are there; with none, the first window makes all of its own.
        window: Frames of a window; the last one may reach beyond the end.
        overlap: Given frames of a window, once there are so many.

    Raises:
        ValueError: If a window has no new frame, or there are fewer frames than none.
    """
    if first < 0 or not 1 <= overlap < window:
        raise ValueError(
            f"prediction_windows: expected no frame or more to begin with, and an overlap from 1 to below window="
            f"{window}, got first={first} and overlap={overlap}"
        )
    windows, there = [], first
    while there < num_frames:
        given = min(there, overlap)
        windows.append((there - given, given))
        there += window - given
    return windows


def predict_windows(
    base: VideoBase,
    planes: ContextPlanes,
    conditioning: Conditioning | Timeline,
    first: Float[Tensor, "clips channels first height width"],
    num_frames: int,
    options: ContextSampling | None = None,
    *,
    window: int = 8,
    overlap: int = 2,
    folder: str | Path | None = None,
    **sampling: Any,
) -> Iterator[Float[Tensor, "clips channels some height width"]]:
    """Continue clips, and hand out the frames as they come.

    Several futures of one start are clips that begin alike: repeat ``first`` and the conditioning.

    Args:
        base: The image model, with temporal layers trained to predict.
        planes: Of their context.
        conditioning: One row a clip, or a timeline of such.
        first: Latents of the first frames; with none of them (``first[:, :, :0]``), clips begin with nothing.
        num_frames: Frames in the end, the first ones included.
        options: Of the sampler.
        window: Frames of a window, as in training.
        overlap: Given frames of a window, once there are so many.
        folder: Where windows are kept as they come. The same call then goes on with those that are missing and comes
            to the same frames bit for bit, after a kill as well; so does one with more ``num_frames``.
        **sampling: ``negative`` and ``on_step`` of `sample_given`.

    Returns:
        Latents on the CPU: ``first``, and then the new frames of each window.

    Raises:
        ValueError: As `prediction_windows`; if ``options`` has seeds of clips, but not one for each; as `LatentStore`
            if the folder holds something else.
    """
    options, timeline = options or ContextSampling(), Timeline.of(conditioning)
    options.check_seeds(len(first))
    windows = prediction_windows(num_frames, first=first.shape[2], window=window, overlap=overlap)
    store = None
    if folder is not None:
        store = LatentStore(folder, {**settings_of(base, planes, options), "window": window, "overlap": overlap})

    def new_frames(number: int, start: int, tail: Tensor) -> Tensor:
        given = tail.shape[2]
        known, mask = F.pad(tail, (0, 0, 0, 0, 0, window - given)), prediction_mask(given, window)
        told = timeline.at(start + given)
        purpose = f"sampling/{number}" if number else "sampling"

        def make() -> Tensor:
            sources = options.sources(range(len(tail)), purpose)
            made = sample_given(base, planes, told, known, mask, options, sources=sources, **sampling)
            return made[:, :, given:]

        return make() if store is None else store.piece(number, made_of(tail, told, sampling.get("negative")), make)

    return _frames(new_frames, first.float().cpu(), windows, num_frames)


def _frames(
    new_frames: Callable[[int, int, Tensor], Tensor], tail: Tensor, windows: list[tuple[int, int]], num_frames: int
) -> Iterator[Tensor]:
    """The first frames and then the new ones of each window, of which no more are held than one window has."""
    there = tail.shape[2]
    if there:
        yield tail[:, :, :num_frames]
    for number, (start, given) in enumerate(windows):
        tail = tail[:, :, tail.shape[2] - given :]
        new = new_frames(number, start, tail)
        tail = torch.cat([tail, new], dim=2)
        yield new[:, :, : num_frames - there]
        there += new.shape[2]


def sample_prediction(
    base: VideoBase,
    planes: ContextPlanes,
    conditioning: Conditioning | Timeline,
    first: Float[Tensor, "clips channels first height width"],
    num_frames: int,
    options: ContextSampling | None = None,
    **how: Any,
) -> Float[Tensor, "clips channels frames height width"]:
    """All frames of `predict_windows`, which says what the arguments are, together."""
    return torch.cat(list(predict_windows(base, planes, conditioning, first, num_frames, options, **how)), dim=2)
