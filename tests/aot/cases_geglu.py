"""Gated projections of real models, for compilation without a GPU: both passes with meta tensors."""

from collections.abc import Callable

import torch

from temporal_layers.kernels.geglu import fused

# Rows (clips * frames * positions) and channels; the inner width is four times the channels.
SHAPES = {
    "sd15-64x64x320": (2 * 16 * 64 * 64, 320),
    "sd15-16x16x1280": (2 * 16 * 16 * 16, 1280),
    "sdxl-64x64x640": (2 * 16 * 64 * 64, 640),
    "odd-1023x100": (1023, 100),
}


def case(
    shape: str, dtype: torch.dtype = torch.bfloat16, *, bias: bool = True, norm: bool = False
) -> Callable[[], None]:
    """Both passes of one projection."""
    rows, channels = SHAPES[shape]

    def compile_both_passes() -> None:
        x = torch.empty(rows, channels, dtype=dtype, device="meta")
        weight = torch.empty(8 * channels, channels, dtype=dtype, device="meta")
        shift = torch.empty(8 * channels, dtype=dtype, device="meta") if bias else None
        scale = torch.empty(channels, dtype=dtype, device="meta") if norm else None
        operands = x, weight, shift, scale, scale, 1e-5 if norm else None
        fused.backward(fused.forward(*operands), *operands)

    return compile_both_passes


CASES: list[tuple[str, Callable[[], None]]] = [
    *((f"{shape}-bf16", case(shape)) for shape in SHAPES),
    ("sd15-64x64x320-fp16-no-bias", case("sd15-64x64x320", torch.float16, bias=False)),
    ("sd15-64x64x320-fp32", case("sd15-64x64x320", torch.float32)),
    *((f"{shape}-norm-bf16", case(shape, norm=True)) for shape in SHAPES),
    ("sd15-64x64x320-norm-fp32", case("sd15-64x64x320", torch.float32, norm=True)),
]
