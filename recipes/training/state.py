"""What a checkpoint holds, as whole tensors by name, so that any number of processes can go on from it.

- the trainable parameters, and the buffers, of the objective;
- the state of every optimiser, by the names of the parameters;
- the averaged weights and the loss scaler, if there are any;
- the losses so far;
- the settings that a run has to share with the one that it continues.

Nothing about random numbers or about the data is needed: samples are a function of the seed and their position, and
what the objective draws itself (dropout) is a function of the seed, the step and the process. Learning rates are a
function of the step. Frozen parameters are not in it: they come from where the run got them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from temporal_layers.recipes.training.average import AveragedWeights
from temporal_layers.recipes.training.sharding import overwrite, placed_like, whole

FREE = ("out", "batch_size", "accumulation", "engine", "checkpoint_every")
"""Settings of a run that may change when it goes on: they do not say what is computed, or `settings` counts them."""


class TrainingState:
    """Everything that changes during a ``fit``.

    Args:
        objective: The module that is trained.
        optimizers: By the name of the turn, "" for the only one.
        average: Averaged weights, if any.
        scaler: Loss scaler of fp16 training, if any.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizers: Mapping[str, torch.optim.Optimizer],
        average: AveragedWeights | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.objective, self.optimizers, self.average, self.scaler = objective, optimizers, average, scaler
        self.names = {parameter: name for name, parameter in objective.named_parameters() if parameter.requires_grad}

    def collect(self, *, keep: bool = True) -> dict[str, Any]:
        """The state on the CPU.

        Args:
            keep: Whether this process wants it; every process has to call this, as sharded tensors are put together.
        """
        parameters = {name: parameter for parameter, name in self.names.items()}
        state: dict[str, Any] = {"parameters": parameters, "buffers": dict(self._buffers()), "optimizers": {}}
        for turn, optimizer in self.optimizers.items():
            state["optimizers"][turn] = {self.names[p]: dict(values) for p, values in optimizer.state.items()}
        if self.average is not None:
            averages = dict(zip(parameters, self.average.averages, strict=True))
            state["average"] = {"updates": self.average.updates, "averages": averages}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return _gathered(state, keep)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Raises:
            ValueError: If it is that of other parameters.
        """
        self._check(state["parameters"], "parameters")
        self._check_parts(state)
        for parameter, name in self.names.items():
            overwrite(parameter, state["parameters"][name])
        for name, buffer in self._buffers():
            overwrite(buffer, state["buffers"][name])
        for turn, optimizer in self.optimizers.items():
            self._restore_optimizer(optimizer, state["optimizers"][turn])
        if self.average is not None:
            self.average.updates = state["average"]["updates"]
            for name, average in zip(self.names.values(), self.average.averages, strict=True):
                overwrite(average, state["average"]["averages"][name])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _restore_optimizer(self, optimizer: torch.optim.Optimizer, values: dict[str, Any]) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                entries = values.get(self.names.get(parameter, ""), {})
                if entries:
                    optimizer.state[parameter] = {
                        key: _like_parameter(value, parameter) if isinstance(value, Tensor) else value
                        for key, value in entries.items()
                    }

    def _check(self, found: Mapping[str, Tensor], what: str) -> None:
        own = {name: tuple(parameter.shape) for parameter, name in self.names.items()}
        theirs = {name: tuple(value.shape) for name, value in found.items()}
        wrong = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"checkpoint: {what}: expected those that are trained here, got {len(wrong)} other, the first of them "
                f"{name!r}: {theirs.get(name, 'missing')} in the checkpoint, {own.get(name, 'missing')} here; "
                "go on with the configuration of the run that wrote it"
            )

    def _check_parts(self, state: dict[str, Any]) -> None:
        own = {
            "turns": sorted(self.optimizers),
            "averaged weights": self.average is not None,
            "a loss scaler": self.scaler is not None,
            "buffers": sorted(name for name, _ in self._buffers()),
        }
        theirs = {
            "turns": sorted(state["optimizers"]),
            "averaged weights": "average" in state,
            "a loss scaler": "scaler" in state,
            "buffers": sorted(state["buffers"]),
        }
        for what, value in own.items():
            if theirs[what] != value:
                raise ValueError(
                    f"checkpoint: {what}: expected {value}, got {theirs[what]}; go on with the configuration of the "
                    "run that wrote it"
                )

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        persistent = self.objective.state_dict(keep_vars=True)
        return ((name, buffer) for name, buffer in self.objective.named_buffers() if name in persistent)


def settings(
    config: Any, *, seed: int, samples_per_step: int, precision: str, groups: Any, run: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a run that goes on from a checkpoint has to share with the run that wrote it, by name.

    How the samples of a step are spread over processes, batches and micro-batches is not in it, their number is.

    Args:
        config: ``OptimConfig`` as a dictionary.
        seed: Of the run.
        samples_per_step: On all processes together.
        precision: Mixed precision.
        groups: By turn, the groups' names, learning rates and weight decays.
        run: Configuration of the whole run, if known.
    """
    parts = {"optim": config, "groups": groups, "run": run or {}}
    flat = {key: value for key, value in _flat(parts) if not set(key.split(".")) & set(FREE)}
    return {**flat, "seed": seed, "samples_per_step": samples_per_step, "precision": precision}


def changed(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What differs between two settings, a sentence each."""
    pairs = {name: (theirs.get(name, "not there"), own.get(name, "not there")) for name in own.keys() | theirs.keys()}
    return [f"{name} was {was} and is {now}" for name, (was, now) in sorted(pairs.items()) if was != now]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _flat(part, f"{prefix}.{index}")
    else:
        yield prefix, value if isinstance(value, int | float | bool | str | None) else str(value)


def _gathered(value: Any, keep: bool) -> Any:
    """Whole tensors on the CPU in place of sharded ones; each is let go at once where it is not wanted."""
    if isinstance(value, Tensor):
        gathered = whole(value)
        if not keep:
            return None
        # A view would bring all of the memory it looks into to the disk.
        return gathered.cpu() if gathered.untyped_storage().nbytes() == gathered.nbytes else gathered.cpu().clone()
    if isinstance(value, dict):
        return {key: _gathered(part, keep) for key, part in value.items()}
    return value


def _like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of an optimiser's state where the optimiser wants it."""
    if value.shape == parameter.shape:
        return placed_like(value, parameter)
    return value if value.ndim == 0 else value.to(parameter.device)  # a step counter stays on the CPU
