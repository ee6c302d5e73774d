"""The denoising loop and guidance, with models whose answer is known."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from temporal_layers.recipes.sampling.loop import Branch, GuidedModel, denoise, is_on
from temporal_layers.recipes.sampling.regions import InRegions, Region, regions, windows
from temporal_layers.recipes.sampling.sampler import Sampler


class AddingBase:
    """A base whose UNet says the noisy clip, plus its label, plus ten times the first plane of its context."""

    def __init__(self):
        self.unet = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
        self.rows = []

    def predict(self, noisy, timestep, conditioning, frame_context=None):
        labels = conditioning["labels"]
        self.rows.append(len(labels))
        shape = (len(noisy), 1, -1, 1, 1) if noisy.ndim == 5 else (len(noisy), 1, 1, 1)
        output = noisy + labels.reshape(shape)
        return output if frame_context is None else output + 10 * frame_context[:, :1]


LABELS = Branch({"labels": torch.tensor([1.0, 2.0])})
NONE = Branch({"labels": torch.zeros(2)})
NOISY = torch.randn(2, 3, 4, 2, 2)
TIMESTEP = torch.tensor(3)


def ask(model, noisy=NOISY):
    return model(noisy, TIMESTEP, Region.of(noisy)) - noisy


@pytest.mark.parametrize("frame_by_frame", [False, True])
def test_text_guidance_is_that_of_ho_and_salimans(frame_by_frame):
    model = GuidedModel(AddingBase(), LABELS, without_text=NONE, text_scale=3.0, frame_by_frame=frame_by_frame)
    expected = torch.tensor([3.0, 6.0]).reshape(2, 1, 1, 1, 1).expand_as(NOISY)
    torch.testing.assert_close(ask(model), expected)
    assert model.base.rows == [16 if frame_by_frame else 4]


def test_a_strength_for_each_frame():
    model = GuidedModel(AddingBase(), LABELS, without_text=NONE, text_scale=[1.0, 2.0, 3.0, 4.0])
    expected = torch.tensor([[1.0, 2, 3, 4], [2, 4, 6, 8]])
    torch.testing.assert_close(ask(model)[:, 0, :, 0, 0], expected)
    second = regions(windows(4, 2))[1]
    part = model(NOISY[:, :, 2:], TIMESTEP, Region(second.frames, slice(0, 2), slice(0, 2))) - NOISY[:, :, 2:]
    torch.testing.assert_close(part[:, 0, :, 0, 0], expected[:, 2:])


def test_a_text_for_each_frame_and_none_to_compare_it_with():
    labels = torch.arange(8.0)  # four frames of the first clip, then four of the second
    model = GuidedModel(AddingBase(), Branch({"labels": labels}), without_text=NONE, text_scale=2.0)
    torch.testing.assert_close(ask(model)[:, 0, :, 0, 0], 2 * labels.reshape(2, 4))
    assert model.base.rows == [16]
    cut = InRegions(model, regions(windows(4, 3, 1)))
    torch.testing.assert_close(ask(cut)[:, 0, :, 0, 0], 2 * labels.reshape(2, 4))


def test_both_guidances_add_up_and_regions_see_their_part_of_the_context():
    context = torch.rand(2, 5, 4, 2, 2)
    told = Branch(LABELS.conditioning, context)
    model = GuidedModel(
        AddingBase(),
        told,
        without_text=Branch(NONE.conditioning, context),
        without_context=Branch(LABELS.conditioning, torch.zeros_like(context)),
        text_scale=2.0,
        context_scale=[1.0, 2.0, 0.5, 3.0],
    )
    scales = torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None, None]
    expected = 2 * torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1, 1) + 10 * scales * context[:, :1]
    torch.testing.assert_close(ask(model), expected.expand_as(NOISY))
    tiled = InRegions(model, regions(windows(4, 2, 1), windows(2, 1), windows(2, 1)), ramp=True)
    torch.testing.assert_close(ask(tiled), expected.expand_as(NOISY))


def test_what_guidance_does_not_need_is_not_asked():
    model = GuidedModel(AddingBase(), LABELS, without_text=NONE, without_context=NONE)
    ask(model)
    assert model.base.rows == [2] and not is_on([1, 1.0]) and is_on([1, 2])
    unconditional = GuidedModel(
        SimpleNamespace(unet=model.base.unet), Branch({}), without_text=Branch({}), text_scale=4
    )
    assert len(unconditional.branches) == 1


def test_the_loop_hands_every_step_out_and_goes_on_with_what_comes_back():
    sampler = Sampler(DDIMScheduler(prediction_type="sample", clip_sample=False), 5)
    seen = []

    def on_step(number, timestep, latents):
        seen.append((number, int(timestep)))
        return latents if number < 4 else torch.full_like(latents, 7.0)

    latents = denoise(lambda noisy, timestep, region: 0 * noisy, sampler, sampler.start(NOISY), on_step=on_step)
    assert seen == [(number, int(timestep)) for number, timestep in enumerate(sampler.timesteps)]
    assert (latents == 7).all()


def test_the_loop_stops_when_it_is_told_to():
    sampler = Sampler(DDIMScheduler(prediction_type="sample", clip_sample=False), 5)
    seen = []

    def on_step(number, timestep, latents):
        seen.append(number)
        return latents + number

    start = sampler.start(NOISY)
    latents = denoise(
        lambda noisy, timestep, region: 0 * noisy, sampler, start, on_step=on_step, stop=lambda: len(seen) == 2
    )
    once = denoise(lambda noisy, timestep, region: 0 * noisy, sampler, sampler.start(NOISY), stop=lambda: True)
    assert seen == [0, 1] and torch.equal(once, start) and not torch.equal(latents, start)
