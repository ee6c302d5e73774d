"""Choice between an operator's fused kernel and its eager reference."""

import importlib.util
import os
from enum import StrEnum

from torch import Tensor

from temporal_layers.kernels.checks import invalid
from temporal_layers.kernels.launch import can_launch


class Impl(StrEnum):
    """Which implementation of an operator runs.

    ``AUTO`` takes the fused kernel where the operator has one that is preferred, triton is installed and the tensors
    are on a CUDA (or ROCm) device, and the eager reference everywhere else; with
    ``TEMPORAL_LAYERS_IMPL=reference`` in the environment when the library is imported it is the reference on every
    device. ``FUSED`` never falls back: where the kernel cannot run it raises. It also runs interpreted on CPU tensors
    (``TRITON_INTERPRET=1``).
    ``REFERENCE`` is plain PyTorch on any device. ``SDPA`` and ``XFORMERS`` are for attention only: PyTorch's and
    xformers' own kernels.
    """

    AUTO = "auto"
    FUSED = "fused"
    REFERENCE = "reference"
    SDPA = "sdpa"
    XFORMERS = "xformers"


# Read once, like all that decides about kernels. A way out for whoever suspects a fused kernel.
REFERENCE_ONLY = os.environ.get("TEMPORAL_LAYERS_IMPL") == "reference"

# A constant rather than a cached function, of which torch.compile warns.
TRITON_FOUND = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether triton is installed. It is looked for without importing it."""
    return TRITON_FOUND


def resolve_impl(
    op: str,
    impl: Impl | str,
    tensor: Tensor,
    *,
    has_fused: bool = False,
    refusal: tuple[str, str] | None = None,
    preferred: bool = True,
    others: tuple[Impl, ...] = (),
) -> Impl:
    """Turns the user's ``impl`` into the implementation to run.

    Args:
        op: Name of the operator, for the error texts.
        impl: ``"auto"``, ``"fused"``, ``"reference"`` or one of ``others``.
        tensor: The operator's first tensor; its device decides.
        has_fused: Whether the operator ships a fused kernel.
        refusal: Why the fused kernel does not take this call, as what it expects and what it got; None if it does.
        preferred: Whether ``"auto"`` takes the fused kernel where it runs. False where nothing was measured and a
            library's kernel is the safer choice.
        others: Further implementations that the operator has, and that run whatever the call.

    Returns:
        ``Impl.FUSED``, ``Impl.REFERENCE`` or one of ``others``, never ``Impl.AUTO``.

    Raises:
        ValueError: ``impl`` is not a name of an implementation, or it is ``"fused"`` and the fused kernel cannot
            run: the operator has none, it does not take the call, triton is missing, or the tensors are not on a
            GPU and nothing is interpreted.
    """
    names = ["auto", "fused", "reference", *others]
    if impl not in names:
        *most, last = map(repr, map(str, names))
        raise invalid(op, "impl", f"{', '.join(most)} or {last}", repr(impl), "pass one of these names")
    if impl not in ("auto", "fused"):
        return Impl(impl)
    if impl == "auto":
        wanted = has_fused and preferred and refusal is None and not REFERENCE_ONLY
        return Impl.FUSED if wanted and tensor.is_cuda and has_triton() else Impl.REFERENCE
    if not has_fused:
        expected, got = "'auto' or 'reference' (no fused kernel exists)", "'fused'"
    elif refusal is not None:
        expected, got = refusal
    elif not has_triton():
        expected, got = "triton for 'fused'", "an environment without it"
    elif not can_launch(tensor):
        expected, got = "tensors on a GPU for 'fused'", f"tensors on {tensor.device}"
    else:
        return Impl.FUSED
    raise invalid(op, "impl", expected, got, "pass impl='auto' or impl='reference'")
