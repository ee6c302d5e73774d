"""Frame positions against diffusers' embeddings and against what defines them."""

import math

import pytest
import torch
from diffusers.models.embeddings import SinusoidalPositionalEmbedding, get_timestep_embedding
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers import (
    RelativePositionBias,
    RotaryPosition,
    SinusoidalMLPPosition,
    SinusoidalPosition,
    TemporalAttention,
    sinusoidal_embedding,
)

FP32 = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.mark.parametrize("dim", [2, 6, 320, 640])
@pytest.mark.parametrize("frames", [1, 24, 100])
def test_svd_embedding_to_the_last_bit(dim, frames):
    # To the last bit, because a rounding of 1e-7 in a frequency is 1e-5 at frame 100.
    positions = torch.arange(frames, dtype=torch.float32)
    theirs = get_timestep_embedding(positions, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(sinusoidal_embedding(positions, dim, interleaved=False), theirs)


@pytest.mark.parametrize("dim", [2, 6, 320, 640])
@pytest.mark.parametrize("frames", [1, 24, 100])
def test_animatediff_embedding_to_the_last_bit(dim, frames):
    theirs = SinusoidalPositionalEmbedding(dim, max_seq_length=frames).pe[0]
    assert torch.equal(SinusoidalPosition(dim)(frames, **FP32), theirs)


@given(
    position=st.floats(0, 1000),
    half=st.integers(1, 8),
    interleaved=st.booleans(),
    max_period=st.sampled_from([100.0, 10000.0]),
)
def test_the_embedding_is_its_formula(position, half, interleaved, max_period):
    positions = torch.tensor([position], dtype=torch.float64)
    got = sinusoidal_embedding(positions, 2 * half, interleaved=interleaved, max_period=max_period)[0].tolist()
    angles = [position * max_period ** (-i / half) for i in range(half)]
    sines, cosines = [math.sin(angle) for angle in angles], [math.cos(angle) for angle in angles]
    pairs = [value for pair in zip(sines, cosines, strict=True) for value in pair]
    assert got == pytest.approx(pairs if interleaved else cosines + sines, abs=1e-11)


@pytest.mark.parametrize(
    ("given_dtype", "got_dtype"),
    [
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_trigonometry_runs_in_fp32_or_wider(given_dtype, got_dtype):
    got = sinusoidal_embedding(torch.arange(3).to(given_dtype), 4, interleaved=True)
    assert got.shape == (3, 4) and got.dtype == got_dtype


def test_the_mlp_starts_as_nothing_on_request():
    position = SinusoidalMLPPosition(6, zero_init=True)
    assert torch.equal(position(5, **FP32), torch.zeros(5, 6))
    torch.nn.init.normal_(position.linear_2.weight)
    hidden = torch.nn.functional.silu(
        position.linear_1(get_timestep_embedding(torch.arange(5), 6, flip_sin_to_cos=True, downscale_freq_shift=0))
    )
    torch.testing.assert_close(position(5, **FP32), position.linear_2(hidden), rtol=1e-6, atol=1e-6)


def scores(rotary, query, key, frames):
    """Attention scores of frames `(f, heads, d)` after rotation, `(heads, f, f)`."""
    rotated = [rotary(x.flatten(1)[:, None], num_frames=frames).unflatten(-1, x.shape[1:])[:, 0] for x in (query, key)]
    return torch.einsum("ihd,jhd->hij", *rotated)


@given(frames=st.integers(2, 40), half=st.integers(1, 4))
def test_rotary_scores_depend_on_distance_alone(frames, half):
    heads, dim = 2, 2 * half
    query, key = torch.randn(2, heads, dim, dtype=torch.float64)
    got = scores(RotaryPosition(dim), query.expand(frames, -1, -1), key.expand(frames, -1, -1), frames)
    for distance in range(1 - frames, frames):
        diagonal = got.diagonal(distance, dim1=1, dim2=2)
        assert (diagonal - diagonal[:, :1]).abs().max() < 1e-11
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    q, k = query.unflatten(-1, (half, 2)), key.unflatten(-1, (half, 2))
    aligned, crossed = (q * k).sum(-1), q[..., 1] * k[..., 0] - q[..., 0] * k[..., 1]
    for later in range(frames):  # the real part of q conj(k) exp(i w (0 - later))
        angle = later * frequencies
        expected = (aligned * angle.cos() + crossed * angle.sin()).sum(-1)
        torch.testing.assert_close(got[:, 0, later], expected, rtol=0, atol=1e-11)


@given(frames=st.integers(1, 9), positions=st.integers(1, 3), heads=st.integers(1, 3), half=st.integers(1, 4))
def test_rotation_keeps_every_norm_and_the_first_frame(frames, positions, heads, half):
    rotary = RotaryPosition(2 * half)
    x = torch.randn(2 * frames, positions, heads * 2 * half, dtype=torch.float64)
    got = rotary(x, num_frames=frames)
    norms = [y.unflatten(-1, (heads, half, 2)).norm(dim=-1) for y in (x, got)]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-12, atol=0)
    assert torch.equal(got[::frames], x[::frames])


def test_rotary_rounds_once_in_bf16():
    x = torch.randn(5, 3, 8).bfloat16()
    rotary = RotaryPosition(8)
    assert torch.equal(rotary(x, num_frames=5), rotary(x.float(), num_frames=5).bfloat16())


@given(frames=st.integers(1, 12), max_distance=st.integers(0, 6))
def test_relative_bias_is_a_table_of_clipped_distances(frames, max_distance):
    bias = RelativePositionBias(3, max_distance=max_distance)
    assert torch.equal(bias(frames), torch.zeros(3, frames, frames))
    torch.nn.init.normal_(bias.table)
    got = bias(frames)
    for query in range(frames):
        for key in range(frames):
            distance = max(-max_distance, min(max_distance, key - query))
            assert torch.equal(got[:, query, key], bias.table[:, max_distance + distance])


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "relative"])
def test_clips_longer_than_any_table_run(position, randomised):
    layer = randomised(TemporalAttention(8, num_heads=2, position=position))
    assert torch.isfinite(layer(torch.randn(100, 1, 8, dtype=torch.float64), num_frames=100)).all()
    assert list(layer.buffers()) == []  # nothing of a fixed length, nothing that a cast could round


def test_they_tell_what_they_are():
    got = [repr(module) for module in (SinusoidalPosition(4), RotaryPosition(6), RelativePositionBias(2))]
    assert got == [
        "SinusoidalPosition(4)",
        "RotaryPosition(6)",
        "RelativePositionBias(num_heads=2, max_distance=32)",
    ]
