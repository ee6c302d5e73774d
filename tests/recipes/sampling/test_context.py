"""Sampling with given frames: models whose best answer is known lead to results in closed form."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from temporal_layers.recipes.conditioning import ContextPlanes
from temporal_layers.recipes.image_ldm import make_scheduler
from temporal_layers.recipes.sampling.context import (
    ContextSampling,
    interpolation_windows,
    prediction_windows,
    sample_given,
    sample_interpolation,
    sample_prediction,
)

FEW = ContextSampling(num_inference_steps=4)


class KnownBase:
    """A base whose UNet is sure of the clean latents: `clean(context, conditioning)`, whatever the noise."""

    def __init__(self, clean):
        self.clean, self.scheduler = clean, make_scheduler()
        self.unet = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
        self.calls = []

    def no_conditioning(self, count):
        return {"labels": torch.zeros(count)}

    def predict(self, noisy, timestep, conditioning, frame_context):
        self.calls.append(frame_context)
        bar = self.scheduler.alphas_cumprod[timestep]
        clean = self.clean(frame_context, conditioning)
        if bar == 0:
            return -clean
        noise = (noisy - bar.sqrt() * clean) / (1 - bar).sqrt()
        return bar.sqrt() * noise - (1 - bar).sqrt() * clean

    def decode(self, latents):
        return latents[:, :3]


def total(context, conditioning):
    """Every frame is the sum of the given ones, plus the label."""
    return (context[:, :4].sum(2, keepdim=True) + conditioning["labels"][:, None, None, None, None]).expand_as(
        context[:, :4]
    )


def known(clips=3, frames=4):
    return torch.randn(clips, 4, frames, 2, 3)


LABELS = {"labels": torch.tensor([1.0, 2.0, 3.0])}


def test_unknown_frames_are_sampled_and_given_ones_stay():
    latents, mask = known(), torch.tensor([1.0, 0, 0, 1])
    latents[:, :, 1:3] = torch.nan  # not looked at
    made = sample_given(KnownBase(total), ContextPlanes(), LABELS, latents, mask, FEW)
    assert torch.equal(made[:, :, 0], latents[:, :, 0]) and torch.equal(made[:, :, 3], latents[:, :, 3])
    expected = latents[:, :, 0] + latents[:, :, 3] + LABELS["labels"][:, None, None, None]
    for frame in (1, 2):
        torch.testing.assert_close(made[:, :, frame], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("context_scale", "guidance_scale"), [(2.5, 1.0), (1.0, 3.0), (2.5, 3.0)])
def test_guidance_moves_away_from_what_the_model_says_without(context_scale, guidance_scale):
    """The model's answer is the sum of the frames plus the label, so each guidance multiplies its own part."""
    latents, mask = known(), torch.tensor([1.0, 0, 0, 0])
    options = ContextSampling(num_inference_steps=4, context_scale=context_scale, guidance_scale=guidance_scale)
    base = KnownBase(total)
    made = sample_given(base, ContextPlanes(), LABELS, latents, mask, options)
    expected = context_scale * latents[:, :, 0] + guidance_scale * LABELS["labels"][:, None, None, None]
    torch.testing.assert_close(made[:, :, 2], expected, rtol=1e-3, atol=1e-3)
    assert len(base.calls[0]) == 2 * (1 + (context_scale != 1) + (guidance_scale != 1))


def test_without_given_frames_the_rate_is_still_told():
    planes = ContextPlanes(rate=True)
    base = KnownBase(total)
    options = ContextSampling(num_inference_steps=2, context_scale=2.0)
    sample_given(base, planes, LABELS, known(), torch.tensor([1.0, 0, 0, 0]), options, rate=1.0)
    assert (base.calls[0][:, -1] == 1).all() and (base.calls[0][2:, :5] == 0).all()


def test_noise_on_the_given_frames_is_told_and_stays_the_same():
    planes = ContextPlanes(max_noise_level=250)
    base = KnownBase(total)
    latents, mask = known(2, 3), torch.tensor([1.0, 0, 0])
    options = ContextSampling(num_inference_steps=3, noise_level=125)
    made = sample_given(base, planes, {"labels": torch.zeros(2)}, latents, mask, options)
    contexts = base.calls
    assert all(torch.equal(context, contexts[0]) for context in contexts)
    assert (contexts[0][:, 5, 0] == 0.5).all() and (contexts[0][:, 5, 1:] == 0).all()
    share = make_scheduler().alphas_cumprod[124]
    noise = (contexts[0][:, :4, 0] - share.sqrt() * latents[:, :, 0]) / (1 - share).sqrt()
    assert (
        0.6 < noise.std() < 1.4
        and abs(torch.corrcoef(torch.stack([noise.flatten(), latents[:, :, 0].flatten()]))[0, 1]) < 0.6
    )
    assert torch.equal(made[:, :, 0], latents[:, :, 0])  # as they came, without the noise


def test_a_clip_is_the_same_however_it_is_batched():
    """With fresh noise in each step, and a model that is unsure: its answer depends on the noise."""
    base = KnownBase(total)
    base.predict = lambda noisy, timestep, conditioning, frame_context: (
        0.5 * noisy + frame_context[:, :4].sum(2, keepdim=True)
    )
    latents, mask = known(), torch.tensor([1.0, 0, 0, 0])
    results = [
        sample_given(
            base, ContextPlanes(), LABELS, latents, mask, ContextSampling(num_inference_steps=3, eta=0.5, **more)
        )
        for more in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 3, "seed": 1})
    ]
    torch.testing.assert_close(results[0], results[1])
    assert not torch.allclose(results[1][:, :, 1:], results[2][:, :, 1:], atol=1e-2)
    still = sample_given(base, ContextPlanes(), LABELS, latents, mask, ContextSampling(num_inference_steps=3))
    assert not torch.allclose(results[1][:, :, 1:], still[:, :, 1:], atol=1e-2)


def go_on(context, conditioning):
    """A frame is the one before it plus the step between the last two given; plus 1 if only one is given."""
    mask = context[:, 4, :, 0, 0]
    count = int(mask[0].sum())
    assert (mask[:, :count] == 1).all() and (mask[:, count:] == 0).all()
    last = context[:, :4, count - 1]
    step = last - context[:, :4, count - 2] if count > 1 else torch.ones_like(last)
    away = torch.arange(context.shape[2]) - (count - 1)
    return last[:, :, None] + step[:, :, None] * away[None, None, :, None, None]


@pytest.mark.parametrize("num_frames", [3, 5, 8, 11])
def test_a_roll_out_goes_on_from_the_last_frames(num_frames):
    first = known(2, 1)
    base = KnownBase(go_on)
    labels = {"labels": torch.zeros(2)}
    made = sample_prediction(base, ContextPlanes(), labels, first, num_frames, FEW, window=5)
    expected = first + torch.arange(float(num_frames))[None, None, :, None, None]
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=2e-3)
    assert torch.equal(made[:, :, :1], first)
    given = [int(context[0, 4, :, 0, 0].sum()) for context in base.calls]
    assert given[0] == 1 and set(given[4:]) <= {2}  # 4 calls a window: one frame first, then two


def test_a_roll_out_knows_the_speed_of_two_frames():
    first = known(1, 3)
    made = sample_prediction(KnownBase(go_on), ContextPlanes(), {"labels": torch.zeros(1)}, first, 7, FEW, window=4)
    step = first[:, :, 2] - first[:, :, 1]
    for ahead in range(1, 5):
        torch.testing.assert_close(made[:, :, 2 + ahead], first[:, :, 2] + ahead * step, rtol=1e-3, atol=5e-3)


def test_windows_of_a_roll_out():
    assert prediction_windows(20, first=1, window=8) == [(0, 1), (6, 2), (12, 2)]
    assert prediction_windows(8, first=1, window=8) == [(0, 1)]
    assert prediction_windows(1, first=1, window=8) == []
    assert prediction_windows(9, first=4, window=4, overlap=1) == [(3, 1), (6, 1)]
    for num_frames in range(2, 40):
        covered = [1]
        for start, given in prediction_windows(num_frames, first=1, window=5):
            assert start + given == len(covered) and given == min(2, len(covered))
            covered += [1] * (5 - given)
        assert len(covered) >= num_frames > len(covered) - 5


def between(context, conditioning):
    """Linear interpolation between the given frames, plus 100 times the rate in those that are not."""
    given = torch.nonzero(context[0, 4, :, 0, 0]).flatten().tolist()
    clean = torch.zeros_like(context[:, :4])
    for left, right in itertools.pairwise(given):
        for frame in range(left, right + 1):
            share = (frame - left) / (right - left)
            clean[:, :, frame] = (1 - share) * context[:, :4, left] + share * context[:, :4, right]
    return clean + 100 * context[:, -1:] + conditioning["labels"][:, None, None, None, None]


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_eight_frames_become_29_and_then_113(pairs):
    keys = torch.arange(8.0)[None, None, :, None, None] * torch.randn(2, 4, 1, 2, 3)
    base, planes, labels = KnownBase(between), ContextPlanes(rate=True), {"labels": torch.zeros(2)}
    made = sample_interpolation(base, planes, labels, keys, FEW, rate=0.0, pairs=pairs)
    finer = sample_interpolation(base, planes, labels, made, FEW, rate=0.0, pairs=pairs)
    assert made.shape[2] == 29 and finer.shape[2] == 113
    assert torch.equal(made[:, :, ::4], keys)
    expected = torch.arange(113.0)[None, None, :, None, None] / 16 * keys[:, :, 1:2]
    torch.testing.assert_close(finer, expected, rtol=1e-3, atol=5e-3)


def test_the_rate_and_the_conditioning_reach_every_window():
    keys = known(2, 3)
    labels = {"labels": torch.tensor([10.0, 20.0])}
    made = sample_interpolation(KnownBase(between), ContextPlanes(rate=True), labels, keys, FEW, rate=1.0)
    middle = (keys[:, :, :2] + keys[:, :, 1:]) / 2 + 100 + labels["labels"][:, None, None, None, None]
    torch.testing.assert_close(made[:, :, 2::4], middle, rtol=1e-3, atol=1e-2)


def test_windows_of_interpolation():
    assert interpolation_windows(8) == [0, 1, 2, 3, 4, 5, 6]
    assert interpolation_windows(8, 3) == [0, 3, 4]  # the last one overlaps
    assert interpolation_windows(7, 3) == [0, 3]
    assert interpolation_windows(4, 3) == [0]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ContextSampling(eta=1.0), r"ContextSampling: .* eta from 0 to below 1, got .*eta=1\.0"),
        (
            lambda: ContextSampling(num_inference_steps=0),
            r"ContextSampling: expected num_inference_steps .* at least 1",
        ),
        (lambda: prediction_windows(5, first=0, window=4), r"prediction_windows: .* one frame to begin .* got first=0"),
        (lambda: prediction_windows(5, first=1, window=2), r"prediction_windows: .* below window=2, got .* overlap=2"),
        (lambda: interpolation_windows(1), r"interpolation_windows: expected more than pairs=1 given frames .* got 1"),
        (lambda: interpolation_windows(3, 0), r"interpolation_windows: expected more than pairs=0 .* one pair, got 3"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
