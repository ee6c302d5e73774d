"""One pass over the clips of a set: features and numbers of each batch, added to what is kept of the set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.evaluation.moments import Moments, Rows, SetStatistics
from temporal_layers.recipes.evaluation.networks import FeatureNetwork, NetworkConfig
from temporal_layers.recipes.evaluation.presets import Measure
from temporal_layers.recipes.evaluation.sets import EvaluationBatch
from temporal_layers.recipes.metrics import frame_difference, motion_agreement, warp_error
from temporal_layers.recipes.stages.image_objectives import as_float

PLAIN: dict[str, Callable[[Tensor], float]] = {
    "warp_error": warp_error,
    "frame_difference": frame_difference,
    "motion_agreement": motion_agreement,
}

RATE = "fps"
"""Under which name the rates of the clips are kept."""


def purpose(measure: Measure) -> str:
    """Under which name a measure finds what is kept for it; equal needs have equal names."""
    if measure.network is None:
        return measure.kind
    network = measure.network
    return f"{measure.kind}/{network.kind}/{network.path}/{network.name}/{network.reads}/{network.output}"


def collect(
    batches: Iterable[EvaluationBatch], measures: Sequence[Measure], networks: Mapping[NetworkConfig, FeatureNetwork]
) -> SetStatistics:
    """Everything that some measures need of a set, or of this process's shard of it.

    Args:
        batches: The clips.
        measures: That look at a set at a time, not at pairs of clips.
        networks: Of the measures.

    Raises:
        ValueError: A network refuses the clips, or a caption is missing that CLIPSIM needs.
    """
    kept = SetStatistics({}, {})
    for batch in batches:
        kept = kept.merged(_of_batch(batch, measures, networks))
    return kept


def _of_batch(
    batch: EvaluationBatch, measures: Sequence[Measure], networks: Mapping[NetworkConfig, FeatureNetwork]
) -> SetStatistics:
    clips = as_float(batch.frames)
    wanted = dict.fromkeys(measure.network for measure in measures if measure.network is not None)
    rows = {config: networks[config](clips) for config in wanted}
    moments = {RATE: numbers_of(batch.rates)}
    kept: dict[str, Rows] = {}
    for measure in measures:
        name = purpose(measure)
        if measure.network is None:
            moments[name] = numbers_of([PLAIN[measure.kind](clip[None]) for clip in clips])
            continue
        found = rows[measure.network]
        if measure.kind == "frechet":
            moments[name] = Moments.of(found)
        elif measure.kind in ("kernel", "inception"):
            kept[name] = Rows(_places(batch, len(found)), found)
        elif measure.kind == "consistency":
            moments[name] = numbers_of(_consistency(found.unflatten(0, (len(clips), -1))))
        else:
            moments[name] = numbers_of(_text_similarity(networks[measure.network], found, batch.captions))
    return SetStatistics(moments, kept)


def _places(batch: EvaluationBatch, count: int) -> Tensor:
    """Of rows: those of the clips, or of their frames."""
    each = count // len(batch.places)
    return (batch.places[:, None] * each + torch.arange(each)).flatten()


def numbers_of(values: Sequence[float] | Tensor) -> Moments:
    """One number a clip."""
    return Moments.of(torch.as_tensor(values, dtype=torch.float64)[:, None])


def _consistency(features: Float[Tensor, "clips frames features"]) -> Float[Tensor, " clips"]:
    """Mean cosine of the features of neighbouring frames.

    Raises:
        ValueError: If clips have a single frame.
    """
    if features.shape[1] < 2:
        raise ValueError(
            "evaluate: consistency: expected a network that reads frames, and clips of two or more, got one row a clip"
        )
    return F.cosine_similarity(features[:, :-1], features[:, 1:], dim=2).mean(1)


def _text_similarity(
    network: FeatureNetwork, frames: Float[Tensor, "rows features"], captions: Sequence[str]
) -> Float[Tensor, " clips"]:
    """Mean cosine of the caption's embedding and those of the frames: CLIPSIM (Wu et al. 2021), not times 100."""
    if network.embed_text is None:
        raise ValueError(
            f"evaluate: text: expected a network that embeds texts as well, got {network.name}; take one of the kind "
            "clip"
        )
    if not all(captions):
        raise ValueError(
            "evaluate: text: expected a caption for each generated video, got none for some; put it into NAME.txt "
            "beside NAME.mp4, or into captions.jsonl"
        )
    texts = network.embed_text(captions)
    return F.cosine_similarity(frames.unflatten(0, (len(texts), -1)), texts[:, None], dim=2).mean(1)
