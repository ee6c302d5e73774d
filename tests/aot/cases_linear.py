"""Products of real models, for compilation without a GPU: the forward pass with meta tensors."""

from collections.abc import Callable

import torch

from temporal_layers.kernels.linear import fused

# Rows (clips * frames * positions), channels in and out.
SHAPES = {
    "sd15-64x64x320-qkv": (2 * 16 * 64 * 64, 320, 960),
    "sd15-64x64x320-out": (2 * 16 * 64 * 64, 320, 320),
    "sd15-64x64x320-ff": (2 * 16 * 64 * 64, 1280, 320),
    "sd15-16x16x1280-qkv": (2 * 16 * 16 * 16, 1280, 3840),
    "sd15-16x16x1280-out": (2 * 16 * 16 * 16, 1280, 1280),
    "odd-1023x100": (1023, 100, 72),
}


def case(
    shape: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = True,
    norm: bool = False,
    residual: bool = True,
    alpha: tuple[int, ...] = (),
) -> Callable[[], None]:
    """One product; ``alpha`` is the shape of its weight, empty for none."""
    rows, channels, out = SHAPES[shape]

    def meta(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    def compile_forward() -> None:
        fused.forward(
            meta(rows, channels), meta(out, channels), meta(out) if bias else None,
            meta(channels) if norm else None, meta(channels) if norm else None, 1e-5 if norm else None,
            meta(rows, out) if residual else None, meta(*alpha, dtype=torch.float32) if alpha else None,
        )  # fmt: skip

    return compile_forward


CASES: list[tuple[str, Callable[[], None]]] = [
    *((f"{shape}-norm-bf16", case(shape, norm=True, bias=False, residual=False)) for shape in SHAPES if "qkv" in shape),
    *((f"{shape}-residual-bf16", case(shape)) for shape in SHAPES if "qkv" not in shape),
    ("sd15-64x64x320-out-blend-bf16", case("sd15-64x64x320-out", alpha=(1,))),
    ("sd15-64x64x320-out-norm-blend-fp16", case("sd15-64x64x320-out", torch.float16, norm=True, alpha=(320,))),
    ("odd-1023x100-norm-blend-bf16", case("odd-1023x100", norm=True, alpha=(1,))),
    ("sd15-64x64x320-out-norm-blend-fp32", case("sd15-64x64x320-out", torch.float32, norm=True, alpha=(1,))),
]
