"""Attention backends, xformers, IP-Adapters, and models that diffusers makes from an injected one."""

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter, UNetControlNetXSModel

from temporal_layers import TemporalAttention
from temporal_layers.adapters import inject


def temporal_attentions(model):
    return [module for module in model.modules() if isinstance(module, TemporalAttention)]


@pytest.fixture
def global_backend():
    """diffusers sets its choice for the whole process, and its own reset leaves it."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.parametrize("backend", ["native", "_native_math", "NATIVE"])
def test_attention_backend_reaches_attention_over_frames(make_unet, randomise, global_backend, backend):
    model = make_unet()
    randomise(inject(model))
    clips, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 3, 12)
    with torch.no_grad():
        expected = model(clips, 7, text).sample
        model.set_attention_backend(backend)
        assert {layer.impl for layer in temporal_attentions(model)} == {"sdpa"}
        assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName(backend.lower())
        torch.testing.assert_close(model(clips, 7, text).sample, expected, rtol=1e-5, atol=1e-6)
        model.reset_attention_backend()
    assert {layer.impl for layer in temporal_attentions(model)} == {"auto"}


def test_an_unknown_backend_changes_nothing(make_unet, global_backend):
    model = make_unet()
    inject(model)
    with pytest.raises(ValueError, match="must be one of the following"):
        model.set_attention_backend("nothing")
    assert {layer.impl for layer in temporal_attentions(model)} == {"auto"}


def test_xformers_switch_reaches_attention_over_frames(make_unet):
    # What pipe.enable_xformers_memory_efficient_attention() calls; the image layers' half needs a GPU.
    model = make_unet()
    inject(model)
    for name, module in model.named_modules():
        if name.endswith(("attn1", "attn2")):
            module.set_use_memory_efficient_attention_xformers = lambda *args: None
    model.set_use_memory_efficient_attention_xformers(True)
    assert {layer.impl for layer in temporal_attentions(model)} == {"xformers"}
    model.set_use_memory_efficient_attention_xformers(False)
    assert {layer.impl for layer in temporal_attentions(model)} == {"auto"}


def ip_adapter(model):
    """Weights of an IP-Adapter with four tokens for an image embedding of six numbers."""
    names = [name for name in model.attn_processors if "attn2" in name]
    widths = [model.get_submodule(name.removesuffix(".processor")).to_q.out_features for name in names]
    projections = {
        f"{2 * index + 1}.{kind}_ip.weight": torch.randn(width, 12) * 0.3
        for index, width in enumerate(widths)
        for kind in ("to_k", "to_v")
    }
    image = {"proj.weight": torch.randn(48, 6), "proj.bias": torch.randn(48)}
    image |= {"norm.weight": torch.ones(12), "norm.bias": torch.zeros(12)}
    return {"image_proj": image, "ip_adapter": projections}


@pytest.mark.parametrize("order", ["IP-Adapter first", "injection first"])
def test_ip_adapter(make_unet, randomise, fold, order):
    plain = make_unet()
    model, weights = copy.deepcopy(plain), ip_adapter(plain)
    plain._load_ip_adapter_weights([copy.deepcopy(weights)])
    if order == "IP-Adapter first":
        model._load_ip_adapter_weights([copy.deepcopy(weights)])
    adapter = randomise(inject(model))
    if order == "injection first":
        model._load_ip_adapter_weights([copy.deepcopy(weights)])
    assert list(model.attn_processors) == list(plain.attn_processors)
    clips, text, image = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 3, 12), torch.randn(2, 1, 6)
    frames, texts, images = (fold(clips), text.repeat_interleave(3, 0), image.repeat_interleave(3, 0))
    with torch.no_grad():
        expected = plain(frames, 7, texts, added_cond_kwargs={"image_embeds": [images]}).sample
        other = plain(frames, 7, texts, added_cond_kwargs={"image_embeds": [images.flip(0)]}).sample
        assert not torch.allclose(expected, other, atol=1e-3)
        with adapter.disabled():
            result = model(clips, 7, text, added_cond_kwargs={"image_embeds": [image]}).sample
        torch.testing.assert_close(fold(result), expected, rtol=1e-5, atol=1e-6)
        # With the layers: each clip as if it were alone, with its image.
        result = model(clips, 7, text, added_cond_kwargs={"image_embeds": [image]}).sample
        for index in range(2):
            rows = slice(index, index + 1)
            alone = model(clips[rows], 7, text[rows], added_cond_kwargs={"image_embeds": [image[rows]]}).sample
            torch.testing.assert_close(result[rows], alone, rtol=1e-5, atol=1e-5)


def test_controlnet_xs_from_an_injected_model(make_unet, randomise):
    model = make_unet(layers_per_block=2)  # what ControlNet-XS is written for
    plain = copy.deepcopy(model)
    randomise(inject(model))
    control = ControlNetXSAdapter.from_unet(plain, block_out_channels=[4, 8])
    made, expected = (UNetControlNetXSModel.from_unet(unet, copy.deepcopy(control)).eval() for unet in (model, plain))
    state = expected.state_dict()
    assert made.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in made.state_dict().items())
    assert all(type(module).__module__.startswith(("diffusers", "torch")) for module in made.modules())
    images, text, condition = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(
            made(images, 7, text, condition).sample,
            expected(images, 7, text, condition).sample,
        )


def test_attention_slicing(make_unet, randomise):
    model = make_unet()
    randomise(inject(model))
    clips, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 3, 12)
    with torch.no_grad():
        expected = model(clips, 7, text).sample
        model.set_attention_slice("max")
        torch.testing.assert_close(model(clips, 7, text).sample, expected, rtol=1e-5, atol=1e-6)
