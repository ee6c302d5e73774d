"""How far apart frames may be and still attend to each other, at run time: for clips longer than those of training."""

from collections.abc import Iterator, Mapping

from torch import nn

from temporal_layers import TemporalTransformerBlock
from temporal_layers.attention import TemporalAttention
from temporal_layers.config import check_at_least

__all__ = ["get_windows", "set_windows"]

WHO = "TemporalAdapter.attention_window"


def get_windows(layers: Mapping[str, nn.Module]) -> int | dict[str, int | None] | None:
    """The largest frame distance that all ``layers`` attend to, or that of each by the name of its site."""
    windows = {name: attention.window for name, _, attention in _over_frames(layers)}
    if len(set(windows.values())) > 1:
        return windows
    return next(iter(windows.values()), None)


def set_windows(layers: Mapping[str, nn.Module], value: int | None) -> None:
    """Limit the frame distance that ``layers`` attend to; ``None`` takes the limit away.

    Raises:
        ValueError: if the limit is no whole number of at least 0, or no layer attends to frames.
    """
    if value is not None:
        check_at_least(WHO, value, 0)
        if not any(_over_frames(layers)):
            raise ValueError(
                f"{WHO}: expected a layer that attends to frames, got none among {len(layers)}; convolutions see a few "
                "frames anyway"
            )
    for _, made, attention in _over_frames(layers):
        limits = [limit for limit in (made, value) if limit is not None]
        attention.window = min(limits, default=None)


def _over_frames(layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, int | None, TemporalAttention]]:
    """Attentions over frames: the name of their site, the distance that they were made with, and they themselves."""
    for name, layer in layers.items():
        if isinstance(layer, TemporalTransformerBlock):
            for attention in layer.attentions:
                if attention.context_dim is None:
                    yield name, layer.config.window, attention
