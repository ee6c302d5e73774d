"""Whether a layer is just its weights, so that an operator may take those instead of calling it."""

from torch import Tensor, nn

__all__ = ["has_plain_weight", "is_plain", "is_watched"]


def has_plain_weight(layer: nn.Linear | nn.LayerNorm) -> bool:
    """Whether the weight is a tensor of numbers: quantised and sharded ones are of classes of their own."""
    return type(layer.weight) in (nn.Parameter, Tensor)


def is_watched(module: nn.Module) -> bool:
    """Whether a call of ``module`` does or tells more than its class: something hooks into it or stands in its place.

    Offloading, for instance, brings the weights only then.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return "forward" in module.__dict__ or any(hooks)


def is_plain(layer: nn.Module) -> bool:
    """Whether calling ``layer`` is the product with its weight, or the layer norm with it, and nothing else.

    It is not where PEFT, quantisation, parametrisation or FSDP put another class of layer or of weight in its place, or
    where something hooks into the call.
    """
    return type(layer) in (nn.Linear, nn.LayerNorm) and has_plain_weight(layer) and not is_watched(layer)
