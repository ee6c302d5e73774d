"""Boxes in an image model: closed gates, files, diffusers' own GLIGEN pipeline, sampling, and what is refused."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from temporal_layers.adapters import inject
from temporal_layers.recipes.bases import LabelBase, PipelineBase
from temporal_layers.recipes.boxes import (
    BOXES,
    WEIGHTS,
    BoxBase,
    add_boxes,
    box_coverage,
    box_parameters,
    gated,
    is_gated,
    load_boxes,
    sample_boxes,
)
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm, sample_images

TINY = ImageLDMConfig(
    height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 16), num_heads=2, context_dim=8, num_tokens=2
)
ONE = torch.tensor([[0.1, 0.2, 0.5, 0.9]])
TWO = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.6, 0.0, 1.0, 0.4]])
NONE = torch.empty(0, 4)


def opened(base, gate=0.7):
    """With gates that are open and weights that make boxes matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in box_parameters(base.unet).items():
            if "alpha_" in name:
                parameter.fill_(gate)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return base


@pytest.fixture
def image():
    return LabelBase(build_image_ldm(TINY, ("day", "night"), seed=0))


@pytest.fixture
def base(image):
    return opened(add_boxes(image, max_boxes=3))


@pytest.fixture
def gligen(stable_diffusion):
    """A pipeline of diffusers whose UNet is gated, as published ones for text and boxes are."""
    stable_diffusion.unet = gated(stable_diffusion.unet, seed=0)
    opened(BoxBase(PipelineBase(stable_diffusion)))
    return stable_diffusion


def predicted(base, conditioning, shape=(2, 4, 8, 12)):
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return base.predict(noisy, torch.tensor([300]), conditioning)


# -- gates ------------------------------------------------------------------------------------------------------------


def test_with_closed_gates_it_is_the_image_model_bit_for_bit_and_each_part_learns(image):
    rows = image.conditioning([0, 1], ["", ""])
    expected = predicted(image, rows)
    boxes = add_boxes(image, max_boxes=3)
    assert torch.equal(predicted(boxes, boxes.with_boxes(rows, [ONE, TWO])), expected)
    noisy = torch.randn(2, 4, 8, 12)
    told = boxes.with_boxes(rows, [ONE, TWO])
    for _ in range(2):  # the gates move first, and let the others move
        boxes.unet.zero_grad()
        boxes.predict(noisy, torch.tensor([300]), told).square().mean().backward()
        moved = {name for name, value in box_parameters(boxes.unet).items() if value.grad.abs().max() > 0}
        assert any("alpha_attn" in name for name in moved)
        with torch.no_grad():
            for name, parameter in box_parameters(boxes.unet).items():
                if "alpha_" in name:
                    parameter -= 0.1 * parameter.grad.sign()
    assert moved == set(box_parameters(boxes.unet))


def test_the_image_model_that_is_given_stays_as_it_is(image):
    before = {name: value.clone() for name, value in image.unet.state_dict().items()}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = torch.get_rng_state()
        boxes = opened(add_boxes(image))
        assert torch.equal(torch.get_rng_state(), state)
    assert not is_gated(image.unet) and is_gated(boxes.unet)
    after = image.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert boxes.base.ldm.unet is boxes.unet is not image.ldm.unet


def test_boxes_matter_and_their_order_does_not(base):
    rows = base.conditioning([0, 1], ["", ""])
    nothing, one, two = (predicted(base, base.with_boxes(rows, [some] * 2)) for some in (NONE, ONE, TWO))
    turned = predicted(base, base.with_boxes(rows, [TWO.flip(0)] * 2))
    assert (one - nothing).abs().max() > 1e-3 and (two - one).abs().max() > 1e-3
    torch.testing.assert_close(turned, two, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(predicted(base, rows), nothing, atol=0, rtol=0)


def test_clips_take_boxes_of_a_clip_and_of_each_frame(base):
    inject(base.unet)
    noisy, timestep = torch.randn(2, 4, 3, 8, 12), torch.tensor([300])
    told = base.with_boxes(base.conditioning([0, 1], ["", ""]), [ONE, TWO])
    each = {name: value.repeat_interleave(3, 0) for name, value in told.items()}
    with torch.no_grad():
        clips = base.predict(noisy, timestep, told)
        assert torch.equal(base.predict(noisy, timestep, {**each}), clips)
        frames = base.predict(noisy.transpose(1, 2).flatten(0, 1), timestep, each)
    assert torch.equal(clips.transpose(1, 2).flatten(0, 1), frames)


# -- diffusers' pipelines ---------------------------------------------------------------------------------------------


def test_a_pipeline_gets_the_boxes_that_diffusers_gligen_pipeline_gives_it(gligen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated there, but the one that published weights are for
        from diffusers import StableDiffusionGLIGENPipeline

        parts = {name: part for name, part in gligen.components.items() if name != "image_encoder"}
        theirs = StableDiffusionGLIGENPipeline(**parts, requires_safety_checker=False)
    seen = []
    handle = gligen.unet.position_net.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    theirs.set_progress_bar_config(disable=True)
    phrases, boxes = ["a road", "a road"], TWO.tolist()
    options = {"gligen_phrases": phrases, "gligen_boxes": boxes, "gligen_scheduled_sampling_beta": 1.0}
    theirs("a day", num_inference_steps=1, output_type="latent", height=32, width=32, **options)
    base = BoxBase(PipelineBase(gligen), phrase="a road")
    told = base.with_boxes(base.conditioning([0], ["a day"]), [TWO])
    base.predict(torch.randn(1, 4, 16, 16), torch.tensor(5), told)
    handle.remove()
    expected, own = seen[0], seen[-1]
    assert expected["boxes"].shape == (2, 30, 4)  # without and with, for guidance
    assert torch.equal(own["boxes"][0], expected["boxes"][1])
    assert torch.equal(own["masks"][0], expected["masks"][1])
    for number in range(2):
        torch.testing.assert_close(own["positive_embeddings"][0, number], expected["positive_embeddings"][1, number])


def test_sampling_works_for_a_pipeline(gligen):
    base = BoxBase(PipelineBase(gligen), phrase="a road")
    rows = base.conditioning([0, 0], ["a day", "a night"])
    made = sample_boxes(base, rows, [ONE, NONE], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert made.shape == (2, 3, *base.frame_size) and made.min() >= 0 and made.max() <= 1


def test_a_pipeline_gets_gates_and_the_given_one_stays(stable_diffusion):
    image = PipelineBase(stable_diffusion)
    base = add_boxes(image)
    assert is_gated(base.base.pipeline.unet) and not is_gated(stable_diffusion.unet)
    assert base.embedding.shape == (16,) and base.embedding.abs().max() > 0


def test_a_pipeline_of_another_width_is_refused(stable_diffusion_xl):
    with pytest.raises(ValueError, match=r"embeddings are as wide .* takes them, 32, got 16; take Stable Diffusion"):
        add_boxes(PipelineBase(stable_diffusion_xl))


# -- files ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_and_nothing_else_is_saved(base, image, tmp_path):
    base.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    assert weights.keys() == box_parameters(base.unet).keys()
    assert {value.dtype for value in weights.values()} == {torch.float16}
    loaded = load_boxes(image, tmp_path)
    assert loaded.max_boxes == 3 and loaded.phrase == "a car"
    for name, value in box_parameters(loaded.unet).items():
        torch.testing.assert_close(value, base.unet.get_parameter(name).half().float(), atol=0, rtol=0)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "BoxBase"


def test_folders_of_something_else_are_refused(base, image, tmp_path):
    with pytest.raises(ValueError, match=r"load_boxes: expected a folder with a config\.json of class BoxBase, got"):
        load_boxes(image, tmp_path)
    base.save_pretrained(tmp_path)
    other = LabelBase(build_image_ldm(dataclasses.replace(TINY, unet_channels=(16, 32)), ("day",)))
    with pytest.raises(ValueError, match=r"load_boxes: expected weights for this UNet.*, got .* 'down_blocks"):
        load_boxes(other, tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    weights.pop("position_net.null_position_feature")
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"such as 'position_net\.null_position_feature' in"):
        load_boxes(image, tmp_path)


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_without_boxes_behind_closed_gates_samples_are_those_of_the_image_model(image):
    base = add_boxes(image)
    noise, labels = torch.randn(2, 4, 8, 12), torch.tensor([0, 1])
    expected = sample_images(image.ldm, labels, noise=noise, num_inference_steps=3, guidance_scale=2.0)
    made = sample_boxes(base, base.conditioning([0, 1], ["", ""]), [ONE, NONE], noise=noise, num_inference_steps=3)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("guidance_scale", "box_scale"), [(1.0, 1.0), (3.0, 1.0), (1.0, 2.5), (3.0, 2.5)])
def test_each_guidance_adds_what_leaving_its_condition_out_takes_away(base, guidance_scale, box_scale):
    noise = torch.randn(1, 4, 8, 12)
    rows, nothing = base.conditioning([1], [""]), base.no_conditioning(1)
    told = base.with_boxes(rows, [ONE])
    scales = {"guidance_scale": guidance_scale, "box_scale": box_scale}
    made = sample_boxes(base, rows, [ONE], noise=noise, num_inference_steps=1, **scales)
    timestep = torch.tensor(999)
    with torch.no_grad():
        full = base.predict(noise, timestep, told)
        guided = full + (guidance_scale - 1) * (full - base.predict(noise, timestep, {**nothing, BOXES: told[BOXES]}))
        guided = guided + (box_scale - 1) * (full - base.predict(noise, timestep, rows))
        clean = (
            base.scheduler.alphas_cumprod[-1].sqrt() * noise - (1 - base.scheduler.alphas_cumprod[-1]).sqrt() * guided
        )
        expected = base.decode(clean)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


def test_samples_do_not_depend_on_the_batch(base):
    rows, noise = base.conditioning([0, 1, 0], [""] * 3), torch.randn(3, 4, 8, 12)
    options = {"noise": noise, "num_inference_steps": 2}
    whole = sample_boxes(base, rows, [ONE, NONE, TWO], **options)
    parts = sample_boxes(base, rows, [ONE, NONE, TWO], batch_size=2, **options)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


# -- boxes and pixels -------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    corners=st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
def test_coverage_is_the_share_of_fine_pixels_in_the_largest_part(corners, height, width):
    boxes = torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners])
    coverage = box_coverage(boxes, height, width)
    fine = 64
    across = (np.arange(width * fine) + 0.5) / (width * fine)
    down = (np.arange(height * fine) + 0.5) / (height * fine)
    shares = []
    for left, top, right, bottom in boxes.tolist():
        mask = ((top <= down) & (down <= bottom))[:, None] * ((left <= across) & (across <= right))[None]
        shares.append(mask.reshape(height, fine, width, fine).mean((1, 3)))
    assert np.abs(coverage.numpy() - np.max(shares, axis=0)).max() < 2.1 / fine


def test_boxes_that_are_not_there_cover_nothing():
    assert box_coverage(torch.zeros(2, 3, 4), 4, 6).abs().max() == 0
    assert box_coverage(torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]), 4, 6).min() == 1


# -- what is refused --------------------------------------------------------------------------------------------------


def test_bad_models_are_refused(image, base, unconditional):
    with pytest.raises(ValueError, match=r"BoxBase: base: expected one whose UNet is gated, got a UNet2D"):
        BoxBase(image)
    with pytest.raises(ValueError, match=r"gated: expected .* got UNet2DConditionModel with attention_type='gated'"):
        gated(base.unet)
    with pytest.raises(ValueError, match=r"gated: expected .* got UNet2DModel with attention_type=None"):
        gated(unconditional.unet)
    inject(image.unet)
    with pytest.raises(ValueError, match=r"gated: expected the layers of the image model alone, .* make the"):
        gated(image.unet)


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        (torch.rand(4, 4), r"boxes: expected \(3 at most, 4\) for an image, got \(4, 4\)"),
        (torch.rand(2, 5), r"boxes: expected \(3 at most, 4\) for an image, got \(2, 5\)"),
        (torch.tensor([[0.5, 0.2, 0.5, 0.9]]), r"boxes: expected left < right .* got \[0\.5, "),
        (torch.tensor([[0.1, 0.9, 0.5, 0.2]]), r"boxes: expected left < right and top < bottom"),
        (torch.tensor([[0.1, 0.2, 1.5, 0.9]]), r"as shares of width and height from 0 to 1, got \[0\.1"),
        (torch.tensor([[0.1, 0.2, float("nan"), 0.9]]), r"boxes: expected left < right"),
    ],
)
def test_bad_boxes_are_refused(base, boxes, text):
    with pytest.raises(ValueError, match=text):
        base.with_boxes(base.conditioning([0], [""]), [boxes])


def test_rows_that_do_not_fit_are_refused(base):
    with pytest.raises(ValueError, match=r"sample_boxes: expected a row of everything for 2 images, got \{'labels': 1"):
        sample_boxes(base, base.conditioning([0], [""]), [ONE, ONE])
    with pytest.raises(ValueError, match=r"sample_boxes: expected a row of everything for 1 images, .*'noise': 2"):
        sample_boxes(base, base.conditioning([0], [""]), [ONE], noise=torch.randn(2, 4, 8, 12))
