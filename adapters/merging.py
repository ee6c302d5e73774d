"""Linear interpolation of adapters."""

import math
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from temporal_layers.adapters import hub
from temporal_layers.adapters.adapter import TemporalAdapter
from temporal_layers.adapters.files import is_alpha
from temporal_layers.adapters.weights import AdapterWeights

__all__ = ["merge"]

Source = TemporalAdapter | AdapterWeights | str | PathLike


def merge(adapters: Sequence[Source], weights: Sequence[float]) -> AdapterWeights:
    """Interpolate adapters with equal configurations and sites linearly.

    Every tensor is the weighted mean of those of the adapters. Alphas are averaged as such and not as logits: the
    output of a layer is linear in alpha, so that layers that differ in alpha only give the mean of their outputs.
    Metadata that all agree on is kept; where they differ, licences and notes are listed one after the other and the
    rest is dropped.

    Args:
        adapters: live adapters, snapshots, folders that ``save_pretrained`` wrote, or repositories of the hub.
        weights: of each, from 0 to 1, with a sum of 1.

    Returns:
        The merged adapter on the CPU: pass it to :meth:`TemporalAdapter.from_pretrained`, or call its
        ``save_pretrained``.

    Raises:
        ValueError: if something is no list, there are no adapters or not as many weights, the weights are not from 0
            to 1 or their sum is not 1, or an adapter differs from the first in configuration, sites or tensors.

    Example:
        >>> both = merge(["motion", "zoom"], weights=[0.3, 0.7])  # doctest: +SKIP
        >>> adapter = TemporalAdapter.from_pretrained(unet, both)  # doctest: +SKIP
    """
    for name, value in (("adapters", adapters), ("weights", weights)):
        if not isinstance(value, Iterable) or isinstance(value, str):
            raise ValueError(f"merge: {name}: expected a list, got {value!r}; pass one of each for every adapter")
    adapters, weights = list(adapters), list(weights)
    _check_weights(len(adapters), weights)
    read = [_read(adapter) for adapter in adapters]
    first = read[0]
    for index, other in enumerate(read[1:], start=1):
        _check_alike(index, first, other)
    # One that does not count is left out, and what is alone stays as it is: the ends are exact, values from outside
    # the range of a dtype do not become NaN.
    counting = [(adapter.weights, weight) for adapter, weight in zip(read, weights, strict=True) if weight > 0]
    merged = {
        key: _mean(key, [tensors[key] for tensors, _ in counting], [weight for _, weight in counting])
        for key in first.weights
    }
    return AdapterWeights(
        first.base_class, first.config, first.sites, merged, _merged_metadata([one.metadata for one in read]), "merge"
    )


def _check_weights(count: int, weights: list[float]) -> None:
    if count == 0 or len(weights) != count:
        raise ValueError(
            f"merge: weights: expected one for each of at least one adapter, got {len(weights)} for {count} adapters"
        )
    if not all(0 <= weight <= 1 for weight in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(
            f"merge: weights: expected numbers from 0 to 1 with a sum of 1, got {weights} with a sum of "
            f"{sum(weights):g}; set the strength of an adapter with its scale"
        )


def _read(adapter: Source) -> AdapterWeights:
    if isinstance(adapter, TemporalAdapter):
        return adapter.snapshot()
    return adapter if isinstance(adapter, AdapterWeights) else AdapterWeights.load(hub.local_folder(adapter))


def _check_alike(index: int, first: AdapterWeights, other: AdapterWeights) -> None:
    pairs = [("TemporalConfig", first.config.to_dict(), other.config.to_dict())]
    pairs += [("sites", [*map(vars, first.sites)], [*map(vars, other.sites)])]
    pairs += [("tensors", _shapes(first), _shapes(other))]
    for where, one, two in pairs:
        difference = _first_difference(where, one, two)
        if difference is not None:
            name, expected, got = difference
            raise ValueError(
                f"merge: adapters[{index}]: {name}: expected {expected!r} as in the first, got {got!r}; only adapters "
                "with equal configurations and sites can be merged"
            )


def _shapes(adapter: AdapterWeights) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in adapter.weights.items()}


def _first_difference(where: str, one: Any, two: Any) -> tuple[str, Any, Any] | None:
    """Path and values of the first place where two nests of dictionaries and lists differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        parts = [(f"{where}.{key}", one.get(key), two.get(key)) for key in dict.fromkeys([*one, *two])]
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        parts = [(f"{where}[{index}]", *pair) for index, pair in enumerate(zip(one, two, strict=True))]
    else:
        return None if one == two else (where, one, two)
    return next((found for part in parts if (found := _first_difference(*part)) is not None), None)


def _mean(key: str, tensors: list[Tensor], weights: list[float]) -> Tensor:
    """The weighted mean in the widest dtype of ``tensors``, computed in fp64."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if len(tensors) == 1:
        return tensors[0].detach().to("cpu", copy=True)
    wide = [tensor.detach().to("cpu", torch.float64) for tensor in tensors]
    if is_alpha(key):
        return _logit_of_mean(wide, weights).to(dtype)
    return sum(tensor * weight for tensor, weight in zip(wide, weights, strict=True)).to(dtype)


def _logit_of_mean(logits: list[Tensor], weights: list[float]) -> Tensor:
    """Logit of the weighted mean of sigmoids, from the logarithms of both sides: exact where a sigmoid rounds to 1."""
    shares = torch.tensor(weights, dtype=torch.float64).log().reshape(-1, *(1,) * logits[0].dim())
    stacked = torch.stack(logits)
    return torch.logsumexp(torch.nn.functional.logsigmoid(stacked) + shares, 0) - torch.logsumexp(
        torch.nn.functional.logsigmoid(-stacked) + shares, 0
    )


def _merged_metadata(entries: list[dict[str, str]]) -> dict[str, str]:
    merged = {}
    for key in dict.fromkeys(key for entry in entries for key in entry):
        values = list(dict.fromkeys(entry.get(key, "") for entry in entries))
        if len(values) == 1 or key in ("licence", "notes"):
            merged[key] = "; ".join(value for value in values if value)
    return merged
