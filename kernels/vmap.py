"""``torch.func.vmap`` of the fused operators."""

from typing import Any

import torch
from torch import Tensor


def register_looped_vmap(operator: Any) -> None:
    """Lets ``torch.func.vmap`` call a custom operator once for each example.

    Right for every operator and every mix of mapped arguments. A kernel fills the GPU with one clip, so that a launch
    for each example costs little.

    Args:
        operator: Result of ``torch.library.custom_op``; it returns a tensor or a tuple of tensors.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        examples = [operator(*select(in_dims, arguments, index)) for index in range(info.batch_size)]
        if isinstance(examples[0], Tensor):
            return torch.stack(examples), 0
        return tuple(torch.stack(results) for results in zip(*examples, strict=True)), (0,) * len(examples[0])

    operator.register_vmap(rule)


def select(in_dims: tuple[int | None, ...], arguments: tuple[Any, ...], index: int) -> list[Any]:
    """Arguments of one example."""
    return [value if dim is None else value.select(dim, index) for dim, value in zip(in_dims, arguments, strict=True)]
