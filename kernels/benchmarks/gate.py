"""The gate in front of the clock: what does not compute the right thing gets no time."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from temporal_layers.kernels.benchmarks.workloads import Function, Provider, Workload
from temporal_layers.kernels.testing import assert_within_budget

# This library may be four times as far from the float64 oracle as its formula evaluated in plain PyTorch. The tests
# hold the kernels to two times PyTorch's own operators, whose group norm on a CPU is that far off already.
OURS = 4.0

# A peer may round where it pleases: the gate only asks whether it computes the same thing. In units of the activation's
# rounding.
PEERS = 10.0


@dataclass(frozen=True)
class Expected:
    """Results and gradients that a provider has to reproduce.

    Attributes:
        oracle: In float64: the output, then for the backward pass the gradient of each input.
        baseline: The same, from the formula in the precision that the dtype grants.
        magnitudes: What rounding is relative to, None for the oracle itself.
        upstream: Gradient of the output.
    """

    oracle: list[Tensor]
    baseline: list[Tensor]
    magnitudes: list[Tensor | None]
    upstream: Tensor


def expect(workload: Workload, *, backward: bool) -> Expected:
    """Evaluates a workload's formula in float64 and in the precision of its dtype."""
    shape = workload.output_shape
    generator = torch.Generator(workload.inputs[0].device).manual_seed(5)
    upstream = torch.randn(shape, generator=generator, device=workload.inputs[0].device).to(workload.inputs[0].dtype)
    # A layer rounds between its operators; a single operator computes in fp32 and rounds once.
    narrow = workload.inputs[0].dtype if workload.weights else torch.float32
    oracle = evaluate(workload, torch.float64, upstream if backward else None)
    baseline = evaluate(workload, narrow, upstream if backward else None)
    magnitudes: list[Tensor | None] = [None] * len(oracle)
    count = workload.activations
    if backward:
        magnitudes[1 + count :] = [
            magnitude_of_sum(gradient, upstream.numel() // gradient.numel(), x.dtype)
            for gradient, x in zip(oracle[1 + count :], workload.inputs[count:], strict=True)
        ]
    if backward and workload.terms is not None:
        wide = (x.double() for x in (*workload.inputs, upstream))
        terms = workload.terms(*wide)
        magnitudes[-1] = terms.abs().sum()
        if workload.terms_rounded:  # each by itself, so that the errors add up like random numbers
            ratio = torch.finfo(upstream.dtype).eps / torch.finfo(workload.inputs[-1].dtype).eps
            magnitudes[-1] += ratio * terms.norm()
    dtypes = [workload.inputs[0].dtype, *(x.dtype for x in workload.inputs)]
    baseline = [x.to(dtype) for x, dtype in zip(baseline, dtypes, strict=False)]
    return Expected(oracle, baseline, magnitudes, upstream)


def magnitude_of_sum(gradient: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """What the rounding of a parameter's gradient is relative to, which depends on the order of its summation.

    The terms have random signs, so their absolute values add up to about ``sqrt(terms)`` times the sum. They are added
    in fp32; in 16 bits only the sum is rounded.

    Args:
        gradient: The gradient in float64.
        terms: Number of terms of each of its sums.
        dtype: What the sum is rounded to.

    Returns:
        The magnitude; a rounding to ``dtype`` is relative to it.
    """
    size = gradient.square().mean().sqrt() * terms**0.5
    return gradient.abs() + size * (torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)


def evaluate(workload: Workload, dtype: torch.dtype, upstream: Tensor | None) -> list[Tensor]:
    """The formula's output in a dtype and, given an upstream gradient, its inputs' gradients."""
    weights = {"p": {name: value.to(dtype) for name, value in workload.weights.items()}} if workload.weights else {}
    return outcome(lambda *x: workload.oracle(*x, **weights), [x.to(dtype) for x in workload.inputs], upstream)


def outcome(function: Function, inputs: list[Tensor], upstream: Tensor | None) -> list[Tensor]:
    """Output of a function and, given an upstream gradient, its inputs' gradients."""
    if upstream is None:
        with torch.no_grad():
            return [function(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def check(workload: Workload, provider: Provider, function: Function, expected: Expected, *, backward: bool) -> None:
    """Runs a provider, this library's on new memory that is full of NaN, and compares.

    Args:
        workload: The workload.
        provider: The provider, which decides the budget.
        function: The function it has built.
        expected: What :func:`expect` returned.
        backward: Whether the inputs' gradients are compared too.

    Raises:
        AssertionError: a result is further from the oracle than the budget, or not finite.
    """
    layout, count = provider.layout, workload.activations

    def on_frames(*inputs: Tensor) -> Tensor:
        if layout is None:
            return function(*inputs)
        return layout.back(function(*(layout.to(x) for x in inputs[:count]), *inputs[count:]))

    # A compiled peer would compile once more for the deterministic mode that the filling needs.
    with NanInEmptyMemory() if provider.ours else nullcontext():
        got = outcome(on_frames, list(workload.inputs), expected.upstream if backward else None)
    names = ["output", *(f"gradient {index}" for index in range(len(workload.inputs)))]
    for name, actual, oracle, baseline, magnitude in zip(
        names, got, expected.oracle, expected.baseline, expected.magnitudes, strict=False
    ):
        if provider.ours:
            assert_within_budget(actual, oracle, baseline, magnitude=magnitude, factor=OURS, what=name)
        else:
            eps = torch.finfo(workload.inputs[0].dtype).eps
            assert_same(actual, oracle, baseline, oracle if magnitude is None else magnitude, eps, name)


def assert_same(actual: Tensor, oracle: Tensor, baseline: Tensor, magnitude: Tensor, eps: float, what: str) -> None:
    """Asserts that a peer computes the same thing, whatever it rounds on the way.

    Raises:
        AssertionError: the error in the Euclidean norm is above ``PEERS`` roundings of the activation.
    """
    error, own = (float((x.double() - oracle).norm()) for x in (actual, baseline))
    budget = PEERS * (own + eps * float(magnitude.norm()))
    assert error <= budget, f"{what}: error {error:.3e} exceeds {budget:.3e}"  # NaN fails as well


class NanInEmptyMemory:
    """Lets PyTorch fill new memory with NaN, so that an element which no kernel wrote shows."""

    def __enter__(self) -> None:
        self.previous = (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )
        # The filling comes with deterministic algorithms only; those without such a form warn and run as ever.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *error: object) -> None:
        deterministic, fill = self.previous
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
