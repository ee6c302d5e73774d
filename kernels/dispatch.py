"""Choice between an operator's fused kernel and its eager reference."""

import importlib.util
from enum import StrEnum
from functools import cache

from torch import Tensor

from temporal_layers.kernels.checks import invalid
from temporal_layers.kernels.launch import can_launch


class Impl(StrEnum):
    """Which implementation of an operator runs.

    ``AUTO`` takes the fused kernel where the operator has one, triton is installed and the tensors are on a
    CUDA (or ROCm) device, and the eager reference everywhere else. ``FUSED`` never falls back: where the kernel
    cannot run it raises. It also runs interpreted on CPU tensors (``TRITON_INTERPRET=1``). ``REFERENCE`` is plain
    PyTorch on any device.
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
            the operator has none, triton is missing, or the tensors are not on a GPU and nothing is interpreted.
    """
    if impl not in ("auto", "fused", "reference"):
        raise invalid(op, "impl", "'auto', 'fused' or 'reference'", repr(impl), "pass one of the three names")
    if impl == "reference":
        return Impl.REFERENCE
    if impl == "auto":
        return Impl.FUSED if has_fused and tensor.is_cuda and has_triton() else Impl.REFERENCE
    if not has_fused:
        expected, got = "'auto' or 'reference' (no fused kernel exists)", "'fused'"
    elif not has_triton():
        expected, got = "triton for 'fused'", "an environment without it"
    elif not can_launch(tensor):
        expected, got = "tensors on a GPU for 'fused'", f"tensors on {tensor.device}"
    else:
        return Impl.FUSED
    raise invalid(op, "impl", expected, got, "pass impl='auto' or impl='reference'")
