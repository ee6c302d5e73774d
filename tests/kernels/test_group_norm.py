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
@pytest.mark.parametrize("wanted", [torch.channels_last, torch.contiguous_format])
def test_memory_format_as_asked(layout, wanted):
    x = random_map(6, 4, 5, 2, layout=layout)
    result = group_norm(x, 2, num_frames=3, memory_format=wanted)
    assert result.is_contiguous(memory_format=wanted)
    assert torch.equal(result, group_norm(x, 2, num_frames=3))


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


# The fused kernels. They run on a GPU or interpreted; elsewhere the fixture ``device`` skips these tests.

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FUSED = {  # batch, frames, channels, groups, height, width; statistics over the clip?; layout; dtype; affine; SiLU
    "clip-bf16": ((2, 3, 48, 32 // 2, 5, 7), True, "channels_last", BF16, (True, True), True),
    "clip-fp16": ((1, 2, 320, 32, 3, 5), True, "channels_last", FP16, (True, True), True),
    "clip-fp32-nchw": ((2, 3, 12, 4, 5, 7), True, "contiguous", FP32, (True, True), True),
    "clip-fp32-strided": ((2, 2, 12, 12, 3, 5), True, "strided", FP32, (True, True), False),
    "frames-bf16-nchw": ((2, 2, 48, 1, 4, 4), False, "contiguous", BF16, (True, True), True),
    "frames-fp32": ((1, 3, 12, 3, 6, 9), False, "channels_last", FP32, (True, True), True),
    "plain-fp32": ((1, 2, 6, 3, 5, 5), True, "channels_last", FP32, (False, False), False),
    "weight-alone-bf16": ((1, 2, 6, 3, 5, 5), True, "channels_last", BF16, (True, False), True),
    "bias-alone-fp32": ((1, 2, 6, 3, 5, 5), True, "contiguous", FP32, (False, True), True),
    "one-pixel-fp32": ((2, 4, 16, 2, 1, 1), True, "contiguous", FP32, (True, True), True),
    "many-chunks-fp32": ((1, 2, 4, 2, 70, 61), True, "channels_last", FP32, (True, True), True),
}


def fused_inputs(shape, layout, dtype, affine, device):
    """Input and parameters of a case of ``FUSED``, with a mean that is not zero."""
    batch, frames, channels, _, height, width = shape
    x = random_map(batch * frames, channels, height, width, dtype=dtype, layout=layout, device=device)
    x.mul_(2).add_(0.5)  # in place, so that the strides stay
    parameters = [random_normal((channels,), 1 + i).to(device, dtype) for i, use in enumerate(affine) if use]
    return [x, *parameters]


def fused_call(function, affine, *arguments):
    """``function(x, weight, bias, *arguments)`` as a function of the tensors that there are."""

    def call(x, *parameters):
        given = iter(parameters)
        return function(x, *(next(given) if use else None for use in affine), *arguments)

    return call


def fused(x, weight, bias, num_groups, num_frames, eps, activation):
    return group_norm(
        x, num_groups, weight, bias, num_frames=num_frames, eps=eps, activation=activation, impl="fused"
    )  # fmt: skip


@pytest.mark.parametrize("case", FUSED)
def test_fused_matches_the_definition(case, device):
    shape, over_clip, layout, dtype, affine, silu = FUSED[case]
    inputs = fused_inputs(shape, layout, dtype, affine, device)
    arguments = (affine, shape[3], shape[1] if over_clip else 1, 1e-5, "silu" if silu else None)
    actual, expected, plain = (
        with_gradients(fused_call(function, *arguments), *tensors, dtype=dtype)
        for function, tensors in ((fused, inputs), (definition, [x.double() for x in inputs]), (on_5d, inputs))
    )
    for what, *tensors in zip(("result", "x", "weight", "bias"), actual, expected, plain, strict=False):
        assert_within_budget(*tensors, what=what)
    kept = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert actual[0].is_contiguous(memory_format=kept) and actual[1].is_contiguous(memory_format=kept)


def test_fused_gradients_in_fp64(device):
    x = random_map(2, 4, 2, 2, dtype=torch.float64, device=device).requires_grad_()
    weight, bias = (random_normal((4,), seed).to(device).requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(
        lambda *tensors: group_norm(tensors[0], 2, *tensors[1:], num_frames=2, activation="silu", impl="fused"),
        (x, weight, bias), fast_mode=True,
    )  # fmt: skip


@pytest.mark.parametrize("offset", [1e3, -3e4])
def test_fused_survives_a_mean_far_from_zero(offset, device):
    # Squares of these values leave fp32 no digit for the variance. The first pixel of a chunk is an outlier as well.
    x = random_map(4, 8, 9, 10, device=device) + offset
    x[:, :, 0, 0] += 50
    expected = definition(x.double(), None, None, 2, 2, 1e-5, None)
    actual = group_norm(x, 2, num_frames=2, impl="fused")
    assert_within_budget(actual, expected, on_5d(x.contiguous(), None, None, 2, 2, 1e-5, None))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fused_writes_the_whole_result_and_nothing_else(layout, channels_last, device, among_nan, monkeypatch):
    from temporal_layers.kernels.group_norm import fused as launchers

    x, grad = (random_map(4, 12, 5, 7, layout=layout, seed=seed, device=device) for seed in (0, 1))
    _, mean, rstd = plain = launchers.forward(x, 3, None, None, 2, 1e-5, True, channels_last)
    plain = plain[0], launchers.backward(grad, x, mean, rstd, None, None, 2, True, True)[0]
    monkeypatch.setattr(launchers.walks, "empty_map", among_nan.empty_map)
    y, *_ = launchers.forward(x, 3, None, None, 2, 1e-5, True, channels_last)
    to_x, *_ = launchers.backward(grad, x, mean, rstd, None, None, 2, True, True)
    assert torch.equal(y, plain[0]) and torch.equal(to_x, plain[1])
    for room, window in among_nan.rooms:
        assert room.isnan().sum() == room.numel() - window.numel()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("wanted", [torch.channels_last, torch.contiguous_format])
def test_fused_changes_the_memory_format(layout, wanted, device):
    x, weight = fused_inputs((1, 2, 70, 7, 5, 7), layout, BF16, (True, False), device)
    results = [
        with_gradients(
            lambda x, weight, form=form: group_norm(
                x, 7, weight, num_frames=2, activation="silu", memory_format=form, impl="fused"
            ),
            x, weight, dtype=BF16,
        )
        for form in (wanted, torch.preserve_format)
    ]  # fmt: skip
    assert results[0][0].is_contiguous(memory_format=wanted)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, check_stride=False)


def test_fused_repeats_bit_for_bit(device):
    inputs = fused_inputs((2, 2, 12, 4, 9, 11), "channels_last", FP32, (True, True), device)
    call = fused_call(fused, (True, True), 4, 2, 1e-5, "silu")
    first, second = (with_gradients(call, *inputs, dtype=FP32) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_fused_reaches_beyond_two_to_the_31(device):
    # Only the touched pages of this memory exist. The last frame begins at element 3 * 2**30.
    room = torch.empty(3 * 2**30 + 64, dtype=FP16, device=device)
    x = room.as_strided((4, 4, 2, 4), (2**30, 8, 4, 1)).copy_(random_map(4, 4, 2, 4, dtype=FP16))
    leaf, copy = (tensor.detach().requires_grad_() for tensor in (x, x.clone()))
    far, near = (group_norm(tensor, 2, num_frames=2, activation="silu", impl="fused") for tensor in (leaf, copy))
    assert torch.equal(far, near)
    gradients = [torch.autograd.grad(y, leaf, torch.ones_like(y)) for y, leaf in ((far, leaf), (near, copy))]
    assert torch.equal(gradients[0][0], gradients[1][0])


@pytest.mark.parametrize("needs_x", [True, False])
def test_fused_is_an_operator_of_pytorch(needs_x, device):
    from temporal_layers.kernels.group_norm.fused import group_norm as operator

    x, weight, bias = fused_inputs((2, 2, 6, 3, 2, 3), "channels_last", FP32, (True, True), device)
    inputs = (x.requires_grad_(needs_x), 3, weight.requires_grad_(), bias.requires_grad_(), 2, 1e-5, True, True)
    torch.library.opcheck(operator, inputs)


def test_fused_in_programs(device):
    x, weight, bias = fused_inputs((2, 2, 6, 3, 2, 3), "channels_last", FP32, (True, True), device)

    class Norm(torch.nn.Module):
        def forward(self, x, weight, bias):
            return group_norm(x, 3, weight, bias, num_frames=2, activation="silu", impl="fused")

    module = Norm()
    expected = with_gradients(module, x, weight, bias, dtype=FP32)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for got, want in zip(with_gradients(compiled, x, weight, bias, dtype=FP32), expected, strict=True):
        torch.testing.assert_close(got, want)
    program = torch.export.export(module, (x, weight, bias))
    torch.testing.assert_close(program.module()(x, weight, bias), expected[0])
    mapped = torch.func.vmap(module, in_dims=(None, 0, 0))(x, torch.stack([weight, bias]), torch.stack([bias, weight]))
    torch.testing.assert_close(mapped[0], expected[0])
    torch.testing.assert_close(mapped[1], module(x, bias, weight))


def test_fused_empty_batch(device):
    x, weight = torch.empty(0, 4, 3, 3, device=device), torch.ones(4, device=device)
    y, to_x, to_weight = with_gradients(
        lambda x, weight: group_norm(x, 2, weight, num_frames=3, impl="fused"), x, weight, dtype=FP32
    )
    assert y.shape == to_x.shape == (0, 4, 3, 3) and torch.equal(to_weight, torch.zeros_like(weight))
