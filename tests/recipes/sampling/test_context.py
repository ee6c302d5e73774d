"""Sampling with given frames: models whose best answer is known lead to results in closed form."""

import pytest
import torch

from temporal_layers.recipes.conditioning import ContextPlanes
from temporal_layers.recipes.image_ldm import make_scheduler
from temporal_layers.recipes.sampling.context import ContextSampling, sample_given

FEW = ContextSampling(num_inference_steps=4)


def total(context, conditioning):
    """Every frame is the sum of the given ones, plus the label."""
    return (context[:, :4].sum(2, keepdim=True) + conditioning["labels"][:, None, None, None, None]).expand_as(
        context[:, :4]
    )


def known(clips=3, frames=4):
    return torch.randn(clips, 4, frames, 2, 3)


LABELS = {"labels": torch.tensor([1.0, 2.0, 3.0])}


def test_unknown_frames_are_sampled_and_given_ones_stay(known_base):
    latents, mask = known(), torch.tensor([1.0, 0, 0, 1])
    latents[:, :, 1:3] = torch.nan  # not looked at
    made = sample_given(known_base(total), ContextPlanes(), LABELS, latents, mask, FEW)
    assert torch.equal(made[:, :, 0], latents[:, :, 0]) and torch.equal(made[:, :, 3], latents[:, :, 3])
    expected = latents[:, :, 0] + latents[:, :, 3] + LABELS["labels"][:, None, None, None]
    for frame in (1, 2):
        torch.testing.assert_close(made[:, :, frame], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("context_scale", "guidance_scale"), [(2.5, 1.0), (1.0, 3.0), (2.5, 3.0)])
def test_guidance_moves_away_from_what_the_model_says_without(known_base, context_scale, guidance_scale):
    """The model's answer is the sum of the frames plus the label, so each guidance multiplies its own part."""
    latents, mask = known(), torch.tensor([1.0, 0, 0, 0])
    options = ContextSampling(num_inference_steps=4, context_scale=context_scale, guidance_scale=guidance_scale)
    base = known_base(total)
    made = sample_given(base, ContextPlanes(), LABELS, latents, mask, options)
    expected = context_scale * latents[:, :, 0] + guidance_scale * LABELS["labels"][:, None, None, None]
    torch.testing.assert_close(made[:, :, 2], expected, rtol=1e-3, atol=1e-3)
    assert len(base.calls[0]) == 2 * (1 + (context_scale != 1) + (guidance_scale != 1))


def test_without_given_frames_the_rate_is_still_told(known_base):
    planes = ContextPlanes(rate=True)
    base = known_base(total)
    options = ContextSampling(num_inference_steps=2, context_scale=2.0)
    sample_given(base, planes, LABELS, known(), torch.tensor([1.0, 0, 0, 0]), options, rate=1.0)
    assert (base.calls[0][:, -1] == 1).all() and (base.calls[0][2:, :5] == 0).all()


def test_noise_on_the_given_frames_is_told_and_stays_the_same(known_base):
    planes = ContextPlanes(max_noise_level=250)
    base = known_base(total)
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


def test_a_clip_is_the_same_however_it_is_batched(unsure_base):
    """With fresh noise in each step."""
    base = unsure_base
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


def test_a_clip_with_a_seed_of_its_own_is_the_same_among_others(unsure_base):
    latents, mask = known(), torch.tensor([1.0, 0, 0, 0])

    def sample(rows, seed):
        options = ContextSampling(num_inference_steps=3, eta=0.5, seed=seed)
        labels = {"labels": LABELS["labels"][rows]}
        return sample_given(unsure_base, ContextPlanes(), labels, latents[rows], mask, options)

    together = sample([0, 1, 1], (5, 6, 7))
    for row, (clip, seed) in enumerate([(0, 5), (1, 6), (1, 7)]):
        torch.testing.assert_close(sample([clip], (seed,))[0], together[row])
    torch.testing.assert_close(sample([0], 5)[0], together[0])  # the first clip of a seed
    assert not torch.allclose(together[1, :, 1:], together[2, :, 1:], atol=1e-2)  # two futures of one start


def test_with_no_frame_given_context_guidance_changes_nothing_and_costs_nothing(known_base):
    base = known_base(total)
    options = ContextSampling(num_inference_steps=2, context_scale=3.0)
    made = sample_given(base, ContextPlanes(), LABELS, known(), torch.zeros(4), options)
    expected = LABELS["labels"][:, None, None, None, None].expand_as(made)
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
    assert len(base.calls[0]) == 2  # a batch, once


def test_guidance_moves_away_from_what_is_told_in_place_of_nothing(known_base):
    """The model's answer is the label, so 3 times the way from -1 to it is ``-1 + 3 (label + 1)``."""
    options = ContextSampling(num_inference_steps=4, guidance_scale=3.0)
    negative = {"labels": -torch.ones(3)}
    made = sample_given(known_base(total), ContextPlanes(), LABELS, known(), torch.zeros(4), options, negative=negative)
    expected = (-1 + 3 * (LABELS["labels"] + 1))[:, None, None, None, None].expand_as(made)
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ContextSampling(eta=1.0), r"ContextSampling: .* eta from 0 to below 1, got .*eta=1\.0"),
        (
            lambda: ContextSampling(num_inference_steps=0),
            r"ContextSampling: expected num_inference_steps .* at least 1",
        ),
        (
            lambda: ContextSampling(seed=(1, 2)).check_seeds(3),
            r"ContextSampling: seed: .* one for each of 3 clips, got \(1, 2\)",
        ),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_seeds_of_other_clips_are_refused(known_base):
    with pytest.raises(ValueError, match=r"one for each of 3 clips, got \(1, 2\)"):
        sample_given(known_base(total), ContextPlanes(), LABELS, known(), torch.zeros(4), ContextSampling(seed=(1, 2)))
