"""Low-rank adapters, attention processors and FreeU beside temporal layers."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from temporal_layers.adapters import inject

SPATIAL_ONLY = {"exclude_modules": r".*\.temporal\..*"}
MOTION = r".*\.temporal\..*(to_q|to_k|to_v|to_out)"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def lora_weights(make_unet):
    """A LoRA trained on a plain model, as files hold it."""
    model = make_unet()
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    state = get_peft_model_state_dict(model)
    return {f"unet.{key}": torch.randn_like(value) * 0.5 for key, value in state.items()}


def load_lora(model, weights):
    model.load_lora_adapter(dict(weights), prefix="unet")


@pytest.mark.parametrize("order", ["LoRA first", "injection first"])
def test_a_spatial_lora_has_the_effect_it_has_on_the_image_model(make_unet, randomise, fold, lora_weights, order):
    model = make_unet()
    clips, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 3, 12)
    with torch.no_grad():
        plain = model(fold(clips), 7, text.repeat(2, 1, 1)).sample
        if order == "LoRA first":
            load_lora(model, lora_weights)
        adapter = randomise(inject(model))
        if order == "injection first":
            load_lora(model, lora_weights)
        wrapped = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
        assert len(wrapped) == len(lora_weights) // 2 and not any("temporal" in name for name in wrapped)
        with adapter.disabled():
            with_lora = fold(model(clips, 7, text).sample)
        assert not torch.allclose(with_lora, plain, atol=1e-3)
        other = make_unet()
        other.load_state_dict({
            key.replace(".base_layer", ""): value
            for key, value in model.state_dict().items()
            if ".temporal." not in key and ".lora_" not in key
        })  # fmt: skip
        load_lora(other, lora_weights)
        assert torch.equal(other(fold(clips), 7, text.repeat(2, 1, 1)).sample, with_lora)
        model.unload_lora()
        with adapter.disabled():
            assert torch.equal(fold(model(clips, 7, text).sample), plain)
        adapter.remove()
        assert torch.equal(model(fold(clips), 7, text.repeat(2, 1, 1)).sample, plain)


def test_an_adapter_with_a_lora_on_the_image_model_saves_and_loads(make_unet, randomise, lora_weights, tmp_path):
    model = make_unet()
    adapter = randomise(inject(model))
    load_lora(model, lora_weights)
    before = adapter.state_dict()
    adapter.save_pretrained(tmp_path)
    loaded = type(adapter).from_pretrained(make_unet(), tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


def test_lora_on_the_temporal_layers(make_unet, tmp_path):
    model = make_unet()
    adapter = inject(model)
    count = len(adapter.state_dict())
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "convs.0"]))
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name.rpartition(".")[2] for name in wrapped if ".temporal." in name} == {"to_q", "0"}
    clips, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 3, 12)
    with torch.no_grad():
        fresh = model(clips, 7, text).sample
        for name, parameter in model.named_parameters():
            if ".temporal." in name:
                parameter.normal_(std=0.2)
        assert not torch.allclose(model(clips, 7, text).sample, fresh, atol=1e-3)
    with pytest.raises(ValueError, match=r"expected the tensors that injection made, got others: .*; unload what was"):
        adapter.save_pretrained(tmp_path)
    model.delete_adapters("default")
    model.unload_lora()
    assert len(adapter.state_dict()) == count
    adapter.save_pretrained(tmp_path)


def test_excluding_the_temporal_layers(make_unet):
    model, plain = make_unet(), make_unet()
    inject(model)
    for unet, extra in ((model, SPATIAL_ONLY), (plain, {})):
        unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, **extra))
    names = [{name for name, _ in unet.named_parameters() if "lora" in name} for unet in (model, plain)]
    assert names[0] == names[1] and names[0]


@pytest.mark.parametrize("order", ["LoRA first", "injection first"])
def test_a_spatial_lora_trains_beside_the_temporal_layers(make_unet, order):
    # PEFT freezes all that is there when it comes; the temporal layers stay as trainable as they were.
    model = make_unet()
    if order == "LoRA first":
        model.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
        adapter = inject(model)
    else:
        adapter = inject(model)
        model.mid_block.resnets[0].temporal.blend.logit.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, target_modules=TARGETS, **SPATIAL_ONLY))
        assert not model.mid_block.resnets[0].temporal.blend.logit.requires_grad
        model.mid_block.resnets[0].temporal.blend.logit.requires_grad_(True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".temporal." in name or "lora" in name}
    adapter.remove()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name in trainable if "lora" in name
    }


def test_loading_a_spatial_lora_does_not_freeze_the_temporal_layers(make_unet, lora_weights):
    model = make_unet()
    adapter = inject(model)
    load_lora(model, lora_weights)
    assert all(parameter.requires_grad for _, parameter in adapter.named_parameters("temporal"))
    assert not model.conv_in.weight.requires_grad


def test_models_without_loras_have_none_after_an_injection(make_unconditional):
    model = make_unconditional()
    inject(model)
    assert not hasattr(model, "add_adapter")


def test_a_motion_lora_on_the_temporal_layers_only(make_unet, randomise, tmp_path):
    model, merged = make_unet(), make_unet()
    merged.load_state_dict(model.state_dict())
    adapter, other = randomise(inject(model)), inject(merged)
    merged.load_state_dict(model.state_dict())
    model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=MOTION))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".temporal." in name and "lora_" in name for name in trainable)
    with torch.no_grad():
        for name in trainable:
            model.get_parameter(name).normal_(std=0.3)
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A"):  # W + alpha / r * B A
                product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                merged.get_submodule(name).weight.add_(3.0 * product)
        clips, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 3, 12)
        expected = merged(clips, 7, text).sample
        torch.testing.assert_close(model(clips, 7, text).sample, expected, rtol=1e-5, atol=1e-5)
        with adapter.disabled(), other.disabled():
            assert torch.equal(model(clips, 7, text).sample, merged(clips, 7, text).sample)
        model.save_lora_adapter(tmp_path)
        third = make_unet()
        inject(third)
        third.load_state_dict(
            {key.replace(".base_layer", ""): value for key, value in model.state_dict().items() if "lora_" not in key}
        )
        third.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors")
        assert torch.equal(third(clips, 7, text).sample, model(clips, 7, text).sample)


def test_processors_are_those_of_the_image_model(make_unet, randomise):
    model, plain = make_unet(), make_unet()
    plain.load_state_dict(model.state_dict())
    adapter = randomise(inject(model))
    assert list(model.attn_processors) == list(plain.attn_processors)
    chosen = {name: AttnProcessor() for name in plain.attn_processors}
    model.set_attn_processor(dict(chosen))
    plain.set_attn_processor(dict(chosen))
    assert model.attn_processors == chosen
    images, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12)
    with torch.no_grad():
        assert torch.equal(model(images, 7, text).sample, plain(images, 7, text).sample)
        model.fuse_qkv_projections()
        plain.fuse_qkv_projections()
        assert torch.equal(model(images, 7, text).sample, plain(images, 7, text).sample)
        model.unfuse_qkv_projections()
    adapter.remove()
    assert list(model.attn_processors) == list(plain.attn_processors)


def test_freeu(make_unet, randomise, fold):
    model = make_unet(block_out_channels=(8, 16))
    clips, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 3, 12)
    scales = {"s1": 0.5, "s2": 0.4, "b1": 1.5, "b2": 1.6}
    with torch.no_grad():
        without = model(fold(clips), 7, text.repeat(2, 1, 1)).sample
        # FreeU tells the stages by their 1280 and 640 channels; the tiny model has its own numbers.
        for block in model.up_blocks:
            block.s1 = None
        model.enable_freeu(**scales)
        expected = model(fold(clips), 7, text.repeat(2, 1, 1)).sample
        adapter = randomise(inject(model))
        with adapter.disabled():
            assert torch.equal(fold(model(clips, 7, text).sample), expected)
        model.disable_freeu()
        with adapter.disabled():
            assert torch.equal(fold(model(clips, 7, text).sample), without)
