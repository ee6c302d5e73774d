"""Forward kernel of attention over frames, and what it shares with the backward kernel.

One program reads the frames of a few positions and one head where they lie, with the frame stride of the folded
layout, and writes the result the same way: every operand moves once and nothing is permuted. Its matrices have the
shapes ``(B, R, D)`` and ``(B, K, D)``: blocks, query rows and key rows, channels of a head; :class:`Tile` says what a
row is. Channels come in chunks, which bounds the registers and keeps a head size of 80 or 160 from being padded to a
power of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from temporal_layers.kernels.launch import launch
from temporal_layers.kernels.temporal_attention.call import Call

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_frames(GROUP: tl.constexpr, FRAMES: tl.constexpr):
    """Frame of each row of a matrix."""
    return tl.arange(0, GROUP * FRAMES) % FRAMES


@triton.jit
def row_positions(first, BLOCKS: tl.constexpr, GROUP: tl.constexpr, FRAMES: tl.constexpr):
    """Position ``(B, R)`` of each row, counted from ``first``."""
    return first + tl.arange(0, BLOCKS)[:, None] * GROUP + (tl.arange(0, GROUP * FRAMES) // FRAMES)[None, :]


@triton.jit
def row_offsets(
    clip, num_frames, first, stride_frame, stride_position,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """Offset ``(B, R)`` of each row. ``clip`` and ``first`` are int64, so nothing overflows past 2**31 elements."""
    frame = (clip * num_frames + row_frames(GROUP, FRAMES)) * stride_frame
    return frame[None, :] + row_positions(first, BLOCKS, GROUP, FRAMES) * stride_position


@triton.jit
def row_mask(
    num_frames, num_positions, first, BLOCKS: tl.constexpr, GROUP: tl.constexpr, FRAMES: tl.constexpr
):  # fmt: skip
    """True ``(B, R)`` where a row is a frame at a position and not padding."""
    position = row_positions(first, BLOCKS, GROUP, FRAMES)
    return (row_frames(GROUP, FRAMES) < num_frames)[None, :] & (position < num_positions)


@triton.jit
def part_offsets(rows, head, stride_channel, part, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Offsets ``(B, R, D)`` of one chunk of a head's channels."""
    # With DIM a constant the compiler knows that heads start at multiples of 16 bytes, and moves 16 bytes at a time.
    channel = head * DIM + part * CHUNK + tl.arange(0, CHUNK)
    return rows[:, :, None] + (channel * stride_channel)[None, None, :]


@triton.jit
def part_mask(inside, part, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Mask ``(B, R, D)`` of one chunk of a head's channels."""
    return inside[:, :, None] & (part * CHUNK + tl.arange(0, CHUNK) < DIM)[None, None, :]


@triton.jit
def load_part(ptr, rows, inside, head, stride_channel, part, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk ``(B, R, D)`` of a head's channels; zero in padding."""
    offsets = part_offsets(rows, head, stride_channel, part, DIM, CHUNK)
    return tl.load(ptr + offsets, mask=part_mask(inside, part, DIM, CHUNK), other=0.0)


@triton.jit
def store_part(ptr, values, rows, inside, head, stride_channel, part, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Writes one chunk ``(B, R, D)`` of a head's channels."""
    offsets = part_offsets(rows, head, stride_channel, part, DIM, CHUNK)
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=part_mask(inside, part, DIM, CHUNK))


@triton.jit
def product(a, b):
    """Matrix products ``(B, m, n)`` of ``(B, m, k)`` and ``(B, k, n)`` in fp32."""
    BATCH: tl.constexpr = a.shape[0]
    M: tl.constexpr = a.shape[1]
    K: tl.constexpr = a.shape[2]
    N: tl.constexpr = b.shape[2]
    # fp32 operands keep their digits ("ieee"): tensor cores would round them to tf32, three digits less than the plain
    # reference has, and at at most 64 rows the exact product is no slower than memory. For 16 bits it means nothing.
    if a.dtype == tl.float32 and K > 16:
        # Without tensor cores a thread holds all K factors of its results: take the sum in pieces of 16.
        pieces_a = tl.permute(tl.reshape(a, (BATCH, M, K // 16, 16)), (0, 2, 1, 3))
        pieces_a = tl.reshape(pieces_a, (BATCH * (K // 16), M, 16))
        pieces_b = tl.reshape(b, (BATCH * (K // 16), 16, N))
        pieces = tl.dot(pieces_a, pieces_b, input_precision="ieee")
        return tl.sum(tl.reshape(pieces, (BATCH, K // 16, M, N)), axis=1)
    if BATCH == 1:  # only the 2-D form reaches the matrix unit of a whole warp group
        flat = tl.dot(tl.reshape(a, (M, K)), tl.reshape(b, (K, N)), input_precision="ieee")
        return tl.reshape(flat, (1, M, N))
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def transposed(x):
    """Each matrix of ``(B, m, n)`` transposed."""
    return tl.permute(x, (0, 2, 1))


@triton.jit
def forbidden_pairs(
    frame_mask_ptr, clip, num_frames, key_frames, reach_back, reach_ahead,
    BANDED: tl.constexpr, GROUP: tl.constexpr, FRAMES: tl.constexpr, KEY_FRAMES: tl.constexpr,
):  # fmt: skip
    """Positive ``(R, K)`` where a query row must not attend to a key row: one integer, where flags cost registers."""
    key_frame = row_frames(GROUP, KEY_FRAMES)
    absent = (key_frame >= key_frames).to(tl.int32)
    if frame_mask_ptr is not None:
        flags = tl.load(frame_mask_ptr + clip * key_frames + tl.minimum(key_frame, key_frames - 1))
        absent = tl.maximum(absent, (flags == 0).to(tl.int32))
    lag = (row_frames(GROUP, FRAMES) + (key_frames - num_frames))[:, None] - key_frame[None, :]
    forbidden = absent[None, :] + 0 * lag
    if GROUP > 1:
        place, key_place = tl.arange(0, GROUP * FRAMES) // FRAMES, tl.arange(0, GROUP * KEY_FRAMES) // KEY_FRAMES
        forbidden += (place[:, None] != key_place[None, :]).to(tl.int32)
    if BANDED:
        forbidden = tl.maximum(forbidden, tl.maximum(lag - reach_back, -lag - reach_ahead))
    return forbidden


@triton.jit
def add_bias(
    scores, bias_ptr, head, num_frames, key_frames,
    GROUP: tl.constexpr, FRAMES: tl.constexpr, KEY_FRAMES: tl.constexpr,
):  # fmt: skip
    """Adds a head's bias to scores ``(B, R, K)`` in the unit of exp2."""
    # Padding repeats the last frame, and is masked like all scores; a mask for the load would cost registers.
    frame = tl.minimum(row_frames(GROUP, FRAMES), num_frames - 1)
    key_frame = tl.minimum(row_frames(GROUP, KEY_FRAMES), key_frames - 1)
    pair = frame[:, None] * key_frames + key_frame[None, :]
    bias = tl.load(bias_ptr + head * (num_frames * key_frames) + pair).to(tl.float32)
    return scores + (bias * LOG2_E)[None, :, :]


@triton.jit
def softmax(scores, forbidden):
    """Softmax of ``(B, R, K)`` over the pairs ``(R, K)`` that are not forbidden; a row without any is zero."""
    scores = tl.where(forbidden[None, :, :] <= 0, scores, float("-inf"))
    largest = tl.max(scores, axis=2)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(scores - largest[:, :, None])
    total = tl.sum(weights, axis=2)
    return weights * (1.0 / tl.where(total == 0.0, 1.0, total))[:, :, None]


@triton.jit(do_not_specialize=["num_frames", "key_frames", "num_heads", "num_positions", "reach_back", "reach_ahead"])
def temporal_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, frame_mask_ptr, out_ptr,
    stride_q_frame, stride_q_position, stride_q_channel,
    stride_k_frame, stride_k_position, stride_k_channel,
    stride_v_frame, stride_v_position, stride_v_channel,
    stride_out_frame, stride_out_position, stride_out_channel,
    num_frames, key_frames, num_heads, num_positions, reach_back, reach_ahead, scale_log2,
    BANDED: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, FRAMES: tl.constexpr, KEY_FRAMES: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (DIM + CHUNK - 1) // CHUNK
    # Heads vary fastest: neighbouring programs read neighbouring pieces of the same rows.
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    tiles = tl.cdiv(num_positions, BLOCKS * GROUP)
    clip = (program // num_heads // tiles).to(tl.int64)
    first = (program // num_heads % tiles).to(tl.int64) * (BLOCKS * GROUP)

    q_rows = row_offsets(clip, num_frames, first, stride_q_frame, stride_q_position, BLOCKS, GROUP, FRAMES)
    k_rows = row_offsets(clip, key_frames, first, stride_k_frame, stride_k_position, BLOCKS, GROUP, KEY_FRAMES)
    v_rows = row_offsets(clip, key_frames, first, stride_v_frame, stride_v_position, BLOCKS, GROUP, KEY_FRAMES)
    out_rows = row_offsets(clip, num_frames, first, stride_out_frame, stride_out_position, BLOCKS, GROUP, FRAMES)
    inside = row_mask(num_frames, num_positions, first, BLOCKS, GROUP, FRAMES)
    key_inside = row_mask(key_frames, num_positions, first, BLOCKS, GROUP, KEY_FRAMES)

    scores = tl.zeros((BLOCKS, GROUP * FRAMES, GROUP * KEY_FRAMES), tl.float32)
    for part in tl.static_range(PARTS):
        q = load_part(q_ptr, q_rows, inside, head, stride_q_channel, part, DIM, CHUNK)
        k = load_part(k_ptr, k_rows, key_inside, head, stride_k_channel, part, DIM, CHUNK)
        if part == 0:  # the first values are under way during the softmax
            v = load_part(v_ptr, v_rows, key_inside, head, stride_v_channel, part, DIM, CHUNK)
        scores += product(q, transposed(k))
    scores *= scale_log2
    if bias_ptr is not None:
        scores = add_bias(scores, bias_ptr, head, num_frames, key_frames, GROUP, FRAMES, KEY_FRAMES)
    forbidden = forbidden_pairs(
        frame_mask_ptr, clip, num_frames, key_frames, reach_back, reach_ahead, BANDED, GROUP, FRAMES, KEY_FRAMES
    )
    weights = softmax(scores, forbidden).to(v.dtype)
    for part in tl.static_range(PARTS):
        if part > 0:
            v = load_part(v_ptr, v_rows, key_inside, head, stride_v_channel, part, DIM, CHUNK)
        store_part(out_ptr, product(weights, v), out_rows, inside, head, stride_out_channel, part, DIM, CHUNK)


def launch_forward(query: Tensor, key: Tensor, value: Tensor, out: Tensor, call: Call) -> None:
    """Writes the attention of ``query`` to ``key`` and ``value`` into ``out``.

    Args:
        query: ``(batch*frames, positions, heads*head_dim)``, any strides.
        key: ``(batch*key_frames, positions, heads*head_dim)``, any strides.
        value: Shape of ``key``, any strides.
        out: Shape of ``query``, any strides without overlap.
        call: Sizes and options.
    """
    tile = call.tile()
    launch(
        temporal_attention_forward_kernel,
        (call.programs(tile),),
        query, key, value, call.bias, call.frame_mask, out,
        *query.stride(), *key.stride(), *value.stride(), *out.stride(),
        *call.sizes, *call.reach, call.scale * LOG2_E.value,
        **call.constants(tile),
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
