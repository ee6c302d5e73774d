"""What a training or sampling program does to a layer: copies, casts, formats, autocast, checkpoints, compilation."""

import copy
import io
from functools import partial

import accelerate
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from temporal_layers import (
    AlphaConfig,
    TemporalResBlock,
    TemporalResBlockConfig,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
)

CHANNELS, TEMB, CONTEXT, HEIGHT, WIDTH = 16, 6, 5, 2, 3


def resblock(**options):
    config = TemporalResBlockConfig(**options)
    return TemporalResBlock(CHANNELS, temb_channels=TEMB, num_groups=4, config=config)


def transformer(**options):
    config = TemporalTransformerConfig(**options)
    return TemporalTransformerBlock(CHANNELS, num_heads=2, context_dim=CONTEXT, num_groups=4, config=config)


BUILDS = {
    "resblock": resblock,
    "resblock_causal": partial(resblock, causal=True, norm="frame", alpha=AlphaConfig(shape="channel")),
    "resblock_space": partial(resblock, spatial_kernel_size=3),
    "resblock_space_causal": partial(resblock, spatial_kernel_size=3, causal=True, norm="frame"),
    "transformer": transformer,
    "transformer_relative": partial(transformer, position="relative", causal=True),
    "transformer_rotary": partial(transformer, position="rotary", attentions=("self",), window=1),
    "transformer_projected": partial(transformer, position="sinusoidal", projection=True, in_norm="clip"),
}
every_layer = pytest.mark.parametrize("name", BUILDS)
# While it traces an autograd function, torch makes an instance of it, which it warns about.
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def inputs(layer, frames=4, batch=2, dtype=torch.float32):
    """Channels-last maps, and the layer's timestep embedding or text."""
    maps = torch.randn(batch * frames, CHANNELS, HEIGHT, WIDTH, dtype=dtype)
    extra = (batch * frames, TEMB) if isinstance(layer, TemporalResBlock) else (batch, 3, CONTEXT)
    return maps.to(memory_format=torch.channels_last), torch.randn(extra, dtype=dtype)


def gradients(layer):
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}


@every_layer
def test_copies_pickles_and_saved_files_are_the_layer(name, randomised):
    layer = randomised(BUILDS[name](), torch.float32)
    args = inputs(layer)
    expected = layer(*args, num_frames=4)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(*args, num_frames=4), expected)
        torch.nn.init.zeros_(next(twin.parameters()))
        assert torch.equal(layer(*args, num_frames=4), expected)  # nothing is shared


@every_layer
def test_channels_last_weights_give_the_same_output(name, randomised, relative_error):
    layer = randomised(BUILDS[name]())
    args = inputs(layer, dtype=torch.float64)
    expected = layer(*args, num_frames=4)
    layer.to(memory_format=torch.channels_last)  # refuses any 5-D weight
    assert relative_error(layer(*args, num_frames=4), expected) < 1e-12


@every_layer
def test_the_memory_format_of_maps_passes_through_and_changes_nothing(name, randomised, relative_error):
    layer = randomised(BUILDS[name]())
    maps, extra = inputs(layer, dtype=torch.float64)
    channels_last, contiguous = layer(maps, extra, num_frames=4), layer(maps.contiguous(), extra, num_frames=4)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert contiguous.is_contiguous()
    assert relative_error(contiguous, channels_last) < 1e-12


@every_layer
def test_bf16_errs_by_the_rounding_of_its_inputs_and_weights(name, randomised, relative_error):
    exact = randomised(BUILDS[name](), torch.bfloat16).double()
    layer = BUILDS[name]().to(torch.bfloat16)
    layer.load_state_dict(exact.state_dict())
    args = inputs(layer, dtype=torch.bfloat16)
    oracle = exact(*(x.double() for x in args), num_frames=4)
    # Rounding every weight and input once more moves the exact result by about as much as bf16 arithmetic may.
    nudged = copy.deepcopy(exact)
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter *= 1 + torch.finfo(torch.bfloat16).eps * (torch.rand_like(parameter) - 0.5)
    noise = [x.double() * (1 + torch.finfo(torch.bfloat16).eps * (torch.rand_like(x.double()) - 0.5)) for x in args]
    scale = relative_error(nudged(*noise, num_frames=4), oracle)
    assert relative_error(layer(*args, num_frames=4).double(), oracle) < 4 * scale + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("host", [torch.float32, torch.bfloat16], ids=str)
@every_layer
def test_autocast_keeps_the_dtype_of_the_host_and_trains_fp32_weights(name, host, randomised, relative_error):
    layer = randomised(BUILDS[name](), torch.float32)
    maps, extra = inputs(layer, dtype=host)
    expected = layer(maps.float(), extra.float(), num_frames=4)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(maps, extra, num_frames=4)
    assert got.dtype == host and got.is_contiguous(memory_format=torch.channels_last)
    assert 0 < relative_error(got.float(), expected) < 0.05
    got.float().square().sum().backward()
    assert {gradient.dtype for gradient in gradients(layer).values()} == {torch.float32}


@every_layer
def test_two_dtypes_without_autocast_are_an_error(name):
    layer = BUILDS[name]()
    maps, extra = inputs(layer, dtype=torch.bfloat16)
    with pytest.raises((ValueError, RuntimeError), match=r"dtype|must have the same"):
        layer(maps, extra, num_frames=4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_layer
def test_gradient_checkpointing_changes_no_gradient(name, use_reentrant, randomised):
    layer = randomised(BUILDS[name]())
    maps, extra = inputs(layer, dtype=torch.float64)
    maps.requires_grad_()
    layer(maps, extra, num_frames=4).square().sum().backward()
    expected, expected_maps = gradients(layer), maps.grad.clone()
    layer.zero_grad(), setattr(maps, "grad", None)

    def run(maps, extra):
        return layer(maps, extra, num_frames=4)

    checkpoint(run, maps, extra, use_reentrant=use_reentrant).square().sum().backward()
    # Not to the last bit: the two sum the gradients of a tensor with several uses in different orders.
    torch.testing.assert_close(maps.grad, expected_maps, rtol=1e-12, atol=1e-12)
    for key, gradient in gradients(layer).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-12, atol=1e-12)


@every_layer
def test_the_first_layer_of_a_frozen_model_trains(name, randomised):
    # PyTorch's CPU backward pass of a channels-last GroupNorm writes through a null pointer (and kills the process)
    # when the input needs no gradient but the weight does.
    layer = randomised(BUILDS[name]())
    maps, extra = inputs(layer, dtype=torch.float64)
    layer(maps, extra, num_frames=4).square().sum().backward()
    frozen_host = gradients(layer)
    layer.zero_grad()
    layer(maps.clone().requires_grad_(), extra, num_frames=4).square().sum().backward()
    for key, gradient in gradients(layer).items():
        torch.testing.assert_close(frozen_host[key], gradient, rtol=1e-10, atol=1e-10)


def check_one_graph(layer, backend):
    """Compiles `layer` as one graph and requires that clips of other lengths need no second one."""
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for frames in (4, 6, 9):
        args = inputs(layer, frames=frames)
        with torch._dynamo.config.patch(error_on_recompile=frames != 4):
            got = compiled(*args, num_frames=frames)
        torch.testing.assert_close(got, layer(*args, num_frames=frames), rtol=1e-5, atol=1e-5)


@traced
@pytest.mark.parametrize("name", ["resblock_causal", "resblock_space_causal", "transformer"])
def test_compiles_to_one_graph_for_all_clip_lengths(name, randomised):
    check_one_graph(randomised(BUILDS[name](), torch.float32), "eager")


@pytest.mark.slow
@pytest.mark.timeout(300)  # tracing is slow where cores are shared
@traced
@every_layer
def test_compiles_to_one_graph_with_its_backward_pass(name, randomised):
    check_one_graph(randomised(BUILDS[name](), torch.float32), "aot_eager")


@every_layer
def test_exports(name, randomised):
    layer = randomised(BUILDS[name](), torch.float32)
    args = inputs(layer)
    program = torch.export.export(layer, args, {"num_frames": 4})
    torch.testing.assert_close(program.module()(*args, num_frames=4), layer(*args, num_frames=4), rtol=1e-5, atol=1e-5)


@every_layer
def test_offload_hooks_reach_every_weight(name, randomised):
    # Sequential offloading leaves weights on the meta device and brings them in as each module is called.
    layer = randomised(BUILDS[name](), torch.float32)
    args = inputs(layer)
    with torch.no_grad():
        expected = layer(*args, num_frames=4)
        accelerate.cpu_offload(layer, execution_device="cpu")
        assert all(parameter.is_meta for parameter in layer.parameters())
        assert torch.equal(layer(*args, num_frames=4), expected)


def test_no_forward_pass_changes_a_weight(randomised):
    for build in BUILDS.values():
        layer = randomised(build(), torch.float32)
        before = copy.deepcopy(layer.state_dict())
        layer(*inputs(layer), num_frames=4)
        for key, value in layer.state_dict().items():
            assert torch.equal(value, before[key])
