"""Evaluate a generated set of clips against a real one: from videos to named numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from temporal_layers import __version__
from temporal_layers.recipes.data.decoding import make_decoder
from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import Source
from temporal_layers.recipes.evaluation.collecting import RATE, collect, purpose
from temporal_layers.recipes.evaluation.distances import (
    INCEPTION_SPLITS,
    Value,
    check_enough_classes,
    check_full_rank,
    frechet,
    inception_score,
    kernel_distance,
    mean_of,
)
from temporal_layers.recipes.evaluation.moments import Moments, SetStatistics
from temporal_layers.recipes.evaluation.networks import FeatureNetwork, NetworkConfig, load_network
from temporal_layers.recipes.evaluation.presets import Measure, Preset
from temporal_layers.recipes.evaluation.processes import from_first_process, merged_over_processes, rank_and_size
from temporal_layers.recipes.evaluation.reconstruction import compare_pairs
from temporal_layers.recipes.evaluation.results import Evaluation, Measured, shown_name
from temporal_layers.recipes.evaluation.sets import ClipSet, EvaluationBatch, SamplingPlan, check_pairs
from temporal_layers.recipes.evaluation.store import StatisticsStore


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an evaluation is carried out; nothing here changes a number but by rounding.

    Attributes:
        batch_size: Clips at a time.
        device: Of the networks.
        loader: How videos are decoded.
        cache: Folder in which statistics of the real set are kept and looked up; nowhere if None.
        lpips: Package or file of LPIPS; see ``perceptual_loss``.
        networks: Ready-made ones, by the description that they stand in for.
    """

    batch_size: int = 8
    device: str = "cpu"
    loader: LoaderConfig = LoaderConfig()
    cache: Path | None = None
    lpips: str = "lpips"
    networks: Mapping[NetworkConfig, FeatureNetwork] = field(default_factory=dict)


def evaluate(
    generated: Source,
    real: Source | None,
    preset: Preset,
    *,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    options: Options | None = None,
) -> Evaluation:
    """Measure a generated set.

    Under ``torch.distributed`` every process measures a part of each set, and all get the numbers of the whole.

    Args:
        generated: Videos, of ``make_source``.
        real: Videos to compare with; None for scores of one set.
        preset: What to measure, on how many clips of which length and rate.
        size: Height and width that all frames are brought to; those of the first generated video if None.
        seed: Of which clips are taken, and of the blocks of the kernel distance.
        options: How to go about it.

    Returns:
        The numbers.

    Raises:
        ValueError: A set is missing, too small or unreadable; a network is missing or does not fit.
    """
    options = options or Options()
    if preset.needs_real and real is None:
        raise ValueError(
            "evaluate: real: expected a set to compare with, got none; name one, or measure what looks at one set"
        )
    plan = SamplingPlan(
        samples=preset.samples,
        num_frames=preset.num_frames,
        fps=preset.fps,
        size=size or _frame_size(generated, options.loader),
        per_video=preset.per_video,
        ordered=preset.paired,
        seed=seed,
    )
    sources = {"generated": generated} | ({} if real is None else {"real": real})
    sets = {name: ClipSet(name, source, plan) for name, source in sources.items()}
    networks = {
        measure.network: options.networks.get(measure.network) or load_network(measure.network, options.device)
        for measure in preset.measures
        if measure.network is not None
    }
    check_measurable(preset.measures, networks, plan)
    if preset.paired:
        kept = {"generated": _pair_statistics(sets, [measure.kind for measure in preset.measures], options)}
    else:
        kept = {name: _statistics(clips, preset.measures, networks, options) for name, clips in sets.items()}
    return Evaluation(
        measures=tuple(_measured(measure, kept, networks, seed) for measure in preset.measures),
        sampling=asdict(plan),
        fps={name: one.moments[RATE].mean.item() for name, one in kept.items()},
        digests={name: clips.digest() for name, clips in sets.items()},
    )


def _frame_size(source: Source, loader: LoaderConfig) -> tuple[int, int]:
    info = make_decoder(loader.decoder).probe(source[0].file)
    return info.height, info.width


def check_measurable(
    measures: Sequence[Measure], networks: Mapping[NetworkConfig, FeatureNetwork], plan: SamplingPlan
) -> None:
    """Try the networks on one clip of noise, so that what must fail fails before hours of decoding.

    Raises:
        ValueError: As the networks, and `frechet` and `inception_score` for the planned number of samples.
    """
    noise = torch.rand(1, 3, plan.num_frames, *plan.size, generator=torch.Generator().manual_seed(0))
    for config in dict.fromkeys(measure.network for measure in measures if measure.network is not None):
        rows = networks[config](noise)
        samples = plan.samples * len(rows)
        kinds = [measure.kind for measure in measures if measure.network == config]
        if "frechet" in kinds:
            check_full_rank(networks[config].name, samples, rows.shape[1])
        if "inception" in kinds:
            check_enough_classes(samples, rows.shape[1], INCEPTION_SPLITS)


def _batches(clips: ClipSet, options: Options) -> Iterator[EvaluationBatch]:
    rank, size = rank_and_size()
    return clips.batches(batch_size=options.batch_size, loader=options.loader, rank=rank, world_size=size)


def _statistics(
    clips: ClipSet,
    measures: Sequence[Measure],
    networks: Mapping[NetworkConfig, FeatureNetwork],
    options: Options,
) -> SetStatistics:
    """What the measures need of a set; of the real one from the cache if it is there."""
    real = clips.name == "real"
    wanted = [measure for measure in measures if not (real and measure.kind == "text")]
    store = StatisticsStore(options.cache) if real and options.cache is not None else None
    if store is None:
        return merged_over_processes(collect(_batches(clips, options), wanted, networks))
    identity = {
        "set": clips.digest(),
        "version": __version__,
        "measures": {
            purpose(measure): None if measure.network is None else networks[measure.network].identity
            for measure in wanted
        },
    }
    kept = from_first_process(lambda: store.load(identity))
    if kept is None:
        kept = merged_over_processes(collect(_batches(clips, options), wanted, networks))
        if rank_and_size()[0] == 0:
            store.save(identity, kept)
    return kept


def _pair_statistics(sets: Mapping[str, ClipSet], kinds: Sequence[str], options: Options) -> SetStatistics:
    check_pairs(sets["generated"], sets["real"])
    output, target = (_batches(sets[name], options) for name in ("generated", "real"))
    return merged_over_processes(compare_pairs(output, target, kinds, lpips=options.lpips))


def _measured(
    measure: Measure,
    kept: Mapping[str, SetStatistics],
    networks: Mapping[NetworkConfig, FeatureNetwork],
    seed: int,
) -> Measured:
    network = None if measure.network is None else networks[measure.network]
    ours, theirs = (_needed(measure, kept[name]) if name in kept else None for name in ("generated", "real"))
    reference = None
    if measure.kind == "frechet":
        value = frechet(ours, theirs)
    elif measure.kind == "kernel":
        value = kernel_distance(ours, theirs, seed=seed)
    else:
        value, reference = _score(ours), None if theirs is None else _score(theirs).value
    return Measured(
        name=shown_name(measure.kind, network),
        value=value.value,
        spread=value.spread,
        real=reference,
        samples=_count(ours),
        real_samples=None if theirs is None else _count(theirs),
        network=None if network is None else network.identity,
    )


def _needed(measure: Measure, kept: SetStatistics) -> Moments | Tensor | None:
    """What was kept of a set for a measure; None if that looks at the other one only."""
    name = purpose(measure)
    return kept.rows[name].values if name in kept.rows else kept.moments.get(name)


def _score(kept: Moments | Tensor) -> Value:
    return inception_score(kept) if isinstance(kept, Tensor) else mean_of(kept)


def _count(kept: Moments | Tensor) -> int:
    return len(kept) if isinstance(kept, Tensor) else kept.count
