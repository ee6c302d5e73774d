"""The operators as part of a program: compiled as one graph, exported, on the meta device, under autocast."""

import pytest
import torch
from torch import nn

from temporal_layers.kernels.alpha_blend import alpha_blend, alpha_residual
from temporal_layers.kernels.geglu import geglu
from temporal_layers.kernels.group_norm import group_norm
from temporal_layers.kernels.linear import linear
from temporal_layers.kernels.temporal_attention import temporal_attention
from temporal_layers.kernels.temporal_conv import temporal_conv
from temporal_layers.kernels.testing import random_map, random_normal, random_tokens

CHANNELS = 4


class Op(nn.Module):
    """One operator with trained parameters, as a module: what torch.export takes."""

    def __init__(self, call, **shapes):
        super().__init__()
        self.call = call
        for index, (name, shape) in enumerate(shapes.items()):
            self.register_parameter(name, nn.Parameter(random_normal(shape, 10 + index).float()))

    def forward(self, x, num_frames):
        return self.call(self, x, num_frames)


def attend(module, x, num_frames, **options):
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    return temporal_attention(tokens, tokens, tokens, num_frames=num_frames, num_heads=2, **options)


def project(module, x, num_frames, **options):
    tokens = x.permute(0, 2, 3, 1)
    norm = {"norm_weight": module.norm_weight, "norm_eps": 1e-5}
    return linear(tokens, module.weight, **norm, residual=tokens.flip(0), num_frames=num_frames, **options)


def image_frames(x, num_frames):
    return torch.arange(x.shape[0], device=x.device) % num_frames == 0


OPS = {
    "alpha_blend": lambda: Op(
        lambda m, x, f: alpha_blend(x, x.flip(0), m.alpha, num_frames=f, image_only=image_frames(x, f)),
        alpha=(1, CHANNELS),
    ),
    "alpha_residual": lambda: Op(lambda m, x, f: alpha_residual(x, x.flip(0), m.alpha, num_frames=f), alpha=()),
    "geglu": lambda: Op(
        lambda m, x, f: geglu(x.permute(0, 2, 3, 1), m.weight, m.bias), weight=(6, CHANNELS), bias=(6,)
    ),
    "group_norm": lambda: Op(
        lambda m, x, f: group_norm(x, 2, m.weight, m.bias, num_frames=f, activation="silu"),
        weight=(CHANNELS,), bias=(CHANNELS,),
    ),
    "linear": lambda: Op(project, weight=(CHANNELS, CHANNELS), norm_weight=(CHANNELS,)),
    "linear_blend": lambda: Op(
        lambda m, x, f: project(m, x, f, bias=m.bias, alpha=m.alpha),
        weight=(CHANNELS, CHANNELS), norm_weight=(CHANNELS,), bias=(CHANNELS,), alpha=(1, CHANNELS),
    ),
    "temporal_attention": lambda: Op(attend),
    "temporal_attention_masked": lambda: Op(
        lambda m, x, f: attend(m, x, f, window=1, frame_mask=~image_frames(x, f).unflatten(0, (-1, f)))
    ),
    "temporal_attention_causal": lambda: Op(lambda m, x, f: attend(m, x, f, causal=True)),
    "temporal_conv": lambda: Op(
        lambda m, x, f: temporal_conv(x, m.weight, m.bias, num_frames=f), weight=(3, CHANNELS, 3, 1), bias=(3,)
    ),
    "temporal_conv_causal": lambda: Op(
        lambda m, x, f: temporal_conv(x, m.weight, num_frames=f, causal=True), weight=(3, CHANNELS, 3, 1)
    ),
    "temporal_conv_residual": lambda: Op(
        lambda m, x, f: temporal_conv(
            x, m.weight, num_frames=f, temb=x.mean((2, 3)), residual=x.flip(0), alpha=m.alpha
        ),
        weight=(CHANNELS, CHANNELS, 3, 1), alpha=(),
    ),
    "temporal_conv_spatial": lambda: Op(
        lambda m, x, f: temporal_conv(
            x, m.weight, m.bias, num_frames=f, residual=x.flip(0), alpha=m.alpha, causal=True
        ),
        weight=(CHANNELS, CHANNELS, 3, 3, 3), bias=(CHANNELS,), alpha=(),
    ),
}  # fmt: skip
every_op = pytest.mark.parametrize("name", OPS)


def gradients(function, module, x, num_frames):
    """Result and gradients of the input and the parameters."""
    x = x.detach().requires_grad_()
    result = function(x, num_frames)
    return [result, *torch.autograd.grad(result.square().sum(), [x, *module.parameters()])]


def check_one_graph(name, backend, frames):
    """Compiles an operator as one graph; clips of other lengths and sizes must not need a second one."""
    module = OPS[name]()
    torch.compiler.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for count in frames:
        x = random_map(2 * count, CHANNELS, 3, 2 + count)
        with torch._dynamo.config.patch(error_on_recompile=count != frames[0]):
            actual = gradients(compiled, module, x, count)
        torch.testing.assert_close(actual, gradients(module, module, x, count), rtol=1e-5, atol=1e-5)


@every_op
def test_compiles_to_one_graph_for_all_clip_lengths(name):
    check_one_graph(name, "aot_eager", (4, 3, 7))


# Importing inductor uses parts of torch.jit that PyTorch itself deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
def test_inductor():
    check_one_graph("alpha_residual", "inductor", (4, 3))


@every_op
def test_exports(name):
    module, x = OPS[name]().requires_grad_(False), random_map(6, CHANNELS, 3, 4)
    program = torch.export.export(module, (x, 3), dynamic_shapes=({2: torch.export.Dim.AUTO}, None))
    for height in (3, 5):
        x = random_map(6, CHANNELS, height, 4)
        torch.testing.assert_close(program.module()(x, 3), module(x, 3))


@every_op
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_meta_device(name, layout):
    module, x = OPS[name](), random_map(6, CHANNELS, 3, 5, layout=layout)
    real, meta = module(x, 3), module.to("meta")(x.to("meta"), 3)
    assert meta.is_meta
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@every_op
def test_autocast(name):
    module, x = OPS[name](), random_map(6, CHANNELS, 3, 5)
    expected = gradients(module, module, x, 3)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(module, module, x, 3)
    assert [x.dtype for x in actual[1:]] == [x.dtype for x in expected[1:]]
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05 * want.abs().max().item())


def test_attention_under_autocast_is_fp32_inside_and_keeps_the_dtype_of_the_query():
    query, key, value = (random_tokens(6, 3, 4, seed=seed) for seed in range(3))
    expected = temporal_attention(query, key, value, num_frames=3, num_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(temporal_attention(query, key, value, num_frames=3, num_heads=2), expected)
        mixed = temporal_attention(query.bfloat16(), key, value.bfloat16(), num_frames=3, num_heads=2)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, rtol=0.02, atol=0.02)
