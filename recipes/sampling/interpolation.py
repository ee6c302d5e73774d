"""Interpolation: three frames between every two, again and again (Video LDM, section 3.3).

Frames may come part by part, as a roll-out makes them, and the result is handed out part by part: memory does not grow
with the length, and one level of interpolation can feed on another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.bases import Conditioning, VideoBase
from temporal_layers.recipes.conditioning import FACTOR, ContextPlanes, interpolation_mask
from temporal_layers.recipes.sampling.context import ContextSampling, made_of, sample_given, settings_of
from temporal_layers.recipes.sampling.latent_store import LatentStore
from temporal_layers.recipes.sampling.timeline import Timeline


def interpolation_windows(count: int, pairs: int = 1) -> list[int]:
    """The given frames, of ``count``, at which windows of ``pairs`` pairs begin; the last two may overlap.

    Raises:
        ValueError: If there are too few frames.
    """
    if pairs < 1 or count <= pairs:
        raise ValueError(
            f"interpolation_windows: expected more than pairs={pairs} given frames and at least one pair, got {count}"
        )
    starts = list(range(0, count - pairs, pairs))
    return starts if starts[-1] + pairs == count - 1 else [*starts, count - 1 - pairs]


class _Window(NamedTuple):
    """Given frames between which others are made, and the number of the first of them."""

    number: int
    start: int
    keys: Tensor


def _windows(parts: Iterable[Tensor], pairs: int) -> Iterator[_Window]:
    """The windows of `interpolation_windows` over frames that come part by part."""
    held, offset, start, number = None, 0, 0, 0
    for part in parts:
        held = part if held is None else torch.cat([held, part], dim=2)
        while offset + held.shape[2] > start + pairs:
            yield _Window(number, start, held[:, :, start - offset : start - offset + pairs + 1])
            number, start = number + 1, start + pairs
        spare = max(start - pairs - offset, 0)  # the last window may begin up to so many frames back
        held, offset = held[:, :, spare:], offset + spare
    count = 0 if held is None else offset + held.shape[2]
    last = interpolation_windows(count, pairs)[-1]
    if start < count - 1:
        yield _Window(number, last, held[:, :, last - offset : last - offset + pairs + 1])


def interpolate_windows(
    base: VideoBase,
    planes: ContextPlanes,
    conditioning: Conditioning | Timeline,
    keys: Float[Tensor, "clips channels keys height width"] | Iterable[Tensor],
    options: ContextSampling | None = None,
    *,
    rate: float,
    pairs: int = 1,
    folder: str | Path | None = None,
    **sampling: Any,
) -> Iterator[Float[Tensor, "clips channels some height width"]]:
    """Make three frames between every two of some clips, and hand out the frames as they come.

    The noise of a window depends on the seed, the clip, the number of the window and the rate alone.

    Args:
        base: The image model, with temporal layers trained to interpolate.
        planes: Of their context.
        conditioning: One row a clip, or a timeline of such, by number of the key frame.
        keys: Latents of two frames or more, or parts of them, one after the other: what `predict_windows` or this
            function hands out.
        options: Of the sampler. ``batch_size`` is the number of windows, of all clips, that are sampled at a time.
        rate: Label of the frame rate: 0 between key frames, 1 between those that came of them.
        pairs: Pairs of given frames in a window, as in training.
        folder: Where frames are kept as they come. The same call then goes on with those that are missing and comes to
            the same frames bit for bit, after a kill as well.
        **sampling: ``negative`` and ``on_step`` of `sample_given`.

    Returns:
        Latents on the CPU, ``keys`` among them as they came.

    Raises:
        ValueError: As `interpolation_windows`, of parts when all have come; if ``options`` has seeds of clips, but not
            one for each; as `LatentStore` if the folder holds something else.
    """
    options, timeline = options or ContextSampling(), Timeline.of(conditioning)
    whole = isinstance(keys, Tensor)
    interpolation_windows(keys.shape[2] if whole else pairs + 1, pairs)
    store = None
    if folder is not None:
        store = LatentStore(folder, {**settings_of(base, planes, options), "rate": rate, "pairs": pairs})
    mask, negative = interpolation_mask(FACTOR * pairs + 1), sampling.pop("negative", None)

    def filled(number: int, group: list[_Window]) -> Tensor:
        known, told = _spread(group), _told(group, timeline)
        clips, of_all = len(group[0].keys), known.flatten(0, 1)
        free = None if negative is None else _told(group, Timeline.of(negative))
        options.check_seeds(clips)

        def make() -> Tensor:
            purposes = [f"interpolation/{rate:g}/{window.number}" for window in group]
            sources = [options.sources([clip], purpose)[0] for clip in range(clips) for purpose in purposes]
            return sample_given(
                base, planes, told, of_all, mask, options, rate=rate, negative=free, sources=sources, **sampling
            )

        made = make() if store is None else store.piece(number, made_of(of_all, told, free), make)
        return made.unflatten(0, known.shape[:2])

    return _frames(filled, _windows([keys] if whole else keys, pairs), options.batch_size)


def _spread(group: list[_Window]) -> Float[Tensor, "clips windows channels frames height width"]:
    """The given frames of windows, with room between them."""
    keys = torch.stack([window.keys for window in group], dim=1).float().cpu()
    spread = keys.new_zeros(*keys.shape[:3], FACTOR * (keys.shape[3] - 1) + 1, *keys.shape[4:])
    spread[:, :, :, ::FACTOR] = keys
    return spread


def _told(group: list[_Window], timeline: Timeline) -> Conditioning:
    """One row for each window of each clip."""
    parts = [timeline.at(window.start) for window in group]
    return {name: torch.stack([part[name] for part in parts], dim=1).flatten(0, 1) for name in parts[0]}


def _frames(filled: Callable[[int, list[_Window]], Tensor], windows: Iterator[_Window], size: int) -> Iterator[Tensor]:
    """The frames of groups of windows, every one once."""
    there = 0
    for number, group in enumerate(_groups(windows, size)):
        for window, made in zip(group, filled(number, group).unbind(1), strict=True):
            first = FACTOR * window.start
            yield made[:, :, there - first :]
            there = first + made.shape[2]


def _groups(windows: Iterator[_Window], size: int) -> Iterator[list[_Window]]:
    """Windows of which ``size`` make a batch, those of all clips counted; at least one."""
    for window in windows:
        yield [window, *itertools.islice(windows, max(size // len(window.keys), 1) - 1)]


def sample_interpolation(
    base: VideoBase,
    planes: ContextPlanes,
    conditioning: Conditioning | Timeline,
    keys: Float[Tensor, "clips channels keys height width"],
    options: ContextSampling | None = None,
    **how: Any,
) -> Float[Tensor, "clips channels frames height width"]:
    """All frames of `interpolate_windows`, which says what the arguments are, together.

    Twice, at rates 0 and 1, 8 frames become 29 and then 113.
    """
    return torch.cat(list(interpolate_windows(base, planes, conditioning, keys, options, **how)), dim=2)
