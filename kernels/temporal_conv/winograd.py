"""The convolution over frames with half the multiplications, for fp32 on a CPU.

Four neighbouring results of a filter of three taps are a polynomial product, which six multiplications give: the filter
and the six frames that it touches are evaluated at six points, multiplied there, and the products are turned back into
the four results. Direct summation takes twelve. Evaluating and turning back are linear maps over frames, so here each
is one matrix product with a constant, frames beyond the ends included, and the multiplications are six matrix products
over channels. A few positions are worked on at a time, whose intermediate results stay in the cache.

A result is a difference of larger numbers, so the rounding of the products is amplified: to 2.2 times that of oneDNN's
``conv3d`` with these points, the best of the form (0, a, -a, b, -b) in a search by steps of 0.1. With terms summed up
in parts it is 1.5 to 1.6 times, which oneDNN's ``conv2d`` exceeds from 320 channels on. Neighbouring results see each
other's frames up to that rounding, so the form is not for causal convolutions.

Zeros of the constant matrices keep frames apart that are not of a group or its neighbour, but a value that is not
finite spreads over all frames of its position.

Source: Winograd, Arithmetic Complexity of Computations (1980); Lavin and Gray, Fast Algorithms for Convolutional Neural
Networks (2016).
"""

import functools
import itertools

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from temporal_layers.kernels.checks import is_autocast
from temporal_layers.kernels.processor import is_intel
from temporal_layers.kernels.vmap import register_looped_vmap

TAPS = 3
RESULTS = 4  # of a group of frames
POINTS = (0.0, 0.7, -0.7, 1.5, -1.5)  # and infinity
PRODUCTS = len(POINTS) + 1

TERMS = 160  # summed up by themselves, since the rounding of sums of products is what counts here
WORKING_BYTES = 16 << 20  # of what is multiplied at a time, and of the products

# Where the form was measured to be faster than oneDNN's conv2d: with so many channels and pixels, and with no more than
# so many multiplications for each of direct summation. Of a last group that is not full all products are made.
LEAST_CHANNELS = 256
LEAST_PIXELS = 512
LARGEST_SHARE = 0.65


def is_faster(x: Tensor, weight: Tensor, num_frames: int, causal: bool) -> bool:
    """Whether the form was measured to beat oneDNN's ``conv2d``, and may take its place.

    It was on an Intel processor.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or causal or torch.compiler.is_compiling():
        return False
    if weight.shape[2] != TAPS or min(weight.shape[:2]) < LEAST_CHANNELS or x[:, 0].numel() < LEAST_PIXELS:
        return False
    products, terms = PRODUCTS * groups_of(num_frames), TAPS * num_frames - 2
    if products > LARGEST_SHARE * terms or is_autocast("cpu") or not is_intel():
        return False
    # Derivatives that are carried forward do not pass through a custom operator.
    return all(forward_ad.unpack_dual(value).tangent is None for value in (x, weight))


def groups_of(num_frames: int) -> int:
    """Groups of results that cover a clip."""
    return -(-num_frames // RESULTS)


def powers(length: int) -> Tensor:
    """Evaluates polynomials of ``length`` coefficients at the points; at infinity that is the last coefficient."""
    rows = [[point**exponent for exponent in range(length)] for point in POINTS]
    return torch.tensor([*rows, [0.0] * (length - 1) + [1.0]], dtype=torch.float64)


@functools.cache
def transforms(num_frames: int) -> tuple[list[list[float]], ...]:
    """The three constant matrices.

    By the transposition of the Toom-Cook algorithm: ``A @ ((G @ taps) * (B @ frames))`` are the results of one group,
    where ``A`` and ``G`` evaluate polynomials and the transposed ``B`` interpolates. Rows of ``B`` are scaled to a
    largest entry of one, so that the values at all points are about as large as the frames.

    Returns:
        ``(PRODUCTS * groups, num_frames)`` turns frames into values, points outermost; ``(num_frames, PRODUCTS *
        groups)`` products into results; ``(PRODUCTS, TAPS)`` taps into values.
    """
    inverse = torch.linalg.inv(powers(PRODUCTS))
    scale = inverse.abs().amax(0)
    of_frames, of_taps, back = (inverse / scale).t(), powers(TAPS) * scale[:, None], powers(RESULTS)
    groups = groups_of(num_frames)
    values = torch.zeros(PRODUCTS, groups, groups * RESULTS + TAPS - 1, dtype=torch.float64)
    results = torch.zeros(groups * RESULTS, PRODUCTS, groups, dtype=torch.float64)
    for group in range(groups):
        first = group * RESULTS
        values[:, group, first : first + PRODUCTS] = of_frames
        results[first : first + RESULTS, :, group] = back.t()
    before = TAPS // 2  # frames in front of the clip, which are zero
    return (
        values[:, :, before : before + num_frames].flatten(0, 1).tolist(),
        results[:num_frames].flatten(1).tolist(),
        of_taps.tolist(),
    )


def matrices(x: Tensor, num_frames: int) -> tuple[Tensor, ...]:
    """The constant matrices as tensors of the dtype of ``x``."""
    return tuple(torch.tensor(rows, dtype=x.dtype, device=x.device) for rows in transforms(num_frames))


class Blocks:
    """Positions to work on together, and memory that all blocks share: new memory of this size costs page faults.

    Args:
        x: ``(batch, frames, positions, channels)``.
        out: Channels of the result.
    """

    def __init__(self, x: Tensor, out: int) -> None:
        batch, num_frames, positions, channels = x.shape
        self.rows = PRODUCTS * groups_of(num_frames)  # at each position
        count = -(-positions // max(16, WORKING_BYTES // (self.rows * (channels + out) * x.element_size())))
        bounds = [positions * index // count for index in range(count + 1)]
        self.places = [(clip, slice(start, end)) for clip in range(batch) for start, end in itertools.pairwise(bounds)]
        most = self.rows * -(-positions // count)
        self.memory = {"in": x.new_empty(most * channels), "out": x.new_empty(most * out)}

    def room(self, side: str, place: slice, channels: int) -> Tensor:
        """``(rows, positions * channels)`` for one of the two sides of a convolution."""
        width = (place.stop - place.start) * channels
        return self.memory[side][: self.rows * width].view(self.rows, width)


def rows_of(x: Tensor, clip: int, positions: slice) -> Tensor:
    """``(frames, positions * channels)`` of dense ``(batch, frames, positions, channels)``."""
    channels = x.shape[3]
    return x[clip].flatten(1)[:, positions.start * channels : positions.stop * channels]


def forward(x: Tensor, weight: Tensor, added: Tensor | None, residual: Tensor | None, share: Tensor | None) -> Tensor:
    """``residual + share * convolution + added``.

    Args:
        x: ``(batch, frames, positions, in)``.
        weight: ``(out, in, TAPS)``.
        added: ``(batch or 1, frames or 1, 1, out)`` or None.
        residual: ``(batch, frames, positions, out)`` or None.
        share: One number, shape ``()``, or None for 1.

    Returns:
        ``(batch, frames, positions, out)``.
    """
    batch, num_frames, positions, channels = x.shape
    out = weight.shape[0]
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    of_frames, back, of_taps = matrices(x, num_frames)
    if share is not None:
        back = back * share
    result = x.new_empty(batch, num_frames, positions, out)
    every = None if added is None else added.expand(batch, num_frames, 1, out)
    blocks = Blocks(x, out)
    for clip, place in blocks.places:
        values, products = blocks.room("in", place, channels), blocks.room("out", place, out)
        torch.mm(of_frames, rows_of(x, clip, place), out=values)
        factors, sums = values.view(PRODUCTS, -1, channels), products.view(PRODUCTS, -1, out)
        for first in range(0, channels, TERMS):
            terms = slice(first, first + TERMS)
            # Anew for each block: all filters at once would not stay in the cache.
            filters = torch.mm(of_taps, weight[:, terms].reshape(-1, TAPS).t()).view(PRODUCTS, out, -1).transpose(1, 2)
            sums.baddbmm_(factors[:, :, terms], filters, beta=float(first > 0))
        target = rows_of(result, clip, place)
        if residual is None:
            torch.mm(back, products, out=target)
        else:
            torch.addmm(rows_of(residual, clip, place), back, products, out=target)
        if every is not None:
            result[clip, :, place] += every[clip]
    return result


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient ``(out, in, TAPS)`` of the weight, from the input and the gradient of the convolution."""
    channels, out = x.shape[3], grad.shape[3]
    x, grad = x.contiguous(), grad.contiguous()
    of_frames, back, of_taps = matrices(x, x.shape[1])
    total = x.new_zeros(PRODUCTS, out, channels)
    blocks = Blocks(x, out)
    for clip, place in blocks.places:
        values, to_products = blocks.room("in", place, channels), blocks.room("out", place, out)
        torch.mm(of_frames, rows_of(x, clip, place), out=values)
        torch.mm(back.t(), rows_of(grad, clip, place), out=to_products)
        total.baddbmm_(to_products.view(PRODUCTS, -1, out).transpose(1, 2), values.view(PRODUCTS, -1, channels))
    return torch.mm(total.view(PRODUCTS, -1).t(), of_taps).view(out, channels, TAPS)


winograd_conv = torch.library.custom_op("temporal_layers::winograd_conv", forward, mutates_args=())
winograd_weight_gradient = torch.library.custom_op(
    "temporal_layers::winograd_weight_gradient", weight_gradient, mutates_args=()
)
register_looped_vmap(winograd_conv)
register_looped_vmap(winograd_weight_gradient)


@winograd_conv.register_fake
def _(x, weight, added, residual, share):
    return x.new_empty(*x.shape[:3], weight.shape[0])


@winograd_weight_gradient.register_fake
def _(x, grad):
    return x.new_empty(grad.shape[3], x.shape[3], TAPS)


class WinogradConv(torch.autograd.Function):
    """:func:`forward`, differentiable any number of times.

    The convolution is linear in its weight, so the gradient of its share is the product of the weight with the gradient
    of the weight, and the convolution itself is not kept. Not the operator's own autograd rule, which ``torch.func``
    does not take.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, added: Tensor | None, residual: Tensor | None, share: Tensor | None
    ) -> Tensor:
        """Convolves."""
        return winograd_conv(x, weight, added, residual, share)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        """Keeps the input, the weight and its share."""
        x, weight, added, _, share = inputs
        ctx.added_shape = None if added is None else added.shape
        ctx.save_for_backward(x, weight, share)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the operands."""
        x, weight, share = ctx.saved_tensors
        needs_x, needs_weight, needs_added, needs_residual, needs_share = ctx.needs_input_grad
        to_x = to_weight = to_share = None
        if needs_x:
            to_x = WinogradConv.apply(grad, transposed(weight), None, None, share)
        if needs_weight or needs_share:
            to_weight = WinogradWeightGradient.apply(x, grad)
            to_share = (weight * to_weight).sum() if needs_share else None
            to_weight = to_weight if share is None else to_weight * share
        to_added = grad.sum_to_size(ctx.added_shape) if needs_added else None
        return to_x, to_weight if needs_weight else None, to_added, grad if needs_residual else None, to_share


class WinogradWeightGradient(torch.autograd.Function):
    """:func:`weight_gradient`, differentiable: it is linear in either operand."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, grad: Tensor) -> Tensor:
        """Sums up."""
        return winograd_weight_gradient(x, grad)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        """Keeps the operands."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, direction: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the operands: convolutions with the direction as the weight."""
        x, grad = ctx.saved_tensors
        needs_x, needs_grad = ctx.needs_input_grad
        return (
            WinogradConv.apply(grad, transposed(direction), None, None, None) if needs_x else None,
            WinogradConv.apply(x, direction, None, None, None) if needs_grad else None,
        )


def transposed(weight: Tensor) -> Tensor:
    """The weight of the transposed convolution."""
    return weight.flip(2).transpose(0, 1)
