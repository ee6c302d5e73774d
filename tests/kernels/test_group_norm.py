"""Group norm of folded frames against its definition in float64, and against PyTorch's on the 5-D map."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.kernels.group_norm import group_norm
from temporal_layers.kernels.testing import assert_within_budget, random_map, random_normal, with_gradients

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMATS = ["contiguous", "channels_last", "strided"]


def definition(x, weight, bias, num_groups, num_frames, eps, activation):
    """Normalises every clip and group by itself, with the moments written out."""
    clips = []
    for clip in x.split(num_frames):
        groups = []
        for group in clip.chunk(num_groups, dim=1):
            mean = group.sum() / group.numel()
            variance = ((group - mean) ** 2).sum() / group.numel()
            groups.append((group - mean) / (variance + eps).sqrt())
        clips.append(torch.cat(groups, dim=1))
    y = torch.cat(clips)
    if weight is not None:
        y = y * weight[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    return y / (1 + torch.exp(-y)) if activation == "silu" else y


def on_5d(x, weight, bias, num_groups, num_frames, eps, activation):
    """PyTorch's own group norm of the clips ``(batch, channels, frames, height, width)``."""
    clips = x.unflatten(0, (-1, num_frames)).transpose(1, 2)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    y = F.group_norm(clips, num_groups, weight, bias, eps).transpose(1, 2).flatten(0, 1)
    return F.silu(y) if activation == "silu" else y


@given(
    batch=st.integers(1, 2),
    num_frames=st.integers(1, 5),
    groups=st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 2)]),
    size=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    affine=st.tuples(st.booleans(), st.booleans()),
    activation=st.sampled_from([None, "silu"]),
    eps=st.sampled_from([1e-6, 1e-5, 1e-1]),
    layout=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
)
def test_matches_the_definition(batch, num_frames, groups, size, affine, activation, eps, layout, dtype):
    num_groups, channels = groups[0], groups[0] * groups[1]
    if num_frames * groups[1] * size[0] * size[1] < 4:  # statistics of so few values amplify every rounding
        size = (2, 2)
    x = 2 * random_map(batch * num_frames, channels, *size, dtype=dtype, layout=layout) + 0.5
    weight, bias = (random_normal((channels,), 1 + i).to(dtype) if use else None for i, use in enumerate(affine))
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]

    def run(function, tensors):
        def call(x, *affine_tensors):
            parameters = iter(affine_tensors)
            weight, bias = (next(parameters) if use else None for use in affine)
            return function(x, weight, bias, num_groups, num_frames, eps, activation)

        return with_gradients(call, *tensors, dtype=dtype)

    def ours(x, weight, bias, num_groups, num_frames, eps, activation):
        return group_norm(x, num_groups, weight, bias, num_frames=num_frames, eps=eps, activation=activation)

    actual, expected = run(ours, inputs), run(definition, [tensor.double() for tensor in inputs])
    if dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        return
    for tensors in zip(actual, expected, run(on_5d, inputs), strict=True):
        assert_within_budget(*tensors)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("num_frames", [1, 2, 4])
def test_gradients(layout, num_frames):
    x = random_map(4, 4, 2, 3, dtype=torch.float64, layout=layout).requires_grad_()
    weight, bias = (random_normal((4,), seed).requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(
        lambda *tensors: group_norm(tensors[0], 2, *tensors[1:], num_frames=num_frames, activation="silu"),
        (x, weight, bias),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("num_frames", [1, 3])
def test_memory_format_of_the_result(dtype, layout, num_frames):
    x = random_map(6, 4, 5, 2, dtype=dtype, layout=layout)
    result = group_norm(x, 2, num_frames=num_frames, activation="silu")
    kept = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert result.is_contiguous(memory_format=kept) and result.dtype == dtype


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("train", [True, False])
def test_input_is_not_written(layout, train):
    x = random_map(4, 4, 5, 2, layout=layout)
    copy = x.clone()
    with torch.set_grad_enabled(train):
        group_norm(x, 2, num_frames=2, activation="silu")
    assert torch.equal(x, copy)


def test_frames_share_statistics_within_their_clip_only():
    x = random_map(6, 4, 3, 3)
    shifted = x.clone(memory_format=torch.preserve_format)
    shifted[5] += 3
    joint, moved = (group_norm(maps, 2, num_frames=3) for maps in (x, shifted))
    assert torch.equal(joint[:3], moved[:3]) and not torch.allclose(joint[3:5], moved[3:5])
    single, moved = (group_norm(maps, 2) for maps in (x, shifted))
    assert torch.equal(single[:5], moved[:5])


def test_empty_batch():
    assert group_norm(torch.empty(0, 4, 3, 3), 2, num_frames=3, activation="silu").shape == (0, 4, 3, 3)
