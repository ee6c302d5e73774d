"""How the fused operators on maps divide their work: one walk over ``(clips, frames, pixels, channels)``.

Each tensor of a walk has strides of its own, so a kernel reads one memory format and writes another at no cost. The
division depends on shapes and strides alone, never on the GPU: sums are taken in the same order everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from temporal_layers.kernels.launch import launch

FORWARD_TILE = 4096  # elements: 32 for each thread of four warps
BACKWARD_TILE = 2048  # a backward pass holds more values of each element
WANTED_PROGRAMS = 2048  # several for each multiprocessor of the largest GPUs
MOST_TILES = 32

Strides = tuple[int, int, int, int]


@triton.jit
def place(frames, chunks, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Clip, frame, chunk and channels of this program; channels vary fastest, so that neighbours share memory."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    channel = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = pid // blocks
    frame = (row // chunks) % frames
    return (row // chunks // frames).to(tl.int64), frame.to(tl.int64), row % chunks, channel


@triton.jit
def tile_at(ptr, pixel, channel, stride_pixel, stride_channel):
    """Pointers to a tile of pixels and channels."""
    return ptr + pixel.to(tl.int64)[:, None] * stride_pixel + channel.to(tl.int64)[None, :] * stride_channel


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
    def channel_blocks(self) -> int:
        """Programs along the channels."""
        return cdiv(self.channels, self.block_c)

    @property
    def parts(self) -> int:
        """Chunks of a clip."""
        return self.frames * self.chunks

    def launch(self, kernel: object, *tensors: Tensor | None, **options: object) -> None:
        """Launches a kernel that walks over the maps."""
        grid = (self.clips * self.parts * self.channel_blocks,)
        strides = [stride for strides in self.strides for stride in strides]
        launch(
            kernel, grid, *tensors, self.frames, self.pixels, self.chunks, *strides, CHANNELS=self.channels,
            BLOCK_P=self.block_p, BLOCK_C=self.block_c, TILES=self.tiles, num_warps=4, **options,
        )  # fmt: skip


def walk(num_frames: int, *maps: Tensor, tile_elements: int = FORWARD_TILE) -> Walk:
    """Plans a walk over maps of one shape whose pixels have one stride each (:func:`with_pixels`)."""
    batch_frames, channels, height, width = maps[0].shape
    clips, frames, pixels = batch_frames // num_frames, num_frames, height * width
    along = [(x.stride(0), x.stride(1), x.stride(3) if width > 1 else x.stride(2)) for x in maps]
    if frames == 1 or all(frame == pixels * pixel for frame, _, pixel in along):
        strides = tuple((num_frames * frame, 0, channel, pixel) for frame, channel, pixel in along)
        frames, pixels = 1, frames * pixels
    else:
        strides = tuple((num_frames * frame, frame, channel, pixel) for frame, channel, pixel in along)
    block_p, block_c = tile_shape(pixels, channels, strides, tile_elements)
    tiles_of_frame = cdiv(pixels, block_p)
    programs = clips * frames * tiles_of_frame * cdiv(channels, block_c)
    tiles = next_power_of_2(min(max(programs // WANTED_PROGRAMS, 1), tiles_of_frame, MOST_TILES))
    return Walk(clips, frames, pixels, channels, strides, block_p, block_c, tiles)


def tile_shape(pixels: int, channels: int, strides: Sequence[Strides], elements: int) -> tuple[int, int]:
    """Pixels and channels of a tile: long where memory is contiguous, square where one map is each way."""
    channels_inside = {channel < pixel for *_, channel, pixel in strides}
    if channels_inside == {True}:
        exact = next((block for block in (128, 64) if channels % block == 0), 128)
        block_c = min(exact, next_power_of_2(channels))
        return min(elements // block_c, next_power_of_2(pixels)), block_c
    block_p = min(512 if channels_inside == {False} else 64, next_power_of_2(pixels))
    return block_p, min(elements // block_p, next_power_of_2(channels), 64)


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
    """Dtype of the arithmetic on ``x``: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def triton_dtype(x: Tensor) -> tl.dtype:
    """Triton's name of :func:`compute_dtype`."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
