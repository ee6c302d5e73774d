"""A text for the temporal layers alone, beside that of the image model."""

import copy
import pickle

import pytest
import torch

from temporal_layers import TemporalTransformerConfig
from temporal_layers.adapters import TemporalConfig, inject

FRAMES = 3


@pytest.fixture
def video(make_unet, randomise):
    """An injected UNet with random temporal weights, its adapter, two clips and two texts for each."""
    model = make_unet()
    adapter = randomise(inject(model))
    return model, adapter, torch.randn(2, 4, FRAMES, 8, 8), torch.randn(2, 3, 12), torch.randn(2, 5, 12)


@pytest.fixture
def replaced(video):
    """The result with every temporal layer's text replaced in front of the layer, past all that hands it on."""
    model, adapter, clips, text, other = video
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: (given[0], other))
        for layer in adapter.layers.values()
        if getattr(layer, "context_dim", None) is not None
    ]
    assert hooks
    with torch.no_grad():
        result = model(clips, 7, text).sample
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize("rows", ["a clip", "a frame"])
@pytest.mark.parametrize("folded", [False, True])
def test_the_temporal_layers_read_their_own_text_and_nothing_else_does(video, replaced, fold, rows, folded):
    model, adapter, clips, text, other = video
    if rows == "a frame":  # of which the first of each clip counts
        other = torch.stack([other, *torch.randn(FRAMES - 1, *other.shape)], dim=1).flatten(0, 1)
    with torch.no_grad():
        if folded:
            adapter.num_frames = FRAMES
            repeated = text.repeat_interleave(FRAMES, dim=0)
            result = model(fold(clips), 7, repeated, temporal_encoder_hidden_states=other).sample
        else:
            result = fold(model(clips, 7, text, temporal_encoder_hidden_states=other).sample)
        assert torch.equal(result, fold(replaced))
        assert not torch.allclose(result, fold(model(clips, 7, text).sample), atol=1e-3)


def test_the_same_text_twice_is_as_one_and_the_image_model_does_not_see_it(video):
    model, adapter, clips, text, other = video
    with torch.no_grad():
        expected = model(clips, 7, text).sample
        assert torch.equal(model(clips, 7, text, temporal_encoder_hidden_states=text).sample, expected)
        model(clips, 7, text, temporal_encoder_hidden_states=other)  # leaves nothing behind
        assert torch.equal(model(clips, 7, text).sample, expected)
        with adapter.disabled():
            expected = model(clips, 7, text).sample
            assert torch.equal(model(clips, 7, text, temporal_encoder_hidden_states=other).sample, expected)


def test_copies_and_pickles_made_after_a_call_do_not_hold_its_text(video, replaced):
    model, _, clips, text, other = video
    with torch.no_grad():
        model(clips, 7, text, temporal_encoder_hidden_states=other)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin._temporal_state.text is None
            assert torch.equal(twin(clips, 7, text, temporal_encoder_hidden_states=other).sample, replaced)


def test_checkpointing_recomputes_with_the_text_of_its_pass(video):
    model, _, clips, text, other = video

    def gradients(checkpointing):
        model.train()
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        first = model(clips, 7, text, temporal_encoder_hidden_states=other).sample.square().mean()
        model(clips, 7, text)  # another call before the backward pass
        first.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain, again = gradients(False), gradients(True)
    assert max(value.abs().max() for value in plain) > 1e-3
    for expected, got in zip(plain, again, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.timeout(300)
def test_compiled_in_one_graph(make_unet, randomise):
    torch._dynamo.reset()
    model = make_unet(
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        mid_block_type=None,
    )
    randomise(inject(model, TemporalConfig(resblock=None)))
    clips, text, other = torch.randn(2, 4, FRAMES, 8, 8), torch.randn(2, 3, 12), torch.randn(2, 5, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(clips, 7, text, temporal_encoder_hidden_states=other).sample
        got = compiled(clips, 7, text, temporal_encoder_hidden_states=other).sample
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(3, 5, 12), (2, 12), (2, 3, 5, 12)])
def test_other_shapes_are_refused(video, shape):
    model, _, clips, text, _ = video
    message = r"temporal_encoder_hidden_states: expected \(2, tokens, channels\), one text a clip, or \(6, tokens"
    with pytest.raises(ValueError, match=message):
        model(clips, 7, text, temporal_encoder_hidden_states=torch.zeros(shape))


def test_a_text_for_images_or_for_layers_without_one_is_refused(video, make_unet, make_unconditional):
    model, _, clips, text, other = video
    with pytest.raises(ValueError, match=r"temporal_encoder_hidden_states: expected None for images, which bypass"):
        model(clips[:, :, 0], 7, text, temporal_encoder_hidden_states=other)
    self_only = make_unet()
    inject(self_only, TemporalConfig(transformer=TemporalTransformerConfig(attentions=("self",))))
    message = r"temporal_encoder_hidden_states: expected None, since no temporal layer takes a text, got shape \(2, 5"
    with pytest.raises(ValueError, match=message):
        self_only(clips, 7, text, temporal_encoder_hidden_states=other)
    unconditional = make_unconditional()
    inject(unconditional)
    with pytest.raises(ValueError, match=message):
        unconditional(clips, 7, temporal_encoder_hidden_states=other)
