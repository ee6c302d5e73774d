"""Prompts that change within clips, and tokens in place of prompts."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.adapters import inject
from temporal_layers.recipes.bases import PipelineBase
from temporal_layers.recipes.pipelines.components import TemporalPipeline
from temporal_layers.recipes.pipelines.prompts import TEXT, Asked, Span, conditionings, spans, tokens_of
from temporal_layers.recipes.stages.personal import TEMPORAL_TEXT

FRAMES = 6


def test_frames_in_front_of_a_start_turn_into_the_new_prompt():
    assert spans([0], 3) == [Span(0, 0, 0.0)] * 3
    assert spans([0, 2], 4) == [Span(0, 0, 0.0)] * 2 + [Span(1, 1, 0.0)] * 2
    third = 1 / 3
    told = spans([0, 4, 6], 7, blend=1)
    assert [span.prompt for span in told] == [0, 0, 0, 0, 1, 1, 2] and [span.share for span in told][3::2] == [0.5, 0.5]
    assert [span.share for span in spans([0, 3], 4, blend=2)] == [0.0, third, 2 * third, 0.0]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 8))
def test_every_frame_is_told_something_in_equal_steps(lengths, blend):
    starts = [0, *itertools.accumulate(lengths)]
    starts, num_frames = starts[:-1], starts[-1]
    blend = min(blend, *(length - 1 for length in lengths))
    told = spans(starts, num_frames, blend)
    assert len(told) == num_frames
    places = [span.prompt + span.share for span in told]
    steps = [after - before for before, after in itertools.pairwise(places)]
    assert all(-1e-12 < step <= 1 for step in steps)
    assert all(min(abs(step), abs(step - 1 / (blend + 1))) < 1e-9 for step in steps)
    assert [places[start] for start in starts] == list(range(len(starts)))


@pytest.mark.parametrize("starts", [[], [1], [0, 6], [0, 9]])
def test_prompts_outside_of_the_clip_are_refused(starts):
    with pytest.raises(ValueError, match=r"prompt: expected prompts by the frame .* below num_frames=6, got \["):
        spans(starts, FRAMES)


@pytest.mark.parametrize("blend", [-1, 2, 3])
def test_a_blend_without_room_is_refused(blend):
    with pytest.raises(ValueError, match=r"prompt_blend: expected 0 or more, and fewer .* \(\[2\]\), got"):
        spans([0, 2], FRAMES, blend)


@pytest.fixture
def pipeline(stable_diffusion):
    inject(stable_diffusion.unet)
    return TemporalPipeline.from_image_pipeline(stable_diffusion)


def told(pipeline, num_videos_per_prompt=1, **asked):
    options = {"num_frames": FRAMES, "size": (32, 32), "num_videos_per_prompt": num_videos_per_prompt}
    with torch.no_grad():
        return conditionings(pipeline, Asked(**asked), **options)


def test_a_prompt_that_stays_has_one_row_a_clip(pipeline):
    got = told(pipeline, 2, prompt=["a day", "a night"], negative_prompt="rain")
    expected = tokens_of(pipeline, ["a day", "a day", "a night", "a night"])[TEXT]
    assert got.clips == 4 and torch.allclose(got.told[TEXT], expected, atol=1e-6)
    rain = tokens_of(pipeline, ["rain"])[TEXT]
    assert torch.allclose(got.without[TEXT], rain.expand(4, -1, -1), atol=1e-6) and TEMPORAL_TEXT not in got.told
    empty = told(pipeline, prompt="a day").without[TEXT]
    torch.testing.assert_close(empty, PipelineBase(pipeline).no_conditioning(1)[TEXT])


def test_a_prompt_that_changes_has_one_row_a_frame(pipeline):
    got = told(pipeline, 2, prompt=[{3: "a night", 0: "a day"}, "rain"], prompt_blend=1)
    day, night, rain = tokens_of(pipeline, ["a day", "a night", "rain"])[TEXT]
    first = [day, day, (day + night) / 2, night, night, night]
    expected = torch.stack([*first, *first, *[rain] * 12])
    torch.testing.assert_close(got.told[TEXT], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(got.told[TEXT][0], got.told[TEXT][1]) and len(got.without[TEXT]) == 4


def test_xl_is_told_pooled_tokens_and_sizes(stable_diffusion_xl):
    inject(stable_diffusion_xl.unet)
    pipeline = TemporalPipeline.from_image_pipeline(stable_diffusion_xl)
    pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    options = {"num_images_per_prompt": 1, "device": torch.device("cpu"), "do_classifier_free_guidance": True}
    for negative in (None, "rain"):
        expected = pipeline.encode_prompt(["a day"], negative_prompt=negative, **options)
        got = told(pipeline, prompt="a day", negative_prompt=negative)
        values = (got.told[TEXT], got.without[TEXT], got.told["text_embeds"], got.without["text_embeds"])
        assert all(torch.equal(value, other) for value, other in zip(values, expected, strict=True))
        assert (got.without[TEXT] == 0).all() == (negative is None)
    assert got.told["time_ids"].tolist() == got.without["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    again = told(pipeline, **dict(zip(names, expected, strict=True)))
    assert all(torch.equal(again.told[name], value) for name, value in got.told.items())
    with pytest.raises(ValueError, match="pooled_prompt_embeds: expected a tensor beside prompt_embeds for this model"):
        told(pipeline, prompt_embeds=expected[0])


def test_labels_go_by_name_or_number(label_model):
    inject(label_model.unet)
    pipeline = TemporalPipeline.from_image_pipeline(label_model)
    tokens = label_model.conditioner(torch.tensor([0, 1, 2]))
    assert torch.equal(told(pipeline, prompt=["day", 1, 2]).told[TEXT], tokens)
    assert torch.equal(told(pipeline).told[TEXT], tokens[2:]) and torch.equal(told(pipeline).without[TEXT], tokens[2:])
    assert torch.equal(told(pipeline, prompt="day", negative_prompt="night").without[TEXT], tokens[1:2])
    blended = told(pipeline, prompt={0: "day", 2: 1}, prompt_blend=1).told[TEXT]
    torch.testing.assert_close(blended[1], (tokens[0] + tokens[1]) / 2)
    for wrong in ("dusk", 3, -1, 1.0):
        with pytest.raises(ValueError, match=r"prompt: expected a label, one of 'day', 'night' or its number, or 2"):
            told(pipeline, prompt=wrong)


def test_temporal_layers_are_told_what_their_own_text_encoder_says(pipeline, stable_diffusion):
    original = copy.deepcopy(stable_diffusion)
    for parameter in pipeline.text_encoder.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    two = TemporalPipeline.from_image_pipeline(stable_diffusion, temporal_text=original)
    plain = TemporalPipeline.from_image_pipeline(original)
    got = told(two, prompt={0: "a day", 3: "a night"}, negative_prompt="rain")
    expected = told(plain, prompt={0: "a day", 3: "a night"}, negative_prompt="rain")
    assert torch.equal(got.told[TEMPORAL_TEXT], expected.told[TEXT])
    assert torch.equal(got.without[TEMPORAL_TEXT], expected.without[TEXT])
    assert not torch.allclose(got.told[TEXT], expected.told[TEXT], atol=1e-2)
    other = told(two, prompt=["a day", "a night"], temporal_prompt="snow")
    snow = tokens_of(plain, ["snow"])[TEXT]
    torch.testing.assert_close(other.told[TEMPORAL_TEXT], snow.expand(2, -1, -1))
    with pytest.raises(ValueError, match="temporal_prompt: expected a prompt for the text encoder of the temporal lay"):
        told(two, prompt_embeds=snow)
    embeds = told(two, prompt_embeds=snow, temporal_prompt_embeds=2 * snow, negative_temporal_prompt_embeds=3 * snow)
    assert torch.equal(embeds.told[TEMPORAL_TEXT], 2 * snow)
    assert torch.equal(embeds.without[TEMPORAL_TEXT], 3 * snow)


def test_tokens_can_be_given_for_clips_or_for_frames(pipeline):
    tokens = torch.randn(2, 12, 16)
    assert torch.equal(told(pipeline, prompt_embeds=tokens).told[TEXT], tokens)
    per_frame = torch.randn(2, FRAMES, 12, 16)
    got = told(pipeline, prompt_embeds=tokens, negative_prompt_embeds=per_frame)
    assert torch.equal(got.without[TEXT], per_frame.flatten(0, 1))
    for wrong in (torch.zeros(3, 12, 16), torch.zeros(2, FRAMES - 1, 12, 16), torch.zeros(2, 16)):
        message = r"negative_prompt_embeds: expected \(2, tokens, channels\), one row a clip, or \(2, 6, tokens"
        with pytest.raises(ValueError, match=message):
            told(pipeline, prompt_embeds=tokens, negative_prompt_embeds=wrong)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "prompt: expected a text or prompt_embeds, got neither; '' asks for nothing"),
        ({"prompt": []}, "prompt: expected at least one, got an empty list"),
        ({"prompt": 3}, r"prompt: expected texts, got \[3\]; numbers are for models of labels"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 12, 16)}, "prompt: expected it or prompt_embeds, got both"),
        (
            {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": torch.zeros(1, 12, 16)},
            "negative_prompt: expected it or negative_prompt_embeds, got both",
        ),
        (
            {"prompt": "a", "temporal_prompt": "b", "temporal_prompt_embeds": torch.zeros(1, 12, 16)},
            "temporal_prompt: expected it or temporal_prompt_embeds, got both",
        ),
        (
            {"prompt": ["a"] * 3, "negative_prompt": ["a"] * 2},
            "negative_prompt: expected one for all or one for each of 3 clips, got 2",
        ),
        (
            {"prompt": ["a"] * 3, "temporal_prompt": ["a"] * 2},
            "temporal_prompt: expected one for all or one for each of 3 clips, got 2",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 12, 16), "pooled_prompt_embeds": torch.zeros(1, 16)},
            "pooled_prompt_embeds: expected None beside prompt_embeds for this model, got a tensor",
        ),
    ],
)
def test_what_does_not_fit_is_refused(pipeline, asked, message):
    with pytest.raises(ValueError, match=message):
        told(pipeline, **asked)


def test_an_unconditional_model_is_told_nothing(unconditional):
    inject(unconditional.unet)
    pipeline = TemporalPipeline.from_image_pipeline(unconditional)
    assert told(pipeline, 3)[:3] == (3, {}, {})
    with pytest.raises(ValueError, match="prompt: expected None for an unconditional model"):
        told(pipeline, prompt="a road")
