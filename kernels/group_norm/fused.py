"""Fused group norm over frames: launchers, custom operators, autograd."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from triton import cdiv, next_power_of_2

from temporal_layers.kernels.group_norm import fused_kernels as kernels
from temporal_layers.kernels.launch import launch
from temporal_layers.kernels.layout import is_channels_last
from temporal_layers.kernels.vmap import register_looped_vmap

TILE_ELEMENTS = 4096  # 32 values for each thread of four warps
WANTED_PROGRAMS = 2048  # several for each multiprocessor; fixed, so that results are the same on every GPU
MOST_TILES = 32

Strides = tuple[int, int, int, int]


@dataclass(frozen=True)
class Walk:
    """How programs divide maps of one shape ``(clips, frames, pixels, channels)``.

    Attributes:
        clips: Clips, each with statistics of its own.
        frames: Frames that do not lie one behind the other in memory; 1 where the pixels run on through a clip.
        pixels: Pixels of each of these frames.
        channels: Channels.
        strides: Of each map: along clips, frames, channels and pixels.
        block_p: Pixels of one tile.
        block_c: Channels of one tile.
        tiles: Tiles of one program, one behind the other.
    """

    clips: int
    frames: int
    pixels: int
    channels: int
    strides: tuple[Strides, ...]
    block_p: int
    block_c: int
    tiles: int

    @property
    def chunks(self) -> int:
        """Programs along the pixels of a frame."""
        return cdiv(self.pixels, self.block_p * self.tiles)

    @property
    def parts(self) -> int:
        """Chunks of a clip."""
        return self.frames * self.chunks

    def launch(self, kernel: object, *tensors: Tensor | None, **options: object) -> None:
        """Launches a kernel that walks over the maps."""
        grid = (self.clips * self.parts * cdiv(self.channels, self.block_c),)
        strides = [stride for strides in self.strides for stride in strides]
        launch(
            kernel, grid, *tensors, self.frames, self.pixels, self.chunks, *strides, CHANNELS=self.channels,
            BLOCK_P=self.block_p, BLOCK_C=self.block_c, TILES=self.tiles, num_warps=4, **options,
        )  # fmt: skip

    def launch_fold(self, kernel: object, num_groups: int, *arguments: object, **options: object) -> None:
        """Launches a kernel that folds the chunks of each clip and group."""
        width = next_power_of_2(self.channels // num_groups)
        rows = min(next_power_of_2(self.parts), max(TILE_ELEMENTS // 2 // width, 1))
        # The number of loops is part of the kernel: powers of two keep the number of kernels small.
        loops = next_power_of_2(cdiv(self.parts, rows))
        launch(
            kernel, (self.clips * num_groups,), *arguments, CHANNELS=self.channels, GROUPS=num_groups, BLOCK_R=rows,
            BLOCK_G=width, LOOPS=loops, num_warps=4, **options,
        )  # fmt: skip


def walk(num_frames: int, *maps: Tensor) -> Walk:
    """Plans a walk over maps of one shape whose pixels have one stride each (:func:`with_pixels`)."""
    batch_frames, channels, height, width = maps[0].shape
    clips, frames, pixels = batch_frames // num_frames, num_frames, height * width
    along = [(x.stride(0), x.stride(1), x.stride(3) if width > 1 else x.stride(2)) for x in maps]
    if frames == 1 or all(frame == pixels * pixel for frame, _, pixel in along):
        strides = tuple((num_frames * frame, 0, channel, pixel) for frame, channel, pixel in along)
        frames, pixels = 1, frames * pixels
    else:
        strides = tuple((num_frames * frame, frame, channel, pixel) for frame, channel, pixel in along)
    block_p, block_c = tile_shape(pixels, channels, strides)
    tiles_of_frame = cdiv(pixels, block_p)
    programs = clips * frames * tiles_of_frame * cdiv(channels, block_c)
    tiles = next_power_of_2(min(max(programs // WANTED_PROGRAMS, 1), tiles_of_frame, MOST_TILES))
    return Walk(clips, frames, pixels, channels, strides, block_p, block_c, tiles)


def tile_shape(pixels: int, channels: int, strides: Sequence[Strides]) -> tuple[int, int]:
    """Pixels and channels of a tile: long where memory is contiguous, square where one map is each way."""
    channels_inside = {channel < pixel for *_, channel, pixel in strides}
    if channels_inside == {True}:
        exact = next((block for block in (128, 64) if channels % block == 0), 128)
        block_c = min(exact, next_power_of_2(channels))
        return min(TILE_ELEMENTS // block_c, next_power_of_2(pixels)), block_c
    longest = 512 if channels_inside == {False} else 64
    block_p = min(longest, next_power_of_2(pixels))
    return block_p, min(TILE_ELEMENTS // block_p, next_power_of_2(channels), 64)


def with_pixels(x: Tensor) -> Tensor:
    """A map whose rows follow one another, so that one stride leads from pixel to pixel: ``x`` or a copy."""
    height, width = x.shape[2:]
    if height == 1 or width == 1 or x.stride(2) == width * x.stride(3):
        return x
    inside = torch.channels_last if x.stride(1) < x.stride(3) else torch.contiguous_format
    return x.contiguous(memory_format=inside)


def empty_map(x: Tensor, channels_last: bool) -> Tensor:
    """A map for the result, in shape and dtype of ``x``."""
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the arithmetic."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def triton_dtype(x: Tensor) -> object:
    """Triton's name of :func:`compute_dtype`."""
    return kernels.tl.float64 if x.dtype == torch.float64 else kernels.tl.float32


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    num_frames: int,
    eps: float,
    silu: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the three kernels of the forward pass.

    Args:
        x: ``(batch*num_frames, channels, height, width)``.
        num_groups: Groups of channels.
        weight: ``(channels,)`` or None.
        bias: ``(channels,)`` or None.
        num_frames: Frames that share statistics.
        eps: Added to the variance.
        silu: Whether SiLU follows.
        channels_last: Memory format of the result.

    Returns:
        The result; mean and reciprocal deviation ``(batch, num_groups)`` of each clip and group, fp32 or fp64.
    """
    y = empty_map(x, channels_last)
    clips = x.shape[0] // num_frames
    mean, rstd = (x.new_empty(clips, num_groups, dtype=compute_dtype(x)) for _ in range(2))
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    x = with_pixels(x)
    weight, bias = (None if value is None else value.contiguous() for value in (weight, bias))
    compute = triton_dtype(x)
    reading, both = walk(num_frames, x), walk(num_frames, x, y)
    part_mean, part_m2 = (mean.new_empty(clips, reading.parts, x.shape[1]) for _ in range(2))
    reading.launch(kernels.moments_kernel, x, part_mean, part_m2, COMPUTE=compute)
    size = float(x.shape[1:].numel() // num_groups * num_frames)
    reading.launch_fold(
        kernels.fold_moments_kernel, num_groups, part_mean, part_m2, mean, rstd, reading.parts, reading.chunks,
        reading.pixels, size, eps, CHUNK=reading.block_p * reading.tiles, COMPUTE=compute,
    )  # fmt: skip
    both.launch(kernels.normalise_kernel, x, y, mean, rstd, weight, bias, COMPUTE=compute, GROUPS=num_groups, SILU=silu)
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_frames: int,
    silu: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the three kernels of the backward pass; the last only if ``x`` needs a gradient.

    Returns:
        Gradients of ``x`` (empty if not needed), of the weight and of the bias, the latter ``(channels,)`` in fp32 or
        fp64 whether or not there are such parameters.
    """
    to_x = empty_map(x, is_channels_last(x)) if needs_x else x.new_empty(0)
    num_groups, channels = mean.shape[1], x.shape[1]
    to_weight, to_bias = (mean.new_empty(mean.shape[0], channels) for _ in range(2))
    if x.numel() == 0:
        return to_x, mean.new_zeros(channels), mean.new_zeros(channels)
    grad, x = with_pixels(grad), with_pixels(x)
    weight, bias = (None if value is None else value.contiguous() for value in (weight, bias))
    options = {"COMPUTE": triton_dtype(x)}
    per_map = options | {"GROUPS": num_groups, "SILU": silu}
    reading = walk(num_frames, x, grad)
    part_weight, part_bias = (mean.new_empty(mean.shape[0], reading.parts, channels) for _ in range(2))
    reading.launch(
        kernels.gradient_sums_kernel, x, grad, mean, rstd, weight, bias, part_bias, part_weight, **per_map
    )  # fmt: skip
    to_mean, to_rstd = (torch.empty_like(mean) for _ in range(2))
    size = float(x.shape[1:].numel() // num_groups * num_frames)
    reading.launch_fold(
        kernels.fold_gradient_sums_kernel, num_groups, part_bias, part_weight, weight, to_bias, to_weight, to_mean,
        to_rstd, reading.parts, size, **options,
    )  # fmt: skip
    if needs_x:
        all_three = walk(num_frames, x, grad, to_x)
        all_three.launch(
            kernels.input_gradient_kernel, x, grad, to_x, mean, rstd, weight, bias, to_mean, to_rstd, **per_map
        )  # fmt: skip
    return to_x, to_weight.sum(0), to_bias.sum(0)


@torch.library.custom_op("temporal_layers::group_norm", mutates_args=())
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    num_frames: int,
    eps: float,
    silu: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass as an operator; see :func:`forward`."""
    return forward(x, num_groups, weight, bias, num_frames, eps, silu, channels_last)


@group_norm.register_fake
def _(x, num_groups, weight, bias, num_frames, eps, silu, channels_last):
    moments = x.new_empty(x.shape[0] // num_frames, num_groups, dtype=compute_dtype(x))
    return empty_map(x, channels_last), moments, torch.empty_like(moments)


@torch.library.custom_op("temporal_layers::group_norm_backward", mutates_args=())
def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_frames: int,
    silu: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass as an operator; see :func:`backward`."""
    return backward(grad, x, mean, rstd, weight, bias, num_frames, silu, needs_x)


@group_norm_backward.register_fake
def _(grad, x, mean, rstd, weight, bias, num_frames, silu, needs_x):
    to_x = empty_map(x, is_channels_last(x)) if needs_x else x.new_empty(0)
    return to_x, mean.new_empty(x.shape[1]), mean.new_empty(x.shape[1])


def keep_for_backward(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Saves what the backward pass reads: the input as it came and the statistics."""
    x, _, weight, bias, ctx.num_frames, _, ctx.silu, _ = inputs
    ctx.save_for_backward(x, output[1], output[2], weight, bias)


def differentiate(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the operator's arguments; none flow through the statistics, which are not handed on."""
    x, mean, rstd, weight, bias = ctx.saved_tensors
    to_x, to_weight, to_bias = group_norm_backward(
        grad, x, mean, rstd, weight, bias, ctx.num_frames, ctx.silu, ctx.needs_input_grad[0]
    )
    to_x = to_x if ctx.needs_input_grad[0] else None
    to_weight = to_weight.to(weight.dtype) if ctx.needs_input_grad[2] else None
    to_bias = to_bias.to(bias.dtype) if ctx.needs_input_grad[3] else None
    return to_x, None, to_weight, to_bias, None, None, None, None


group_norm.register_autograd(differentiate, setup_context=keep_for_backward)
register_looped_vmap(group_norm)
register_looped_vmap(group_norm_backward)
