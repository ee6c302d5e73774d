"""Argument checks shared by the operators, with one form of error text.

Every text reads ``<op>: <argument>: expected <what>, got <what>; <what to do>``. The checks look at shapes,
dtypes and devices only, never at values, so they cost no synchronisation and trace under ``torch.compile``
with symbolic sizes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def invalid(op: str, argument: str, expected: str, got: str, advice: str) -> ValueError:
    """Builds the error that every check raises.

    Args:
        op: Operator the user called.
        argument: Name of the offending argument.
        expected: What the operator takes.
        got: What came.
        advice: What to do, as an imperative clause.

    Returns:
        The exception, for the caller to raise.
    """
    return ValueError(f"{op}: {argument}: expected {expected}, got {got}; {advice}")


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device of a tensor in words, e.g. ``(4, 8) float32 on cpu``."""
    return f"{tuple(tensor.shape)} {name_of(tensor.dtype)} on {tensor.device}"


def name_of(dtype: torch.dtype) -> str:
    """Name of a dtype without its module, e.g. ``float32``."""
    return str(dtype).removeprefix("torch.")


def check_map(op: str, argument: str, x: Tensor) -> None:
    """Requires a floating feature map ``(batch*num_frames, channels, height, width)``.

    Raises:
        ValueError: ``x`` has another rank or is not floating point.
    """
    if x.dim() != 4:
        raise invalid(
            op, argument, "a map (batch*num_frames, channels, height, width)", f"shape {tuple(x.shape)}",
            "fold the frames into the batch first",
        )  # fmt: skip
    check_floating(op, argument, x)


def check_floating(op: str, argument: str, x: Tensor) -> None:
    """Requires a real floating-point tensor.

    Raises:
        ValueError: ``x`` is an integer, boolean or complex tensor.
    """
    if not x.is_floating_point():
        raise invalid(op, argument, "a floating-point tensor", describe(x), "convert it with .to(dtype)")


def check_num_frames(op: str, argument: str, x: Tensor, num_frames: int) -> None:
    """Requires ``num_frames >= 1`` and a batch that is a whole number of clips.

    Raises:
        ValueError: ``num_frames`` is below 1 or does not divide ``x.shape[0]``.
    """
    if num_frames < 1:
        raise invalid(op, "num_frames", "at least 1", f"{num_frames}", "pass the number of frames of a clip")
    if x.shape[0] % num_frames != 0:
        raise invalid(
            op, argument, f"a batch divisible by num_frames={num_frames}", f"batch {x.shape[0]}",
            "pass the number of frames that was folded into the batch",
        )  # fmt: skip


def check_device(op: str, argument: str, x: Tensor, like: Tensor, like_name: str) -> None:
    """Requires the device of another argument.

    Raises:
        ValueError: the devices differ.
    """
    if x.device != like.device:
        raise invalid(
            op, argument, f"a tensor on {like.device} like {like_name}", describe(x), f"move it to {like.device}"
        )


def check_alike(op: str, argument: str, x: Tensor, like: Tensor, like_name: str) -> None:
    """Requires the dtype and the device of another argument.

    Under autocast, where parameters are wider than activations by design, the dtypes may differ.

    Raises:
        ValueError: the dtypes differ outside autocast, ``x`` is not floating point, or the devices differ.
    """
    check_floating(op, argument, x)
    check_device(op, argument, x, like, like_name)
    if x.dtype != like.dtype and not is_autocast(like.device.type):
        raise invalid(
            op, argument, f"{name_of(like.dtype)} like {like_name}", describe(x),
            f"convert it with .to({like_name}.dtype)",
        )  # fmt: skip


# Devices without autocast, such as meta, raise when asked whether it is on. Asked here, once: torch.compile cannot
# trace the question in torch 2.11.
AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(kind)
)


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a kind of device."""
    return device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def check_shape(op: str, argument: str, x: Tensor, shape: Sequence[int], meaning: str, advice: str) -> None:
    """Requires an exact shape.

    Raises:
        ValueError: ``x.shape`` is not ``shape``.
    """
    if x.dim() != len(shape) or any(got != want for got, want in zip(x.shape, shape, strict=True)):
        raise invalid(op, argument, f"{meaning} {tuple(shape)}", f"shape {tuple(x.shape)}", advice)


def check_norm(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> None:
    """Requires parameters of a layer norm of the last dimension of ``x`` that come with its epsilon.

    Raises:
        ValueError: a shape, dtype or device does not match, or there are parameters and no epsilon.
    """
    for argument, value in (("norm_weight", weight), ("norm_bias", bias)):
        if value is None:
            continue
        if eps is None:
            raise invalid(op, argument, "norm_eps beside it", "none", "pass the epsilon of the layer norm")
        check_shape(op, argument, value, x.shape[-1:], "one value for each channel", "size it by x's channels")
        check_alike(op, argument, value, x, "x")


def check_bool(op: str, argument: str, x: Tensor) -> None:
    """Requires a boolean tensor.

    Raises:
        ValueError: ``x.dtype`` is not ``torch.bool``.
    """
    if x.dtype != torch.bool:
        raise invalid(op, argument, "a bool tensor", describe(x), "compare or convert it to bool")
