"""The training engine shared by all stages: optimiser, schedule, averaged weights, progress and run folder.

A stage brings two things: an *objective*, a module whose ``forward(*batch)`` returns a dictionary of scalar losses
with the key ``"loss"`` (so that distributed wrappers see one forward pass), and a stream of batches, which owns
all randomness (so that an objective is a function of its batch).  Hugging Face ``accelerate`` supplies devices,
mixed precision and data parallelism: start a stage with ``accelerate launch`` to use several GPUs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from temporal_layers.recipes.training.streams import Batch, Stream  # noqa: F401


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How a set of parameters is trained.

    Attributes:
        steps: Optimiser steps.
        batch_size: Samples per step and process.
        lr: Peak learning rate of AdamW.
        schedule: ``one-cycle`` (Smith & Topin 2018; best for the short runs of this repository), ``cosine`` (linear
            warm-up, then cosine to zero) or ``constant`` (linear warm-up, then flat).
        warmup: Share of the steps during which the learning rate rises.
        weight_decay: AdamW's decoupled weight decay.
        grad_clip: Largest gradient norm; larger gradients are scaled down.
        ema_decay: Decay of the averaged weights that a stage hands back; 0 hands back the last weights.
        checkpoint_every: Steps between calls of the checkpoint function; 0 for none.
    """

    steps: int
    batch_size: int
    lr: float
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    warmup: float = 0.1
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"OptimConfig: expected steps and batch_size of at least 1, got steps={self.steps} and "
                f"batch_size={self.batch_size}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"OptimConfig: expected ema_decay in [0, 1), got {self.ema_decay}; 0 turns averaging off")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"OptimConfig: expected warmup, a share of the steps, in [0, 1), got {self.warmup}")
        if self.schedule not in ("one-cycle", "cosine", "constant"):
            raise ValueError(
                f"OptimConfig: expected schedule 'one-cycle', 'cosine' or 'constant', got {self.schedule!r}"
            )


def learning_rate(config: OptimConfig, step: int) -> float:
    """Learning rate at a step, counted from 0.

    One-cycle and cosine both end at (nearly) zero; one-cycle rises along a cosine from a 25th of the peak, the
    others rise linearly from 1 / (warm-up steps).
    """
    rising = config.warmup * config.steps
    if step < rising:
        if config.schedule == "one-cycle":
            share = 0.5 - 0.5 * math.cos(math.pi * step / rising)
            return config.lr * (0.04 + 0.96 * share)
        return config.lr * min(1.0, (step + 1) / rising)
    if config.schedule == "constant":
        return config.lr
    progress = (step - rising) / max(config.steps - rising, 1)
    return config.lr * (0.5 + 0.5 * math.cos(math.pi * progress))


class AveragedWeights:
    """Exponential moving average of the trainable parameters of a module.

    The decay warms up as ``(1 + n) / (10 + n)``, so that a short run does not average its own initialisation.

    Args:
        module: The module whose parameters with ``requires_grad`` are averaged.
        decay: Long-run decay in (0, 1).
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the current parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def store(self) -> None:
        """Write the averages into the module for good."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the module for the duration of a ``with`` block."""
        current = [parameter.detach().clone() for parameter in self.parameters]
        self.store()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, current, strict=True):
                    parameter.copy_(value)


class RunFolder:
    """Folder of a run: resolved configuration, versions and one JSON line of losses per step.

    Args:
        path: Folder to create; its losses are started afresh.
        config: Dataclass instance with everything needed to repeat the run.
    """

    def __init__(self, path: Path | str, config: Any) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("config.json", dataclasses.asdict(config))
        self.write("versions.json", versions())
        self.losses = self.path / "losses.jsonl"
        self.losses.write_text("")

    def write(self, name: str, value: Any) -> None:
        """Write a value as indented JSON."""
        (self.path / name).write_text(json.dumps(value, indent=2, default=str) + "\n")

    def log(self, **record: Any) -> None:
        """Append one record to ``losses.jsonl``."""
        with self.losses.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


def versions() -> dict[str, str]:
    """Versions of everything that can change a training run."""
    names = ("torch", "diffusers", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def fit(
    objective: nn.Module,
    stream: Stream,
    config: OptimConfig,
    *,
    name: str,
    seed: int = 0,
    groups: list[dict[str, Any]] | None = None,
    accelerator: Accelerator | None = None,
    run: RunFolder | None = None,
    progress: bool = True,
    on_checkpoint: Callable[[int], None] | None = None,
) -> list[float]:
    """Train the parameters of an objective that require gradients; leave averaged weights in place if asked for.

    Args:
        objective: Module whose ``forward(*batch)`` returns losses by name, ``"loss"`` being the one to minimise.
        stream: Batches, drawn by their number; tensors are moved to the device, other values pass as they are.
        config: Steps, learning rate and so on.
        name: What to call this stage in the progress bar and in the log.
        seed: Seed of what the objective draws itself, such as dropout.
        groups: Parameter groups for the optimiser, each with its peak ``lr`` and its ``weight_decay``, for instance
            of ``TemporalAdapter.parameter_groups``; one group of everything trainable if None.
        accelerator: Device and precision; a default one if None.
        run: Folder that gets one line of losses per step, if given.
        progress: Whether to show a progress bar on the main process.
        on_checkpoint: Called with the number of finished steps, averaged weights in place.

    Returns:
        The loss of each step on this process.

    Raises:
        ValueError: If nothing in the objective is trainable.
        RuntimeError: If the loss stops being finite.
    """
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(
            f"fit: expected a trainable parameter in the objective of {name!r}, got none; call "
            "requires_grad_(True) on the part to train"
        )
    accelerator = accelerator or Accelerator()
    groups = groups or [{"params": parameters}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    model, optimizer = accelerator.prepare(objective, optimizer)
    # Made only now, so that the averages lie on the device that the parameters were moved to.
    average = AveragedWeights(objective, decay=config.ema_decay) if config.ema_decay else None
    history: list[float] = []
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = stream.batches(0, batch_size=config.batch_size, rank=rank, world_size=world_size)
    started = time.perf_counter()
    with _progress_bar(name, config.steps, shown=progress and accelerator.is_local_main_process) as report:
        for step in range(config.steps):
            rate = learning_rate(config, step)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = rate * peak / config.lr
            torch.manual_seed(seed * 1_000_003 + step * world_size + rank)
            batch = next(batches)
            losses = model(*(v.to(accelerator.device) if isinstance(v, Tensor) else v for v in batch))
            accelerator.backward(losses["loss"])
            accelerator.clip_grad_norm_(parameters, config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update()
            values = {key: value.item() for key, value in losses.items()}
            if not math.isfinite(values["loss"]):
                raise RuntimeError(
                    f"fit: the loss of {name!r} is {values['loss']} at step {step}; lower lr={config.lr}"
                )
            history.append(values["loss"])
            elapsed = time.perf_counter() - started
            report(values["loss"], rate, (step + 1) / elapsed)
            if run is not None and accelerator.is_main_process:
                run.log(stage=name, step=step, lr=rate, seconds=round(elapsed, 2), **values)
            if on_checkpoint and config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
                with average.applied() if average is not None else nullcontext():
                    on_checkpoint(step + 1)
    if average is not None:
        average.store()
    return history


@contextmanager
def _progress_bar(name: str, steps: int, *, shown: bool) -> Iterator[Callable[[float, float, float], None]]:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  lr {task.fields[rate]:.1e}  {task.fields[speed]:.2f} it/s"),
        TimeRemainingColumn(),
    )
    bar: AbstractContextManager[Any] = Progress(*columns) if shown else nullcontext()
    with bar:
        task = bar.add_task(name, total=steps, loss=0.0, rate=0.0, speed=0.0) if shown else None
        smooth: list[float] = []

        def report(loss: float, rate: float, speed: float) -> None:
            smooth.append(loss if not smooth else 0.95 * smooth[-1] + 0.05 * loss)
            if shown:
                bar.update(task, advance=1, loss=smooth[-1], rate=rate, speed=speed)

        yield report
