"""Operators take the weights of a layer only where calling the layer would do nothing else."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from temporal_layers import TemporalAttention, TemporalTransformerBlock
from temporal_layers.attention import packing_pays
from temporal_layers.plain import is_plain
from temporal_layers.transformer import gate


def hooked(kind):
    linear = nn.Linear(4, 4)
    getattr(linear, f"register_{kind}_hook")(lambda *args: None)
    return linear


def patched():
    linear = nn.Linear(4, 4)
    linear.forward = linear.forward
    return linear


class Subclass(nn.Linear):
    pass


class Quantised(torch.Tensor):
    pass


def quantised():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    return linear


OTHERS = {
    "forward hook": lambda: hooked("forward"),
    "forward pre-hook": lambda: hooked("forward_pre"),
    "backward hook": lambda: hooked("full_backward"),
    "backward pre-hook": lambda: hooked("full_backward_pre"),
    "offloaded": patched,
    "subclass": lambda: Subclass(4, 4),
    "parametrised": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "quantised": quantised,
    "something else": nn.Identity,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_than_its_weights(name):
    assert not is_plain(OTHERS[name]())


def test_what_is_not():
    assert is_plain(nn.Linear(4, 4)) and is_plain(nn.Linear(4, 4, bias=False, device="meta"))


def test_one_product_gives_what_three_do(randomised, relative_error, monkeypatch):
    """Packed as on a GPU; a hook keeps the three layers apart."""
    layer = randomised(TemporalAttention(8, num_heads=2))
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    expected = layer(x, num_frames=3)
    monkeypatch.setattr("temporal_layers.attention.packing_pays", lambda *args: True)
    products = []
    monkeypatch.setattr(torch, "cat", lambda *args, cat=torch.cat, **kw: products.append(args) or cat(*args, **kw))
    assert relative_error(layer(x, num_frames=3), expected) < 1e-12
    assert len(products) == 1
    seen = []
    layer.to_k.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(layer(x, num_frames=3), expected)
    assert len(products) == len(seen) == 1


@pytest.mark.parametrize(("device", "positions", "pays"), [("cpu", 50, False), ("meta", 50, True), ("meta", 4, False)])
def test_packing_pays_for_many_positions_and_not_on_a_cpu(device, positions, pays):
    layer = TemporalAttention(8, num_heads=2, device=device)
    assert packing_pays(torch.empty(6, positions, 8, device=device), layer.to_q) == pays


@pytest.mark.parametrize("change", ["hooked", "quantised"])
def test_the_gated_product_is_that_of_the_layer(change, randomised, relative_error):
    layer = randomised(TemporalTransformerBlock(8, num_heads=2, context_dim=5))
    x, text = torch.randn(6, 4, 8, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    result = layer(x, text, num_frames=3)
    seen = []
    for linear in (layer.ff_in.proj_in, layer.ff_out.proj_in):
        linear.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
        if change == "quantised":
            linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    assert relative_error(torch.Tensor(layer(x, text, num_frames=3)).double(), result) < 1e-6
    assert seen == [(6, 4, 32)] * 2


def test_the_projection_of_a_gated_layer_alone(randomised):
    linear = randomised(TemporalTransformerBlock(8, num_heads=2)).ff_in.proj_in
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    torch.testing.assert_close(linear(x, gated=True), gate(linear(x)), rtol=1e-12, atol=1e-12)
