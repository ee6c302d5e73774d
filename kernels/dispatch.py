"""Choice between an operator's fused kernel and its eager reference."""

import importlib.util
from enum import StrEnum
from functools import cache

from torch import Tensor

from temporal_layers.kernels.checks import invalid


class Impl(StrEnum):
    """Which implementation of an operator runs.

    ``AUTO`` takes the fused kernel where the operator has one, triton is installed and the tensors are on a
    CUDA (or ROCm) device, and the eager reference everywhere else. ``FUSED`` never falls back: it raises
    where ``AUTO`` would take the reference. ``REFERENCE`` is plain PyTorch on any device.
    """

    AUTO = "auto"
    FUSED = "fused"
    REFERENCE = "reference"


@cache
def has_triton() -> bool:
    """Whether triton is installed. Looks for it without importing it."""
    return importlib.util.find_spec("triton") is not None


def resolve_impl(op: str, impl: Impl | str, tensor: Tensor, *, has_fused: bool = False) -> Impl:
    """Turns the user's ``impl`` into the implementation to run.

    Args:
        op: Name of the operator, for the error texts.
        impl: ``"auto"``, ``"fused"`` or ``"reference"``.
        tensor: The operator's first tensor; its device decides.
        has_fused: Whether the operator ships a fused kernel.

    Returns:
        ``Impl.FUSED`` or ``Impl.REFERENCE``, never ``Impl.AUTO``.

    Raises:
        ValueError: ``impl`` is none of the three names, or it is ``"fused"`` and the fused kernel cannot run:
            the operator has none, triton is missing, or the tensors are not on a GPU.
    """
    if impl not in ("auto", "fused", "reference"):
        raise invalid(op, "impl", "'auto', 'fused' or 'reference'", repr(impl), "pass one of the three names")
    if impl == "reference":
        return Impl.REFERENCE
    runnable = has_fused and tensor.is_cuda and has_triton()
    if impl == "auto":
        return Impl.FUSED if runnable else Impl.REFERENCE
    if not has_fused:
        expected, got = "an operator with a fused kernel", f"'fused', but {op} has a reference only"
    elif not tensor.is_cuda:
        expected, got = "tensors on a GPU for 'fused'", f"tensors on {tensor.device.type}"
    elif not has_triton():
        expected, got = "triton for 'fused'", "an environment without triton"
    else:
        return Impl.FUSED
    raise invalid(op, "impl", expected, got, "use impl='auto' or impl='reference'")
