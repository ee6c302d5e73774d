"""Looking into temporal layers: whom frames attend to, and plots for notebooks of that, of alpha and of gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers import TemporalAttention
from temporal_layers.adapters import TemporalAdapter


@dataclass
class AttentionRecord:
    """Attention over frames at some pixels.

    Attributes:
        pixels: Row and column of each, as shares of height and width from 0 to below 1.
        weights: By layer ``(clips, pixels, frames, frames)``, the mean over heads: how much a frame (third axis)
            attends to each frame (last axis). Of the last call of the model.
    """

    pixels: tuple[tuple[float, float], ...]
    weights: dict[str, Float[Tensor, "clips pixels frames frames"]] = field(default_factory=dict)


@contextmanager
def record_attention(
    adapter: TemporalAdapter, pixels: Sequence[tuple[float, float]] = ((0.5, 0.5),)
) -> Iterator[AttentionRecord]:
    """Record whom frames attend to, in every layer of attention over frames, while the model is called.

    The weights are what the layer itself computes, whatever its positions, masks and implementation: it is run a second
    time on the chosen pixels with the frames' numbers in place of their values.

    Args:
        adapter: Of the model.
        pixels: Row and column of each as shares of height and width.

    Yields:
        The record, filled by each call of the model.

    Raises:
        ValueError: If a pixel is not in the frame.

    Example:
        >>> with record_attention(adapter, [(0.5, 0.5)]) as record:  # doctest: +SKIP
        ...     unet(clips, timestep, text)
        >>> plot_attention(record)  # doctest: +SKIP
    """
    if not pixels or not all(0 <= share < 1 for pixel in pixels for share in pixel):
        raise ValueError(
            "record_attention: pixels: expected rows and columns as shares of the frame, from 0 to below 1, got "
            f"{list(pixels)}"
        )
    record = AttentionRecord(tuple((float(row), float(column)) for row, column in pixels))
    size: list[tuple[int, int]] = []
    hooks = [adapter.model.register_forward_pre_hook(_Size(size), with_kwargs=True)]
    for site, layer in adapter.layers.items():
        for name, module in layer.named_modules():
            if isinstance(module, TemporalAttention) and module.context_dim is None:
                label = f"{site}.{name}" if name else site
                hooks.append(module.register_forward_pre_hook(_Weights(record, label, size), with_kwargs=True))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


class _Size:
    """Notes height and width of what a model is called on."""

    def __init__(self, size: list[tuple[int, int]]) -> None:
        self.size = size

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        self.size[:] = [tuple(sample.shape[-2:])]


class _Weights:
    """Computes the weights of one layer whenever it is called."""

    def __init__(self, record: AttentionRecord, name: str, size: list[tuple[int, int]]) -> None:
        self.record, self.name, self.size = record, name, size

    @torch.no_grad()
    def __call__(self, module: TemporalAttention, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden_states, num_frames = args[0], kwargs["num_frames"]
        height, width = level_size(*self.size[0], hidden_states.shape[1])
        places = [int(row * height) * width + int(column * width) for row, column in self.record.pixels]
        weights = frame_weights(module, hidden_states[:, places], **kwargs)
        self.record.weights[self.name] = weights.mean(2).transpose(1, 2).flatten(2, 3).unflatten(2, (-1, num_frames))


def level_size(height: int, width: int, positions: int) -> tuple[int, int]:
    """Height and width of feature maps of ``positions`` pixels, from those that are halved to them, rounded up.

    Raises:
        ValueError: If no halving leads there.
    """
    h, w = height, width
    while h * w > positions:
        h, w = -(-h // 2), -(-w // 2)
    if h * w != positions:
        raise ValueError(
            f"level_size: expected {height} x {width}, or a size that halving it leads to, got {positions} positions"
        )
    return h, w


def frame_weights(
    module: TemporalAttention, hidden_states: Float[Tensor, "n positions dim"], *, num_frames: int, **options: Any
) -> Float[Tensor, "clips frames heads positions key_frames"]:
    """How much each frame attends to each frame, at every position and head.

    Args:
        module: Attention over frames.
        hidden_states: What it is called on.
        num_frames: Frames of a clip.
        **options: Of its call, but for a cache.
    """
    probe = copy.copy(module)
    probe._forward_pre_hooks, probe._modules = {}, dict(module._modules)
    probe._modules["to_out"] = nn.Identity()
    parts = []
    for first in range(0, num_frames, module.head_dim):
        count = min(module.head_dim, num_frames - first)
        probe._modules["to_v"] = _FrameNumbers(module.num_heads, module.head_dim, num_frames, first)
        found = probe(hidden_states, num_frames=num_frames, **{**options, "cache": None})
        heads = found.unflatten(0, (-1, num_frames)).unflatten(-1, (module.num_heads, module.head_dim))
        parts.append(heads[..., :count].transpose(2, 3))
    return torch.cat(parts, dim=-1)


class _FrameNumbers(nn.Module):
    """In place of the values: the number of a frame, as one of ``head_dim`` ones and zeros, in every head."""

    def __init__(self, num_heads: int, head_dim: int, num_frames: int, first: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_frames, self.first = num_heads, head_dim, num_frames, first

    def forward(self, hidden_states: Tensor) -> Tensor:
        numbers = torch.arange(self.num_frames, device=hidden_states.device) - self.first
        ones = (numbers[:, None] == torch.arange(self.head_dim, device=hidden_states.device)).to(hidden_states.dtype)
        values = ones.repeat(len(hidden_states) // self.num_frames, self.num_heads)
        return values[:, None].expand(-1, hidden_states.shape[1], -1)


def _figure(width: float, height: float, **options: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plots: expected the package matplotlib, got none; install it with: pip install "temporal-layers[plot]"'
        ) from error
    return Figure(figsize=(width, height), layout="constrained", **options)


def plot_attention(record: AttentionRecord, clip: int = 0) -> Any:
    """One map a layer (rows) and pixel (columns): bright where the frame of the row attends to that of the column.

    Args:
        record: Of `record_attention`, after a call of the model.
        clip: Which clip of the batch.

    Returns:
        A ``matplotlib.figure.Figure``, which notebooks show and ``savefig`` writes.

    Raises:
        ValueError: If nothing was recorded.
        ModuleNotFoundError: Without matplotlib.
    """
    if not record.weights:
        raise ValueError("plot_attention: record: expected recorded layers, got none; call the model while recording")
    layers, pixels = list(record.weights), record.pixels
    figure = _figure(2.2 * len(pixels) + 2.5, 1.9 * len(layers))
    axes = figure.subplots(len(layers), len(pixels), squeeze=False)
    for row, name in zip(axes, layers, strict=True):
        for ax, pixel, weights in zip(row, pixels, record.weights[name][clip], strict=True):
            ax.imshow(weights.float().cpu().numpy(), vmin=0, vmax=1, cmap="magma")
            ax.set_xticks([]), ax.set_yticks([])
            if name == layers[0]:
                ax.set_title(f"row {pixel[0]:.2f}, column {pixel[1]:.2f}", fontsize=8)
        row[0].set_ylabel(name.replace(".", ".\n", 2), fontsize=6, rotation=0, ha="right", va="center")
    return figure


def plot_alphas(alphas: Mapping[str, float] | Mapping[str, Sequence[tuple[int, float]]]) -> Any:
    """Alpha of every layer: bars of numbers, or curves of ``(step, alpha)`` over a training.

    Args:
        alphas: By layer; ``stages.temporal.alphas(adapter)``, or of `alphas_over_training`.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    curves = bool(alphas) and not isinstance(next(iter(alphas.values())), float)
    figure = _figure(7, 4 if curves else 0.22 * len(alphas) + 1)
    ax = figure.subplots()
    if curves:
        for points in alphas.values():
            ax.plot(*zip(*points, strict=True), linewidth=0.8)
        ax.set_xlabel("step"), ax.set_ylabel("alpha: weight of the image branch")
    else:
        ax.barh(list(alphas), list(alphas.values()))
        ax.invert_yaxis(), ax.set_xlabel("alpha: weight of the image branch"), ax.tick_params(labelsize=7)
        ax.set_xlim(0, 1)
    return figure


def alphas_over_training(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Alpha of each layer over the steps of a training.

    Args:
        records: Of ``RunFolder.records()``.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("alpha/"):
                curves.setdefault(key.removeprefix("alpha/"), []).append((record["step"], value))
    return curves


def plot_gradients(records: Sequence[Mapping[str, Any]]) -> Any:
    """Norm of the gradient over the steps of a training, one curve for each group of parameters.

    Args:
        records: Of ``RunFolder.records()``.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = _figure(7, 4)
    ax = figure.subplots()
    names = sorted({key for record in records for key in record if key.startswith("grad_norm/")})
    for name in names:
        points = [(record["step"], record[name]) for record in records if name in record]
        ax.semilogy(*zip(*points, strict=True), linewidth=0.8, label=name.removeprefix("grad_norm/"))
    ax.set_xlabel("step"), ax.set_ylabel("norm of the gradient")
    if names:
        ax.legend()
    return figure
