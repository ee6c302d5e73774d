"""Convolution over frames against a sum over taps in float64, and against PyTorch's conv3d."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.kernels.temporal_conv import temporal_conv
from temporal_layers.kernels.testing import assert_within_budget, random_map, random_normal, with_gradients

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMATS = ["contiguous", "channels_last", "strided"]


def taps(x, weight, bias, num_frames, causal):
    """Adds up one matrix product for each output frame and tap."""
    kernel = weight.shape[2]
    frames = []
    for row in range(x.shape[0]):
        clip, frame = divmod(row, num_frames)
        total = torch.zeros(weight.shape[0], *x.shape[2:], dtype=x.dtype)
        for tap in range(kernel):
            source = frame + tap - (kernel - 1 if causal else kernel // 2)
            if 0 <= source < num_frames:
                total = total + torch.einsum("oc,chw->ohw", weight[:, :, tap, 0], x[clip * num_frames + source])
        frames.append(total if bias is None else total + bias[:, None, None])
    return torch.stack(frames)


def on_5d(x, weight, bias, num_frames, causal):
    """PyTorch's conv3d of the clips ``(batch, channels, frames, height, width)``."""
    reach = weight.shape[2] - 1
    clips = x.unflatten(0, (-1, num_frames)).transpose(1, 2)
    clips = F.pad(clips, (0, 0, 0, 0, reach, 0) if causal else (0, 0, 0, 0, reach // 2, reach // 2))
    return F.conv3d(clips, weight[..., None], bias).transpose(1, 2).flatten(0, 1)


@given(
    batch=st.integers(1, 2),
    num_frames=st.integers(1, 5),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    kernel=st.sampled_from([1, 3, 5]),
    causal=st.booleans(),
    with_bias=st.booleans(),
    layout=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
)
def test_matches_the_sum_over_taps(batch, num_frames, channels, size, kernel, causal, with_bias, layout, dtype):
    inputs = [
        random_map(batch * num_frames, channels[0], *size, dtype=dtype, layout=layout),
        random_normal((channels[1], channels[0], kernel, 1), 1).to(dtype),
    ]
    if with_bias:
        inputs.append(random_normal((channels[1],), 2).to(dtype))

    def run(function, tensors):
        return with_gradients(lambda x, w, b=None: function(x, w, b, num_frames, causal), *tensors, dtype=dtype)

    actual = run(lambda x, w, b, f, c: temporal_conv(x, w, b, num_frames=f, causal=c), inputs)
    expected = run(taps, [x.double() for x in inputs])
    if dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        return
    for tensors in zip(actual, expected, run(on_5d, inputs), strict=True):
        assert_within_budget(*tensors)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(layout, causal):
    x = random_map(4, 2, 2, 2, dtype=torch.float64, layout=layout).requires_grad_()
    weight, bias = random_normal((3, 2, 3, 1), 1).requires_grad_(), random_normal((3,), 2).requires_grad_()
    args = (lambda *tensors: temporal_conv(*tensors, num_frames=2, causal=causal), (x, weight, bias))
    assert torch.autograd.gradcheck(*args) and torch.autograd.gradgradcheck(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("causal", [False, True])
def test_result_is_channels_last(dtype, layout, causal):
    x, weight = random_map(6, 4, 5, 2, dtype=dtype, layout=layout), random_normal((7, 4, 3, 1), 1).to(dtype)
    result = temporal_conv(x, weight, num_frames=3, causal=causal)
    assert result.is_contiguous(memory_format=torch.channels_last) and result.dtype == dtype


def test_a_weight_in_any_memory_format_gives_the_same():
    x, weight = random_map(6, 4, 5, 2), random_normal((7, 4, 3, 1), 1).float()
    expected = temporal_conv(x, weight, num_frames=3)
    for other in (weight.to(memory_format=torch.channels_last), weight.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(temporal_conv(x, other, num_frames=3), expected)


def test_a_channels_last_input_is_not_copied(monkeypatch):
    x, weight = random_map(6, 4, 5, 2), torch.randn(4, 4, 3, 1)
    seen, conv2d = [], F.conv2d

    def spy(clips, *args, **kwargs):
        seen.append(clips)
        return conv2d(clips, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", spy)
    temporal_conv(x, weight, num_frames=3)
    assert seen[0].data_ptr() == x.data_ptr() and seen[0].is_contiguous(memory_format=torch.channels_last)


def test_causal_frames_do_not_see_the_future():
    x, weight = random_map(6, 4, 2, 2), random_normal((4, 4, 3, 1), 1).float()
    changed = x.clone(memory_format=torch.preserve_format)
    changed[2] += 1
    before, after = (temporal_conv(maps, weight, num_frames=6, causal=True) for maps in (x, changed))
    differs = (before != after).flatten(1).any(1)
    assert differs.tolist() == [False, False, True, True, True, False]


def test_empty_batch():
    result = temporal_conv(torch.empty(0, 4, 3, 3), torch.randn(5, 4, 3, 1), torch.randn(5), num_frames=3)
    assert result.shape == (0, 5, 3, 3)
