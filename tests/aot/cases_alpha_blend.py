"""Blends of real models, for compilation without a GPU: each case calls the launchers with meta tensors."""

from collections.abc import Callable

import torch

from temporal_layers.kernels.alpha_blend import fused

# Name: clips, frames, channels, height, width.
SHAPES = {
    "sd15-64x64x320": (2, 16, 320, 64, 64),
    "sdxl-32x32x1280": (2, 16, 1280, 32, 32),
    "vae-512x512x128": (1, 8, 128, 512, 512),
}
NCHW, NHWC = torch.contiguous_format, torch.channels_last


def case(
    shape: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    per_frame: bool = False,
    per_channel: bool = False,
    image_only: bool = False,
    residual: bool = False,
    first: torch.memory_format = NHWC,
    second: torch.memory_format = NHWC,
) -> Callable[[], None]:
    """Both passes of one blend with a trained alpha."""
    clips, frames, channels, height, width = SHAPES[shape]

    def compile_both_passes() -> None:
        size = (clips * frames, channels, height * width, 1)
        x, y = (torch.empty(size, dtype=dtype, device="meta").to(memory_format=form) for form in (first, second))
        alpha = torch.empty(frames if per_frame else 1, channels if per_channel else 1, device="meta")
        flags = torch.empty(clips * frames, dtype=torch.bool, device="meta") if image_only else None
        grad = fused.forward(x, y, alpha, frames, flags, residual, first == NHWC)
        fused.alpha_gradient(grad, x, y, alpha, frames, flags, residual)
        fused.branch_gradients(grad, alpha, frames, flags, not residual, True, first == NHWC)

    return compile_both_passes


CASES: list[tuple[str, Callable[[], None]]] = [
    *((f"{shape}-bf16", case(shape)) for shape in SHAPES),
    ("sd15-64x64x320-fp32", case("sd15-64x64x320", torch.float32)),
    ("sd15-64x64x320-fp16-residual", case("sd15-64x64x320", torch.float16, residual=True)),
    ("sdxl-32x32x1280-bf16-per-channel", case("sdxl-32x32x1280", per_channel=True)),
    ("sd15-64x64x320-bf16-per-frame-image-only", case("sd15-64x64x320", per_frame=True, image_only=True)),
    ("sd15-64x64x320-bf16-nchw", case("sd15-64x64x320", first=NCHW, second=NCHW)),
    ("vae-512x512x128-bf16-nchw-and-nhwc", case("vae-512x512x128", first=NCHW)),
]
