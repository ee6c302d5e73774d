"""The video pipeline against the sampling functions, the pipelines of diffusers and closed forms."""

import copy
import functools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from temporal_layers.adapters import TemporalConfig, inject
from temporal_layers.recipes.bases import LabelBase, PipelineBase
from temporal_layers.recipes.conditioning import ContextPlanes, prediction_mask
from temporal_layers.recipes.pipelines.components import TemporalPipeline
from temporal_layers.recipes.pipelines.video_ldm import VideoLDMPipeline, guidance_ramp
from temporal_layers.recipes.sampling.clips import sample_clips
from temporal_layers.recipes.sampling.context import ContextSampling, sample_given
from temporal_layers.recipes.sampling.noise import clip_generators, clips_of_noise, windows_of_noise
from temporal_layers.recipes.stages.personal import TwoTexts, frozen_text

FRAMES = 4
FEW = {"num_inference_steps": 3}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def text(stable_diffusion, randomise):
    randomise(inject(stable_diffusion.unet))
    return quiet(VideoLDMPipeline.from_image_pipeline(stable_diffusion))


@pytest.fixture
def labels(label_model, randomise):
    randomise(inject(label_model.unet))
    return quiet(VideoLDMPipeline.from_image_pipeline(label_model))


@pytest.fixture
def predict(predicting):
    return quiet(VideoLDMPipeline.from_image_pipeline(predicting))


@pytest.fixture
def framewise(text):
    """A pipeline whose temporal layers are off: frames do not see each other."""
    with text.adapter.disabled():
        yield text


def latents_of(pipeline, *arguments, **options):
    return pipeline(*arguments, **{"num_frames": FRAMES, "output_type": "latent", **FEW, **options}).frames


def noise_for(pipeline, clips=1, frames=FRAMES, seed=7):
    shape = (clips, pipeline.base.latent_shape[0], frames, *pipeline.base.latent_shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_labels_give_what_sample_clips_gives(labels):
    noise, base = noise_for(labels, 2), LabelBase(copy.deepcopy(labels.base.ldm))
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    expected = sample_clips(base, base.conditioning([0, 1], ["", ""]), noise, **options)
    made = labels(["day", 1], num_frames=FRAMES, latents=noise, output_type="pt", **FEW).frames
    torch.testing.assert_close(made, expected.transpose(1, 2), **CLOSE)
    free = labels(num_frames=FRAMES, latents=noise[:1], output_type="pt", **FEW).frames
    expected = sample_clips(base, base.no_conditioning(1), noise[:1], num_inference_steps=3)
    torch.testing.assert_close(free, expected.transpose(1, 2), **CLOSE)


def test_texts_give_what_sample_clips_gives(text):
    noise, base = noise_for(text, 2), PipelineBase(text)
    told = base.conditioning([0, 0], ["a day", "a night"])
    expected = sample_clips(base, told, noise, num_inference_steps=3, guidance_scale=7.5)
    made = text(["a day", "a night"], num_frames=FRAMES, latents=noise, output_type="pt", **FEW).frames
    torch.testing.assert_close(made, expected.transpose(1, 2), **CLOSE)


@pytest.mark.parametrize(
    ("image_pipeline", "scheduler"),
    [
        ("stable_diffusion", DDIMScheduler),
        ("stable_diffusion", DPMSolverMultistepScheduler),
        ("stable_diffusion", EulerDiscreteScheduler),
        ("stable_diffusion", UniPCMultistepScheduler),
        ("stable_diffusion_xl", EulerDiscreteScheduler),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_one_frame_without_layers_is_the_image_of_diffusers(image_pipeline, scheduler, request, randomise):
    image = quiet(request.getfixturevalue(image_pipeline))
    image.scheduler = scheduler.from_config(image.scheduler.config)
    randomise(inject(image.unet))
    pipeline = quiet(VideoLDMPipeline.from_image_pipeline(image, scheduler=image.scheduler))
    if image_pipeline == "stable_diffusion_xl":
        assert pipeline.config.force_zeros_for_empty_prompt
    noise = noise_for(pipeline, 2, 1)
    for negative in (None, ["rain", "fog"]):
        options = {"negative_prompt": negative, "guidance_scale": 5.0, "num_inference_steps": 4, "output_type": "pt"}
        with pipeline.adapter.disabled():
            made = pipeline(["a day", "a night"], num_frames=1, latents=noise, **options).frames
            expected = image(["a day", "a night"], latents=noise[:, :, 0], **options).images
        torch.testing.assert_close(made[:, 0], expected, **CLOSE)
        assert not torch.allclose(made[0], made[1], atol=1e-2)


def test_the_same_seed_is_the_same_image_as_in_diffusers(text, stable_diffusion):
    quiet(stable_diffusion)
    with text.adapter.disabled():
        made = text("a day", num_frames=1, generator=torch.Generator().manual_seed(3), output_type="pt", **FEW).frames
        generator = torch.Generator().manual_seed(3)
        expected = stable_diffusion("a day", generator=generator, output_type="pt", **FEW).images
    torch.testing.assert_close(made[:, 0], expected, **CLOSE)


def test_video_to_video_is_image_to_image_of_diffusers(framewise, stable_diffusion):
    frame = torch.rand(3, 32, 32)
    clean = framewise.encode_clips(frame[None, :, None])[:, :, 0]  # latents, for which diffusers draws nothing
    image_to_image = quiet(StableDiffusionImg2ImgPipeline(**stable_diffusion.components, requires_safety_checker=False))
    for strength in (0.5, 1.0):
        options = {"strength": strength, "num_inference_steps": 4, "output_type": "pt"}
        made = framewise("a day", video=frame, generator=torch.Generator().manual_seed(3), **options).frames
        expected = image_to_image("a day", clean, generator=torch.Generator().manual_seed(3), **options).images
        torch.testing.assert_close(made[:, 0], expected, **CLOSE)


def test_a_video_keeps_as_much_as_is_not_noise(labels):
    frames, noise = torch.rand(1, FRAMES, 3, 32, 48), noise_for(labels)
    all_noise = latents_of(labels, "day", video=frames, strength=1.0, latents=noise)
    # The schedule ends in pure noise.
    torch.testing.assert_close(all_noise, latents_of(labels, "day", latents=noise), **CLOSE)
    clean = labels.encode_clips(frames.transpose(1, 2))
    away = [
        (latents_of(labels, "day", video=frames, strength=s, latents=noise, num_inference_steps=10) - clean).std()
        for s in (0.1, 0.5, 1.0)
    ]
    assert away[0] < away[1] < away[2] and away[0] < 0.5
    eight = latents_of(labels, "day", video=frames, latents=noise, num_inference_steps=5)
    assert torch.equal(
        eight, latents_of(labels, "day", video=frames, strength=0.8, latents=noise, num_inference_steps=5)
    )


@pytest.mark.parametrize(("context_scale", "scale", "level"), [(1.0, 1.0, 0), (2.0, 1.0, 0), (2.0, 3.0, 125)])
def test_given_frames_lead_to_what_sample_given_makes(predict, context_scale, scale, level):
    base, first = predict.base, torch.rand(2, 2, 3, 32, 48)
    known = torch.zeros(2, 4, FRAMES, 16, 24)
    known[:, :, :2] = predict.encode_clips(first.transpose(1, 2))
    options = ContextSampling(
        num_inference_steps=3, context_scale=context_scale, guidance_scale=scale, noise_level=level
    )
    planes, told = ContextPlanes.of(predict.adapter), base.conditioning([0, 1], ["", ""])
    expected = sample_given(base, planes, told, known, prediction_mask(2, FRAMES), options)
    sources = clip_generators(0, range(2))  # of which sample_given takes the noise of the given frames first
    clips_of_noise(known.shape[1:], sources)
    made = latents_of(
        predict,
        ["day", "night"],
        image=first,
        latents=clips_of_noise(known.shape[1:], sources),
        generator=clip_generators(0, range(2)),
        guidance_scale=scale,
        context_guidance_scale=context_scale,
        context_noise_level=level,
    )
    torch.testing.assert_close(made, expected, **CLOSE)
    assert torch.equal(made[:, :, :2], known[:, :, :2])


def test_one_start_image_is_for_all_clips(predict):
    image = Image.new("RGB", (96, 64), (200, 30, 60))
    made = latents_of(predict, ["day", "night"], image=image, num_videos_per_prompt=2)
    start = predict.encode_clips(torch.tensor([200, 30, 60])[None, :, None, None, None].expand(1, 3, 1, 32, 48) / 255)
    torch.testing.assert_close(made[:, :, :1], start.expand(4, -1, -1, -1, -1), **CLOSE)
    lists = latents_of(predict, ["day", "night"], image=[[image], [Image.new("RGB", (48, 32))]])
    torch.testing.assert_close(lists[:1, :, :1], start, **CLOSE)
    assert not torch.allclose(lists[1, :, 0], start[0, :, 0], atol=1e-2)
    two = latents_of(predict, "day", image=[image, image])
    torch.testing.assert_close(two[:, :, :2], start.expand(-1, -1, 2, -1, -1), **CLOSE)


def test_a_context_changes_the_frames_that_are_made(predict):
    noise = noise_for(predict)
    without = latents_of(predict, "day", latents=noise)
    made = [latents_of(predict, "day", latents=noise, image=torch.full((3, 32, 48), value)) for value in (0.0, 1.0)]
    assert not torch.allclose(made[0][:, :, 1:], made[1][:, :, 1:], atol=1e-3)
    assert not torch.allclose(made[0][:, :, 1:], without[:, :, 1:], atol=1e-3)
    again = latents_of(predict, "day", latents=noise, image=torch.zeros(3, 32, 48), context_noise_level=200)
    assert torch.equal(again[:, :, :1], made[0][:, :, :1]) and not torch.allclose(again, made[0], atol=1e-3)


def test_every_frame_can_have_a_guidance_of_its_own(framewise):
    noise = noise_for(framewise)
    ramp = guidance_ramp(1.0, 4.0, FRAMES)
    assert ramp == [1.0, 2.0, 3.0, 4.0]
    made = latents_of(framewise, "a day", latents=noise, guidance_scale=ramp)
    for frame, scale in enumerate(ramp):
        alone = latents_of(framewise, "a day", latents=noise, guidance_scale=scale)
        torch.testing.assert_close(made[:, :, frame], alone[:, :, frame], **CLOSE)


def test_every_frame_can_have_a_guidance_towards_given_frames_of_its_own(predict):
    image, noise = torch.rand(3, 32, 48), noise_for(predict)
    same = [latents_of(predict, "day", image=image, latents=noise, context_guidance_scale=s) for s in (2.0, [2.0] * 4)]
    torch.testing.assert_close(same[0], same[1])
    ramp = guidance_ramp(1.0, 3.0, FRAMES)
    other = latents_of(predict, "day", image=image, latents=noise, context_guidance_scale=ramp)
    assert not torch.allclose(other, same[0], atol=1e-3)


def test_frames_show_the_prompt_of_their_span(framewise):
    noise = noise_for(framewise)
    day, night = (latents_of(framewise, prompt, latents=noise) for prompt in ("a day", "a night"))
    made = latents_of(framewise, {0: "a day", 2: "a night"}, latents=noise)
    torch.testing.assert_close(made[:, :, :2], day[:, :, :2], **CLOSE)
    torch.testing.assert_close(made[:, :, 2:], night[:, :, 2:], **CLOSE)
    assert not torch.allclose(day, night, atol=1e-2)
    made = latents_of(framewise, {0: "a day", 3: "a night"}, prompt_blend=1, latents=noise)
    tokens = PipelineBase(framewise).conditioning([0, 0], ["a day", "a night"])["encoder_hidden_states"]
    between = latents_of(framewise, prompt_embeds=tokens.mean(0, keepdim=True), latents=noise)
    torch.testing.assert_close(made[:, :, 2], between[:, :, 2], **CLOSE)
    torch.testing.assert_close(made[:, :, 3], night[:, :, 3], **CLOSE)


def test_temporal_layers_are_told_the_prompt_of_the_first_frame(text):
    """Of the whole clip, or of each window: the second one begins with the second prompt."""
    noise = noise_for(text)
    made = latents_of(text, {0: "a day", 2: "a night"}, latents=noise)
    told = latents_of(text, {0: "a day", 2: "a night"}, temporal_prompt="a day", latents=noise)
    torch.testing.assert_close(made, told, **CLOSE)
    other = latents_of(text, {0: "a day", 2: "a night"}, temporal_prompt="a night", latents=noise)
    assert not torch.allclose(made, other, atol=1e-4)
    cut = latents_of(text, {0: "a day", 2: "a night"}, latents=noise, window=2, window_overlap=0)
    second = latents_of(text, "a night", latents=noise[:, :, 2:], num_frames=2)
    torch.testing.assert_close(cut[:, :, 2:], second, **CLOSE)


def test_a_clip_does_not_depend_on_its_batch(labels):
    def sources():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]

    prompts = ["day", "night", "day"]
    together = latents_of(labels, prompts, generator=sources(), eta=0.5)
    pairs = zip(prompts, sources(), strict=True)
    alone = torch.cat([latents_of(labels, prompt, generator=[source], eta=0.5) for prompt, source in pairs])
    torch.testing.assert_close(together, alone, **CLOSE)
    assert not torch.allclose(together[0], together[2], atol=1e-2)
    torch.manual_seed(5)
    first = latents_of(labels, "day")
    torch.manual_seed(5)
    assert torch.equal(first, latents_of(labels, "day"))


def test_windows_of_a_framewise_model_are_the_whole(framewise):
    noise = noise_for(framewise, frames=9)
    whole = latents_of(framewise, "a day", latents=noise, num_frames=9)
    for options in ({"window": 4}, {"window": 4, "window_overlap": 1}, {"window": 20}):
        cut = latents_of(
            framewise, "a day", latents=noise, num_frames=9, guidance_scale=guidance_ramp(7.5, 7.5, 9), **options
        )
        torch.testing.assert_close(cut, whole, **CLOSE)


def test_frames_of_a_window_do_not_see_those_of_others(text):
    noise = noise_for(text, frames=6)
    cut = latents_of(text, "a day", latents=noise, num_frames=6, window=3, window_overlap=0)
    parts = [latents_of(text, "a day", latents=part, num_frames=3) for part in noise.split(3, dim=2)]
    torch.testing.assert_close(cut, torch.cat(parts, dim=2), **CLOSE)
    assert not torch.allclose(cut, latents_of(text, "a day", latents=noise, num_frames=6), atol=1e-3)


def test_noise_comes_from_where_it_is_said(labels):
    def sources():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    expected = clips_of_noise((4, FRAMES, 16, 24), sources(), correlation=0.5)
    noise = functools.partial(clips_of_noise, correlation=0.5)
    made = latents_of(labels, ["day"] * 2, generator=sources(), noise=noise)
    assert torch.equal(made, latents_of(labels, ["day"] * 2, latents=expected))

    free_noise = functools.partial(windows_of_noise, window=3, step=1)
    assert latents_of(labels, "day", num_frames=7, noise=free_noise, window=3).shape[2] == 7


def test_sizes_other_than_trained(text, labels):
    assert text("a", num_frames=2, height=16, width=48, output_type="pt", **FEW).frames.shape == (1, 2, 3, 16, 48)
    assert labels("day", num_frames=2, width=32, output_type="np", **FEW).frames.shape == (1, 2, 32, 32, 3)
    assert labels("day", num_inference_steps=1, output_type="latent").frames.shape[2] == 8


def test_output_types(labels):
    noise = noise_for(labels)
    latent, pt, array, images = (
        labels("day", num_frames=FRAMES, latents=noise, output_type=kind, **FEW).frames
        for kind in ("latent", "pt", "np", "pil")
    )
    assert torch.equal(labels.decode_clips(latent).transpose(1, 2), pt)
    assert (array == pt.permute(0, 1, 3, 4, 2).numpy()).all()
    assert len(images) == 1 and len(images[0]) == FRAMES and images[0][0].size == (48, 32)
    assert torch.equal(latents_of(labels, "day", latents=noise, return_dict=True), latent)
    assert torch.equal(
        labels("day", num_frames=FRAMES, latents=noise, output_type="pt", return_dict=False, **FEW)[0], pt
    )


def test_an_unconditional_model_of_pixels(unconditional, randomise):
    randomise(inject(unconditional.unet))
    pipeline = quiet(VideoLDMPipeline.from_image_pipeline(unconditional))
    noise, base = noise_for(pipeline, 2), PipelineBase(copy.deepcopy(unconditional))
    made = pipeline(num_frames=FRAMES, num_videos_per_prompt=2, latents=noise, output_type="pt", **FEW).frames
    torch.testing.assert_close(made, sample_clips(base, {}, noise, num_inference_steps=3).transpose(1, 2), **CLOSE)


def test_a_saved_pipeline_makes_the_same_clips(predict, randomise, tmp_path):
    randomise(inject(predict.vae, TemporalConfig.for_decoder()))
    options = {"num_frames": FRAMES, "image": torch.rand(3, 32, 48), "output_type": "pt", **FEW}
    expected = predict("night", generator=torch.Generator().manual_seed(1), **options).frames
    predict.save_pretrained(tmp_path)
    loaded = quiet(VideoLDMPipeline.from_pretrained(tmp_path))
    assert torch.equal(loaded("night", generator=torch.Generator().manual_seed(1), **options).frames, expected)
    assert isinstance(TemporalPipeline.from_pretrained(tmp_path), TemporalPipeline)


def tuned(module):
    for parameter in module.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))


def test_a_tuned_image_model_under_the_same_temporal_layers(stable_diffusion, randomise, tmp_path):
    """DreamBooth: the adapter was trained with the original; only the text encoder of the image model is tuned."""
    original = copy.deepcopy(stable_diffusion)
    trained = copy.deepcopy(stable_diffusion)
    randomise(inject(trained.unet)).save_pretrained(tmp_path / "adapter")
    tuned(stable_diffusion.unet), tuned(stable_diffusion.text_encoder)
    stable_diffusion.save_pretrained(tmp_path / "tuned")
    loaded = type(stable_diffusion).from_pretrained(tmp_path / "tuned")
    pipeline = quiet(VideoLDMPipeline.from_image_pipeline(loaded, adapter=tmp_path / "adapter", temporal_text=original))
    noise = noise_for(pipeline)
    base = TwoTexts(PipelineBase(loaded), PipelineBase(original))
    told = base.conditioning([0], ["a video"])
    expected = sample_clips(base, told, noise, num_inference_steps=3, guidance_scale=7.5)
    made = pipeline("a video", num_frames=FRAMES, latents=noise, output_type="pt", **FEW).frames
    torch.testing.assert_close(made, expected.transpose(1, 2), **CLOSE)
    one_text = quiet(VideoLDMPipeline.from_image_pipeline(loaded))
    assert not torch.allclose(
        one_text("a video", num_frames=FRAMES, latents=noise, output_type="pt", **FEW).frames, made, atol=1e-4
    )
    pipeline.save_pretrained(tmp_path / "video")
    again = quiet(VideoLDMPipeline.from_pretrained(tmp_path / "video"))
    assert torch.equal(again("a video", num_frames=FRAMES, latents=noise, output_type="pt", **FEW).frames, made)


def test_a_tuned_label_model_under_the_same_temporal_layers(label_model, randomise):
    randomise(inject(label_model.unet))
    base = LabelBase(label_model)
    original = frozen_text(base)
    tuned(label_model.conditioner)
    pipeline = quiet(VideoLDMPipeline.from_image_pipeline(label_model, temporal_text=original.ldm))
    noise, two = noise_for(pipeline), TwoTexts(base, original)
    expected = sample_clips(two, two.conditioning([1], [""]), noise, num_inference_steps=3, guidance_scale=2.0)
    made = pipeline("night", num_frames=FRAMES, latents=noise, output_type="pt", **FEW).frames
    torch.testing.assert_close(made, expected.transpose(1, 2), **CLOSE)
    changing = latents_of(pipeline, {0: "day", 2: "night"}, latents=noise, window=2)
    assert changing.shape == noise.shape and changing.isfinite().all()


def test_decoding_in_chunks(labels, randomise):
    noise = noise_for(labels, frames=7)
    options = {"num_frames": 7, "latents": noise, "output_type": "pt", **FEW}
    whole = labels("day", **options).frames
    torch.testing.assert_close(labels("day", decode_chunk_size=2, **options).frames, whole, **CLOSE)
    randomise(inject(labels.vae, TemporalConfig.for_decoder()))
    temporal = labels("day", **options).frames
    assert not torch.allclose(temporal, whole, atol=1e-3)
    with pytest.raises(ValueError, match="enable_temporal_chunking: overlap: expected a number of frames, got None"):
        labels("day", decode_chunk_size=2, **options)
    labels.decoder.enable_temporal_chunking(4, overlap=2)
    chunked = labels("day", **options).frames
    assert not torch.equal(chunked, temporal)
    with pytest.raises(ValueError, match="overlap"):
        labels("day", decode_chunk_size=2, **options)
    assert torch.equal(labels("day", **options).frames, chunked)  # as it was


def test_chunks_that_cannot_be_are_refused_before_anything_is_sampled(labels, randomise):
    def too_late(*told):
        raise AssertionError

    options = {"num_frames": 4, "callback_on_step_end": too_late, **FEW}
    with pytest.raises(ValueError, match="VideoLDMPipeline: decode_chunk_size: expected a whole number of at least 1"):
        labels("day", decode_chunk_size=0, **options)
    randomise(inject(labels.vae, TemporalConfig.for_decoder()))
    with pytest.raises(ValueError, match="enable_temporal_chunking: overlap: expected a number of frames, got None"):
        labels("day", decode_chunk_size=2, **options)


def test_the_autoencoder_of_xl_runs_in_single_precision(stable_diffusion_xl, randomise):
    randomise(inject(stable_diffusion_xl.unet))
    pipeline = VideoLDMPipeline.from_image_pipeline(stable_diffusion_xl)
    clean = pipeline.encode_clips(torch.rand(1, 3, 2, 32, 32))
    expected = pipeline.decode_clips(clean)
    pipeline.vae.half()
    seen = []
    pipeline.vae.post_quant_conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    torch.testing.assert_close(pipeline.decode_clips(clean), expected, rtol=1e-2, atol=1e-2)
    assert seen == [torch.float32] and pipeline.vae.dtype == torch.float16


def test_callbacks_change_latents_and_end_the_run(labels):
    noise, steps = noise_for(labels), []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = step == 1
        return {"latents": tensors["latents"] + 1}

    ended = latents_of(labels, "day", latents=noise, num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1]
    plain = []

    def keep(pipeline, step, timestep, tensors):
        plain.append(tensors["latents"])
        return {"latents": tensors["latents"] + 1}

    latents_of(labels, "day", latents=noise, num_inference_steps=5, callback_on_step_end=keep)
    assert torch.equal(ended, plain[1] + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "gif"}, "VideoLDMPipeline: output_type: expected one of"),
        (
            {"image": torch.zeros(3, 32, 48)},
            "image: expected None, since the temporal layers take no given frames",
        ),
        ({"context_guidance_scale": 2.0}, "context_guidance_scale: expected image beside it, got none"),
        ({"context_noise_level": 3}, "context_noise_level: expected image beside it, got none"),
        ({"strength": 0.5}, "strength: expected video beside it, got none; pass video, or leave it out"),
        ({"window_overlap": 1}, "window_overlap: expected window beside it, got none"),
        ({"window": 2, "window_overlap": 2}, "windows: overlap: expected 0 to below window=2, got 2"),
        ({"height": 33}, "height and width: expected multiples of 2, got 33 and 48"),
        ({"width": 0}, "height and width: expected multiples of 2, got 32 and 0"),
        ({"num_frames": 0}, "num_frames: expected a whole number of at least 1, got 0"),
        ({"num_frames": 2.5}, "num_frames: expected a whole number of at least 1, got 2.5"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt: expected a whole number of at least 1, got 0"),
        ({"num_inference_steps": 0}, "Sampler: steps: expected a whole number of at least 1, got 0"),
        ({"generator": 3}, "generator: expected a torch.Generator or a list of them, got 3; make one of a seed"),
        ({"video": torch.zeros(3, 3, 32, 48)}, "num_frames: expected the 3 frames of the video, got 4; cut the video"),
        ({"video": torch.zeros(2, 4, 3, 32, 48)}, "video: expected one for all or one for each of 1 clips, got 2"),
        ({"video": torch.zeros(4, 3, 32, 40)}, "VideoLDMPipeline: video: expected frames of 3 channels, 32 high"),
        (
            {"generator": [torch.Generator()] * 2},
            "generator: expected one on the CPU, or one for each of 1 clips",
        ),
        ({"guidance_scale": [1.0, 2.0]}, "guidance scale: expected one number, or one for each of 4 frames, got 2"),
        ({"latents": torch.zeros(1, 4, 3, 16, 24)}, r"latents: expected shape \(1, 4, 4, 16, 24\), got \(1, 4, 3, 16"),
        (
            {"noise": lambda shape, sources: torch.zeros(shape)},
            r"noise: expected shape \(1, 4, 4, 16, 24\), got",
        ),
        ({"noise": clips_of_noise, "latents": torch.zeros(1)}, "noise: expected it or latents, got both"),
        ({"eta": 1.5}, "Sampler: eta: expected a value from 0 to below 1, got 1.5"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "callback_on_step_end_tensor_inputs: expected some of"),
    ],
)
def test_what_does_not_fit_is_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        latents_of(labels, "day", **options)


def test_given_frames_that_do_not_fit_are_refused(predict):
    image = torch.zeros(3, 32, 48)
    with pytest.raises(ValueError, match="context_noise_level: expected 0 to 250, which the temporal layers were tr"):
        latents_of(predict, "day", image=image, context_noise_level=251)
    with pytest.raises(ValueError, match="image: expected one for all or one for each of 3 clips, got 2"):
        latents_of(predict, ["day"] * 3, image=torch.zeros(2, 1, 3, 32, 48))
    with pytest.raises(ValueError, match="prediction_mask: expected from 0 to 3 given frames of 4, got 4"):
        latents_of(predict, "day", image=[image] * 4)
    predict.adapter.metadata.clear()
    with pytest.raises(ValueError, match=r"ContextPlanes\.of: expected an adapter with 'frame_context' in its"):
        latents_of(predict, "day", image=image)


def test_a_model_without_layers_is_refused(text):
    text.adapter.remove()
    with pytest.raises(ValueError, match="VideoLDMPipeline: unet: expected temporal layers, got none; make the pipe"):
        text("a day")


def test_the_shipped_model():
    from temporal_layers.recipes.stages.video import load_shipped_adapter

    base, _ = load_shipped_adapter()
    pipeline = quiet(VideoLDMPipeline.from_image_pipeline(base.ldm))
    name = pipeline.config.labels[0]
    made = pipeline({0: name, 4: 1}, num_frames=8, num_inference_steps=2, prompt_blend=2, output_type="np").frames
    assert made.shape == (1, 8, 64, 96, 3) and made.std() > 0.02
