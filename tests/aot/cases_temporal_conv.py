"""Convolutions of real models, for compilation without a GPU: each case calls the launcher with meta tensors."""

from collections.abc import Callable

import torch

from temporal_layers.kernels.temporal_conv import fused

# Name: clips, frames, channels, height, width.
SHAPES = {
    "sd15-64x64x320": (2, 16, 320, 64, 64),
    "sd15-8x8x1280": (2, 16, 1280, 8, 8),
    "sdxl-32x32x1280": (2, 16, 1280, 32, 32),
    "vae-256x256x256": (1, 8, 256, 256, 256),
    "odd-31x33x100": (2, 7, 100, 31, 33),
}


def case(
    shape: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    kernel: int = 3,
    temb: bool = False,
    blend: str | None = None,
) -> Callable[[], None]:
    """One convolution; ``blend`` is "scalar" or "channel" for an alpha. The input's gradient is the plain one."""
    clips, frames, channels, height, width = SHAPES[shape]

    def compile_forward() -> None:
        def empty(*size: int, like: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(size, dtype=like, device="meta")

        maps = empty(clips * frames, height, width, channels).permute(0, 3, 1, 2)
        embedding = empty(clips * frames, channels) if temb else None
        alpha = None if blend is None else empty(channels if blend == "channel" else 1, like=torch.float32)
        residual = None if blend is None else maps
        bias = empty(channels) if temb or blend else None
        weight = empty(channels, channels, kernel, 1)
        fused.forward(maps, weight, bias, embedding, residual, alpha, frames, kernel // 2)

    return compile_forward


CASES: list[tuple[str, Callable[[], None]]] = [
    *((f"{shape}-bf16", case(shape)) for shape in SHAPES),
    ("sdxl-32x32x1280-bf16-temb", case("sdxl-32x32x1280", temb=True)),
    ("sd15-64x64x320-bf16-blend", case("sd15-64x64x320", blend="scalar")),
    ("vae-256x256x256-bf16-blend", case("vae-256x256x256", blend="scalar")),
    ("sd15-64x64x320-bf16-all", case("sd15-64x64x320", temb=True, blend="channel")),
    ("sd15-8x8x1280-fp16-all", case("sd15-8x8x1280", torch.float16, temb=True, blend="channel")),
    ("odd-31x33x100-bf16-all", case("odd-31x33x100", temb=True, blend="scalar")),
    ("sd15-64x64x320-fp16-kernel-5", case("sd15-64x64x320", torch.float16, kernel=5, blend="scalar")),
    ("sd15-64x64x320-fp32-all", case("sd15-64x64x320", torch.float32, temb=True, blend="scalar")),
]
