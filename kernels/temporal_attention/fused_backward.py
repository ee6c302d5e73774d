"""Backward kernel of attention over frames.

A program has all frames of its positions, so it computes the attention weights anew and needs neither the result nor
any statistic of the forward pass. Each gradient is written once by one program: no atomics, the same bits every time.
The gradient of the bias is a sum over positions and clips, taken in two stages in fp32, in a fixed order.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from temporal_layers.kernels.launch import launch
from temporal_layers.kernels.temporal_attention.call import Call
from temporal_layers.kernels.temporal_attention.fused_forward import (
    LOG2_E,
    add_bias,
    forbidden_pairs,
    load_part,
    product,
    row_mask,
    row_offsets,
    softmax,
    store_part,
    transposed,
)
from temporal_layers.kernels.temporal_attention.tiles import Tile

# Programs of one launch where each writes a partial sum for the gradient of the bias: enough to fill a GPU, and at most
# 128 MiB of sums.
BIAS_PROGRAMS = 8192


@triton.jit(do_not_specialize=["num_frames", "key_frames", "num_heads", "num_positions", "reach_back", "reach_ahead"])
def temporal_attention_backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, frame_mask_ptr, dq_ptr, dk_ptr, dv_ptr, dbias_ptr,
    stride_grad_frame, stride_grad_position, stride_grad_channel,
    stride_q_frame, stride_q_position, stride_q_channel,
    stride_k_frame, stride_k_position, stride_k_channel,
    stride_v_frame, stride_v_position, stride_v_channel,
    stride_dq_frame, stride_dq_position, stride_dq_channel,
    stride_dk_frame, stride_dk_position, stride_dk_channel,
    stride_dv_frame, stride_dv_position, stride_dv_channel,
    num_frames, key_frames, num_heads, num_positions, reach_back, reach_ahead, scale_log2, scale,
    BANDED: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, FRAMES: tl.constexpr, KEY_FRAMES: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (DIM + CHUNK - 1) // CHUNK
    ROWS: tl.constexpr = GROUP * FRAMES
    KEY_ROWS: tl.constexpr = GROUP * KEY_FRAMES
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    tiles = tl.cdiv(num_positions, BLOCKS * GROUP)
    clip = (program // num_heads // tiles).to(tl.int64)
    first = (program // num_heads % tiles).to(tl.int64) * (BLOCKS * GROUP)
    forbidden = forbidden_pairs(
        frame_mask_ptr, clip, num_frames, key_frames, reach_back, reach_ahead, BANDED, GROUP, FRAMES, KEY_FRAMES
    )

    grad_rows = row_offsets(clip, num_frames, first, stride_grad_frame, stride_grad_position, BLOCKS, GROUP, FRAMES)
    q_rows = row_offsets(clip, num_frames, first, stride_q_frame, stride_q_position, BLOCKS, GROUP, FRAMES)
    k_rows = row_offsets(clip, key_frames, first, stride_k_frame, stride_k_position, BLOCKS, GROUP, KEY_FRAMES)
    v_rows = row_offsets(clip, key_frames, first, stride_v_frame, stride_v_position, BLOCKS, GROUP, KEY_FRAMES)
    dq_rows = row_offsets(clip, num_frames, first, stride_dq_frame, stride_dq_position, BLOCKS, GROUP, FRAMES)
    dk_rows = row_offsets(clip, key_frames, first, stride_dk_frame, stride_dk_position, BLOCKS, GROUP, KEY_FRAMES)
    dv_rows = row_offsets(clip, key_frames, first, stride_dv_frame, stride_dv_position, BLOCKS, GROUP, KEY_FRAMES)
    inside = row_mask(num_frames, num_positions, first, BLOCKS, GROUP, FRAMES)
    key_inside = row_mask(key_frames, num_positions, first, BLOCKS, GROUP, KEY_FRAMES)

    q = load_part(q_ptr, q_rows, inside, head, stride_q_channel, 0, DIM, CHUNK)
    k = load_part(k_ptr, k_rows, key_inside, head, stride_k_channel, 0, DIM, CHUNK)
    grad = load_part(grad_ptr, grad_rows, inside, head, stride_grad_channel, 0, DIM, CHUNK)
    v = load_part(v_ptr, v_rows, key_inside, head, stride_v_channel, 0, DIM, CHUNK)
    scores = product(q, transposed(k))
    dweights = product(grad, transposed(v))
    for part in range(1, PARTS):
        next_q = load_part(q_ptr, q_rows, inside, head, stride_q_channel, part, DIM, CHUNK)
        next_k = load_part(k_ptr, k_rows, key_inside, head, stride_k_channel, part, DIM, CHUNK)
        scores += product(next_q, transposed(next_k))
        next_grad = load_part(grad_ptr, grad_rows, inside, head, stride_grad_channel, part, DIM, CHUNK)
        next_v = load_part(v_ptr, v_rows, key_inside, head, stride_v_channel, part, DIM, CHUNK)
        dweights += product(next_grad, transposed(next_v))
    scores *= scale_log2
    if bias_ptr is not None:
        scores = add_bias(scores, bias_ptr, head, num_frames, key_frames, GROUP, FRAMES, KEY_FRAMES)
    weights = softmax(scores, forbidden)
    # The usual shortcut, the sum of grad * out, would take the rounding of out along.
    dscores = weights * (dweights - tl.sum(weights * dweights, axis=2)[:, :, None])
    if dbias_ptr is not None:
        pairs = tl.arange(0, ROWS)[:, None] * KEY_ROWS + tl.arange(0, KEY_ROWS)[None, :]
        tl.store(dbias_ptr + program.to(tl.int64) * (ROWS * KEY_ROWS) + pairs, tl.sum(dscores, axis=0))

    weights = weights.to(q.dtype)
    dscores = dscores.to(q.dtype)
    for part in range(PARTS):
        if PARTS > 1:  # from the cache: all chunks at once do not fit the registers
            q = load_part(q_ptr, q_rows, inside, head, stride_q_channel, part, DIM, CHUNK)
            k = load_part(k_ptr, k_rows, key_inside, head, stride_k_channel, part, DIM, CHUNK)
            grad = load_part(grad_ptr, grad_rows, inside, head, stride_grad_channel, part, DIM, CHUNK)
        dv = product(transposed(weights), grad)
        store_part(dv_ptr, dv, dv_rows, key_inside, head, stride_dv_channel, part, DIM, CHUNK)
        dk = product(transposed(dscores), q) * scale
        store_part(dk_ptr, dk, dk_rows, key_inside, head, stride_dk_channel, part, DIM, CHUNK)
        dq = product(dscores, k) * scale
        store_part(dq_ptr, dq, dq_rows, inside, head, stride_dq_channel, part, DIM, CHUNK)


def launch_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, call: Call,
    *, with_bias: bool,
) -> Tensor | None:  # fmt: skip
    """Writes the gradients of query, key and value into ``dq``, ``dk`` and ``dv``.

    Args:
        grad: Upstream gradient, ``(batch*frames, positions, heads*head_dim)``, any strides.
        query: ``(batch*frames, positions, heads*head_dim)``, any strides.
        key: ``(batch*key_frames, positions, heads*head_dim)``, any strides.
        value: Shape of ``key``, any strides.
        dq: Shape of ``query``, any strides without overlap.
        dk: Shape of ``key``, any strides without overlap.
        dv: Shape of ``value``, any strides without overlap.
        call: Sizes and options.
        with_bias: Whether the gradient of the bias is wanted.

    Returns:
        Gradient of the bias, ``(heads, frames, key_frames)`` fp32; None if it is not wanted.
    """
    tile = call.tile(backward=True)
    operands = grad, query, key, value, dq, dk, dv
    if not with_bias:
        launch_tiles(*operands, call, tile, None)
        return None
    dbias = torch.zeros(call.num_heads, call.num_frames, call.key_frames, dtype=torch.float32, device=query.device)
    step = max(BIAS_PROGRAMS // max(call.batch * call.num_heads, 1), 1) * tile.positions
    for start in range(0, call.num_positions, step):
        positions = slice(start, min(start + step, call.num_positions))
        part = replace(call, num_positions=positions.stop - start)
        shape = (call.num_heads, tile.group, tile.frames, tile.group, tile.key_frames)
        sums = dbias.new_empty(part.programs(tile) // call.num_heads, *shape)
        launch_tiles(*(x[:, positions] for x in operands), part, tile, sums)
        # Pairs of different positions of a group have weight zero, and so have their sums.
        dbias += sums.sum((0, 2, 4))[:, : call.num_frames, : call.key_frames]
    return dbias


def launch_tiles(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, call: Call,
    tile: Tile, sums: Tensor | None,
) -> None:  # fmt: skip
    """One launch; with ``sums`` each program writes its part of the gradient of the bias there."""
    launch(
        temporal_attention_backward_kernel,
        (call.programs(tile),),
        grad, query, key, value, call.bias, call.frame_mask, dq, dk, dv, sums,
        *grad.stride(), *query.stride(), *key.stride(), *value.stride(), *dq.stride(), *dk.stride(), *dv.stride(),
        *call.sizes, *call.reach, call.scale * LOG2_E.value, call.scale,
        **call.constants(tile),
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
