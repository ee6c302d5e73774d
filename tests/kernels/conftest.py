"""How the fused kernels run under test: on a GPU, or interpreted on the CPU with bf16 put right.

Triton's interpreter keeps bf16 as raw 16-bit integers: it adds and multiplies the bits, and it truncates where a GPU
rounds to the nearest. ``correct_bf16`` makes it compute in fp32 and round to nearest even, as the hardware does. It
is applied only where kernels are interpreted (``TRITON_INTERPRET=1``), and ``test_interpreter.py`` holds it to
PyTorch's own bf16.
"""

import pytest
import torch

from temporal_layers.kernels.dispatch import has_triton
from temporal_layers.kernels.launch import is_interpreted


@pytest.fixture
def device():
    """Device on which fused kernels run in this process; skips the test where they cannot."""
    if not has_triton():
        pytest.skip("needs triton")
    if is_interpreted():
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("fused kernels need a GPU, or TRITON_INTERPRET=1 in the environment")


class AmongNan:
    """Stands in for a launcher's ``empty_map``: the result is a window into a larger tensor, and all is NaN.

    Attributes:
        rooms: The larger tensors and their windows, in the order in which they were asked for.
    """

    def __init__(self):
        self.rooms = []

    def empty_map(self, x, channels_last):
        """A window of the shape of ``x``."""
        rows, channels, *size = x.shape
        shape = (rows + 2, *size, channels + 5) if channels_last else (rows + 2, channels + 5, *size)
        room = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
        window = (room.movedim(-1, 1) if channels_last else room)[1:-1, 2:-3]
        self.rooms.append((room, window))
        return window


@pytest.fixture
def among_nan():
    """Shows what a kernel leaves unwritten, and what it writes beside its result."""
    return AmongNan()


def pytest_configure():
    if not (is_interpreted() and has_triton()):
        return
    import numpy as np

    np.seterr(all="ignore")  # a GPU has no floating-point warnings either
    correct_bf16()


def correct_bf16():
    """Replaces the interpreter's bf16 arithmetic by fp32 with rounding; other dtypes keep their code."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    for name, wrap in (
        ("binary_op", wrap_elementwise), ("unary_op", wrap_elementwise), ("ternary_op", wrap_elementwise),
        ("create_fma", wrap_elementwise), ("create_rsqrt", wrap_elementwise), ("create_dot", wrap_dot),
        ("cast_impl", wrap_cast), ("create_fp_to_fp", wrap_cast),
    ):  # fmt: skip
        setattr(builder, name, wrap(getattr(builder, name)))
    builder.get_bf16 = lambda self, value: narrow(self.get_fp32(value))  # constants; the interpreter has none of bf16
    for reduction in (interpreter.ReduceOps, interpreter.ScanOps):
        reduction.apply_impl = refuse_bf16(reduction.apply_impl)


def is_bf16(value):
    from triton.runtime.interpreter import TensorHandle

    return isinstance(value, TensorHandle) and value.dtype.scalar.is_bf16()


def widen(handle):
    """The fp32 handle of a bf16 one, which is the same bits with 16 zeros behind; others as they are."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if not is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrow(handle, truncate=False):
    """The bf16 handle of an fp32 one, rounded to nearest even; a NaN stays one."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    values = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = bits if truncate else bits + 0x7FFF + ((bits >> 16) & 1)
    rounded = np.where(np.isnan(values), (bits | 0x400000), rounded)
    return TensorHandle((rounded >> 16).astype(np.uint16).reshape(handle.data.shape), tl.bfloat16)


def wrap_elementwise(original):
    def compute(self, *arguments):
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        # The last operand decides: the first one of a selection is its condition.
        operands = [value for value in arguments if isinstance(value, TensorHandle)]
        if not is_bf16(operands[-1]):
            return original(self, *arguments)
        result = original(self, *map(widen, arguments))
        if result.data.dtype == np.bool_:  # a comparison
            return TensorHandle(result.data, tl.int1)
        return narrow(result)

    return compute


def wrap_dot(original):
    def compute(self, a, b, d, *options):
        result = original(self, widen(a), widen(b), widen(d), *options)
        return narrow(result) if is_bf16(d) else result

    return compute


def wrap_cast(original):
    def compute(self, source, dst_type, *rounding):
        import triton.language as tl
        from triton._C.libtriton import ir

        if dst_type.scalar.is_bf16() and not is_bf16(source):
            wide = original_cast(self, source, tl.float32)
            return narrow(wide, truncate=ir.ROUNDING_MODE.RTZ in rounding)
        if is_bf16(source) and not dst_type.scalar.is_bf16():
            source = widen(source)
            return source if dst_type.scalar == tl.float32 else original(self, source, dst_type, *rounding)
        return original(self, source, dst_type, *rounding)

    def original_cast(self, source, dst_type):
        return source if source.dtype.scalar == dst_type else self.cast_impl(source, dst_type)

    return compute


def refuse_bf16(original):
    def apply(self, values):
        # Summing the bits would be silent nonsense, and a kernel should not accumulate in bf16 anyway.
        assert not any(is_bf16(value.handle) for value in values), "reduce bf16 after .to(tl.float32)"
        return original(self, values)

    return apply
