"""Settings of the engine that do not say what is learned, and the accelerator, trackers and signals they ask for."""

from __future__ import annotations

import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

Precision = Literal["auto", "no", "bf16", "fp16"]
Tracker = Literal["tensorboard", "trackio", "wandb"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What a run stops for when it has finished its step."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a run is carried out.

    Attributes:
        precision: Mixed precision: ``no``, ``bf16``, ``fp16`` (with loss scaling), or ``auto`` for what
            ``accelerate launch`` was told, without it none.
        accumulation: Batches whose gradients are averaged for one step.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        trackers: Where numbers go beside ``losses.jsonl``: ``tensorboard``, ``trackio``, ``wandb``.
        keep: Checkpoints that stay; older ones are removed.
        resume: ``auto`` goes on from the newest usable checkpoint of the run folder, or starts if there is none; a
            path goes on from that checkpoint; None starts afresh and refuses a folder that has checkpoints.
        allow_changes: Go on although settings that change the result are not those of the run that is continued; what
            changed is printed.
        validate_every: Steps between calls of the validation function; 0 for none.
    """

    precision: Precision = "auto"
    accumulation: int = 1
    gradient_checkpointing: bool = False
    trackers: tuple[Tracker, ...] = ()
    keep: int = 2
    resume: str | None = None
    allow_changes: bool = False
    validate_every: int = 0

    def __post_init__(self) -> None:
        if self.accumulation < 1 or self.keep < 1 or self.validate_every < 0:
            raise ValueError(
                "EngineConfig: expected accumulation and keep of at least 1 and validate_every of at least 0, got "
                f"accumulation={self.accumulation}, keep={self.keep} and validate_every={self.validate_every}"
            )
        if self.precision not in get_args(Precision):
            raise ValueError(f"EngineConfig: expected precision 'auto', 'no', 'bf16' or 'fp16', got {self.precision!r}")
        for tracker in self.trackers:
            if tracker not in get_args(Tracker):
                raise ValueError(
                    f"EngineConfig: expected trackers among 'tensorboard', 'trackio' and 'wandb', got {tracker!r}"
                )


def make_accelerator(engine: EngineConfig | None = None, out: Path | str | None = None) -> Accelerator:
    """The accelerator of a run.

    Args:
        engine: Precision and trackers.
        out: Folder of the run, in which trackers that write files do so.

    Raises:
        ValueError: If the package of a tracker is missing.
    """
    engine = engine or EngineConfig()
    for tracker in engine.trackers:
        if not any(importlib.util.find_spec(package) for package in _packages(tracker)):
            raise ValueError(
                f"EngineConfig: trackers: expected the package {tracker!r}, got none; pip install {tracker}, or leave "
                "it out: losses.jsonl has the numbers in any case"
            )
    return Accelerator(
        mixed_precision=None if engine.precision == "auto" else engine.precision,
        log_with=list(engine.trackers) or None,
        project_dir=None if out is None else str(out),
    )


def check_accelerator(accelerator: Accelerator, engine: EngineConfig) -> None:
    """Refuse an accelerator that was not made for these settings.

    Raises:
        ValueError: If precision, trackers or accumulation are others, or it cannot do what they ask for.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED and engine.resume is not None:
        raise ValueError(
            f"fit: expected no resume with DeepSpeed, which keeps the weights to itself, got resume={engine.resume!r}; "
            "DDP and FSDP2 can go on from checkpoints"
        )
    if engine.precision not in ("auto", accelerator.mixed_precision):
        raise ValueError(
            f"fit: accelerator: expected precision {engine.precision!r}, got {accelerator.mixed_precision!r}; make it "
            "with make_accelerator(engine, out)"
        )
    if accelerator.gradient_accumulation_steps not in (1, engine.accumulation):
        raise ValueError(
            f"fit: accelerator: expected gradient_accumulation_steps={engine.accumulation}, as in EngineConfig, got "
            f"{accelerator.gradient_accumulation_steps}; make it with make_accelerator(engine, out)"
        )
    missing = sorted(set(engine.trackers) - {str(tracker) for tracker in accelerator.log_with})
    if missing:
        raise ValueError(
            f"fit: accelerator: expected the tracker {missing[0]!r}, got one without it; make it with "
            "make_accelerator(engine, out)"
        )


def checkpoint_gradients(objective: nn.Module) -> list[str]:
    """Turn gradient checkpointing on in the diffusers and transformers models of an objective.

    Args:
        objective: Module that has the models as children, at any depth.

    Returns:
        The names of the models.

    Raises:
        ValueError: If no model in it can.
    """
    names: list[str] = []
    for name, module in objective.named_modules():
        inside = any(not above or name.startswith(f"{above}.") for above in names)
        trainable = any(parameter.requires_grad for parameter in module.parameters())
        turn_on = _checkpointing_of(module)
        if trainable and not inside and turn_on is not None:
            turn_on()
            names.append(name)
    if not names:
        raise ValueError(
            "checkpoint_gradients: expected a trained model with enable_gradient_checkpointing(), got none in "
            f"{type(objective).__name__}; leave gradient_checkpointing off"
        )
    return names


@contextmanager
def tracking(accelerator: Accelerator, engine: EngineConfig, name: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Start the trackers for the duration of a ``with`` block.

    Args:
        accelerator: Made with ``make_accelerator``.
        engine: Trackers.
        name: Of the stage, which they call the project.
        config: What to write down with the run.
    """
    started = bool(engine.trackers) and not accelerator.trackers
    if started:
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()}
        accelerator.init_trackers(name.replace(" ", "-"), config=plain)
    try:
        yield
    finally:
        if started:
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.trackers = []


class StopRequest:
    """Notes Ctrl-C and SIGTERM (a cluster's "time is up") instead of stopping in the middle of a step.

    A second Ctrl-C stops at once. Outside the main thread, where Python has no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.received = 0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *arguments: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def asked(self) -> int:
        """The number of the signal that came, 0 if none did."""
        return self.received

    def _note(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def _packages(tracker: str) -> tuple[str, ...]:
    return ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (tracker,)


def _checkpointing_of(module: nn.Module) -> Callable[[], Any] | None:
    """The method of a diffusers or transformers (from 5.24, before) model that turns checkpointing on, if it can."""
    for method, can in (
        ("enable_gradient_checkpointing", "_supports_gradient_checkpointing"),
        ("activation_checkpointing_enable", "supports_gradient_checkpointing"),
        ("gradient_checkpointing_enable", "supports_gradient_checkpointing"),
    ):
        if hasattr(module, method):
            return getattr(module, method) if getattr(module, can, True) else None
    return None
