"""Gradient checkpointing: the same gradients, whatever is called between forward and backward."""

import copy

import pytest
import torch

from temporal_layers.adapters import adapter_of, inject


@pytest.fixture
def reference(make_unet, randomise):
    model = make_unet()
    randomise(inject(model))
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(first, second):
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)


def joint_loss(model, clips, text):
    """Two calls with clips of different length, one joint loss."""
    return model(clips, 7, text).sample.square().mean() + model(clips[:, :, :1], 7, text).sample.square().mean()


@pytest.mark.parametrize("enable", ["before injection", "after injection", "own function"])
def test_equal_gradients(reference, make_unet, enable):
    clips, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 3, 12)
    expected = gradients(reference, joint_loss(reference, clips, text))
    calls = []

    def own(function, *args):
        calls.append(function)
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    model = make_unet()
    if enable == "before injection":
        model.enable_gradient_checkpointing()
    inject(model)
    if enable != "before injection":
        model.enable_gradient_checkpointing(own if enable == "own function" else None)
    model.load_state_dict(reference.state_dict())
    model.train()
    assert_equal(expected, gradients(model, joint_loss(model, clips, text)))
    assert bool(calls) == (enable == "own function")


def test_recomputation_sees_the_layers_as_they_were_switched(reference):
    model = copy.deepcopy(reference)
    model.enable_gradient_checkpointing()
    model.train()
    clips, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 3, 12)
    flags = torch.tensor([[True, False]])

    def loss(unet):
        with adapter_of(unet).disabled():
            image = unet(clips, 7, text).sample.square().mean()
        partly = unet(clips, 7, text, image_only=flags).sample.square().mean()
        return image + 2 * partly + 3 * unet(clips[:, :, 0], 7, text).sample.square().mean()

    assert_equal(gradients(reference, loss(reference)), gradients(model, loss(model)))


def test_copies_recompute_with_their_own_clip_length(reference):
    reference.enable_gradient_checkpointing(torch.utils.checkpoint.checkpoint)
    twin = copy.deepcopy(reference)
    functions = {
        module._gradient_checkpointing_func.state
        for module in twin.modules()
        if getattr(module, "gradient_checkpointing", False)
    }
    assert functions == {twin._temporal_state} and twin._temporal_state is not reference._temporal_state


def test_decoder_checkpointing(make_vae, randomise):
    model = make_vae()
    randomise(inject(model))
    latents = torch.randn(1, 4, 3, 4, 4)
    expected = gradients_of(model, latents)
    model.enable_gradient_checkpointing()
    model.train()
    assert_equal(expected, gradients_of(model, latents))


def gradients_of(model, latents):
    model.zero_grad()
    loss = model.decode(latents).sample.square().mean()
    model.decode(latents[:, :, :2])
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.decoder.named_parameters()}
