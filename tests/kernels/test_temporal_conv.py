"""Convolution over frames against a sum over taps in float64, and against PyTorch's conv3d."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from temporal_layers.kernels.launch import is_interpreted, launch
from temporal_layers.kernels.layout import from_clips, to_clips
from temporal_layers.kernels.temporal_conv import products, spatial, temporal_conv
from temporal_layers.kernels.testing import (
    assert_within_budget,
    in_nan_surroundings,
    random_map,
    random_normal,
    with_gradients,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMATS = ["contiguous", "channels_last", "strided"]
KINDS = ["scalar", "frame", "channel"]  # of alpha


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
    weight = weight[..., None] if weight.dim() == 4 else weight
    sides = (0, *(size // 2 for size in weight.shape[3:]))
    return F.conv3d(clips, weight, bias, padding=sides).transpose(1, 2).flatten(0, 1)


def finished(convolve, x, weight, num_frames, causal, bias=None, temb=None, residual=None, alpha=None):
    """What stands around a convolution in a residual block that is blended with its input, step by step."""
    update = convolve(x, weight, bias, num_frames, causal)
    if temb is not None:
        rows = [temb[row if len(temb) == len(x) else row // num_frames] for row in range(len(x))]
        update = update + torch.stack(rows)[:, :, None, None]
    if residual is None:
        return update
    if alpha is None:
        return residual + update
    per_row = alpha.expand(num_frames, weight.shape[0]).repeat(len(x) // num_frames, 1)[:, :, None, None]
    return (per_row * residual + (1 - per_row) * (residual + update)).to(update.dtype)


def around(names, batch, num_frames, channels, size, dtype):
    """Tensors that stand around a convolution, by argument; ``names`` says which, as in ``temb:frame``."""
    shapes = {
        "bias": (channels,), "temb:frame": (batch * num_frames, channels), "temb:clip": (batch, channels),
        "alpha:scalar": (), "alpha:frame": (num_frames, 1), "alpha:channel": (1, channels),
    }  # fmt: skip
    found = {}
    for seed, name in enumerate(names):
        if name == "residual":
            found[name] = random_map(batch * num_frames, channels, *size, dtype=dtype, seed=7, layout="strided")
        elif name.startswith("alpha"):
            found["alpha"] = in_nan_surroundings(random_normal(shapes[name], seed).float().sigmoid())
        else:
            found[name.partition(":")[0]] = random_normal(shapes[name], seed).to(dtype)
    return found


@given(
    batch=st.integers(1, 2),
    num_frames=st.integers(1, 5),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    kernel=st.sampled_from([1, 3, 5]),
    causal=st.booleans(),
    beside=st.sampled_from([(), ("bias",), ("temb:clip",), ("bias", "temb:frame")]),
    blend=st.sampled_from(
        [(), ("residual",), *(("residual", f"alpha:{kind}") for kind in ("scalar", "frame", "channel"))]
    ),
    layout=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
)
def test_matches_the_sum_over_taps(
    batch, num_frames, channels, size, kernel, causal, beside, blend, layout, dtype
):  # fmt: skip
    extra = around(beside + blend, batch, num_frames, channels[1], size, dtype)
    inputs = [
        random_map(batch * num_frames, channels[0], *size, dtype=dtype, layout=layout),
        random_normal((channels[1], channels[0], kernel, 1), 1).to(dtype),
        *extra.values(),
    ]

    def ours(x, weight, *tensors):
        named = dict(zip(extra, tensors, strict=True))
        return temporal_conv(x, weight, num_frames=num_frames, causal=causal, **named)

    def plain(convolve):
        return lambda x, w, *rest: finished(convolve, x, w, num_frames, causal, **dict(zip(extra, rest, strict=True)))

    actual = with_gradients(ours, *inputs, dtype=dtype)
    expected = with_gradients(plain(taps), *(x.double() for x in inputs), dtype=dtype)
    if dtype == torch.float64:
        for got, want in zip(actual, expected, strict=True):  # alpha's gradient is rounded to alpha's fp32
            tolerance = 1e-12 if got.dtype == dtype else 1e-5
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
        return
    eager = with_gradients(plain(on_5d), *inputs, dtype=dtype)
    for name, *tensors in zip(["result", "x", "weight", *extra], actual, expected, eager, strict=True):
        magnitude = magnitude_of_alpha(tensors[1], inputs, extra, num_frames, causal) if name == "alpha" else None
        assert_within_budget(*tensors, magnitude=magnitude, what=name)


def magnitude_of_alpha(gradient, inputs, extra, num_frames, causal, convolve=taps):
    """What the rounding of alpha's gradient is relative to: random terms, rounded like the update."""
    beside = {name: value.double() for name, value in extra.items() if name in ("bias", "temb")}
    update = finished(convolve, *(x.double() for x in inputs[:2]), num_frames, causal, **beside)
    upstream = random_normal(tuple(update.shape), 99)  # that of with_gradients
    ratio = torch.finfo(inputs[0].dtype).eps / torch.finfo(torch.float32).eps
    return gradient.abs() + ratio * (update * upstream).norm() / gradient.numel() ** 0.5


@given(
    batch=st.integers(1, 2),
    num_frames=st.integers(1, 6),
    positions=st.integers(1, 5),
    kernel=st.sampled_from([1, 3, 5, 7]),
    causal=st.booleans(),
    has_bias=st.booleans(),
)
def test_products_of_taps_are_the_convolution(batch, num_frames, positions, kernel, causal, has_bias):
    x = random_map(batch * num_frames, 4, 1, positions, dtype=torch.float64)
    weight, bias = random_normal((3, 4, kernel, 1), 1), random_normal((3,), 2) if has_bias else None
    actual = from_clips(products.convolve(to_clips(x, num_frames), weight, bias, causal), 1, positions)
    torch.testing.assert_close(actual, taps(x, weight, bias, num_frames, causal), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_products_of_taps_are_what_the_operator_takes(monkeypatch, causal):
    """Within the budget of the dtype, as the library's convolution is."""
    x, weight = random_map(8, 256, 8, 16, dtype=torch.bfloat16), random_normal((256, 256, 3, 1), 1).bfloat16() / 28
    results = {}
    for there in (True, False):
        monkeypatch.setattr(products, "has_bf16_tiles", lambda there=there: there)
        assert products.is_faster(x, weight, 8) == there
        results[there] = temporal_conv(x, weight, num_frames=8, causal=causal)
    expected = on_5d(x.double(), weight.double(), None, 8, causal)
    assert not torch.equal(results[True], results[False])
    assert_within_budget(results[True], expected, on_5d(x, weight, None, 8, causal))


def test_where_products_of_taps_are_chosen(monkeypatch):
    monkeypatch.setattr(products, "has_bf16_tiles", lambda: True)
    x, weight = torch.empty(8, 256, 8, 16).bfloat16(), torch.empty(256, 256, 3, 1).bfloat16()
    assert products.is_faster(x, weight, 8) and products.is_faster(x, torch.empty(256, 256, 5, 1).bfloat16(), 4)
    assert not products.is_faster(x, weight, 1) and not products.is_faster(x, weight[:, :, :1], 8)
    assert not products.is_faster(x[:, :128], weight[:, :128], 8) and not products.is_faster(x[:, :, :7], weight, 8)
    assert not products.is_faster(x.float(), weight.float(), 8) and not products.is_faster(x.to("meta"), weight, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.is_faster(x, weight, 8)
    weight.requires_grad_()
    assert not products.is_faster(x, weight, 8)
    with torch.no_grad():
        assert products.is_faster(x, weight, 8)


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


# With an extent in space.


def volume(x, weight, bias, num_frames, causal):
    """Adds up one matrix product for each tap over frames, height and width."""
    reach, (up, left) = weight.shape[2] - 1, (size // 2 for size in weight.shape[3:])
    before, (height, width) = (reach if causal else reach // 2), x.shape[2:]
    padded = F.pad(x.unflatten(0, (-1, num_frames)), (left, left, up, up, 0, 0, before, reach - before))
    total = torch.zeros(len(x), len(weight), height, width, dtype=x.dtype)
    for t, i, j in itertools.product(*map(range, weight.shape[2:])):
        seen = padded[:, t : t + num_frames, :, i : i + height, j : j + width].flatten(0, 1)
        total = total + torch.einsum("oc,nchw->nohw", weight[:, :, t, i, j], seen)
    return total if bias is None else total + bias[:, None, None]


@pytest.fixture(params=["clips", "stacked frames"])
def library(request, monkeypatch):
    """The form of the library's convolution, of which a CPU takes both."""
    monkeypatch.setattr(spatial, "takes_stacked_frames", lambda clips: request.param == "stacked frames")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the form stays the same for all examples
@given(
    batch=st.integers(1, 2),
    num_frames=st.integers(1, 4),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.tuples(*[st.sampled_from([1, 3, 5])] * 3),
    causal=st.booleans(),
    beside=st.sampled_from([(), ("bias",), ("bias", "temb:clip"), ("temb:frame",)]),
    blend=st.sampled_from([(), ("residual",), *(("residual", f"alpha:{kind}") for kind in KINDS)]),
    layout=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
)
def test_with_space_matches_the_sum_over_taps(
    library, batch, num_frames, channels, size, kernel, causal, beside, blend, layout, dtype
):  # fmt: skip
    extra = around(beside + blend, batch, num_frames, channels[1], size, dtype)
    inputs = [
        random_map(batch * num_frames, channels[0], *size, dtype=dtype, layout=layout),
        random_normal((channels[1], channels[0], *kernel), 1).to(dtype),
        *extra.values(),
    ]

    def ours(x, weight, *rest):
        return temporal_conv(x, weight, num_frames=num_frames, causal=causal, **dict(zip(extra, rest, strict=True)))

    def plain(convolve):
        return lambda x, w, *rest: finished(convolve, x, w, num_frames, causal, **dict(zip(extra, rest, strict=True)))

    actual = with_gradients(ours, *inputs, dtype=dtype)
    assert actual[0].is_contiguous(memory_format=torch.channels_last) and actual[0].dtype == dtype
    expected = with_gradients(plain(volume), *(x.double() for x in inputs), dtype=dtype)
    if dtype == torch.float64:
        for got, want in zip(actual, expected, strict=True):
            tolerance = 1e-12 if got.dtype == dtype else 1e-5
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
        return
    eager = with_gradients(plain(on_5d), *inputs, dtype=dtype)
    for name, *tensors in zip(["result", "x", "weight", *extra], actual, expected, eager, strict=True):
        magnitude = None
        if name == "alpha":
            magnitude = magnitude_of_alpha(tensors[1], inputs, extra, num_frames, causal, volume)
        assert_within_budget(*tensors, magnitude=magnitude, what=name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 5, 12, 16])
def test_with_space_single_frames(library, dtype, causal, channels):
    # conv3d in bf16 of single frames with an odd number of channels, or 12, fills its result with what was in memory.
    x, weight = random_map(4, channels, 3, 5, dtype=dtype), random_normal((6, channels, 3, 3, 3), 1).to(dtype)
    options = {"bias": None, "num_frames": 1, "causal": causal}
    tensors = [
        with_gradients(partial(function, **options), x.to(wide), weight.to(wide), dtype=dtype)
        for function, wide in ((temporal_conv, dtype), (volume, torch.float64), (single_frames, dtype))
    ]
    for name, *results in zip(["result", "x", "weight"], *tensors, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(*results[:2], rtol=1e-12, atol=1e-12)
        else:
            assert_within_budget(*results, what=name)


def single_frames(x, weight, bias, num_frames, causal):
    """PyTorch's convolution of frames that see no others."""
    return F.conv2d(x, weight[:, :, -1 if causal else weight.shape[2] // 2], bias, padding="same")


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_with_space(library, causal):
    x = random_map(4, 2, 2, 3, dtype=torch.float64).requires_grad_()
    weight, bias = random_normal((3, 2, 3, 3, 1), 1).requires_grad_(), random_normal((3,), 2).requires_grad_()
    args = (lambda *tensors: temporal_conv(*tensors, num_frames=2, causal=causal), (x, weight, bias))
    assert torch.autograd.gradcheck(*args) and torch.autograd.gradgradcheck(*args)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_space_what_a_pixel_sees(library, causal, dtype):
    x, weight = random_map(6, 4, 5, 7, dtype=dtype), random_normal((4, 4, 3, 3, 5), 1).to(dtype)
    changed = x.clone(memory_format=torch.preserve_format)
    changed[3, :, 2, 3] += 8
    before, after = (temporal_conv(maps, weight, num_frames=6, causal=causal) for maps in (x, changed))
    seen = torch.zeros(6, 5, 7, dtype=torch.bool)
    seen[3 if causal else 2 : 6 if causal else 5, 1:4, 1:6] = True
    assert torch.equal((before != after).any(1), seen)


@given(shift=st.tuples(st.integers(-1, 1), st.integers(-2, 2), st.integers(-2, 2)), causal=st.booleans())
def test_with_space_a_shifted_clip_gives_a_shifted_result(shift, causal):
    # Inside a border of zeros as wide as the shift and the kernel together, nothing else changes.
    x = F.pad(random_map(3, 2, 3, 4, dtype=torch.float64), (4, 4, 4, 4, 0, 0, 3, 3))
    weight = random_normal((3, 2, 3, 5, 3), 1)
    first, second = (temporal_conv(clip, weight, num_frames=9, causal=causal) for clip in (x, x.roll(shift, (0, 2, 3))))
    torch.testing.assert_close(second, first.roll(shift, (0, 2, 3)), rtol=1e-12, atol=1e-12)


def test_a_weight_of_conv3d_without_an_extent_in_space_is_one_over_frames(monkeypatch):
    x, weight = random_map(6, 4, 5, 2), random_normal((7, 4, 3, 1, 1), 1).float()
    monkeypatch.delattr(spatial, "convolve")
    assert torch.equal(temporal_conv(x, weight, num_frames=3), temporal_conv(x, weight[..., 0], num_frames=3))


@pytest.mark.parametrize("frames", [3, 6])
def test_with_space_a_channels_last_input_is_not_copied(monkeypatch, frames):
    x, weight = random_map(6, 64, 60, 2).requires_grad_(), torch.randn(64, 64, 3, 3, 3)
    strides, conv3d = [], F.conv3d

    def spy(clips, *args, **kwargs):
        assert clips.data_ptr() == x.data_ptr()
        result = conv3d(clips, *args, **kwargs)
        strides.extend([clips.stride(), result.stride()])
        result.register_hook(lambda gradient: strides.append(gradient.stride()))
        return result

    monkeypatch.setattr(F, "conv3d", spy)
    temporal_conv(x, weight, num_frames=frames).backward(random_map(6, 64, 60, 2, seed=1))
    # By the strides, that between clips included, PyTorch tells which layout a tensor has.
    assert strides == [(frames * 7680, 1, 7680, 128, 64)] * 3


@pytest.mark.parametrize(
    ("clips", "expected"),
    [
        (torch.empty(1, 64, 4, 80, 1), True),
        (torch.empty(1, 64, 4, 81, 1), False),
        (torch.empty(2, 64, 4, 4, 4), False),
        (torch.empty(1, 64, 4, 4, 4, dtype=torch.bfloat16), False),
        (torch.empty(2, 64, 4, 4, 4, device="meta"), True),
    ],
)
def test_where_frames_are_stacked(clips, expected):
    assert spatial.takes_stacked_frames(clips) is expected


def test_with_space_an_empty_batch(library):
    x, weight, bias = torch.empty(0, 4, 3, 3), torch.randn(5, 4, 3, 3, 3), torch.randn(5)
    result, *gradients = with_gradients(
        lambda *tensors: temporal_conv(*tensors, num_frames=3), x, weight, bias, dtype=torch.float32
    )
    assert result.shape == (0, 5, 3, 3) and [float(x.abs().sum()) for x in gradients] == [0, 0, 0]


# The fused kernel. It runs on a GPU or interpreted; elsewhere the fixture ``device`` skips these tests.

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL = ("bias", "temb:frame", "residual", "alpha:scalar")
FUSED = {  # batch, frames, channels in and out, height, width; kernel; causal?; layout; dtype; what stands around
    "all-bf16": ((2, 3, 24, 40, 5, 3), 3, False, "channels_last", BF16, ALL),
    "all-fp16-causal": ((2, 3, 40, 24, 5, 3), 3, True, "channels_last", FP16, ALL),
    "kernel-5-bf16-causal": ((1, 4, 16, 16, 3, 3), 5, True, "contiguous", BF16, ("temb:clip", "residual")),
    "tiles-within-frames-fp16": ((1, 3, 16, 8, 8, 4), 3, False, "channels_last", FP16, ("bias", "temb:frame")),
    "kernel-1-fp32": ((1, 2, 12, 20, 5, 7), 1, False, "strided", FP32, ("bias",)),
    "odd-fp32": ((2, 3, 7, 5, 5, 3), 3, False, "strided", FP32, ("bias", "temb:clip", "residual", "alpha:channel")),
    "alpha-per-frame-fp32": ((1, 3, 8, 8, 2, 3), 3, False, "channels_last", FP32, ("residual", "alpha:frame")),
    "one-frame-bf16": ((2, 1, 8, 8, 3, 5), 3, False, "channels_last", BF16, ("residual", "alpha:channel")),
    "plain-fp32-kernel-5": ((1, 2, 8, 8, 3, 5), 5, False, "channels_last", FP32, ()),
}


@pytest.fixture(params=["pointers", "descriptors"])
def form(request, device, monkeypatch):
    """Chooses one of the two forms of the kernel; a GPU older than Hopper has only the first."""
    from temporal_layers.kernels.temporal_conv import fused

    chosen, takes = request.param, fused.takes_descriptors
    if chosen == "pointers":
        monkeypatch.setattr(fused, "takes_descriptors", lambda *_: False)
    elif is_interpreted():
        monkeypatch.setattr(fused, "takes_descriptors", lambda target, *rest: takes("sm_90", *rest))
    elif torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("needs tensor descriptors in hardware")
    return chosen


def launched(monkeypatch):
    """Names of the kernels that are launched from now on."""
    from temporal_layers.kernels.temporal_conv import fused

    names = []

    def spy(kernel, *arguments, **options):
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(fused, "launch", spy)
    return names


def fused_case(name, device):
    """Inputs of a case, the function under test and the formula on a convolution."""
    (batch, frames, channels, out, *size), kernel, causal, layout, dtype, beside = FUSED[name]
    extra = around(beside, batch, frames, out, size, dtype)
    weight = random_normal((out, channels, kernel, 1), 1).to(dtype)
    inputs = [random_map(batch * frames, channels, *size, dtype=dtype, layout=layout), weight, *extra.values()]

    def fused(x, weight, *rest):
        named = dict(zip(extra, rest, strict=True))
        return temporal_conv(x, weight, num_frames=frames, causal=causal, impl="fused", **named)

    def formula(convolve):
        return lambda x, w, *rest: finished(convolve, x, w, frames, causal, **dict(zip(extra, rest, strict=True)))

    return [x.to(device) for x in inputs], extra, fused, formula


@pytest.mark.parametrize("case", FUSED)
def test_fused_matches_the_sum_over_taps(case, form, device, monkeypatch):
    inputs, extra, fused, formula = fused_case(case, device)
    (_, frames, channels, out, *_), _, causal, _, dtype, _ = FUSED[case]
    names = launched(monkeypatch)
    actual = with_gradients(fused, *inputs, dtype=dtype)
    described = form == "descriptors" and dtype != FP32 and channels % 8 == out % 8 == 0
    assert set(names) == {"temporal_conv_descriptor_kernel" if described else "temporal_conv_kernel"}
    inputs = [x.cpu() for x in inputs]
    expected = with_gradients(formula(taps), *(x.double() for x in inputs), dtype=dtype)
    eager = with_gradients(formula(on_5d), *inputs, dtype=dtype)
    for name, *tensors in zip(["result", "x", "weight", *extra], actual, expected, eager, strict=True):
        magnitude = None
        if name == "alpha":
            magnitude = magnitude_of_alpha(tensors[1], inputs, extra, frames, causal)
        assert_within_budget(*tensors, magnitude=magnitude, what=name)
    assert actual[0].is_contiguous(memory_format=torch.channels_last) and actual[0].dtype == dtype


def test_fused_writes_the_whole_result_and_nothing_else(form, device, monkeypatch):
    from temporal_layers.kernels.temporal_conv import fused as launchers

    [x, weight, bias, temb, residual, alpha], *_ = fused_case("all-bf16", device)
    arguments = (x, weight, bias, temb, residual, alpha.reshape(1), 3, 1)
    plain, rooms = launchers.forward(*arguments), []

    def among_nan(x, channels, dtype):
        rooms.append(torch.full((x.shape[0] + 2, x.shape[1], channels), torch.nan, dtype=dtype, device=x.device))
        return rooms[-1][1:-1]

    monkeypatch.setattr(launchers, "empty_rows", among_nan)
    result = launchers.forward(*arguments)
    assert torch.equal(result, plain) and rooms[0].isnan().sum() == rooms[0].numel() - result.numel()


def test_fused_does_not_read_beside_its_input(form, device):
    # Descriptors and masks keep out the clip before and the clip behind, and what lies around all of them.
    room = torch.full((8, 5, 3, 16), torch.nan, dtype=BF16, device=device)
    x = room[2:-2].permute(0, 3, 1, 2).copy_(random_map(4, 16, 5, 3, dtype=BF16))
    weight = random_normal((8, 16, 5, 1), 1).to(device, BF16)
    result = temporal_conv(x, weight, num_frames=4, impl="fused")
    assert torch.equal(result, temporal_conv(x.clone(), weight, num_frames=4, impl="fused"))
    halves = [temporal_conv(half, weight, num_frames=2, impl="fused") for half in x.split(2)]
    assert torch.equal(torch.cat(halves), temporal_conv(x, weight, num_frames=2, impl="fused"))


@pytest.mark.skipif(not is_interpreted(), reason="all programs but the last are left out")
def test_fused_reaches_beyond_two_to_the_31(form, device, monkeypatch):
    from temporal_layers.kernels.temporal_conv import fused as launchers

    # Only the touched pages of this memory exist. The last tile of the last clip ends at element 3 * 2**30.
    rows, tile = 2**26, 32
    x = torch.empty(3, rows, 16, dtype=FP16)
    x[2, -2 * tile :] = random_normal((2 * tile, 16), 0)
    near, weight = x[2:, -2 * tile :].clone(), random_normal((3, 16, 16), 1).to(FP16)
    expected, out = torch.empty_like(near), torch.empty_like(x)
    launchers.launch_on_rows(near, weight, None, None, near, None, expected, 2, 1)
    last = lambda row_tiles, *_: (row_tiles * 0 + 2, (row_tiles - 1) * tile, row_tiles * 0)  # noqa: E731
    monkeypatch.setattr(launchers.kernels, "place", last)
    monkeypatch.setattr(launchers, "launch", lambda kernel, grid, *args, **kw: launch(kernel, (1,), *args, **kw))
    launchers.launch_on_rows(x, weight, None, None, x, None, out, rows // tile, 1)
    assert torch.equal(out[2, -tile:], expected[0, -tile:])


def test_fused_is_an_operator_of_pytorch(device):
    from temporal_layers.kernels.temporal_conv.fused import temporal_conv as operator

    extra = around(ALL, 2, 2, 3, (1, 2), FP32)
    x, weight = random_map(4, 2, 1, 2).to(device), random_normal((3, 2, 3, 1), 1).to(device, FP32)
    bias, temb, residual, alpha = (value.to(device) for value in extra.values())
    tensors = [x, weight, bias, temb, residual, alpha.reshape(1)]
    torch.library.opcheck(operator, (*(value.detach().requires_grad_() for value in tensors), 2, 1))
    torch.library.opcheck(operator, (x, weight.requires_grad_(), None, None, None, None, 2, 2))


def test_fused_in_programs(device):
    [x, weight, bias, temb, residual, alpha], *_ = fused_case("all-bf16", device)
    inputs = [x.float(), weight.float(), bias.float(), temb.float(), residual.float(), alpha]

    class Convolution(torch.nn.Module):
        def forward(self, x, weight, bias, temb, residual, alpha):
            named = {"temb": temb, "residual": residual, "alpha": alpha}
            return temporal_conv(x, weight, bias, num_frames=3, impl="fused", **named)

    module = Convolution()
    expected = with_gradients(module, *inputs, dtype=FP32)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for got, want in zip(with_gradients(compiled, *inputs, dtype=FP32), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    program = torch.export.export(module, tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), expected[0])
    biases = torch.stack([bias, -bias]).float()
    mapped = torch.func.vmap(module, in_dims=(None, None, 0, None, None, None))(*inputs[:2], biases, *inputs[3:])
    torch.testing.assert_close(mapped, torch.stack([module(*inputs[:2], each, *inputs[3:]) for each in biases]))


def test_fused_under_autocast_is_in_the_low_dtype(device):
    [x, weight, bias, temb, residual, alpha], *_ = fused_case("all-bf16", device)
    inputs = [x.float(), weight.float(), bias.float(), temb.float(), residual.float(), alpha]

    def call(impl):
        return lambda x, w, b, t, r, a: temporal_conv(x, w, b, num_frames=3, temb=t, residual=r, alpha=a, impl=impl)

    exact = with_gradients(call("fused"), *inputs, dtype=FP32)
    with torch.autocast(device.type, BF16):
        assert temporal_conv(*inputs[:2], num_frames=3, impl="fused").dtype == BF16
        results = [with_gradients(call(impl), *inputs, dtype=FP32) for impl in ("fused", "reference")]
    for got, other, want in zip(*results, exact, strict=True):
        assert got.dtype == other.dtype == FP32
        assert float((got - want).norm()) < 0.02 * float(want.norm())


def test_fused_empty_batch(device):
    x, weight = torch.empty(0, 4, 3, 3, device=device), torch.ones(5, 4, 3, 1, device=device)
    result, *gradients = with_gradients(
        lambda x, weight, bias: temporal_conv(x, weight, bias, num_frames=3, impl="fused"),
        x, weight, torch.ones(5, device=device), dtype=FP32,
    )  # fmt: skip
    assert result.shape == (0, 5, 3, 3) and [float(x.abs().sum()) for x in gradients] == [0, 0, 0]
