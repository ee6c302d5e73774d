"""A whole block on the fused kernels, one after the other, against the same block in float64 on the references."""

import copy
import importlib

import pytest
import torch

from temporal_layers import AlphaConfig, TemporalTransformerBlock, TemporalTransformerConfig
from temporal_layers.kernels.dispatch import Impl
from temporal_layers.kernels.testing import assert_within_budget, random_map, random_normal

OPERATORS = ("alpha_blend", "geglu", "group_norm", "linear", "temporal_attention")
FRAMES, CHANNELS = 4, 32
CONFIGS = {
    "modelscope": TemporalTransformerConfig(
        projection=True, in_norm="clip", attentions=("self", "self"), ff_in=False, position="none",
        alpha=AlphaConfig(init=0.3),
    ),
    "svd": TemporalTransformerConfig(),
}  # fmt: skip


@pytest.fixture
def fused(monkeypatch):
    """A switch: every operator takes its kernel, and queries, keys and values come from one product."""

    def switch():
        for name in OPERATORS:
            module = importlib.import_module(f"temporal_layers.kernels.{name}")
            monkeypatch.setattr(module, "resolve_impl", lambda *args, **options: Impl.FUSED)
        monkeypatch.setattr("temporal_layers.attention.packing_pays", lambda *args: True)

    return switch


def results(block, x, text):
    """Result and gradients by name. That of alpha cancels; its operators' own tests know how much."""
    x = x.detach().requires_grad_()
    result = block(x, text, num_frames=FRAMES)
    named = {name: value for name, value in block.named_parameters() if name != "blend.logit"}
    upstream = random_normal(tuple(result.shape), 9).to(result)
    gradients = torch.autograd.grad(result, [x, *named.values()], upstream)
    return dict(zip(["result", "x", *named], [result.detach(), *gradients], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
def test_transformer(config, dtype, device, fused):
    block = TemporalTransformerBlock(CHANNELS, num_heads=2, context_dim=16, num_groups=8, config=CONFIGS[config])
    for seed, parameter in enumerate(block.parameters()):
        with torch.no_grad():
            parameter.copy_(0.2 * random_normal(tuple(parameter.shape), 20 + seed))
    block = block.to(device, dtype)
    x = random_map(2 * FRAMES, CHANNELS, 3, 5, dtype=dtype).to(device)
    text = random_normal((2, 4, 16), 1).to(device, dtype)
    wide = [value.cpu().double() for value in (x, text)]
    expected = results(copy.deepcopy(block).cpu().double(), *wide)
    eager = results(copy.deepcopy(block).cpu(), x.cpu(), text.cpu())
    fused()
    actual = results(block, x, text)
    for name, value in actual.items():
        assert_within_budget(value, expected[name], eager[name], what=name)
