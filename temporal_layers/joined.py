"""Linear layers together with the layer norm in front of them and the sum behind them.

One operator goes over memory once where three go thrice, but knows nothing of what hooks into the layers. So each is
called by itself where it is more than its weights.
"""

from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.kernels.linear import linear
from temporal_layers.plain import is_plain, is_watched

__all__ = ["joins", "norm_parameters", "project"]


def norm_parameters(norm: nn.LayerNorm | None) -> dict[str, Tensor | float | None]:
    """Arguments of an operator that takes a layer norm; of none, none."""
    if norm is None:
        return {}
    return {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}


def joins(norm: nn.Module, layer: nn.Linear) -> bool:
    """Whether an operator that takes the weight of ``layer`` may take those of the norm in front of it as well."""
    return is_plain(norm) and not is_watched(layer) and norm.weight.dtype == layer.weight.dtype


def project(
    layer: nn.Module,
    hidden_states: Float[Tensor, "*rows dim"],
    *,
    norm: nn.Module | None = None,
    residual: Float[Tensor, "*rows out"] | None = None,
) -> Float[Tensor, "*rows out"]:
    """``layer(norm(hidden_states)) + residual`` for a linear layer, or what stands in its place."""
    if norm is not None and not (is_plain(layer) and joins(norm, layer)):
        hidden_states, norm = norm(hidden_states), None
    if is_plain(layer):
        return linear(hidden_states, layer.weight, layer.bias, **norm_parameters(norm), residual=residual)
    result = layer(hidden_states)
    return result if residual is None else residual + result
