"""Clips through an injected UNet: frames mix, clips do not, and conditioning reaches the right frames."""

import pytest
import torch
from diffusers import ControlNetModel

from temporal_layers.adapters import TemporalConfig, inject


@pytest.fixture
def video(make_unet, randomise):
    """An injected UNet with random temporal weights, and its adapter."""
    model = make_unet()
    return model, randomise(inject(model))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def close(result, expected, tolerance=2e-5):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_frames_mix_and_clips_do_not(video):
    model, _ = video
    clips, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 3, 12)
    changed = clips.clone()
    changed[0, :, 2] += 1
    moved = (model(changed, 7, text).sample - model(clips, 7, text).sample).abs().amax(dim=(1, 3, 4))
    assert (moved[0] > 1e-4).all()
    assert moved[1].max() < 2e-5


@pytest.mark.parametrize("policy", ["after_transformer_block", "after_attention"])
def test_a_batch_equals_single_clips_whatever_their_length(make_unet, randomise, policy):
    model = make_unet()
    randomise(inject(model, TemporalConfig(transformer_policy=policy)))
    for frames in (3, 1, 4):
        clips, text, steps = torch.randn(2, 4, frames, 8, 8), torch.randn(2, 3, 12), torch.tensor([1, 900])
        single = [model(clips[i : i + 1], steps[i], text[i : i + 1]).sample for i in range(2)]
        close(model(clips, steps, text).sample, torch.cat(single))


def test_clips_with_the_frames_first_are_refused(video):
    model, _ = video
    clips, text = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 3, 12)  # frames, then channels
    match = r"UNet2DConditionModel: expected clips .* with 4 channels, got shape \(2, 3, 4, 8, 8\); .*transpose\(1, 2\)"
    with pytest.raises(ValueError, match=match):
        model(clips, 7, text)
    assert model(clips.transpose(1, 2), 7, text).sample.shape == (2, 4, 3, 8, 8)


def test_unconditional_batch_equals_single_clips(make_unconditional, randomise):
    model = make_unconditional()
    randomise(inject(model))
    clips = torch.randn(2, 4, 3, 8, 8)
    single = [model(clip[None], 7).sample for clip in clips]
    close(model(clips, 7).sample, torch.cat(single))


def test_timesteps_of_all_shapes_agree(video):
    model, _ = video
    clips, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 3, 12)
    expected = model(clips, 7, text).sample
    for shape in [(), (1,), (2,), (2, 3), (6,)]:
        close(model(clips, torch.full(shape, 7), text).sample, expected)


def test_per_frame_timesteps_reach_their_frames(video, fold):
    model, adapter = video
    clips, text, steps = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 3, 12), torch.arange(6).reshape(2, 3) * 100
    with adapter.disabled():  # the image model: every frame alone
        result = fold(model(clips, steps, text).sample)
        for index, frame in enumerate(fold(clips)):
            alone = model(frame[None], steps.flatten()[index], text[index // 3][None]).sample
            close(result[index], alone[0])
    assert not torch.allclose(model(clips, steps, text).sample, model(clips, 0, text).sample, atol=1e-3)


def test_folded_input_equals_clips(video, fold):
    model, adapter = video
    clips, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 3, 12)
    expected = model(clips, 7, text).sample
    adapter.num_frames = 3
    assert torch.equal(model(fold(clips), 7, text.repeat_interleave(3, 0)).sample, fold(expected))
    model(clips[:, :, :2], 7, text)  # clips of another length do not change the setting
    assert adapter.num_frames == 3
    flags = torch.tensor([[True, False, False], [False, False, True]])
    folded = model(fold(clips), 7, text.repeat_interleave(3, 0), image_only=flags).sample
    assert torch.equal(folded, fold(model(clips, 7, text, image_only=flags).sample))


@pytest.mark.parametrize("with_images", [False, True])
def test_temporal_layers_get_the_text_of_each_clips_first_frame(video, with_images):
    model, adapter = video
    adapter.num_frames = 2
    images, text = torch.randn(4, 4, 8, 8), torch.randn(4, 3, 12)
    seen = []
    layer = adapter.layers["mid_block.attentions.0.transformer_blocks.0"]
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    block = model.mid_block.attentions[0].transformer_blocks[0]
    if with_images:  # as an IP-Adapter passes them: a tuple of text and image embeddings
        block.attn2.processor = lambda attn, hidden, encoder_hidden_states=None, **kwargs: hidden
        model._temporal_state.begin("test", images)
        block(torch.randn(4, 5, 16), encoder_hidden_states=(text, [torch.randn(4, 1, 2, 12)]))
    else:
        model(images, 7, text)
    assert torch.equal(seen[0], text[[0, 2]])


@pytest.mark.parametrize("policy", ["after_transformer_block", "after_attention"])
def test_bf16_and_channels_last(make_unet, randomise, policy):
    model = make_unet()
    randomise(inject(model, TemporalConfig(transformer_policy=policy)), std=0.1)
    clips, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 3, 12)
    expected = model(clips, 7, text).sample
    model.to(memory_format=torch.channels_last)
    close(model(clips, 7, text).sample, expected)
    model.to(torch.bfloat16)
    result = model(clips.bfloat16(), 7, text.bfloat16()).sample
    assert result.dtype == torch.bfloat16
    # bf16 keeps 8 bits and a forward pass has about 50 roundings in a row: a random walk of sqrt(50) half units.
    assert (result.float() - expected).norm() / expected.norm() < 2**-9 * 50**0.5


@pytest.mark.parametrize("as_clips", [False, True])
def test_control_residuals_folded_and_as_clips(video, make_unet, fold, as_clips):
    model, adapter = video
    adapter.remove()
    control = ControlNetModel.from_unet(model, conditioning_channels=3)
    for parameter in control.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    clips, text, hint = torch.randn(2, 4, 2, 8, 8), torch.randn(2, 3, 12), torch.randn(4, 3, 64, 64)
    down, mid = control(fold(clips), 7, text.repeat_interleave(2, 0), hint, return_dict=False)
    expected = model(
        fold(clips),
        7,
        text.repeat_interleave(2, 0),
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample
    inject(model)
    if as_clips:
        down = [value.unflatten(0, (2, 2)).transpose(1, 2) for value in down]
        mid = mid.unflatten(0, (2, 2)).transpose(1, 2)
    result = model(clips, 7, text, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert torch.equal(fold(result), expected)
    assert not torch.allclose(expected, fold(model(clips, 7, text).sample), atol=1e-3)


def test_all_kinds_of_conditioning_are_repeated(make_unet, fold):
    model = make_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 5,
        num_class_embeds=10,
        time_cond_proj_dim=3,
    )
    conditions = {
        "class_labels": torch.tensor([1, 5]),
        "timestep_cond": torch.randn(2, 3),
        "encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 1]]),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 5), "time_ids": torch.randn(2, 6)},
    }
    clips, text = torch.randn(2, 4, 2, 8, 8), torch.randn(2, 3, 12)

    def repeated(value):
        if isinstance(value, dict):
            return {key: repeated(entry) for key, entry in value.items()}
        return torch.stack([row for row in value for _ in range(2)])

    expected = model(fold(clips), 7, repeated(text), **{key: repeated(value) for key, value in conditions.items()})
    inject(model)
    assert torch.equal(fold(model(clips, 7, text, **conditions).sample), expected.sample)
    mask = conditions.pop("encoder_attention_mask")
    labels, steps, added = conditions.values()
    positional = model(clips, 7, text, labels, steps, None, None, added, encoder_attention_mask=mask)
    assert torch.equal(fold(positional.sample), expected.sample)


def test_cross_attention_kwargs_are_passed_on_untouched(video):
    model, _ = video
    seen = []

    class Processor(type(next(iter(model.attn_processors.values())))):
        def __call__(self, attention, hidden_states, *args, mask=None, **kwargs):
            seen.append(mask)
            return super().__call__(attention, hidden_states, *args, **kwargs)

    model.set_attn_processor(Processor())
    mask = torch.randn(2, 5)  # two clips: it would be repeated if it were taken for conditioning
    model(torch.randn(2, 4, 3, 8, 8), 7, torch.randn(2, 3, 12), cross_attention_kwargs={"mask": mask})
    assert seen and all(entry is mask for entry in seen)
    seen.clear()
    model(torch.randn(2, 4, 3, 8, 8), 7, torch.randn(2, 3, 12), None, None, None, {"mask": mask})
    assert seen and all(entry is mask for entry in seen)


def test_the_users_lists_are_not_changed(video):
    # diffusers pops from this one.
    model, _ = video
    residuals = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)]
    model(torch.randn(2, 4, 3, 8, 8), 7, torch.randn(2, 3, 12), down_intrablock_additional_residuals=residuals)
    assert len(residuals) == 2
