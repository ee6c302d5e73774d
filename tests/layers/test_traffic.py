"""Bytes that a block moves, in units of its input: every operator's tensors in and out, with the fused kernels.

Counted on meta tensors, so nothing runs: views are free, and a fused kernel is one operator. docs/whole-models.md says
what the passes are.
"""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from temporal_layers import (
    AlphaConfig,
    TemporalResBlock,
    TemporalResBlockConfig,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
)
from temporal_layers.kernels.dispatch import Impl

CHANNELS, CLIPS, FRAMES, SIZE = 320, 2, 16, 64
MODELSCOPE = TemporalTransformerConfig(
    projection=True, in_norm="clip", attentions=("self", "self"), ff_in=False, position="none",
    alpha=AlphaConfig(init=0.0, learned=False),
)  # fmt: skip
OPERATORS = ("alpha_blend", "geglu", "group_norm", "linear", "temporal_attention", "temporal_conv")


class Traffic(TorchDispatchMode):
    """Adds up the bytes of every operator that is no view, by its name."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage()._cdata for x in inputs}
        is_view = not func._schema.is_mutable and any(x.untyped_storage()._cdata in storages for x in outputs)
        if not is_view:
            moved = sum(x.numel() * x.element_size() for x in inputs + outputs)
            self.bytes[str(func)] = self.bytes.get(str(func), 0) + moved
        return result


@pytest.fixture
def fused(monkeypatch):
    """Takes the fused kernels wherever there are any, as on a GPU for which all were measured to be the faster ones."""
    pytest.importorskip("triton")

    def choose(op, impl, tensor, *, has_fused=False, refusal=None, preferred=True, others=()):
        assert has_fused and refusal is None
        return Impl.FUSED

    for name in OPERATORS:
        monkeypatch.setattr(importlib.import_module(f"temporal_layers.kernels.{name}"), "resolve_impl", choose)


def moved(layer, x, *others):
    layer = layer.to("meta", torch.bfloat16).eval()
    with torch.no_grad(), Traffic() as traffic:
        result = layer(x, *others, num_frames=FRAMES)
    assert result.shape == x.shape and result.stride() == x.stride()
    return sum(traffic.bytes.values()) / (x.numel() * x.element_size()), traffic.bytes


def meta(*shape):
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)


def maps():
    return meta(CLIPS * FRAMES, CHANNELS, SIZE, SIZE).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 9),  # twice norm (2) and convolution (2), the second of which reads what it is blended with (1)
        ({"num_convs": 4}, 17),
        ({"norm": "frame", "causal": True}, 9),
    ],
)
def test_of_a_residual_block(fused, options, passes):
    layer = TemporalResBlock(CHANNELS, temb_channels=4 * CHANNELS, config=TemporalResBlockConfig(**options))
    units, _ = moved(layer, maps(), meta(CLIPS * FRAMES, 4 * CHANNELS))
    assert passes <= units < passes + 0.5  # the rest are weights and embeddings


def test_of_a_residual_block_on_contiguous_maps(fused):
    layer = TemporalResBlock(CHANNELS, temb_channels=4 * CHANNELS)
    units, _ = moved(layer, maps().contiguous(), meta(CLIPS * FRAMES, 4 * CHANNELS))
    assert 13 <= units < 13.5  # a copy to channels-last (2), and the blend as a pass of its own (2)


def test_of_a_transformer_block(fused):
    layer = TemporalTransformerBlock(CHANNELS, num_heads=8, config=MODELSCOPE)
    units, by_operator = moved(layer, maps())
    # Norm (2), projection (2), two attentions of normed product (4), attention (4) and projection with its sum (3), a
    # feed-forward of normed gated product (5) and product with its sum (6), and a projection with its blend (3).
    assert 40 <= units < 41
    others = {"aten.gelu.default", "aten.mul.Tensor", "aten.add.Tensor", "aten.native_layer_norm.default"}
    assert not others & set(by_operator)


def test_of_a_transformer_block_on_contiguous_maps(fused):
    layer = TemporalTransformerBlock(CHANNELS, num_heads=8, config=MODELSCOPE)
    units, _ = moved(layer, maps().contiguous())
    assert 42 <= units < 43  # the first norm writes tokens, but the blend is a pass of its own (2)


def test_of_a_transformer_block_whose_layers_are_watched(fused):
    layer = TemporalTransformerBlock(CHANNELS, num_heads=8, config=MODELSCOPE)
    for module in (*layer.attentions, layer.ff_out, layer.proj_out):
        module.register_forward_hook(lambda *args: None)
    units, _ = moved(layer, maps())
    assert 54 <= units < 55  # three norms (2) and sums (2) of their own, and the blend (2)


def test_of_the_operators_one_by_one(fused):
    """The count itself: what an operator moves that is known."""
    x = meta(8, 4)
    with Traffic() as traffic:
        y = (x + x).t().flatten()
    assert traffic.bytes == {"aten.add.Tensor": 3 * 64, "aten.clone.default": 2 * 64} and y.numel() == 32
