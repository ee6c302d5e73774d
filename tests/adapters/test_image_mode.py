"""Where the temporal layers do not run, or are fresh, the injected model is the image model bit for bit."""

import copy
import dataclasses

import pytest
import torch

from temporal_layers import AlphaConfig, TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalConfig, adapter_of, inject

FIXED = AlphaConfig(init=1.0, learned=False)
FIXED_CONFIG = TemporalConfig(
    resblock=TemporalResBlockConfig(alpha=FIXED), transformer=TemporalTransformerConfig(alpha=FIXED)
)


def per_frame(value, frames):
    return value.repeat_interleave(frames, dim=0)


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fresh_injection_is_the_image_model(make_any_unet, fold, frames, layout):
    make, conditioning = make_any_unet
    model = make().to(memory_format=layout)
    clips, extra = torch.randn(2, 4, frames, 8, 6), conditioning(2)
    with torch.no_grad():
        expected = model(fold(clips), 7, *(per_frame(value, frames) for value in extra)).sample
        inject(model)
        result = model(clips, 7, *extra).sample
    assert result.shape == clips.shape
    assert torch.equal(fold(result), expected)


@pytest.mark.parametrize("mode", ["disabled", "image_only", "alpha"])
def test_image_mode_is_exact_whatever_the_temporal_weights(make_any_unet, randomise, fold, mode):
    make, conditioning = make_any_unet
    model = make()
    clips, extra = torch.randn(2, 4, 3, 8, 8), conditioning(2)
    with torch.no_grad():
        expected = model(fold(clips), 7, *(per_frame(value, 3) for value in extra)).sample
        adapter = randomise(inject(model, FIXED_CONFIG if mode == "alpha" else None))
        if mode == "disabled":
            with adapter.disabled():
                result = model(clips, 7, *extra).sample
        elif mode == "image_only":
            result = model(clips, 7, *extra, image_only=torch.ones(2, 3, dtype=torch.bool)).sample
        else:
            result = model(clips, 7, *extra).sample
        assert torch.equal(fold(result), expected)
        if mode != "alpha":  # and the layers would have done something
            assert not torch.allclose(fold(model(clips, 7, *extra).sample), expected, atol=1e-3)


def test_images_bypass_the_layers(make_any_unet, randomise):
    make, conditioning = make_any_unet
    model = make()
    images, extra = torch.randn(3, 4, 8, 8), conditioning(3)
    with torch.no_grad():
        expected = model(images, 7, *extra).sample
        randomise(inject(model))
        assert torch.equal(model(images, 7, *extra).sample, expected)
        model(images.unsqueeze(2), 7, *extra)  # a clip in between leaves nothing behind
        assert torch.equal(model(images, 7, *extra).sample, expected)
        assert torch.equal(model(images, 7, *extra, return_dict=False)[0], expected)


def test_one_flagged_frame_keeps_the_image_result_where_frames_meet_only_in_the_layers(make_unet, randomise, fold):
    model = make_unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
    clips, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 3, 12)
    flags = torch.tensor([[False, True, False]])
    with torch.no_grad():
        expected = model(fold(clips), 7, per_frame(text, 3)).sample
        randomise(inject(model))
        result = fold(model(clips, 7, text, image_only=flags).sample)
    assert torch.equal(result[1], expected[1])
    assert not torch.allclose(result[0], expected[0], atol=1e-3)


def test_disabled_nests_and_comes_back_after_an_error(make_unet, randomise):
    model = make_unet()
    adapter = randomise(inject(model))
    clips, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 3, 12)
    with torch.no_grad():
        video = model(clips, 7, text).sample
        with adapter.disabled():
            with adapter.disabled():
                pass
            image = model(clips, 7, text).sample
        assert not torch.equal(image, video)
        with pytest.raises(RuntimeError, match="mine"), adapter.disabled():
            raise RuntimeError("mine")
        assert torch.equal(model(clips, 7, text).sample, video)


@pytest.mark.parametrize("checkpointing", ["never", "before", "after"])
def test_remove_restores_everything(make_any_unet, randomise, fingerprint, checkpointing):
    make, conditioning = make_any_unet
    model = make()
    if checkpointing == "before":
        model.enable_gradient_checkpointing()
    next(model.parameters()).requires_grad_(False)
    images, extra = torch.randn(2, 4, 8, 8), conditioning(2)
    with torch.no_grad():
        expected = model(images, 7, *extra).sample
    before = fingerprint(model)
    adapter = randomise(inject(model)).freeze()
    if checkpointing == "after":
        model.enable_gradient_checkpointing()
        model.disable_gradient_checkpointing()
    adapter.num_frames = 2
    model(images.unsqueeze(2), 7, *extra)
    adapter.remove()
    if checkpointing != "after":  # disabling in diffusers leaves a function of its own
        assert fingerprint(model) == before
    with torch.no_grad():
        assert torch.equal(model(images, 7, *extra).sample, expected)
    assert not any("temporal" in name for name in model.state_dict())
    assert inject(model).sites  # and it can be injected again


def test_remove_leaves_no_wrapped_checkpoint_function(make_unet):
    reference, model = make_unet(), make_unet()
    reference.enable_gradient_checkpointing()
    adapter = inject(model)
    model.enable_gradient_checkpointing()
    adapter.remove()

    def functions(unet):
        return {
            name: module._gradient_checkpointing_func.__qualname__
            for name, module in unet.named_modules()
            if getattr(module, "gradient_checkpointing", False)
        }

    assert functions(model) == functions(reference)


def test_injection_keeps_classes_by_name_keys_and_attributes(make_unet):
    model = make_unet()
    before = {name: type(module) for name, module in model.named_modules()}
    keys, processors = list(model.state_dict()), list(model.attn_processors)
    inject(model)
    for name, cls in before.items():
        module = model.get_submodule(name)
        assert isinstance(module, cls) and type(module).__name__ == cls.__name__
        assert type(module).__qualname__ == cls.__qualname__
    assert [key for key in model.state_dict() if ".temporal." not in key] == keys
    assert list(model.attn_processors) == processors


def test_every_temporal_parameter_has_a_gradient_after_one_step(make_any_unet):
    make, conditioning = make_any_unet
    model = make()
    adapter = inject(model).freeze()
    optimizer = torch.optim.SGD(
        [parameter for _, parameter in adapter.named_parameters() if parameter.requires_grad], 1
    )
    clips, target, extra = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8), conditioning(2)
    for _ in range(2):
        optimizer.zero_grad()
        (model(clips, 7, *extra).sample - target).square().mean().backward()
        optimizer.step()
    dead = [
        name
        for group in ("temporal", "alpha")
        for name, parameter in adapter.named_parameters(group)
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert dead == []
    assert all(parameter.grad is None for _, parameter in adapter.named_parameters("spatial"))


def test_training_flag_and_dtype_follow_the_host(make_unet):
    model = make_unet().to(torch.bfloat16)
    model.train()
    model.down_blocks[0].eval()
    adapter = inject(model)
    flags = {name: layer.training for name, layer in adapter.layers.items()}
    assert flags == {name: not name.startswith("down_blocks.0") for name in flags}
    dtypes = {parameter.dtype for _, parameter in adapter.named_parameters("temporal")}
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for _, parameter in adapter.named_parameters("alpha")} == {torch.float32}
    assert model.dtype == torch.bfloat16


def test_config_is_kept(make_unet):
    config = dataclasses.replace(FIXED_CONFIG, transformer_policy="after_attention")
    model = make_unet()
    assert inject(model, config).config == config
    assert adapter_of(copy.deepcopy(model)).config == config
