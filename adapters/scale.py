"""Strength of the temporal layers at run time."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["get_scales", "resolve_scales", "scale_of", "set_scales"]


def scale_of(layer: nn.Module) -> float:
    """The strength of a temporal layer."""
    return _carrier(layer).scale


def get_scales(layers: Mapping[str, nn.Module]) -> float | dict[str, float]:
    """The strength of all ``layers``, or of each by the name of its site where they differ."""
    scales = {name: scale_of(layer) for name, layer in layers.items()}
    first, *others = set(scales.values())
    return scales if others else first


def set_scales(layers: Mapping[str, nn.Module], scales: Mapping[str, float]) -> None:
    """Set the strength of ``layers`` by the name of their site."""
    for name, layer in layers.items():
        _carrier(layer).scale = scales[name]


def resolve_scales(names: list[str], value: float | Mapping[str, float]) -> dict[str, float]:
    """The strength that ``value`` gives to each of the sites ``names``.

    Args:
        names: of the sites.
        value: one number for all, or numbers by a regular expression that is searched for in the names. The name of a
            site itself goes before the expressions, and of those the first that fits counts; a site that none fits
            gets 1.

    Raises:
        ValueError: if a strength is no finite number, or a key is no regular expression or fits no site.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, _checked("", value))
    numbers = {pattern: _checked(f"[{pattern!r}]", number) for pattern, number in value.items()}
    for pattern in numbers:
        try:
            fits = pattern in names or any(re.search(pattern, name) for name in names)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"TemporalAdapter.scale: expected regular expressions as keys, got {pattern!r}: {error}"
            ) from error
        if not fits:
            raise ValueError(
                f"TemporalAdapter.scale: expected a pattern that is found in the name of a site, got {pattern!r}, "
                f"which is in none of {len(names)}; names are like {', '.join(names[:2] + names[-1:])}"
            )
    return {name: numbers.get(name, _first_that_fits(name, numbers)) for name in names}


def _first_that_fits(name: str, numbers: dict[str, float]) -> float:
    return next((number for pattern, number in numbers.items() if re.search(pattern, name)), 1.0)


def _checked(where: str, number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(
            f"TemporalAdapter.scale{where}: expected a finite number, got {number!r}; 0 is the image model, 1 the "
            "layers as trained"
        )
    return float(number)


def _carrier(layer: nn.Module) -> nn.Module:
    """Where the strength of a layer is kept: in its blend, or in a layer without one itself."""
    return getattr(layer, "blend", layer)
