"""One optimiser step: forward and backward passes of every turn, gradients averaged, measured and clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from temporal_layers.recipes.training.average import AveragedWeights
from temporal_layers.recipes.training.launch import SIGNALS
from temporal_layers.recipes.training.live import learned_blends, mean_alphas
from temporal_layers.recipes.training.memory import named_groups
from temporal_layers.recipes.training.optim import OptimConfig, build_optimizer, learning_rate
from temporal_layers.recipes.training.sharding import local
from temporal_layers.recipes.training.state import TrainingState
from temporal_layers.recipes.training.streams import Batch, generator_at

Groups = list[dict[str, Any]]


class Steps:
    """Takes the steps of a ``fit``.

    Args:
        objective: The module that is trained.
        groups: Parameter groups by turn; the turn is "" if there is only one.
        config: Optimiser, learning rates, clipping, averaging.
        accumulation: Batches of a step.
        accelerator: Device, precision, processes.
        name: Of the stage.
        seed: Of what the objective draws itself.
    """

    def __init__(
        self,
        objective: nn.Module,
        groups: dict[str, Groups],
        config: OptimConfig,
        *,
        accumulation: int,
        accelerator: Accelerator,
        name: str,
        seed: int,
    ) -> None:
        self.objective, self.config, self.accelerator = objective, config, accelerator
        self.accumulation, self.name, self.seed = accumulation, name, seed
        accelerator.gradient_accumulation_steps, accelerator.step = accumulation, 0
        self.sharded = is_sharded(objective, name)
        optimizers = {turn: build_optimizer(own, config) for turn, own in groups.items()}
        self.peaks = {turn: [group["lr"] for group in made.param_groups] for turn, made in optimizers.items()}
        self.model: nn.Module = _Shell(objective)
        if self.sharded:
            prepared = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers.values()]
        else:
            if len(groups) > 1 and accelerator.ddp_handler is None:
                # A turn leaves the parameters of the other ones without a gradient, which DDP would wait for.
                accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
            self.model, *prepared = accelerator.prepare(self.model, *optimizers.values())
        self.optimizers = dict(zip(optimizers, prepared, strict=True))
        # Read off only now: FSDP2 puts shards in the place of the parameters.
        self.parameters = {
            turn: {
                name: [p for p in group["params"] if p.requires_grad]
                for name, group in named_groups({turn: optimizer.param_groups})
            }
            for turn, optimizer in self.optimizers.items()
        }
        self.average = AveragedWeights(objective, decay=config.ema_decay) if config.ema_decay else None
        plain = {turn: optimizer.optimizer for turn, optimizer in self.optimizers.items()}
        self.state = TrainingState(objective, plain, self.average, accelerator.scaler)
        self.blends = learned_blends(objective)
        self.alphas_every = max(1, config.steps // 100)  # dozens of layers would be most of a log

    def take(self, step: int, batches: Iterator[Batch], asked: Callable[[], int]) -> tuple[dict[str, float], int]:
        """Take one step.

        Args:
            step: Counted from 0.
            batches: The batches from that of this step on.
            asked: The number of the signal that this process got, 0 without one.

        Returns:
            Losses, the mean over processes, gradient norms, and the mean alpha if there is one, at times that of each
            layer too; and the number of the signal that any process got, 0 without one.

        Raises:
            FloatingPointError: If a loss or a gradient is not finite. The parameters are those of the step before.
        """
        rank = self.accelerator.process_index
        torch.manual_seed(generator_at(self.seed, step, f"objective/{rank}").initial_seed())
        micro = [next(batches) for _ in range(self.accumulation)]
        share = learning_rate(self.config, step) / self.config.lr
        values: dict[str, float] = {}
        signalled = 0
        for turn, optimizer in self.optimizers.items():
            for group, peak in zip(optimizer.param_groups, self.peaks[turn], strict=True):
                group["lr"] = share * peak
            losses = self._gradients(turn, micro)
            self.accelerator.unscale_gradients(optimizer)
            norms = {name: _norm(parameters) for name, parameters in self.parameters[turn].items()}
            found, grads, number = self._together(losses, norms, asked())
            signalled = max(signalled, number)
            self._check(found["loss"], grads, step)
            self._clip(turn, grads)
            optimizer.step()
            self.objective.zero_grad(set_to_none=True)
            values.setdefault("loss", found["loss"])
            values |= {f"{turn}/{key}" if turn else key: value for key, value in found.items()}
            values |= {f"grad_norm/{name}": value for name, value in grads.items()}
        if self.average is not None:
            self.average.update()
        alphas = mean_alphas(self.blends)
        if alphas:
            values["alpha"] = fmean(alphas.values())
        if step % self.alphas_every == 0 or step + 1 == self.config.steps:
            values |= {f"alpha/{name}": value for name, value in alphas.items()}
        return values, signalled

    def release(self) -> None:
        """Make the accelerator forget model and optimisers, which it would keep alive as long as it lives itself."""
        accelerator, own = self.accelerator, {id(self.model), *map(id, self.optimizers.values())}
        for held in (accelerator._models, accelerator._optimizers):
            held[:] = [made for made in held if id(made) not in own]

    def _gradients(self, turn: str, micro: list[Batch]) -> dict[str, Tensor]:
        """Forward and backward passes of a turn; returns the mean losses of this process."""
        keywords = {"turn": turn} if turn else {}
        device = self.accelerator.device
        sums: dict[str, Tensor] = {}
        for batch in micro:
            tensors = [value.to(device) if isinstance(value, Tensor) else value for value in batch]
            # A module that its user sharded reduces its gradients every time, which is slower but no less right.
            with self.accelerator.accumulate(*([] if self.sharded else [self.model])):
                with self.accelerator.autocast():
                    losses = self.model(*tensors, **keywords)
                self.accelerator.backward(losses["loss"])
            for key, value in losses.items():
                part = value.detach() / len(micro)
                sums[key] = sums[key] + part if key in sums else part
        return sums

    def _together(
        self, losses: dict[str, Tensor], norms: dict[str, Tensor], signalled: int
    ) -> tuple[dict[str, float], dict[str, float], int]:
        """Numbers of a step on all processes: mean losses, norms (which agree), and the largest signal of any."""
        device = self.accelerator.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        flags = torch.tensor([float(signalled == number) for number in SIGNALS])
        numbers = [*losses.values(), *norms.values(), *flags]
        vector = torch.stack([value.to(device, wide) for value in numbers])
        if self.accelerator.num_processes > 1:
            vector = self.accelerator.reduce(vector, reduction="mean")
        found = vector.tolist()  # the one transfer from the device
        means, found = dict(zip(losses, found, strict=False)), found[len(losses) :]
        sizes, found = dict(zip(norms, found, strict=False)), found[len(norms) :]
        return means, sizes, max(number * (share > 0) for number, share in zip(SIGNALS, found, strict=True))

    def _check(self, loss: float, norms: dict[str, float], step: int) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"fit: the loss of {self.name!r} is {loss} at step {step}; lower lr={self.config.lr}"
            )
        if self.accelerator.scaler is None:  # which skips steps with gradients that are too large for fp16
            for name, norm in norms.items():
                if not math.isfinite(norm):
                    raise FloatingPointError(
                        f"fit: the gradient norm of {name!r} in {self.name!r} is {norm} at step {step}; lower "
                        f"lr={self.config.lr}"
                    )

    def _clip(self, turn: str, norms: dict[str, float]) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return  # its configuration says how it clips
        factor = self.config.grad_clip / (math.hypot(*norms.values()) + 1e-6)
        if factor < 1:
            torch._foreach_mul_(_gradients(p for own in self.parameters[turn].values() for p in own), factor)


class _Shell(nn.Module):
    """Takes what accelerate does to a module's ``forward`` and attributes, so that the objective stays as it is."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *batch: Any, **keywords: Any) -> dict[str, Tensor]:
        return self.objective(*batch, **keywords)


def _norm(parameters: list[Tensor]) -> Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def is_sharded(objective: nn.Module, name: str) -> bool:
    """Whether the trained parameters have been cut up by FSDP2.

    Raises:
        ValueError: If some of them have.
    """
    sharded = {isinstance(parameter, DTensor) for parameter in objective.parameters() if parameter.requires_grad}
    if len(sharded) > 1:
        raise ValueError(
            f"fit: {name!r}: expected all trained parameters to be sharded, or none, got some of both, of which the "
            "others would have gradients of one process only; call fully_shard on the outermost trained module"
        )
    return sharded == {True}
