"""Boxes told to an image model: nothing at the start, files, GLIGEN as diffusers does it, sampling, what is refused."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import T2IAdapter, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from temporal_layers.adapters import inject
from temporal_layers.recipes.bases import LabelBase, PipelineBase
from temporal_layers.recipes.boxes import BOXES, add_boxes, box_coverage, gligen_base, load_boxes, sample_boxes
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm, sample_images

TINY = ImageLDMConfig(
    height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 16), num_heads=2, context_dim=8, num_tokens=2
)
ONE = torch.tensor([[0.1, 0.2, 0.5, 0.9]])
TWO = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.6, 0.0, 1.0, 0.4]])
NONE = torch.empty(0, 4)


def trained(base):
    """With weights as after a training, so that boxes matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in base.reader.adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return base


@pytest.fixture
def image():
    return LabelBase(build_image_ldm(TINY, ("day", "night"), seed=0))


@pytest.fixture
def base(image):
    return trained(add_boxes(image, max_boxes=3))


@pytest.fixture
def gligen(stable_diffusion):
    """A pipeline whose UNet has gates, and open ones, as published GLIGEN pipelines have."""
    unet = UNet2DConditionModel.from_config(stable_diffusion.unet.config, attention_type="gated").eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "alpha_" in name:
                parameter.fill_(0.7)
    stable_diffusion.unet = unet
    return stable_diffusion


def predicted(base, conditioning, shape=(2, 4, 8, 12)):
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return base.predict(noisy, torch.tensor([300]), conditioning)


# -- the adapter ------------------------------------------------------------------------------------------------------


def test_at_the_start_it_is_the_image_model_bit_for_bit_and_every_part_learns(image):
    rows = image.conditioning([0, 1], ["", ""])
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        boxes = add_boxes(image, max_boxes=3)
        assert torch.equal(torch.get_rng_state(), state)
    told = boxes.with_boxes(rows, [ONE, TWO])
    assert torch.equal(predicted(boxes, told), predicted(image, rows))
    adapter = boxes.reader.adapter
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    for _ in range(2):
        adapter.zero_grad()
        boxes.predict(torch.randn(2, 4, 8, 12), torch.tensor([300]), told).square().mean().backward()
        assert adapter.adapter.conv_in.weight.grad.abs().max() > 0
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


def test_boxes_matter_where_they_are_and_their_order_does_not(base):
    rows = base.conditioning([0, 1], ["", ""])
    nothing, one, two = (predicted(base, base.with_boxes(rows, [some] * 2)) for some in (NONE, ONE, TWO))
    assert (one - nothing).abs().max() > 1e-3 and (two - one).abs().max() > 1e-3
    assert torch.equal(predicted(base, base.with_boxes(rows, [TWO.flip(0)] * 2)), two)
    assert torch.equal(predicted(base, rows), nothing)


def test_each_image_gets_its_own_boxes(base):
    rows = base.conditioning([0, 1], ["", ""])
    both = predicted(base, base.with_boxes(rows, [ONE, TWO]))
    turned = predicted(base, base.with_boxes(rows, [TWO, TWO]))
    assert torch.equal(both[1], turned[1]) and not torch.allclose(both[0], turned[0], atol=1e-3)


@pytest.mark.parametrize("when", ["before", "after"])
def test_clips_take_boxes_of_a_clip_and_of_each_frame(image, when):
    if when == "before":
        inject(image.unet)
    base = trained(add_boxes(image, max_boxes=3))
    if when == "after":
        inject(image.unet)
    noisy, timestep = torch.randn(2, 4, 3, 8, 12), torch.tensor([300])
    told = base.with_boxes(base.conditioning([0, 1], ["", ""]), [ONE, TWO])
    each = {name: value.repeat_interleave(3, 0) for name, value in told.items()}
    with torch.no_grad():
        clips = base.predict(noisy, timestep, told)
        frames = base.predict(noisy.transpose(1, 2).flatten(0, 1), timestep, each)
        assert torch.equal(clips.transpose(1, 2).flatten(0, 1), frames)
        moving = {**told, BOXES: each[BOXES].roll(1, 0)}
        turned = {**each, BOXES: moving[BOXES]}
        frames = base.predict(noisy.transpose(1, 2).flatten(0, 1), timestep, turned)
        assert torch.equal(base.predict(noisy, timestep, moving).transpose(1, 2).flatten(0, 1), frames)


def test_other_sizes_than_that_of_the_training_work(base):
    rows = base.with_boxes(base.conditioning([0, 1], ["", ""]), [ONE, TWO])
    assert predicted(base, rows, (2, 4, 12, 16)).shape == (2, 4, 12, 16)


@pytest.mark.parametrize("pipeline", ["stable_diffusion", "stable_diffusion_xl"])
def test_pipelines_read_boxes(request, pipeline):
    base = trained(add_boxes(PipelineBase(request.getfixturevalue(pipeline))))
    rows = base.conditioning([0, 0], ["a day", "a night"])
    one, none = (predicted(base, base.with_boxes(rows, [some] * 2), (2, 4, 16, 16)) for some in (ONE, NONE))
    assert (one - none).abs().max() > 1e-3
    made = sample_boxes(base, rows, [ONE, NONE], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert made.shape == (2, 3, *base.frame_size) and made.min() >= 0 and made.max() <= 1


def test_the_layout_of_stable_diffusion_1_reads_boxes(stable_diffusion):
    stable_diffusion.unet = UNet2DConditionModel.from_config(
        stable_diffusion.unet.config,
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    base = trained(add_boxes(PipelineBase(stable_diffusion)))
    rows = base.conditioning([0], ["a day"])
    one, none = (predicted(base, base.with_boxes(rows, [some]), (1, 4, 16, 16)) for some in (ONE, NONE))
    assert (one - none).abs().max() > 1e-3


# -- GLIGEN -----------------------------------------------------------------------------------------------------------


def test_gligen_gets_the_boxes_that_diffusers_pipeline_gives_it(gligen):
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
    options = {"gligen_phrases": ["a road"] * 2, "gligen_boxes": TWO.tolist(), "gligen_scheduled_sampling_beta": 1.0}
    theirs("a day", num_inference_steps=1, output_type="latent", height=32, width=32, **options)
    base = gligen_base(PipelineBase(gligen), "a road")
    predicted(base, base.with_boxes(base.conditioning([0], ["a day"]), [TWO]), (1, 4, 16, 16))
    handle.remove()
    expected, own = seen[0], seen[-1]
    assert expected["boxes"].shape == (2, 30, 4)  # without and with, for guidance
    assert torch.equal(own["boxes"][0], expected["boxes"][1])
    assert torch.equal(own["masks"][0], expected["masks"][1])
    for number in range(2):
        torch.testing.assert_close(own["positive_embeddings"][0, number], expected["positive_embeddings"][1, number])


def test_gligen_samples_and_takes_clips(gligen):
    base = gligen_base(PipelineBase(gligen), "a road")
    rows = base.conditioning([0, 0], ["a day", "a night"])
    made = sample_boxes(base, rows, [ONE, NONE], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert made.shape == (2, 3, *base.frame_size)
    inject(gligen.unet)
    assert predicted(base, base.with_boxes(rows, [ONE, NONE]), (2, 4, 3, 16, 16)).shape == (2, 4, 3, 16, 16)


def test_other_models_are_no_gligen(image, stable_diffusion, gligen):
    for base, kind in ((image, "LabelBase"), (PipelineBase(stable_diffusion), "PipelineBase")):
        if kind == "PipelineBase":
            base.unet = UNet2DConditionModel.from_config(gligen.unet.config, attention_type="default")
        with pytest.raises(ValueError, match=rf"gligen_base: .* attention_type='gated', got a {kind} with 'default'"):
            gligen_base(base, "a car")
    base = PipelineBase(gligen)
    base.unet.position_net.positive_len = 32
    with pytest.raises(ValueError, match=r"gligen_base: .* pooled embeddings of width 32, .* got 16"):
        gligen_base(base, "a car")


# -- files ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_here_and_by_diffusers(base, image, tmp_path):
    base.reader.save_pretrained(tmp_path)
    loaded = load_boxes(image, tmp_path, max_boxes=3)
    assert {value.dtype for value in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values()} == {
        torch.half
    }
    for name, value in T2IAdapter.from_pretrained(tmp_path, torch_dtype=torch.half).state_dict().items():
        own = base.reader.adapter.get_parameter(name).half()
        assert torch.equal(value, own)
        torch.testing.assert_close(loaded.reader.adapter.get_parameter(name), own.float(), atol=0, rtol=0)
    rows = base.with_boxes(base.conditioning([0, 1], ["", ""]), [ONE, TWO])
    torch.testing.assert_close(predicted(loaded, rows), predicted(base, rows), atol=1e-2, rtol=0)


def test_folders_of_something_else_are_refused(base, image, tmp_path):
    with pytest.raises(ValueError, match=r"load_boxes: expected the folder of a T2IAdapter with .*, got none in"):
        load_boxes(image, tmp_path)
    base.reader.save_pretrained(tmp_path)
    other = LabelBase(build_image_ldm(dataclasses.replace(TINY, unet_channels=(16, 32)), ("day",)))
    with pytest.raises(ValueError, match=r"got \{'channels': \[16, 16\]\} in .*; take the image model that it was"):
        load_boxes(other, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "ControlNetModel"}))
    with pytest.raises(ValueError, match=r"load_boxes: .* got ControlNetModel in"):
        load_boxes(image, tmp_path)


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_at_the_start_samples_are_those_of_the_image_model(image):
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


def test_bad_models_are_refused(image, unconditional):
    with pytest.raises(ValueError, match=r"add_boxes: base: expected one with a UNet2DConditionModel, .* UNet2DModel"):
        add_boxes(PipelineBase(unconditional))
    four = dataclasses.replace(TINY, unet_channels=(16, 16, 16, 16))
    with pytest.raises(ValueError, match=r"add_boxes: base: expected a UNet with attention in all down blocks but the"):
        add_boxes(LabelBase(build_image_ldm(four, ("day",))))


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
