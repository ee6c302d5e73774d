"""Stage "features": trains the small video network behind the offline metrics on the generated driving corpus.

It learns to tell label (time of day and weather), order of the frames (forward, backward, shuffled, still), speed,
curvature of the road, distance of the car ahead, and how much noise or blur was added. So features have to hold
appearance, motion and quality. It never sees the output of a model.

    temporal-layers train features --out runs/features
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from temporal_layers.recipes.driving import LABELS, DrivingConfig, DrivingCorpus
from temporal_layers.recipes.evaluation.driving_network import (
    FAULTS,
    MOTIONS,
    ORDERS,
    DrivingNetwork,
    build_driving_network,
)
from temporal_layers.recipes.stages.clips import DRIVING_FPS
from temporal_layers.recipes.stages.image import HELD_OUT
from temporal_layers.recipes.stages.image_objectives import as_float
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, fit, make_accelerator
from temporal_layers.recipes.training.streams import SampleStream, Shuffled, generator_at

_FORWARD, _BACKWARD, _SHUFFLED, _STILL = range(len(ORDERS))
_SHARES = torch.tensor([0.4, 0.2, 0.2, 0.2])
_UNKNOWN = float("nan")
"""Motion of shuffled frames, which have none."""

_MOST_NOISE, _MOST_BLUR = 0.2, 6.0
_SMOOTHING = 0.1
"""Of labels: without it the features of classes drift apart, and a distance says little but how often each occurs."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Stage "features".

    Attributes:
        out: Folder of the run; ``model/`` in it is what ``DrivingNetwork.from_pretrained`` loads.
        seed: Of the data, the initial weights and the batches.
        clips: Of the corpus, to train on.
        num_frames: Of each clip.
        driving: Size and rate of the clips.
        optim: Training of the network.
        engine: How the run is carried out.
        held_out: Clips to measure on at the end; 0 for none.
    """

    out: Path = Path("runs/features")
    seed: int = 0
    clips: int = 768
    num_frames: int = 16
    driving: DrivingConfig = DrivingConfig(fps=DRIVING_FPS)
    optim: OptimConfig = OptimConfig(steps=450, batch_size=16, lr=4e-3, ema_decay=0.99)
    engine: EngineConfig = EngineConfig()
    held_out: int = 96

    def __post_init__(self) -> None:
        if self.clips < 1 or self.num_frames < 2 or self.held_out < 0:
            raise ValueError(
                "FeaturesConfig: expected clips of at least 1, num_frames of at least 2 and held_out of at least 0, "
                f"got clips={self.clips}, num_frames={self.num_frames}, held_out={self.held_out}"
            )


@dataclass(frozen=True)
class LabelledClips:
    """Clips with what is known about them.

    Attributes:
        frames: Bytes ``(clips, 3, frames, height, width)``.
        labels: Class of each.
        motions: `MOTIONS` of each.
    """

    frames: Tensor
    labels: Int[Tensor, " clips"]
    motions: Float[Tensor, "clips motions"]


def render_labelled(corpus: DrivingCorpus, count: int, num_frames: int, *, first: int = 0) -> LabelledClips:
    """The first frames of ``count`` clips of the corpus, from the clip ``first`` on."""
    frames, labels, motions = [], [], []
    for index in range(first, first + count):
        clip = corpus.clip(index, num_frames)
        frames.append((clip.frames * 255).round().to(torch.uint8))
        labels.append(clip.label)
        nearness = torch.where(clip.lead_distance > 0, 10 / clip.lead_distance.clamp_min(1.0), 0.0)
        motions.append(torch.stack([torch.tensor(clip.speed / 10), 100 * clip.curvature.mean(), nearness.mean()]))
    return LabelledClips(torch.stack(frames), torch.tensor(labels), torch.stack(motions))


def reordered(
    frames: Float[Tensor, "3 frames height width"], motions: Float[Tensor, " motions"], order: int, shuffle: Tensor
) -> tuple[Float[Tensor, "3 frames height width"], Float[Tensor, " motions"]]:
    """A clip with its frames in another order, and its motion then.

    Args:
        frames: The clip.
        motions: `MOTIONS` of it.
        order: Index into `ORDERS`.
        shuffle: Order of the frames of a shuffled clip; its first entry is the frame of a still one.
    """
    speed, others = motions[:1], motions[1:]
    if order == _BACKWARD:
        return frames.flip(1), torch.cat([-speed, others])
    if order == _SHUFFLED:
        return frames[:, shuffle], torch.full_like(motions, _UNKNOWN)
    if order == _STILL:
        return frames[:, shuffle[:1]].expand_as(frames), torch.cat([0 * speed, others])
    return frames, motions


def degraded(
    frames: Float[Tensor, "3 frames height width"], generator: torch.Generator
) -> tuple[Float[Tensor, "3 frames height width"], Float[Tensor, " faults"]]:
    """A clip with noise, or blurred, or most often as it is; and its `FAULTS`."""
    faults, kind = torch.zeros(len(FAULTS)), int(torch.randint(4, (), generator=generator))
    strength = torch.rand((), generator=generator).item()
    if kind == 0:
        noise = strength * _MOST_NOISE
        frames = (frames + noise * torch.randn(frames.shape, generator=generator)).clamp(0, 1)
        faults[0] = 10 * noise
    elif kind == 1:
        factor = _MOST_BLUR**strength
        size = [max(1, round(side / factor)) for side in frames.shape[2:]]
        small = F.interpolate(frames.transpose(0, 1), size=size, mode="bilinear", antialias=True)
        frames = F.interpolate(small, size=frames.shape[2:], mode="bilinear").transpose(0, 1)
        faults[1] = math.log2(factor)
    return frames, faults


class FeatureSamples:
    """Draws (clip, label, order, motions, faults): reordered and degraded at random, mirrored half of the time.

    Args:
        clips: What to draw from.
        seed: Of the order and of everything drawn.
    """

    def __init__(self, clips: LabelledClips, *, seed: int) -> None:
        self.clips, self.seed = clips, seed
        self.order = Shuffled(len(clips.frames), seed)

    def __call__(self, position: int) -> tuple[Tensor, ...]:
        """The sample at a position of the run."""
        row, generator = self.order[position], generator_at(self.seed, position)
        frames, motions = as_float(self.clips.frames[row]), self.clips.motions[row]
        if torch.rand((), generator=generator) < 0.5:
            frames, motions = frames.flip(-1), motions * torch.tensor([1.0, -1.0, 1.0])
        order = int(torch.multinomial(_SHARES, 1, generator=generator))
        shuffle = torch.randperm(frames.shape[1], generator=generator)
        frames, motions = reordered(frames, motions, order, shuffle)
        frames, faults = degraded(frames, generator)
        return frames, self.clips.labels[row], torch.tensor(order), motions, faults


class FeatureObjective(nn.Module):
    """Cross-entropy of label and order, summed squared errors of the faults, and of the motion where there is one.

    Args:
        network: What is trained.
    """

    def __init__(self, network: DrivingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        frames: Float[Tensor, "batch 3 frames height width"],
        labels: Int[Tensor, " batch"],
        orders: Int[Tensor, " batch"],
        motions: Float[Tensor, "batch motions"],
        faults: Float[Tensor, "batch faults"],
    ) -> dict[str, Tensor]:
        """Losses of one batch."""
        features = self.network(frames)
        label = F.cross_entropy(self.network.labels(features), labels, label_smoothing=_SMOOTHING)
        order = F.cross_entropy(self.network.orders(features), orders, label_smoothing=_SMOOTHING)
        known = ~motions.isnan()
        errors = torch.where(known, self.network.motions(features) - motions.nan_to_num(), 0.0).square()
        motion = errors.sum() / known[:, 0].sum().clamp_min(1)
        fault = (self.network.faults(features) - faults).square().sum(1).mean()
        loss = label + order + motion + fault
        return {"loss": loss, "label": label, "order": order, "motion": motion, "fault": fault}


def train_features(
    network: DrivingNetwork, clips: LabelledClips, config: OptimConfig, *, seed: int = 0, **engine
) -> list[float]:
    """Train a network, in place.

    Args:
        network: What is trained.
        clips: What to train on.
        config: Steps, learning rate and so on.
        seed: Of the batches.
        **engine: Further arguments of ``engine.fit``: ``accelerator``, ``run``, ``engine``, ``progress``.

    Returns:
        The loss of each step.
    """
    network.train().requires_grad_(True)
    stream = SampleStream(FeatureSamples(clips, seed=seed))
    history = fit(FeatureObjective(network), stream, config, name="features", seed=seed, **engine)
    network.eval().requires_grad_(False)
    return history


@torch.no_grad()
def measure_network(network: DrivingNetwork, clips: LabelledClips, *, seed: int = 0) -> dict[str, float]:
    """How well a network tells what it was trained to tell.

    Args:
        network: In evaluation mode.
        clips: That it was not trained on.
        seed: Of the orders.

    Returns:
        Accuracy of label and order (chance is 1/12 and 0.4), and the share of the variance that is explained for each
        of `MOTIONS` and `FAULTS`.
    """
    samples = FeatureSamples(clips, seed=seed)
    device = next(network.parameters()).device
    rows = [samples(position) for position in range(len(clips.frames))]
    frames, labels, orders, motions, faults = (torch.stack(column) for column in zip(*rows, strict=True))
    features = torch.cat([network(part.to(device)) for part in frames.split(16)])
    values = {
        "label accuracy": (network.labels(features).argmax(1).cpu() == labels).double().mean().item(),
        "order accuracy": (network.orders(features).argmax(1).cpu() == orders).double().mean().item(),
    }
    for names, head, wanted in ((MOTIONS, network.motions, motions), (FAULTS, network.faults, faults)):
        for name, made, true in zip(names, head(features).cpu().T, wanted.T, strict=True):
            known = ~true.isnan()
            rest = (made - true)[known].square().mean() / true[known].var(correction=0)
            values[f"{name} explained"] = 1 - rest.item()
    return values


def run_features_stage(config: FeaturesConfig) -> DrivingNetwork:
    """Run the whole stage and write network, losses, configuration and measures to ``config.out``."""
    accelerator = make_accelerator(config.engine, config.out)
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    started, processor = time.perf_counter(), time.process_time()
    corpus = DrivingCorpus(config.driving, seed=config.seed)
    clips = render_labelled(corpus, config.clips, config.num_frames)
    size = (config.driving.height, config.driving.width)
    network = build_driving_network(len(LABELS), size, seed=config.seed)
    history = train_features(
        network,
        clips,
        config.optim,
        seed=config.seed,
        accelerator=accelerator,
        run=run,
        engine=config.engine,
    )
    if run is not None:
        made = {"cpu_seconds": round(time.process_time() - processor, 1)}
        if config.held_out:
            held_out = render_labelled(corpus, config.held_out, config.num_frames, first=HELD_OUT)
            made |= measure_network(network, held_out, seed=config.seed)
        copy.deepcopy(network).half().save_pretrained(config.out / "model")
        run.finish(history, started=started, **made)
        print(json.dumps(made, indent=2))
    return network


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    run_features_stage(parse(FeaturesConfig, arguments, prog="temporal-layers train features", description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
