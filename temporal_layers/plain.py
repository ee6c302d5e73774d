"""Whether a layer is just its weights, so that an operator may take those instead of calling it."""

from torch import Tensor, nn

__all__ = ["has_plain_weight", "is_plain"]


def has_plain_weight(linear: nn.Linear) -> bool:
    """Whether the weight is a tensor of numbers: quantised and sharded ones are of classes of their own."""
    return type(linear.weight) in (nn.Parameter, Tensor)


def is_plain(linear: nn.Module) -> bool:
    """Whether calling ``linear`` is the product with its weight and nothing else.

    It is not where PEFT, quantisation, parametrisation or FSDP put another class of layer or of weight in its place, or
    where something hooks into the call: offloading, for instance, brings the weights only then.
    """
    hooks = linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks
    return (
        type(linear) is nn.Linear and has_plain_weight(linear) and "forward" not in linear.__dict__ and not any(hooks)
    )
