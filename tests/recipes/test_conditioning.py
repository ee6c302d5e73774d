"""Masks, planes, noise and guidance of frame contexts, against closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers import ContextConfig
from temporal_layers.adapters import TemporalAdapter, TemporalConfig, inject
from temporal_layers.recipes.conditioning import (
    ContextPlanes,
    augment,
    context_guidance,
    draw_given,
    interpolated_length,
    interpolation_mask,
    joint_guidance,
    prediction_mask,
    signal_levels,
)


def test_masks():
    assert prediction_mask(2, 5).tolist() == [1, 1, 0, 0, 0]
    assert prediction_mask(torch.tensor([0, 1]), 3).tolist() == [[0, 0, 0], [1, 0, 0]]
    assert interpolation_mask(5).tolist() == [1, 0, 0, 0, 1]
    assert interpolation_mask(9).tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert interpolation_mask(3, factor=2).tolist() == [1, 0, 1]


def test_eight_frames_become_29_and_then_113():
    assert [interpolated_length(8, levels=levels) for levels in range(3)] == [8, 29, 113]
    for count in range(2, 6):  # one window a pair, ends shared
        assert interpolated_length(count) == len(interpolation_mask(4 * (count - 1) + 1))


def test_the_number_of_given_frames_has_its_probabilities():
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([draw_given((0.2, 0.5, 0.3), generator) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=3) / len(draws)
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.5, 0.3]), rtol=0, atol=0.03)
    assert {draw_given((0, 0, 2), generator) for _ in range(20)} == {2}


@given(levels=st.sampled_from([0, 250]), rate=st.booleans(), batched=st.booleans(), seed=st.integers(0, 99))
def test_planes_are_what_they_say(levels, rate, batched, seed):
    torch.manual_seed(seed)
    planes = ContextPlanes(latent_channels=3, max_noise_level=levels, rate=rate)
    latents, mask = torch.randn(2, 3, 4, 2, 5), torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0]])
    told = {"level": torch.tensor([50, 0]) if levels else 0, "rate": torch.tensor([1.0, 0.0]) if rate else 0.0}
    if not batched:
        latents, mask = latents[0], mask[0]
        told = {name: value if not torch.is_tensor(value) else value[0] for name, value in told.items()}
    context = planes.build(latents, mask, **told)
    whole = context if batched else context[None]
    assert whole.shape == (2 if batched else 1, planes.channels, 4, 2, 5)
    for frame in range(4):
        given_here = frame in (0, 3)
        expected = (latents if batched else latents[None])[0, :, frame] if given_here else torch.zeros(3, 2, 5)
        assert torch.equal(whole[0, :3, frame], expected)
        assert (whole[0, 3, frame] == given_here).all()
        if levels:
            torch.testing.assert_close(whole[0, 4, frame], torch.full((2, 5), 0.2 * given_here))
        if rate:
            assert (whole[0, -1, frame] == 1).all()
    if batched:
        assert (whole[1] == 0).all()  # nothing given: the same as no context
    assert torch.equal(planes.given(context), mask)
    without = planes.without(context)
    assert torch.equal(without, planes.build(latents, 0 * mask, rate=told["rate"]))


def test_frames_that_are_not_given_do_not_matter():
    latents, mask = torch.randn(1, 4, 3, 2, 2), torch.tensor([[1.0, 0, 0]])
    spoilt = latents.clone()
    spoilt[:, :, 1:] = torch.nan
    assert torch.equal(ContextPlanes().build(latents, mask), ContextPlanes().build(spoilt, mask))


def test_planes_travel_with_the_adapter(tmp_path):
    unet = UNet2DModel(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    planes = ContextPlanes(max_noise_level=250, rate=True)
    assert planes.config("both") == ContextConfig(channels=7, inject="both")
    adapter = inject(unet, TemporalConfig(context=planes.config()))
    with pytest.raises(
        ValueError, match=r"ContextPlanes\.of: expected an adapter with 'frame_context' in its metadata"
    ):
        ContextPlanes.of(adapter)
    planes.note(adapter)
    adapter.save_pretrained(tmp_path)
    adapter.remove()
    assert ContextPlanes.of(TemporalAdapter.from_pretrained(unet, tmp_path)) == planes


def test_noise_on_given_frames_is_the_forward_process():
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    levels = signal_levels(scheduler)
    latents, noise = torch.randn(3, 4, 2, 5, 5), torch.randn(3, 4, 2, 5, 5)
    noisy = augment(latents, torch.tensor([0, 1, 250]), noise, levels)
    assert torch.equal(noisy[0], latents[0])  # level 0: none
    expected = scheduler.add_noise(latents[1:], noise[1:], torch.tensor([0, 249]))
    torch.testing.assert_close(noisy[1:], expected)
    assert torch.equal(augment(latents[0], 0, noise[0], levels), latents[0])
    flow = signal_levels(FlowMatchEulerDiscreteScheduler())
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    torch.testing.assert_close(flow[1:], bars)
    assert flow[0] == 1


def test_guidance():
    without, context, text = torch.randn(3, 2, 4, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(context_guidance(without, context, 0.0), without)
    torch.testing.assert_close(context_guidance(without, context, 1.0), context)
    torch.testing.assert_close(context_guidance(without, context, 2.5), 2.5 * context - 1.5 * without)
    both = context
    torch.testing.assert_close(
        joint_guidance(both, without_context=without, context_scale=2.5), context_guidance(without, both, 2.5)
    )
    torch.testing.assert_close(joint_guidance(both, without_text=text, text_scale=7.0), text + 7 * (both - text))
    together = joint_guidance(both, without_context=without, without_text=text, context_scale=2.0, text_scale=3.0)
    torch.testing.assert_close(together, 4 * both - without - 2 * text)
    assert torch.equal(joint_guidance(both), both)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: prediction_mask(3, 3), r"prediction_mask: expected from 0 to 2 given frames of 3, got 3"),
        (lambda: prediction_mask(-1, 3), r"prediction_mask: expected from 0 to 2 given frames of 3, got -1"),
        (lambda: interpolation_mask(4), r"interpolation_mask: expected num_frames of 4 n \+ 1 .* got num_frames=4"),
        (lambda: interpolation_mask(1), r"interpolation_mask: expected num_frames of 4 n \+ 1 .* got num_frames=1"),
        (lambda: interpolation_mask(5, factor=1), r"interpolation_mask: .* a factor of at least 2, got .* factor=1"),
        (lambda: draw_given(()), r"draw_given: probabilities: expected numbers of at least 0, .* got \(\)"),
        (lambda: draw_given((0.0, 0.0)), r"draw_given: probabilities: .* one of them above, .* got \(0\.0, 0\.0\)"),
        (lambda: draw_given((1.0, -1.0)), r"draw_given: probabilities: expected numbers of at least 0, .* got"),
        (lambda: ContextPlanes(latent_channels=0), r"ContextPlanes: expected latent_channels of at least 1 .* got"),
        (lambda: ContextPlanes(max_noise_level=-1), r"ContextPlanes: .* max_noise_level of at least 0, got .*=-1; 0"),
        (
            lambda: ContextPlanes().build(torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 2)),
            r"ContextPlanes\.build: expected latents \(\.\.\., 4, frames, height, width\) and a mask .* got \(1, 3, 2",
        ),
        (
            lambda: ContextPlanes().build(torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 3)),
            r"ContextPlanes\.build: expected latents .* and a mask \(\.\.\., frames\), got .* and \(1, 3\)",
        ),
        (
            lambda: ContextPlanes().build(torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 2), level=3),
            r"ContextPlanes\.build: expected levels from 0 to 0 and no rate, got level=3 and rate=0\.0; set max_noise",
        ),
        (
            lambda: ContextPlanes().build(torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 2), rate=1.0),
            r"ContextPlanes\.build: expected levels from 0 to 0 and no rate, got level=0 and rate=1\.0",
        ),
    ],
)  # fmt: skip
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
