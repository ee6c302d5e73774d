"""How parameters are trained: the optimiser by name, its learning rate over the steps, its settings."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

OptimizerName = Literal["adamw", "adamw8bit"]
Schedule = Literal["one-cycle", "cosine", "constant"]

EIGHT_BIT = (("torchao.optim", "AdamW8bit"), ("bitsandbytes.optim", "AdamW8bit"))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How a set of parameters is trained.

    Attributes:
        steps: Optimiser steps.
        batch_size: Samples of a batch on each process; a step takes ``EngineConfig.accumulation`` batches.
        lr: Peak learning rate.
        schedule: ``one-cycle`` (Smith & Topin 2018; best for the short runs of this repository), ``cosine`` (linear
            warm-up, then cosine to zero) or ``constant`` (linear warm-up, then flat).
        warmup: Share of the steps during which the learning rate rises.
        weight_decay: AdamW's decoupled weight decay, in groups that do not bring their own.
        grad_clip: Largest norm of all gradients together; larger ones are scaled down. ``inf`` never scales.
        ema_decay: Decay of the averaged weights that a stage hands back; 0 hands back the last weights.
        checkpoint_every: Steps between checkpoints, and between calls of the checkpoint function; 0 for none.
        optimizer: ``adamw``, or ``adamw8bit``, whose two moments take a byte a parameter each instead of four; the
            latter is torchao's or, without it, bitsandbytes'.
        betas: AdamW's decay rates of the two moments.
    """

    steps: int
    batch_size: int
    lr: float
    schedule: Schedule = "one-cycle"
    warmup: float = 0.1
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.0
    checkpoint_every: int = 0
    optimizer: OptimizerName = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"OptimConfig: expected steps and batch_size of at least 1, got steps={self.steps} and "
                f"batch_size={self.batch_size}"
            )
        if not (self.lr > 0 and self.grad_clip > 0):
            raise ValueError(
                f"OptimConfig: expected lr and grad_clip above 0, got lr={self.lr} and grad_clip={self.grad_clip}; "
                "grad_clip=inf turns clipping off"
            )
        if self.weight_decay < 0 or self.checkpoint_every < 0:
            raise ValueError(
                f"OptimConfig: expected weight_decay and checkpoint_every of at least 0, got weight_decay="
                f"{self.weight_decay} and checkpoint_every={self.checkpoint_every}; 0 turns either off"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"OptimConfig: expected betas in [0, 1), got {self.betas}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"OptimConfig: expected ema_decay in [0, 1), got {self.ema_decay}; 0 turns averaging off")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"OptimConfig: expected warmup, a share of the steps, in [0, 1), got {self.warmup}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"OptimConfig: expected schedule 'one-cycle', 'cosine' or 'constant', got {self.schedule!r}"
            )
        if self.optimizer not in get_args(OptimizerName):
            raise ValueError(f"OptimConfig: expected optimizer 'adamw' or 'adamw8bit', got {self.optimizer!r}")


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


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of a configuration.

    Args:
        groups: Parameter groups; what a group does not say is the configuration's.
        config: Optimiser, learning rate, weight decay.

    Raises:
        ValueError: If an 8-bit optimiser is asked for and no package has one.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    for module, name in EIGHT_BIT:
        try:
            made = getattr(importlib.import_module(module), name)
        except ImportError:
            continue
        return made(groups, **options)
    raise ValueError(
        "build_optimizer: optimizer='adamw8bit': expected the package torchao or bitsandbytes, got neither; "
        'pip install "temporal-layers[8bit]", or take optimizer="adamw"'
    )
