"""Which implementation TemporalAttention asks for, and how diffusers' switches reach it."""

import pytest
import torch
from diffusers import ModelMixin

from temporal_layers import TemporalAttention


class Model(ModelMixin):
    def __init__(self):
        super().__init__()
        self.temporal = TemporalAttention(8, num_heads=1)


def test_diffusers_switches_xformers_on_and_off():
    model = Model()
    assert model.temporal.impl == "auto" and "impl='auto'" in repr(model)
    model.enable_xformers_memory_efficient_attention()
    assert model.temporal.impl == "xformers" and "impl='xformers'" in repr(model)
    model.disable_xformers_memory_efficient_attention()
    assert model.temporal.impl == "auto"


def test_choice_of_an_xformers_kernel_raises():
    with pytest.raises(ValueError, match=r"^TemporalAttention: attention_op: expected None, got 'flash'; xformers"):
        TemporalAttention(8, num_heads=1).set_use_memory_efficient_attention_xformers(True, "flash")


@pytest.mark.parametrize(
    ("backend", "impl"),
    [("native", "sdpa"), ("_native_flash", "sdpa"), ("xformers", "xformers"), ("flash", "auto"), ("sage", "auto")],
)
def test_backends_of_diffusers(backend, impl):
    layer = TemporalAttention(8, num_heads=1)
    layer.set_attention_backend(backend)
    assert layer.impl == impl


def test_forward_passes_it_on():
    layer = TemporalAttention(8, num_heads=1)
    x = torch.randn(4, 3, 8)
    expected = layer(x, num_frames=2)
    layer.impl = "sdpa"
    assert torch.equal(layer(x, num_frames=2), expected)
    layer.impl = "triton"
    with pytest.raises(ValueError, match=r"^temporal_attention: impl: expected 'auto'"):
        layer(x, num_frames=2)
