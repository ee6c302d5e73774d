"""Attention over frames in real sizes, for compilation without a GPU: each case calls a launcher with meta tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

from temporal_layers.kernels.temporal_attention.call import Call
from temporal_layers.kernels.temporal_attention.fused_backward import launch_backward
from temporal_layers.kernels.temporal_attention.fused_forward import launch_forward

BATCH, HEADS = 2, 8


def case(
    frames: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    key_frames: int | None = None,
    with_options: bool = False,
) -> Callable[[], None]:
    """Both passes of one attention, on packed operands; ``with_options``: masked on all grounds, with a bias."""
    key_frames = frames if key_frames is None else key_frames

    def compile_both_passes() -> None:
        channels = HEADS * head_dim
        positions = 256 if with_options else 4096  # the gradient of a bias takes several equal launches for more
        query = empty(BATCH * frames, positions, 3 * channels, dtype=dtype)[..., :channels]
        key, value = empty(BATCH * key_frames, positions, 3 * channels, dtype=dtype).chunk(3, dim=-1)[1:]
        bias = empty(HEADS, frames, key_frames, dtype=dtype) if with_options else None
        mask = empty(BATCH, key_frames, dtype=torch.bool) if with_options else None
        window = 4 if with_options else None
        call = Call.of(query, bias, mask, frames, key_frames, HEADS, False, window, head_dim**-0.5)
        out, dq, dk, dv = (torch.empty_like(x).contiguous() for x in (query, query, key, value))
        launch_forward(query, key, value, out, call)
        launch_backward(out, query, key, value, dq, dk, dv, call, with_bias=with_options)

    return compile_both_passes


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


SIZES = [(8, 64), (16, 40), (16, 64), (16, 80), (16, 160), (32, 64), (64, 64), (64, 160)]
CASES: list[tuple[str, Callable[[], None]]] = [
    *((f"temporal_attention-T{frames}-D{dim}-bf16", case(frames, dim)) for frames, dim in SIZES),
    *(
        (f"temporal_attention-T{frames}-D{dim}-fp32", case(frames, dim, torch.float32))
        for frames, dim in [(16, 64), (16, 160), (32, 64), (64, 64)]
    ),
    ("temporal_attention-T16-D64-fp16-masks-bias", case(16, 64, torch.float16, with_options=True)),
    ("temporal_attention-T64-D64-bf16-masks-bias", case(64, 64, with_options=True)),
    ("temporal_attention-T1-of-16-D64-bf16", case(1, 64, key_frames=16)),
]
