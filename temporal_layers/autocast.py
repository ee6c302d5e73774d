"""Dtypes under autocast: what a layer does where its operators expect tensors of one dtype."""

import torch
from torch import Tensor

from temporal_layers.kernels.checks import is_autocast

__all__ = ["autocast_to"]


def autocast_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``x`` to ``dtype`` where autocast is on, and nowhere else.

    Under autocast a linear layer returns the low dtype whatever its weights are, so the next operator may meet two
    dtypes. Without autocast two dtypes are a mistake, which the operators report.

    Args:
        x: any floating tensor.
        dtype: the dtype of the tensors that ``x`` meets.

    Returns:
        ``x``, cast or as it is.
    """
    return x.to(dtype) if is_autocast(x.device.type) else x
