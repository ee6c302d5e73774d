"""The training engine shared by all stages.

A stage brings two things: an *objective*, a module whose ``forward(*batch)`` returns a dictionary of scalar losses
with the key ``"loss"`` (so that distributed wrappers see one forward pass), and a stream of batches, which owns
all randomness (so that an objective is a function of its batch). Hugging Face ``accelerate`` supplies devices,
mixed precision and data parallelism: start a stage with ``accelerate launch`` or ``torchrun`` to use several GPUs.

docs/training.md says how to start, stop and go on.
"""

from __future__ import annotations

import dataclasses
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn

from temporal_layers.recipes.training.average import AveragedWeights
from temporal_layers.recipes.training.checkpoints import Checkpoints, read, verify
from temporal_layers.recipes.training.files import NO_SPACE
from temporal_layers.recipes.training.launch import (
    EngineConfig,
    StopRequest,
    check_accelerator,
    checkpoint_gradients,
    make_accelerator,
    tracking,
)
from temporal_layers.recipes.training.live import LiveBar
from temporal_layers.recipes.training.memory import format_budget, memory_budget, named_groups
from temporal_layers.recipes.training.optim import OptimConfig, learning_rate
from temporal_layers.recipes.training.run_folder import RunFolder, versions
from temporal_layers.recipes.training.state import changed, settings
from temporal_layers.recipes.training.steps import Groups, Steps
from temporal_layers.recipes.training.streams import Batch, Stream

__all__ = [
    "AveragedWeights",
    "Batch",
    "EngineConfig",
    "OptimConfig",
    "RunFolder",
    "fit",
    "learning_rate",
    "make_accelerator",
    "versions",
]

Validate = Callable[[int], Mapping[str, float]]


def fit(
    objective: nn.Module,
    stream: Stream,
    config: OptimConfig,
    *,
    name: str,
    seed: int = 0,
    groups: Groups | Mapping[str, Groups] | None = None,
    accelerator: Accelerator | None = None,
    run: RunFolder | None = None,
    engine: EngineConfig | None = None,
    progress: bool = True,
    on_checkpoint: Callable[[int], None] | None = None,
    validate: Validate | None = None,
) -> list[float]:
    """Train the parameters of an objective that require gradients; leave averaged weights in place if asked for.

    An objective with an attribute ``turns``, names such as ``("generator", "discriminator")``, is called with each of
    them as the keyword ``turn`` in every step; each turn steps an optimiser of its own, and clears all gradients.

    Args:
        objective: Module whose ``forward(*batch)`` returns losses by name, ``"loss"`` being the one to minimise. It may
            have been cut up with ``fully_shard`` already.
        stream: Batches, drawn by their number; tensors are moved to the device, other values pass as they are.
        config: Steps, learning rate and so on.
        name: What to call this stage in the progress bar, in the log and in the names of the checkpoints.
        seed: Seed of what the objective draws itself, such as dropout.
        groups: Parameter groups for the optimiser, each with its peak ``lr`` and its ``weight_decay``, for instance
            of ``TemporalAdapter.parameter_groups``; one group of everything trainable if None. With turns, a
            dictionary from the name of a turn to its groups.
        accelerator: Device and precision, of ``make_accelerator``; a new one if None.
        run: Folder that gets one line of losses per step, and checkpoints; needed on the main process only.
        engine: Precision, accumulation, trackers, checkpoints, resuming; its defaults if None.
        progress: Whether to show the memory budget and a progress bar on the main process.
        on_checkpoint: Called on every process with the number of finished steps, averaged weights in place.
        validate: The same every ``engine.validate_every`` steps; what it returns is logged.

    Returns:
        The loss of each step, the mean over processes; with turns, that of the first.

    Raises:
        ValueError: If nothing in the objective is trainable, the groups are not those of the objective, or the run
            cannot go on from the checkpoint that it should.
        RuntimeError: If a loss or a gradient stops being finite, or the disk is full.
        KeyboardInterrupt: After Ctrl-C, when the step is finished and a checkpoint is written.
        SystemExit: After SIGTERM, likewise.
    """
    engine = engine or EngineConfig()
    by_turn = _groups_by_turn(objective, groups, name)
    accelerator = accelerator or make_accelerator(engine, None if run is None else run.path)
    check_accelerator(accelerator, engine)
    if engine.gradient_checkpointing:
        checkpoint_gradients(objective)
    steps = Steps(
        objective,
        by_turn,
        config,
        accumulation=engine.accumulation,
        accelerator=accelerator,
        name=name,
        seed=seed,
    )
    shown = progress and accelerator.is_main_process
    if shown:
        groups_here = {turn: optimizer.param_groups for turn, optimizer in steps.optimizers.items()}
        print(format_budget(memory_budget(objective, groups_here, config), title=name))
    journey = _Journey(steps, engine, run, by_turn)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        first = journey.resume()
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))
            stack.enter_context(tracking(accelerator, engine, name, journey.settings))
            stop = stack.enter_context(StopRequest())
            bar = stack.enter_context(LiveBar(name, config.steps, first=first, shown=shown))
            stack.enter_context(journey.explained())
            journey.go(stream, stop, bar, on_checkpoint, validate)
    finally:
        steps.release()
    return journey.history


class _Journey:
    """The way of a run through its steps: where it is, what it logs and what it leaves on the disk."""

    def __init__(self, steps: Steps, engine: EngineConfig, run: RunFolder | None, groups: Mapping[str, Groups]) -> None:
        self.steps, self.engine, self.name = steps, engine, steps.name
        self.accelerator = steps.accelerator
        self.main = self.accelerator.is_main_process
        self.run = run if self.main else None
        self.settings = settings(
            dataclasses.asdict(steps.config),
            seed=steps.seed,
            samples_per_step=steps.config.batch_size * engine.accumulation * self.accelerator.num_processes,
            precision=self.accelerator.mixed_precision,
            groups={key: {k: v for k, v in group.items() if k != "params"} for key, group in named_groups(groups)},
            run=None if self.run is None else self.run.config,
        )
        folder = None
        if self.run is not None and self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            folder = self.run.path / "checkpoints" / re.sub(r"\W+", "-", self.name)
        [folder] = broadcast_object_list([folder])  # all take part in writing a checkpoint
        self.store = None if folder is None else Checkpoints(folder, keep=engine.keep)
        self.usable: Path | None = None
        self.finished = 0
        self.history: list[float] = []

    def resume(self) -> int:
        """Take over the checkpoint that the settings ask for, if any; returns the number of finished steps."""
        found: list[Any] = [None, None]  # what the main process finds, all go by
        if self.main:
            try:
                found[0] = self._checkpoint_to_resume()
            except ValueError as error:
                found[1] = str(error)
        self.usable, error = broadcast_object_list(found)
        if error is not None:
            raise ValueError(error)
        if self.usable is not None:
            state = read(self.usable)
            self.steps.state.restore(state)
            self.finished, self.history = state["step"], state["history"]
            self.accelerator.print(f"{self.name}: {self.finished} steps are done, going on from {self.usable}")
        if self.run is not None:
            self.run.rewind(self.name, self.finished)
        return self.finished

    def _checkpoint_to_resume(self) -> Path | None:
        if self.engine.resume not in (None, "auto"):
            path: Path | None = Path(self.engine.resume)
        elif self.store is None:
            return None
        elif self.engine.resume is None and self.store.paths():
            raise ValueError(
                f"fit: {self.name!r}: expected a run folder without checkpoints, got some in {self.store.folder}; go "
                "on from them with resume='auto' (--engine.resume auto), delete them, or choose another folder"
            )
        else:
            path, problems = self.store.latest()
            for problem in problems:
                print(f"{self.name}: passing over a {problem}")
        if path is not None:
            differences = changed(self.settings, verify(path)["about"])
            if differences and not self.engine.allow_changes:
                raise ValueError(
                    f"fit: {self.name!r}: expected the settings of the run that wrote {path}, got others: "
                    f"{'; '.join(differences[:5])}; change them back, start in another folder, or go on nevertheless "
                    "with allow_changes=True (--engine.allow-changes)"
                )
            for difference in differences:
                print(f"{self.name}: going on although {difference}")
        return path

    def go(
        self,
        stream: Stream,
        stop: StopRequest,
        bar: LiveBar,
        on_checkpoint: Callable[[int], None] | None,
        validate: Validate | None,
    ) -> None:
        """Take the steps that are left."""
        config, first = self.steps.config, self.finished
        batches = stream.batches(
            first * self.engine.accumulation,
            batch_size=config.batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        started = time.perf_counter()
        for step in range(first, config.steps):
            values, signalled = self.steps.take(step, batches, stop.asked)
            self.finished = step + 1
            self.history.append(values["loss"])
            seconds = time.perf_counter() - started
            rate = learning_rate(config, step)
            self._log(step, lr=rate, seconds=round(seconds, 2), **values)
            bar.step(values, rate=rate, speed=(self.finished - first) / seconds)
            due = bool(config.checkpoint_every) and self.finished % config.checkpoint_every == 0
            last = bool(config.checkpoint_every) and self.finished == config.steps
            if self.store is not None and (due or last or signalled):
                self._write_checkpoint()
            if signalled:
                self._stop(signalled)
            if due and on_checkpoint:
                with self._averaged():
                    on_checkpoint(self.finished)
            if validate and self.engine.validate_every and self.finished % self.engine.validate_every == 0:
                with self._averaged():
                    found = validate(self.finished)
                self._log(step, **{f"validation/{key}": value for key, value in found.items()})
        if self.steps.average is not None:
            self.steps.average.store()

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.steps.average is None else self.steps.average.applied()

    def _log(self, step: int, **values: float) -> None:
        if self.run is not None:
            self.run.log(stage=self.name, step=step, **values)
        if self.engine.trackers:
            self.accelerator.log({f"{self.name}/{key}": value for key, value in values.items()}, step=step)

    def _write_checkpoint(self) -> None:
        state = self.steps.state.collect(keep=self.main)
        if self.run is not None and self.store is not None:
            self.run.sync()
            self.usable = self.store.write(
                self.finished, {"step": self.finished, "history": self.history, **state}, about=self.settings
            )

    def _stop(self, signalled: int) -> None:
        self.accelerator.print(f"{self.name}: stopped after step {self.finished}; {self._how_to_go_on()}")
        if signalled == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _how_to_go_on(self) -> str:
        if self.usable is None:
            return "no checkpoint was written (checkpoint_every and a run folder make some)"
        return f"the last usable checkpoint is {self.usable}; go on with resume='auto' (--engine.resume auto)"

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Adds to an error that ends a run what is left of it."""
        try:
            yield
        except FloatingPointError as error:
            raise RuntimeError(f"{error}; {self._how_to_go_on()}") from None
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise RuntimeError(
                f"fit: the disk is full after step {self.finished} of {self.name!r} ({error}); free some space; "
                f"{self._how_to_go_on()}"
            ) from error


def _groups_by_turn(objective: nn.Module, groups: Groups | Mapping[str, Groups] | None, name: str) -> dict[str, Groups]:
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            f"fit: expected a trainable parameter in the objective of {name!r}, got none; call "
            "requires_grad_(True) on the part to train"
        )
    turns = tuple(getattr(objective, "turns", ()))
    if turns and not (isinstance(groups, Mapping) and set(groups) == set(turns)):
        got = sorted(groups) if isinstance(groups, Mapping) else type(groups).__name__
        raise ValueError(
            f"fit: groups: expected a dictionary from the turns {turns} of {name!r} to parameter groups, got {got}"
        )
    if not turns and isinstance(groups, Mapping):
        raise ValueError(
            f"fit: groups: expected a list of parameter groups, as {name!r} has no turns, got a dictionary of "
            f"{sorted(groups)}"
        )
    by_turn = {turn: groups[turn] for turn in turns} if turns else {"": groups or [{"params": trained}]}
    by_turn = {turn: [{**g, "params": list(g["params"])} for g in own] for turn, own in by_turn.items()}
    grouped = {parameter for _, group in named_groups(by_turn) for parameter in group["params"]}
    forgotten = [key for key, p in objective.named_parameters() if p.requires_grad and p not in grouped]
    if forgotten:
        raise ValueError(
            f"fit: groups: expected every trainable parameter of {name!r} in one, got {len(forgotten)} in none, the "
            f"first of them {forgotten[0]!r}; add a group, or call requires_grad_(False) on them"
        )
    return by_turn
