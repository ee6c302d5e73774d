"""What the tests and benchmarks of the operators share: seeded inputs and a tolerance that is measured.

A fixed tolerance is either loose enough to pass a wrong kernel or tight enough to fail a right one. Here the bound
comes from the data: a result may be twice as far from a float64 oracle as plain PyTorch in the same dtype is.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Layout = Literal["contiguous", "channels_last", "strided"]


def random_map(
    batch_frames: int,
    channels: int,
    height: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "channels_last",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "batch_frames channels height width"]:
    """Standard normal feature maps.

    The values depend on the seed and the shape alone: the same on every device and in every layout, and in a
    narrower dtype the same values rounded.

    Args:
        batch_frames: Frames of all clips.
        channels: Channels.
        height: Height.
        width: Width.
        dtype: Floating dtype.
        layout: ``"contiguous"``, ``"channels_last"``, or ``"strided"``: a window into a larger tensor that is NaN
            elsewhere, so that a kernel which reads beside it or ignores strides shows.
        seed: Seed of a generator of its own.
        device: Device.

    Returns:
        The maps.
    """
    values = random_normal((batch_frames, channels, height, width), seed).to(device, dtype)
    if layout == "strided":
        return in_nan_surroundings(values)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return values.contiguous(memory_format=formats[layout])


def random_tokens(
    batch_frames: int,
    positions: int,
    channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: Literal["contiguous", "strided"] = "contiguous",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "batch_frames positions channels"]:
    """Standard normal tokens; arguments as in :func:`random_map`."""
    values = random_normal((batch_frames, positions, channels), seed).to(device, dtype)
    return in_nan_surroundings(values) if layout == "strided" else values


def random_normal(shape: tuple[int, ...], seed: int) -> Float[Tensor, "..."]:
    """Standard normal float64 values on the CPU from a generator of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_nan_surroundings(values: Tensor) -> Tensor:
    """The same values as a window into a larger tensor of NaN; no dimension is contiguous."""
    room = torch.full([2 * size + 1 for size in values.shape], torch.nan, dtype=values.dtype, device=values.device)
    window = room[tuple(slice(1, None, 2) for _ in values.shape)]
    return window.copy_(values)


def with_gradients(
    function: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype, seed: int = 99
) -> list[Tensor]:
    """Result of ``function`` and the gradients of its inputs, for a random upstream gradient.

    Args:
        function: Takes the inputs, returns one tensor.
        *inputs: Floating tensors; they keep their strides.
        dtype: Dtype to which the upstream gradient is rounded, so that an oracle in float64 gets the same one.
        seed: Seed of the upstream gradient.

    Returns:
        The result, then one gradient for each input; zeros for an input that the result does not depend on.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    upstream = random_normal(tuple(result.shape), seed).to(dtype).to(result)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream, materialize_grads=True)]


def assert_within_budget(
    actual: Tensor,
    expected: Float[Tensor, "..."],
    reference: Tensor,
    *,
    magnitude: Float[Tensor, "..."] | None = None,
    factor: float = 2.0,
    what: str = "result",
) -> None:
    """Asserts that ``actual`` is as close to a float64 oracle as its dtype allows.

    Meant for dtypes narrower than float64, over which the oracle has no advantage. The error of ``actual`` may be
    ``factor`` times that of ``reference`` plus the rounding of the oracle itself to the dtype, both in the maximum
    norm and in the Euclidean norm: the first sees one wrong element, the second a small error everywhere.

    Args:
        actual: Result under test.
        expected: The oracle, computed in float64 from the same inputs.
        reference: Plain PyTorch's result in the dtype of ``actual``.
        magnitude: What rounding is relative to, ``expected`` if None. For a long sum of terms that cancel, pass the
            sum of their absolute values: one order of summation may be exact by luck.
        factor: How much worse than the reference the result may be.
        what: Name of the result, for the failure's text.

    Raises:
        AssertionError: the error exceeds the budget, a value is not finite where the oracle is, or the shapes or
            dtypes do not match.
    """
    assert expected.dtype == torch.float64, f"{what}: the oracle is {expected.dtype}, not float64"
    assert actual.shape == expected.shape == reference.shape, (
        f"{what}: shapes {tuple(actual.shape)}, oracle {tuple(expected.shape)}, reference {tuple(reference.shape)}"
    )
    assert actual.dtype == reference.dtype, f"{what}: dtype {actual.dtype}, reference {reference.dtype}"
    expected = expected.detach().cpu()
    magnitude = expected if magnitude is None else magnitude.detach().cpu()
    error, own_error = (x.detach().cpu().double() - expected for x in (actual, reference))
    assert bool(torch.isfinite(error).all()), f"{what}: {int((~torch.isfinite(error)).sum())} values are not finite"
    eps = torch.finfo(actual.dtype).eps
    for norm in (math.inf, 2.0):
        measured, own, scale = (
            float(torch.linalg.vector_norm(x, norm)) if x.numel() else 0.0 for x in (error, own_error, magnitude)
        )
        budget = factor * (own + eps * scale)
        assert measured <= budget, (
            f"{what}: error {measured:.3e} in the {norm}-norm exceeds {factor} x (the reference's {own:.3e} + "
            f"rounding {eps * scale:.3e})"
        )
