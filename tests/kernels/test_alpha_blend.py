"""Both forms of the blend against the formula in float64, and what must hold bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.kernels.alpha_blend import alpha_blend, alpha_residual, reference
from temporal_layers.kernels.testing import (
    assert_within_budget,
    in_nan_surroundings,
    random_map,
    random_normal,
    random_tokens,
    with_gradients,
)

BOTH = pytest.mark.parametrize("op", [alpha_blend, alpha_residual])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMATS = ["contiguous", "channels_last", "strided"]


@pytest.fixture(params=[1 << 18, 8], ids=["whole", "blocks"])
def block(request, monkeypatch):
    """Runs a test with whole tensors, and with blocks that cut rows and lines unevenly."""
    for name in ("BLOCK_ELEMENTS", "SUM_ELEMENTS"):
        monkeypatch.setattr(reference, name, request.param)


def formula(op, first, second, alpha, num_frames, channel_dim):
    """The operator's definition, in the dtype of alpha, with alpha repeated by hand."""
    if alpha.dim() == 2:
        rows = [alpha[row % num_frames if alpha.shape[0] > 1 else 0] for row in range(first.shape[0])]
        shape = [1] * first.dim()
        shape[channel_dim] = alpha.shape[1]
        alpha = torch.stack([row.reshape(shape[1:]) for row in rows])
    first, second = first.to(alpha.dtype), second.to(alpha.dtype)
    return alpha * first + (1 - alpha) * second if op is alpha_blend else first + (1 - alpha) * second


def check(op, first, second, alpha, num_frames, channel_dim):
    """Result and every gradient within budget of float64; the yardstick is the formula in fp32, rounded."""
    dtype = first.dtype
    kwargs = {"num_frames": num_frames, "channel_dim": channel_dim}
    actual = with_gradients(lambda *x: op(*x, **kwargs), first, second, alpha, dtype=dtype)
    expected = with_gradients(
        lambda *x: formula(op, *x, num_frames, channel_dim),
        first.double(),
        second.double(),
        alpha.double(),
        dtype=dtype,
    )
    plain = with_gradients(
        lambda *x: formula(op, *x, num_frames, channel_dim).to(dtype), first, second, alpha, dtype=dtype
    )
    if dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        return
    for what, *tensors in zip(("result", "first", "second"), actual[:3], expected[:3], plain[:3], strict=True):
        assert_within_budget(*tensors, what=what)
    # The gradient of alpha sums terms of either sign.
    terms = (first.double() - second.double() if op is alpha_blend else second.double()).abs()
    upstream = random_normal(tuple(first.shape), 99).to(dtype).double().abs()
    leaf = alpha.double().requires_grad_()
    magnitude = torch.autograd.grad(
        formula(alpha_blend, terms, torch.zeros_like(terms), leaf, num_frames, channel_dim), leaf, upstream
    )
    assert_within_budget(actual[3], expected[3], plain[3], magnitude=magnitude[0], what="alpha")


@BOTH
@given(
    batch=st.integers(1, 2),
    num_frames=st.integers(1, 5),
    channels=st.integers(1, 6),
    size=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    per=st.tuples(st.booleans(), st.booleans()) | st.none(),
    layouts=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)),
    dtype=st.sampled_from(DTYPES),
    block_elements=st.sampled_from([4, 64, 1 << 18]),
)
def test_maps_match_the_formula(op, batch, num_frames, channels, size, per, layouts, dtype, block_elements):
    first, second = (
        random_map(batch * num_frames, channels, *size, dtype=dtype, layout=layout, seed=seed)
        for seed, layout in enumerate(layouts)
    )
    shape = () if per is None else (num_frames if per[0] else 1, channels if per[1] else 1)
    alpha = random_normal(shape, 2).sigmoid().to(torch.float64 if dtype == torch.float64 else torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BLOCK_ELEMENTS", "SUM_ELEMENTS"):
            patch.setattr(reference, name, block_elements)
        check(op, first, second, alpha, num_frames, 1)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("shape", [(), (3, 1), (1, 5), (3, 5)])
def test_tokens_match_the_formula(op, dtype, layout, shape, block):
    first, second = (random_tokens(6, 7, 5, dtype=dtype, layout=layout, seed=seed) for seed in (0, 1))
    alpha = random_normal(shape, 2).sigmoid().to(torch.float64 if dtype == torch.float64 else torch.float32)
    check(op, first, second, alpha, 3, -1)


@BOTH
def test_the_gradient_of_the_gradient(op, block):
    first, second = (random_map(4, 3, 2, 2, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    alpha = random_normal((2, 3), 2).requires_grad_()
    args = (lambda *x: op(*x, num_frames=2), (first, second, alpha))
    assert torch.autograd.gradcheck(*args) and torch.autograd.gradgradcheck(*args)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (2, 1), (1, 3), (2, 3)])
def test_alpha_one_is_the_image_model_bit_for_bit(op, dtype, shape, block):
    first, second = (random_map(4, 3, 5, 2, dtype=dtype, seed=seed) for seed in (0, 1))
    assert torch.equal(op(first, 100 * second, torch.ones(shape), num_frames=2), first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.37, 0.5, 0.999, 1.0])
def test_equal_branches_and_zero_updates_change_nothing(dtype, alpha, block):
    x = random_map(4, 3, 5, 2, dtype=dtype)
    assert torch.equal(alpha_blend(x, x.clone(), torch.tensor(alpha)), x)
    assert torch.equal(alpha_residual(x, torch.zeros_like(x), torch.tensor(alpha)), x)


def test_alpha_keeps_its_precision_in_bf16():
    spatial, temporal = torch.zeros(1, 1, 1, 1).bfloat16(), torch.full((1, 1, 1, 1), 1024.0).bfloat16()
    assert torch.tensor(0.999).bfloat16() == 1
    expected = torch.tensor(1024 * 0.001).bfloat16()
    assert alpha_blend(spatial, temporal, torch.tensor(0.999)).item() == expected
    assert alpha_residual(spatial, temporal, torch.tensor(0.999)).item() == expected


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("flat", [True, False])
def test_image_only_rows_ignore_the_temporal_branch(op, dtype, poison, flat, block):
    first, second = (random_map(6, 3, 5, 2, dtype=dtype, seed=seed) for seed in (0, 1))
    image_only = torch.tensor([[True, False, True], [False, False, True]])
    rows = image_only.flatten()
    alpha = torch.tensor([[0.2], [0.3], [0.4]])
    poisoned = second.clone(memory_format=torch.preserve_format)
    poisoned[rows] = poison

    leaves = [x.detach().requires_grad_() for x in (first, poisoned, alpha)]
    result = op(*leaves, num_frames=3, image_only=rows if flat else image_only)
    assert torch.equal(result[rows], first[rows])
    assert torch.equal(result[~rows], op(first, second, alpha, num_frames=3)[~rows])

    upstream = random_normal(tuple(result.shape), 5).to(dtype)
    to_first, to_second, to_alpha = torch.autograd.grad(result, leaves, upstream)
    assert torch.equal(to_first[rows], upstream[rows])
    assert to_second[rows].count_nonzero() == 0
    assert to_second[~rows].count_nonzero() == to_second[~rows].numel()
    leaf = alpha.clone().requires_grad_()
    masked = upstream.masked_fill(rows[:, None, None, None], 0)
    (expected_to_alpha,) = torch.autograd.grad(op(first, second, leaf, num_frames=3), leaf, masked)
    torch.testing.assert_close(to_alpha, expected_to_alpha)
    assert to_alpha[2] == 0


def test_folded_form_is_the_blend_of_the_sum():
    hidden, update = (random_map(4, 3, 5, 2, dtype=torch.float64, seed=seed) for seed in (0, 1))
    alpha = random_normal((2, 3), 2).sigmoid()
    torch.testing.assert_close(
        alpha_residual(hidden, update, alpha, num_frames=2),
        alpha_blend(hidden, hidden + update, alpha, num_frames=2),
        rtol=1e-14, atol=1e-14,
    )  # fmt: skip


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_result_keeps_the_memory_format(op, dtype, layout, block):
    first = random_map(4, 3, 5, 2, dtype=dtype, layout=layout)
    second = random_map(4, 3, 5, 2, dtype=dtype, layout="contiguous", seed=1)
    assert op(first, second, torch.tensor(0.3)).stride() == first.stride()


@BOTH
def test_branches_are_kept_for_the_backward_pass_only_to_train_alpha(op):
    first, second = (random_map(2, 3, 4, 4, dtype=torch.bfloat16, seed=seed).requires_grad_() for seed in (0, 1))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        op(first, second, torch.tensor(0.3))
        assert max(saved) == 1
        op(first, second, torch.tensor(0.3, requires_grad=True))
    assert max(saved) == first.numel()


@BOTH
def test_inputs_are_not_written(op, block):
    first, second = (in_nan_surroundings(random_map(4, 3, 5, 2, seed=seed)) for seed in (0, 1))
    alpha = torch.tensor(0.3)
    copies = [x.clone() for x in (first, second, alpha)]
    with_gradients(op, first, second, alpha, dtype=torch.float32)
    assert all(map(torch.equal, (first, second, alpha), copies))


@BOTH
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty_maps(op, shape):
    first, second = torch.randn(shape), torch.randn(shape)
    result, _, _, to_alpha = with_gradients(op, first, second, torch.tensor(0.3), dtype=torch.float32)
    assert result.shape == shape and to_alpha == 0


# The fused kernels. They run on a GPU or interpreted; elsewhere the fixture ``device`` skips these tests.

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FUSED = {  # dtype, shape of alpha for 3 frames and 12 channels, layouts of the branches, frames that are images
    "scalar-bf16": (BF16, (), ("channels_last", "channels_last"), False),
    "scalar-fp32-mixed": (FP32, (), ("contiguous", "channels_last"), False),
    "scalar-fp16-images": (FP16, (), ("channels_last", "contiguous"), True),
    "frames-bf16-images": (BF16, (3, 1), ("contiguous", "contiguous"), True),
    "frames-fp32": (FP32, (3, 1), ("channels_last", "strided"), False),
    "channels-bf16": (BF16, (1, 12), ("strided", "contiguous"), False),
    "both-fp16": (FP16, (3, 12), ("channels_last", "channels_last"), False),
    "both-fp32-images": (FP32, (3, 12), ("strided", "strided"), True),
}
IMAGES = torch.tensor([[True, False, True], [False, False, False]])


def fused_inputs(dtype, shape, layouts, device):
    """Two branches of two clips of three frames, and alpha."""
    maps = (
        random_map(6, 12, 5, 7, dtype=dtype, layout=layout, seed=seed, device=device)
        for seed, layout in enumerate(layouts)
    )
    return [*maps, random_normal(shape, 2).sigmoid().float().to(device)]


def fused_formula(op, image_only):
    """The definition with the choice of image frames written out; computes in the dtype of alpha."""

    def call(first, second, alpha):
        out = formula(op, first, second, alpha, 3, 1)
        if image_only is not None:
            out = torch.where(image_only.reshape(-1, 1, 1, 1), first.to(out.dtype), out)
        return out.to(first.dtype)

    return call


@BOTH
@pytest.mark.parametrize("case", FUSED)
def test_fused_matches_the_formula(op, case, device):
    dtype, shape, layouts, images = FUSED[case]
    image_only = IMAGES.to(device) if images else None
    inputs = fused_inputs(dtype, shape, layouts, device)
    actual = with_gradients(lambda *x: op(*x, num_frames=3, image_only=image_only, impl="fused"), *inputs, dtype=dtype)
    oracle, plain = (
        with_gradients(fused_formula(op, image_only), *tensors, dtype=dtype)
        for tensors in ([x.double() for x in inputs], inputs)
    )
    for what, *tensors in zip(("result", "first", "second"), actual[:3], oracle[:3], plain[:3], strict=True):
        assert_within_budget(*tensors, what=what)
    # The gradient of alpha sums terms of either sign; the yardstick is the sum of their absolute values.
    leaf = inputs[2].double().requires_grad_()
    first, second = (x.double() for x in inputs[:2])
    terms = (first - second if op is alpha_blend else second).abs()
    upstream = random_normal(tuple(first.shape), 99).to(dtype).double().abs().to(device)
    out = fused_formula(alpha_blend, image_only)(terms, torch.zeros_like(terms), leaf)
    [magnitude] = torch.autograd.grad(out, leaf, upstream)
    assert_within_budget(actual[3], oracle[3], plain[3], magnitude=magnitude, what="alpha")
    expected = op(*inputs, num_frames=3, image_only=image_only, impl="reference")
    assert actual[0].stride() == expected.stride()


@BOTH
@pytest.mark.parametrize("shape", [(), (1, 6)])
def test_fused_takes_tokens(op, shape, device):
    first, second = (random_tokens(4, 5, 6, layout="strided", seed=seed, device=device) for seed in (0, 1))
    alpha = random_normal(shape, 2).sigmoid().float().to(device)
    actual, expected = (
        with_gradients(lambda *x, impl=impl: op(*x, channel_dim=-1, impl=impl), first, second, alpha, dtype=FP32)
        for impl in ("fused", "reference")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@BOTH
def test_fused_gradients_in_fp64(op, device):
    inputs = [x.double().requires_grad_() for x in fused_inputs(FP32, (3, 12), ("contiguous", "channels_last"), device)]
    assert torch.autograd.gradcheck(
        lambda *x: op(*x, num_frames=3, image_only=IMAGES.to(device), impl="fused"), inputs, fast_mode=True
    )


@BOTH
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_fused_is_the_image_model_bit_for_bit(op, dtype, device):
    first, second, _ = fused_inputs(dtype, (), ("channels_last", "channels_last"), device)
    assert torch.equal(op(first, 100 * second, torch.ones((), device=device), impl="fused"), first)
    same = first.clone(memory_format=torch.preserve_format) if op is alpha_blend else torch.zeros_like(first)
    assert torch.equal(op(first, same, torch.tensor(0.37, device=device), impl="fused"), first)
    rows = IMAGES.flatten().to(device)
    second[rows] = torch.nan
    leaves = [x.requires_grad_() for x in (first, second, torch.tensor(0.3, device=device))]
    result = op(*leaves, image_only=rows, impl="fused")
    assert torch.equal(result[rows], first[rows]) and not result.isnan().any()
    to_first, to_second, to_alpha = torch.autograd.grad(result, leaves, torch.ones_like(result))
    assert torch.equal(to_first[rows], torch.ones_like(to_first[rows]))
    assert to_second[rows].count_nonzero() == 0 and to_alpha.isfinite()


@BOTH
@pytest.mark.parametrize("channels_last", [False, True])
def test_fused_writes_the_whole_result_and_nothing_else(op, channels_last, device, among_nan, monkeypatch):
    from temporal_layers.kernels.alpha_blend import fused

    first, second, alpha = fused_inputs(FP32, (3, 12), ("channels_last", "contiguous"), device)
    first, second = (x.flatten(2).unsqueeze(-1) for x in (first, second))
    monkeypatch.setattr(fused, "empty_map", among_nan.empty_map)
    fused.forward(first, second, alpha, 3, None, op is alpha_residual, channels_last)
    fused.branch_gradients(first, alpha, 3, None, True, True, channels_last)
    assert len(among_nan.rooms) == 3
    for room, window in among_nan.rooms:
        assert room.isnan().sum() == room.numel() - window.numel() and window.isfinite().all()


@BOTH
def test_fused_repeats_bit_for_bit(op, device):
    inputs = fused_inputs(FP32, (3, 12), ("channels_last", "channels_last"), device)
    first, second = (
        with_gradients(lambda *x: op(*x, num_frames=3, impl="fused"), *inputs, dtype=FP32) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@BOTH
def test_fused_reaches_beyond_two_to_the_31(op, device):
    # Only the touched pages of this memory exist. The last frame begins at element 3 * 2**30.
    room = torch.empty(3 * 2**30 + 64, dtype=FP16, device=device)
    far = room.as_strided((4, 4, 2, 4), (2**30, 8, 4, 1)).copy_(random_map(4, 4, 2, 4, dtype=FP16))
    near, alpha = far.clone(), random_normal((2, 1), 2).sigmoid().float().to(device)
    results = [
        with_gradients(lambda *x: op(*x, num_frames=2, impl="fused"), *branches, alpha, dtype=FP16)
        for branches in ((far, far.flip(0)), (near, far.flip(0)), (near.flip(0), far), (near.flip(0), near))
    ]
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[2], results[3]))


@BOTH
@pytest.mark.parametrize("trained", [True, False])
def test_fused_is_an_operator_of_pytorch(op, trained, device):
    from temporal_layers.kernels.alpha_blend.fused import alpha_blend as operator

    first, second = (random_map(2, 3, 4, 1, seed=seed, device=device).requires_grad_() for seed in (0, 1))
    alpha = torch.full((2, 1), 0.3, device=device, requires_grad=trained)
    flags = None if trained else torch.tensor([True, False], device=device)
    torch.library.opcheck(operator, (first, second, alpha, 2, flags, op is alpha_residual, True))


@BOTH
def test_fused_in_programs(op, device):
    first, second, alpha = fused_inputs(FP32, (3, 1), ("channels_last", "contiguous"), device)

    class Blend(torch.nn.Module):
        def forward(self, first, second, alpha):
            return op(first, second, alpha, num_frames=3, impl="fused")

    module = Blend()
    expected = with_gradients(module, first, second, alpha, dtype=FP32)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(with_gradients(compiled, first, second, alpha, dtype=FP32), expected)
    program = torch.export.export(module, (first, second, alpha))
    torch.testing.assert_close(program.module()(first, second, alpha), expected[0])
    mapped = torch.func.vmap(module, in_dims=(None, None, 0))(first, second, torch.stack([alpha, 1 - alpha]))
    torch.testing.assert_close(mapped[0], expected[0])
    torch.testing.assert_close(mapped[1], module(first, second, 1 - alpha))


@BOTH
def test_fused_saves_branches_only_to_train_alpha(op, device):
    inputs = fused_inputs(BF16, (), ("channels_last", "channels_last"), device)
    first, second = (x.requires_grad_() for x in inputs[:2])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        op(first, second, inputs[2], impl="fused")
        assert max(saved) == 1
        op(first, second, inputs[2].requires_grad_(), impl="fused")
    assert saved.count(first.numel()) == (2 if op is alpha_blend else 1)


@BOTH
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_fused_empty_maps(op, shape, device):
    first, second = torch.randn(shape, device=device), torch.randn(shape, device=device)
    alpha = torch.tensor(0.3, device=device)
    result, to_first, _, to_alpha = with_gradients(lambda *x: op(*x, impl="fused"), first, second, alpha, dtype=FP32)
    assert result.shape == to_first.shape == shape and to_alpha == 0
