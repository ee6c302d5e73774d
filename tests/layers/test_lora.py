"""Low-rank adaptation through PEFT: the adapted layer is the layer with weights W + BA, merged or not."""

import copy

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from temporal_layers import TemporalResBlock, TemporalResBlockConfig, TemporalTransformerBlock

RANK, ALPHA, FRAMES = 2, 6, 4


def resblock(causal=False, space=1):
    config = TemporalResBlockConfig(norm="frame", causal=causal, spatial_kernel_size=space)
    return TemporalResBlock(8, temb_channels=6, num_groups=4, config=config)


def transformer():
    return TemporalTransformerBlock(8, num_heads=2, context_dim=5)


CASES = {
    "conv": (resblock, ["convs.0", "convs.1", "temb_proj"]),
    "conv_causal": (lambda: resblock(causal=True), ["convs.0", "convs.1"]),
    "conv_space": (lambda: resblock(space=3), ["convs.0", "convs.1"]),
    "conv_space_causal": (lambda: resblock(causal=True, space=3), ["convs.0", "convs.1"]),
    "attention": (transformer, ["to_q", "to_k", "to_v", "to_out"]),
    "attention_queries": (transformer, ["to_q"]),
    "feed_forward": (transformer, ["proj_in", "proj_out"]),
}


def adapted_and_equivalent(name, randomised):
    """A layer with random low-rank factors, and a plain twin whose weights were added up here."""
    build, targets = CASES[name]
    plain = randomised(build())
    adapted = copy.deepcopy(plain)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(config, adapted)
    adapted.double()
    changed = 0
    for path, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer):
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            weight = plain.get_submodule(path).weight
            with torch.no_grad():
                weight += (ALPHA / RANK * (up.flatten(1) @ down.flatten(1))).reshape(weight.shape)
            changed += 1
    assert changed >= len(targets)
    return adapted, plain


@pytest.mark.parametrize("name", CASES)
def test_adapted_merged_and_unmerged_are_the_sum_of_the_weights(name, randomised, relative_error):
    adapted, plain = adapted_and_equivalent(name, randomised)
    maps = torch.randn(2 * FRAMES, 8, 2, 3, dtype=torch.float64)
    is_conv = isinstance(plain, TemporalResBlock)
    extra = torch.randn((2 * FRAMES, 6) if is_conv else (2, 3, 5), dtype=torch.float64)
    expected = plain(maps, extra, num_frames=FRAMES)
    assert relative_error(adapted(maps, extra, num_frames=FRAMES), expected) < 1e-12

    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    for module in layers:
        module.merge()
    assert relative_error(adapted(maps, extra, num_frames=FRAMES), expected) < 1e-12
    for module in layers:
        module.unmerge()
    assert relative_error(adapted(maps, extra, num_frames=FRAMES), expected) < 1e-12


@pytest.mark.parametrize("config", [LoraConfig(use_dora=True), LoHaConfig()])
@pytest.mark.parametrize("options", [{"space": 3}, {"causal": True}])
def test_methods_that_call_the_convolution_of_pytorch_are_refused_where_it_is_another(config, options):
    config.target_modules = ["convs.0"]
    layer = resblock(**options)
    inject_adapter_in_model(config, layer)
    with pytest.raises(ValueError, match=r"TemporalResBlock: convs: expected LoRA without DoRA around a .*, got peft"):
        layer(torch.randn(FRAMES, 8, 2, 3), torch.randn(FRAMES, 6), num_frames=FRAMES)


@pytest.mark.parametrize("config", [LoraConfig(use_dora=True), LoHaConfig()])
def test_they_do_on_plain_convolutions_over_frames(config):
    """Merged into the weight, the layer computes the same."""
    config.target_modules, config.init_weights = ["convs.0"], False
    layer = resblock().double()
    torch.nn.init.normal_(layer.convs[1].weight)
    inputs = torch.randn(FRAMES, 8, 2, 3).double(), torch.randn(FRAMES, 6).double()
    inject_adapter_in_model(config, layer)
    layer.double()
    expected = layer(*inputs, num_frames=FRAMES)
    layer.convs[0].merge()
    torch.testing.assert_close(layer(*inputs, num_frames=FRAMES), expected)


@pytest.mark.parametrize("options", [{}, {"space": 3}, {"causal": True}])
def test_whole_convolutions_that_peft_trains(options):
    layer = resblock(**options)
    torch.nn.init.normal_(layer.convs[1].weight)
    inputs = torch.randn(FRAMES, 8, 2, 3), torch.randn(FRAMES, 6)
    expected = layer(*inputs, num_frames=FRAMES)
    config = LoraConfig(target_modules=["temb_proj"], modules_to_save=["convs.0"])
    wrapped = get_peft_model(layer, config)
    torch.testing.assert_close(wrapped(*inputs, num_frames=FRAMES), expected)
    with torch.no_grad():
        layer.convs[0].modules_to_save["default"].weight.mul_(2)
    assert not torch.allclose(wrapped(*inputs, num_frames=FRAMES), expected)


@pytest.mark.parametrize("name", CASES)
def test_only_the_low_rank_factors_train(name, randomised):
    adapted, _ = adapted_and_equivalent(name, randomised)
    maps = torch.randn(FRAMES, 8, 2, 3, dtype=torch.float64)
    extra = torch.randn((FRAMES, 6) if isinstance(adapted, TemporalResBlock) else (1, 3, 5), dtype=torch.float64)
    adapted(maps, extra, num_frames=FRAMES).square().sum().backward()
    for key, parameter in adapted.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == ("lora_" in key), key
