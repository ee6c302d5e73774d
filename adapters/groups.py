"""Parameters of an injected model by what they belong to."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn

from temporal_layers import AlphaBlend

__all__ = ["Group", "named_parameters", "parameter_groups"]

Group = Literal["spatial", "temporal", "alpha"]


def named_parameters(
    model: nn.Module, layers: Mapping[str, nn.Module], group: Group | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """As :meth:`~temporal_layers.adapters.TemporalAdapter.named_parameters`, for a model with these ``layers``."""
    if group not in (None, "spatial", "temporal", "alpha"):
        raise ValueError(
            f"TemporalAdapter.named_parameters: group: expected 'spatial', 'temporal', 'alpha' or None, got {group!r}"
        )
    temporal = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    alpha = {
        id(parameter)
        for layer in layers.values()
        for module in layer.modules()
        if isinstance(module, AlphaBlend)
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        own = "alpha" if id(parameter) in alpha else "temporal" if id(parameter) in temporal else "spatial"
        if group in (None, own):
            yield name, parameter


def parameter_groups(
    model: nn.Module, layers: Mapping[str, nn.Module], rates: Mapping[Group, float | None], weight_decay: float
) -> list[dict[str, Any]]:
    """As :meth:`~temporal_layers.adapters.TemporalAdapter.parameter_groups`, with a learning rate for each group."""
    made = [
        {
            "name": name,
            "params": [parameter for _, parameter in named_parameters(model, layers, name)],
            "lr": rate,
            "weight_decay": 0.0 if name == "alpha" else weight_decay,
        }
        for name, rate in rates.items()
        if rate is not None
    ]
    return [group for group in made if group["params"]]
