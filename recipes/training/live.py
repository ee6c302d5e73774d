"""What a run shows while it runs: a progress bar with the numbers of the last step."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from temporal_layers import AlphaBlend
from temporal_layers.recipes.training.sharding import whole


class LiveBar:
    """A progress bar: loss (smoothed), learning rate, mean alpha, gradient norms, speed and time left.

    Args:
        name: Of the stage.
        steps: Of the whole run.
        first: Steps that are done already.
        shown: Whether to show anything.
    """

    def __init__(self, name: str, steps: int, *, first: int = 0, shown: bool = True) -> None:
        self.loss: float | None = None
        self.progress = None
        if shown:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            console = Console(width=None if Console().is_terminal else 200)
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task(name, total=steps, completed=first, numbers="")

    def __enter__(self) -> LiveBar:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()

    def step(self, values: Mapping[str, float], *, rate: float, speed: float) -> None:
        """Count a step and show its numbers.

        Args:
            values: ``loss``, ``alpha`` and ``grad_norm/NAME`` among others.
            rate: Learning rate.
            speed: Steps per second.
        """
        loss = values["loss"]
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        if self.progress is None:
            return
        parts = [f"loss {self.loss:.4f}", f"lr {rate:.1e}"]
        if "alpha" in values:
            parts.append(f"alpha {values['alpha']:.3f}")
        norms = {key.removeprefix("grad_norm/"): norm for key, norm in values.items() if key.startswith("grad_norm/")}
        parts += ["grad " + " ".join(f"{name} {norm:.2g}" for name, norm in norms.items()), f"{speed:.2f} it/s"]
        self.progress.update(self.task, advance=1, numbers="  ".join(parts))


def mean_alphas(blends: Mapping[str, AlphaBlend]) -> dict[str, float]:
    """Mean alpha of each layer, by name. Every process calls this for sharded layers."""
    if not blends:
        return {}
    means = torch.stack([whole(blend.logit).sigmoid().mean() for blend in blends.values()])
    return dict(zip(blends, means.tolist(), strict=True))  # one transfer from the device, however many layers


def learned_blends(objective: nn.Module) -> dict[str, AlphaBlend]:
    """The blends of a module whose alpha is learned, by the name of their place."""
    found = {n: m for n, m in objective.named_modules() if isinstance(m, AlphaBlend) and m.logit is not None}
    return {name.removesuffix(".blend").removesuffix(".temporal"): blend for name, blend in found.items()}
