"""Group norms of real models, for compilation without a GPU: each case calls the launchers with meta tensors."""

from collections.abc import Callable

import torch

from temporal_layers.kernels.group_norm import fused

# Name: clips, frames, channels, height, width.
SHAPES = {
    "sd15-64x64x320": (2, 16, 320, 64, 64),
    "sd15-16x16x1280": (2, 16, 1280, 16, 16),
    "sdxl-32x32x1280": (2, 16, 1280, 32, 32),
    "vae-512x512x128": (1, 8, 128, 512, 512),
    "vae-256x256x256": (1, 8, 256, 256, 256),
}


def case(
    shape: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    source: torch.memory_format = torch.channels_last,
    result: torch.memory_format = torch.channels_last,
    over_clip: bool = True,
) -> Callable[[], None]:
    """Both passes of one group norm with SiLU."""
    clips, frames, channels, height, width = SHAPES[shape]

    def compile_both_passes() -> None:
        size = (clips * frames, channels, height, width)
        x = torch.empty(size, dtype=dtype, device="meta").to(memory_format=source)
        grad = torch.empty(size, dtype=dtype, device="meta").to(memory_format=result)
        weight = torch.empty(channels, dtype=dtype, device="meta")
        num_frames, last = frames if over_clip else 1, result == torch.channels_last
        _, mean, rstd = fused.forward(x, 32, weight, weight, num_frames, 1e-5, True, last)
        fused.backward(grad, x, mean, rstd, weight, weight, num_frames, True, True)

    return compile_both_passes


NCHW, NHWC = torch.contiguous_format, torch.channels_last
CASES: list[tuple[str, Callable[[], None]]] = [
    *((f"{shape}-bf16", case(shape)) for shape in SHAPES),
    ("sd15-64x64x320-fp32", case("sd15-64x64x320", torch.float32)),
    ("sd15-64x64x320-fp16-frames", case("sd15-64x64x320", torch.float16, over_clip=False)),
    ("sd15-64x64x320-bf16-nchw", case("sd15-64x64x320", source=NCHW, result=NCHW)),
    ("sd15-64x64x320-bf16-nchw-to-nhwc", case("sd15-64x64x320", source=NCHW)),
    ("vae-512x512x128-bf16-nhwc-to-nchw", case("vae-512x512x128", result=NCHW)),
]
