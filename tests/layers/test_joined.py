"""Layers that join norm, product and sum: the result of the parts, which run one by one where something hooks in."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

from temporal_layers import (
    AlphaConfig,
    FrameCache,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
    attention,
    joined,
    transformer,
)
from temporal_layers.joined import joins, project

FRAMES, DIM = 3, 8
CONFIGS = {
    "svd": TemporalTransformerConfig(),
    "modelscope": TemporalTransformerConfig(
        projection=True, in_norm="clip", attentions=("self", "self"), ff_in=False, position="none",
        alpha=AlphaConfig(init=0.3),
    ),
    "animatediff": TemporalTransformerConfig(
        projection=True, in_norm="frame", attentions=("self", "cross"), ff_in=False, position="sinusoidal",
        alpha=AlphaConfig(init=0.0, learned=False),
    ),
    "alpha per frame": TemporalTransformerConfig(
        projection=True, position="none", alpha=AlphaConfig(shape="frame", num_frames=FRAMES)
    ),
    "alpha per channel": TemporalTransformerConfig(projection=True, alpha=AlphaConfig(shape="channel")),
}  # fmt: skip
WATCHED = ("norm_in", "ff_in", "ff_in.proj_in", "ff_in.proj_out", "norms.0", "attentions.0", "attentions.0.to_q",
           "attentions.0.to_out", "norm_out", "ff_out", "ff_out.proj_in", "ff_out.proj_out", "proj_out")  # fmt: skip


def block(randomised, config):
    return randomised(TemporalTransformerBlock(DIM, num_heads=2, context_dim=5, num_groups=4, config=CONFIGS[config]))


def call(layer, x, **options):
    text = torch.randn(2, 3, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    return layer(x, text, num_frames=FRAMES, **options)


def maps():
    x = torch.randn(2 * FRAMES, DIM, 2, 3, dtype=torch.float64)
    return x.to(memory_format=torch.channels_last)


def watch_all(layer):
    """Hooks into every layer, so that none is joined; returns what was called."""
    seen = []
    for name, module in layer.named_modules():
        if name:
            module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    return seen


@pytest.fixture(params=[False, True], ids=["apart", "packed"])
def calls(request, monkeypatch):
    """The operator's calls, with queries, keys and values in three products or in one."""
    found = []
    for module in (joined, attention, transformer):

        def spy(*args, operator=module.linear, **options):
            found.append({name for name, value in options.items() if value is not None})
            return operator(*args, **options)

        monkeypatch.setattr(module, "linear", spy)
    monkeypatch.setattr("temporal_layers.attention.packing_pays", lambda *args: request.param)
    found.append(request.param)
    return found


@pytest.mark.parametrize("config", CONFIGS)
def test_the_result_and_the_gradients_are_those_of_the_parts(config, calls, randomised, relative_error):
    layer, x = block(randomised, config), maps().requires_grad_()

    def results():
        result = call(layer, x)
        upstream = torch.randn(result.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
        inputs = [x, *layer.parameters()]
        return [result.detach(), *torch.autograd.grad(result, inputs, upstream, materialize_grads=True)]

    together = results()
    [packed, *found] = calls
    residuals = sum("residual" in options for options in found)
    assert residuals == len(layer.attentions) + sum(
        part is not None for part in (layer.ff_in, layer.ff_out, layer.proj_out)
    )
    assert sum("alpha" in options for options in found) == (layer.proj_out is not None)
    takes_norm = sum(each.position is None and (packed or each.context_dim is not None) for each in layer.attentions)
    assert sum("norm_eps" in options for options in found) == takes_norm
    seen = watch_all(layer)
    for got, want in zip(together, results(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert calls == [packed, *found] and len(seen) > 10


@pytest.mark.parametrize("name", WATCHED)
def test_a_hook_sees_what_its_layer_gives(name, randomised, relative_error):
    """The update alone, of normed tokens, as if nothing were ever joined."""
    layer, x = block(randomised, "modelscope" if name == "proj_out" else "svd"), maps()
    expected = call(layer, x)
    module, seen = layer.get_submodule(name), []
    module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    assert relative_error(call(layer, x), expected) < 1e-12
    [(given, output)] = seen
    if type(module) is nn.Linear:
        torch.testing.assert_close(output, F.linear(given, module.weight, module.bias), rtol=1e-12, atol=1e-12)
    elif isinstance(module, nn.LayerNorm):
        expected = F.layer_norm(given, (DIM,), module.weight, module.bias, module.eps)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    elif name.endswith("proj_in"):
        assert output.shape[-1] == 4 * DIM
    else:
        module._forward_hooks.clear()
        options = {"num_frames": FRAMES} if name.startswith("attentions") else {}
        torch.testing.assert_close(output, module(given, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("targets", [["to_q", "to_out"], ["proj_in", "proj_out"], ["to_k"]])
@pytest.mark.parametrize("config", ["svd", "modelscope"])
def test_low_rank_adapters_are_called(config, targets, randomised, relative_error):
    layer, x = block(randomised, config), maps()
    expected = call(layer, x)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), layer)
    assert relative_error(call(layer.double(), x), expected) < 1e-12  # as it begins, an adapter adds nothing
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapted = call(layer, x)
    assert relative_error(adapted, expected) > 1e-6
    watch_all(layer)
    assert relative_error(call(layer, x), adapted) < 1e-12


@pytest.mark.parametrize("change", ["image_only", "memory_budget", "contiguous", "tokens"])
def test_ways_around_the_joined_blend(change, randomised, relative_error):
    layer, x, options = block(randomised, "modelscope"), maps(), {}
    if change == "image_only":
        options["image_only"] = torch.tensor([[True, False, False]] * 2)
    elif change == "memory_budget":
        options["memory_budget"] = 1
    elif change == "contiguous":
        x = x.contiguous()
    else:
        layer.in_norm, x = None, x.permute(0, 2, 3, 1).flatten(1, 2)
    with torch.no_grad():
        result = call(layer, x, **options)
        watch_all(layer)
        expected = call(layer, x, **options)
    assert relative_error(result, expected) < 1e-12 and result.stride() == expected.stride()


def test_a_stream_ends_in_the_joined_blend(randomised, relative_error, monkeypatch):
    config = TemporalTransformerConfig(projection=True, causal=True, position="none", attentions=("self",))
    layer = randomised(TemporalTransformerBlock(DIM, num_heads=2, config=config))
    x, cache, pieces = maps()[:FRAMES], FrameCache(), []
    whole = layer(x, num_frames=FRAMES)
    with torch.no_grad():
        for frame in x.split(1):
            with cache.block():
                pieces.append(layer(frame, num_frames=1, cache=cache))
    assert relative_error(torch.cat(pieces), whole.detach()) < 1e-12


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_projection(norm, residual, relative_error):
    layer, norm = nn.Linear(4, 5).double(), nn.LayerNorm(4).double() if norm else None
    x, residual = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 5).double() if residual else None
    expected = layer(x if norm is None else norm(x)) + (0 if residual is None else residual)
    assert relative_error(project(layer, x, norm=norm, residual=residual), expected) < 1e-12
    layer.register_forward_hook(lambda *args: None)
    assert torch.equal(project(layer, x, norm=norm, residual=residual), expected)


def test_what_joins():
    norm, layer = nn.LayerNorm(4), nn.Linear(4, 5)
    assert joins(norm, layer)
    assert not joins(norm.double(), layer)
    assert not joins(nn.Identity(), layer)
    layer.register_forward_pre_hook(lambda *args: None)
    assert not joins(norm.float(), layer)
