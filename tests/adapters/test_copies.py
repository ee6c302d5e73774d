"""Copies are independent, and state dicts hold what they should."""

import copy
import io
import pickle

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNetMotionModel

from temporal_layers.adapters import adapter_of, inject


def by_deepcopy(model):
    return copy.deepcopy(model)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make_copy", [by_deepcopy, by_pickle, by_torch_save])
def test_a_copy_is_equal_and_independent(make_unet, randomise, make_copy):
    model = make_unet()
    adapter = randomise(inject(model)).freeze()
    clips, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 3, 12)
    with torch.no_grad():
        expected = model(clips, 7, text).sample
        twin = make_copy(model)
        other = adapter_of(twin)
        assert type(twin) is type(model) and other.sites == adapter.sites and other.config == adapter.config
        assert torch.equal(twin(clips, 7, text).sample, expected)
        assert len({id(module._temporal_state) for module in twin.modules() if hasattr(module, "_temporal_state")}) == 1
        for _, parameter in other.named_parameters():
            parameter.zero_()
        other.num_frames = 5
        other.unfreeze()
        with other.disabled():
            assert torch.equal(model(clips, 7, text).sample, expected)
        other.remove()
        assert torch.equal(model(clips, 7, text).sample, expected)
    assert adapter.num_frames is None
    assert not any(parameter.requires_grad for _, parameter in adapter.named_parameters("spatial"))
    assert not any("temporal" in name for name, _ in twin.named_modules())


def test_a_copy_of_a_compiled_model_is_not_compiled(make_unet):
    # What nn.Module does; a compiled callable cannot be copied.
    model = make_unet()
    inject(model)
    model.compile(backend="eager")
    assert model._compiled_call_impl is not None
    assert copy.deepcopy(model)._compiled_call_impl is None


def test_a_removed_copy_pickles_as_the_plain_class(make_unet):
    model = make_unet()
    inject(model).remove()
    assert b"temporal_layers" not in pickle.dumps(model)


def test_the_state_dict_of_the_model_has_everything_and_round_trips(make_unet, randomise):
    model, other = make_unet(), make_unet()
    adapter = randomise(inject(model))
    inject(other)
    state = model.state_dict()
    assert set(adapter.state_dict()) == {key for key in state if ".temporal." in key}
    assert set(state) == {name for name, _ in model.named_parameters()}
    other.load_state_dict(state)
    clips, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 3, 12)
    with torch.no_grad():
        assert torch.equal(model(clips, 7, text).sample, other(clips, 7, text).sample)


@pytest.mark.parametrize("wrap", ["around", "within"])
def test_wrappers_do_not_lose_weights(make_unet, wrap):
    model = make_unet()
    adapter = inject(model)
    count = len(adapter.state_dict())
    if wrap == "around":
        state = torch.nn.ModuleDict({"unet": model, "other": torch.nn.Linear(1, 1)}).state_dict(prefix="module.")
        assert sum(key.startswith("module.unet.") and ".temporal." in key for key in state) == count
    else:
        # What torch.compile and activation checkpointing do to a block: a module with a name of its own in between.
        model.down_blocks[0] = torch.nn.Sequential(model.down_blocks[0])
        assert sum(".temporal." in key for key in model.state_dict()) == count


def test_a_part_has_the_state_dict_of_the_image_model(make_unet):
    model = make_unet()
    parts = ["down_blocks.0", "down_blocks.0.resnets.0", "mid_block", "up_blocks"]
    keys = {part: list(model.get_submodule(part).state_dict()) for part in parts}
    adapter = inject(model)
    assert {part: list(model.get_submodule(part).state_dict()) for part in parts} == keys
    resnet = model.down_blocks[0].resnets[0]
    with pytest.warns(FutureWarning, match="Positional args"):
        assert all(key.startswith("x.") and "temporal" not in key for key in resnet.state_dict({}, "x."))
    model.state_dict()
    assert list(resnet.state_dict()) == keys["down_blocks.0.resnets.0"]
    adapter.remove()
    assert {part: list(model.get_submodule(part).state_dict()) for part in parts} == keys


def test_models_made_from_an_injected_one_get_its_spatial_weights(make_unet):
    model = make_unet()
    before = copy.deepcopy(model)
    inject(model)
    for made in (ControlNetModel.from_unet(model), UNetMotionModel.from_unet2d(model)):
        assert type(made.down_blocks[0].resnets[0]).__module__.startswith("diffusers")
        state, expected = made.down_blocks[0].resnets[0].state_dict(), before.down_blocks[0].resnets[0].state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)


def test_saving_the_model_as_a_whole_keeps_the_class_of_the_image_model(make_unet, tmp_path):
    model = make_unet()
    expected = copy.deepcopy(model.state_dict())
    adapter = inject(model)
    model.save_pretrained(tmp_path)
    plain, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == set(adapter.state_dict())
    assert plain.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in plain.state_dict().items())
