"""The upscaling pipeline: against diffusers' own, the function of the same parts, and itself in other batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    IFSuperResolutionPipeline,
)
from PIL import Image
from transformers import T5Config, T5EncoderModel

from temporal_layers import TemporalResBlockConfig, fold_frames
from temporal_layers.adapters import TemporalConfig, inject
from temporal_layers.recipes.pipelines.upscaling import VideoUpscalePipeline
from temporal_layers.recipes.sampling.noise import clip_generators
from temporal_layers.recipes.sampling.upscaling import upscale_clips
from temporal_layers.recipes.stages.clips import driving_clips
from temporal_layers.recipes.stages.image import HELD_OUT, psnr
from temporal_layers.recipes.upscaler import Upscaler, UpscalerConfig, build_upscaler, load_shipped_upscaler, shrunk

# Euler's scheduler makes numpy arrays of tensors in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

STEPS = {"num_inference_steps": 3, "output_type": "pt"}


@pytest.fixture
def in_latents(stable_upscaler, randomise):
    randomise(inject(stable_upscaler.unet))
    randomise(inject(stable_upscaler.vae, TemporalConfig.for_decoder()))
    return quiet(VideoUpscalePipeline.from_image_pipeline(stable_upscaler))


@pytest.fixture
def in_pixels(randomise):
    upscaler = build_upscaler(UpscalerConfig(channels=(8, 16), norm_groups=4, head_dim=8, factor=2))
    randomise(inject(upscaler.unet))
    return quiet(VideoUpscalePipeline.from_image_pipeline(upscaler))


@pytest.fixture(params=["in_latents", "in_pixels"])
def pipeline(request):
    return request.getfixturevalue(request.param)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_video(clips=2, frames=3, height=16, width=12):
    return torch.rand(clips, frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def texts(pipeline, count=2):
    return None if pipeline.text_encoder is None else ["a day road", "a night road"][:count]


def test_fresh_layers_give_the_frame_that_diffusers_gives(stable_upscaler):
    """Of the same generator: both draw the noise of the low-resolution frame first, then that of the result."""
    image, options = make_video(1, 1)[:, 0], {"noise_level": 30, "num_inference_steps": 4, "guidance_scale": 2.0}
    quiet(stable_upscaler)
    words = {"negative_prompt": "night", "output_type": "np", **options}
    theirs = stable_upscaler("a road", image, generator=torch.Generator().manual_seed(3), **words).images
    inject(stable_upscaler.unet)
    pipeline = quiet(VideoUpscalePipeline.from_image_pipeline(stable_upscaler))
    mine = pipeline(image[None], "a road", generator=torch.Generator().manual_seed(3), **words).frames
    assert mine.shape == (1, 1, 32, 24, 3)
    np.testing.assert_allclose(mine[:, 0], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_it_is_upscale_clips_with_the_same_sources(pipeline, eta):
    video, told = make_video(), texts(pipeline)
    options = {
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "noise_level": 50,
        "window": 2,
        "eta": eta,
    }
    grid = (16, 12) if pipeline.vae else (32, 24)
    options |= {"tile": tuple(3 * side // 4 for side in grid), "tile_overlap": 4}
    sources = clip_generators(4, range(2), "upscaling")
    made = pipeline(video, told, generator=sources, output_type="pt", window_overlap=1, **options)
    upscaler = pipeline.upscaler
    conditioning = None if told is None else upscaler.conditioning(told)
    expected = upscale_clips(upscaler, video.transpose(1, 2), conditioning, seed=4, overlap=1, **options)
    torch.testing.assert_close(made.frames.transpose(1, 2), expected, rtol=0, atol=1e-5)
    assert made.frames.shape == (2, 3, 3, 32, 24) and made.frames.std() > 0.01


def test_a_clip_is_the_same_however_it_is_batched(pipeline):
    video, told = make_video(3), None if pipeline.text_encoder is None else ["a road", "a day", "a night"]
    three = pipeline(video, told, generator=clip_generators(0, range(3)), eta=0.5, **STEPS).frames
    last = pipeline(video[2:], None if told is None else told[2], generator=clip_generators(0, [2]), eta=0.5, **STEPS)
    torch.testing.assert_close(last.frames, three[2:], rtol=0, atol=1e-5)
    assert (pipeline(video[2:], generator=clip_generators(0, [1]), **STEPS).frames - three[2:]).abs().max() > 1e-2


def test_text_and_what_is_not_wanted_count(in_latents):
    def run(*prompt, **options):
        generator = torch.Generator().manual_seed(0)
        return in_latents(make_video(1), *prompt, generator=generator, **STEPS, **options).frames

    plain = run("a road")
    tokens, nothing = (in_latents.upscaler.conditioning([text])["encoder_hidden_states"] for text in ("a road", ""))
    torch.testing.assert_close(run(prompt_embeds=tokens, negative_prompt_embeds=nothing), plain)
    assert (run("night") - plain).abs().max() > 1e-3
    assert (run("a road", negative_prompt="night") - plain).abs().max() > 1e-3
    assert (run("a road", guidance_scale=1.0) - plain).abs().max() > 1e-3
    torch.testing.assert_close(run(""), run())


def test_given_noise_is_what_it_begins_with(in_pixels):
    video, noise = make_video(1), torch.randn(1, 3, 3, 32, 24)
    first, other = (torch.Generator().manual_seed(seed) for seed in (0, 0))
    drawn = [torch.randn(3, 3, 32, 24, generator=first) for _ in range(2)]
    usual = in_pixels(video, generator=other, **STEPS).frames
    same = in_pixels(video, generator=torch.Generator().manual_seed(0), latents=drawn[1][None], **STEPS).frames
    assert torch.equal(usual, same)
    changed = in_pixels(video, generator=torch.Generator().manual_seed(0), latents=noise, **STEPS).frames
    assert (changed - usual).abs().max() > 1e-2


def test_all_that_comes_and_goes(in_latents):
    video = (make_video(1) * 255).round() / 255
    pixels = (video * 255).byte().permute(0, 1, 3, 4, 2).numpy()
    images = [[Image.fromarray(frame) for frame in clip] for clip in pixels]
    made = {}
    for kind, source in (("pt", video), ("np", pixels / 255.0), ("pil", images), ("latent", images)):
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": kind}
        made[kind] = in_latents(source, **options).frames
    assert made["latent"].shape == (1, 4, 3, 16, 12)
    np.testing.assert_allclose(made["np"], made["pt"].permute(0, 1, 3, 4, 2).numpy(), rtol=0, atol=1e-5)
    assert made["pil"][0][2].size == (24, 32)
    np.testing.assert_allclose(np.asarray(made["pil"][0][2]) / 255, made["np"][0, 2], rtol=0, atol=0.51 / 255)
    decoded = in_latents.upscaler.decode(made["latent"]).transpose(1, 2)
    torch.testing.assert_close(decoded, made["pt"])
    (alone,) = in_latents(
        images[0],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        return_dict=False,
    )
    np.testing.assert_allclose(alone, made["np"], rtol=0, atol=1e-5)


def test_the_decoder_sees_the_clip_or_chunks_of_it_with_the_same_result(in_latents, randomise):
    def run():
        generator = torch.Generator().manual_seed(0)
        return in_latents(make_video(1, 9, 8, 8), generator=generator, **STEPS).frames

    in_latents.adapters()["vae"].remove()
    local = TemporalResBlockConfig(timestep_embedding=False, norm="frame", num_convs=1)
    decoder = randomise(inject(in_latents.vae, TemporalConfig(resblock=local, transformer=None)))
    whole = run()
    with decoder.disabled():
        assert (run() - whole).abs().max() > 1e-2
    decoder.enable_temporal_chunking(2)
    torch.testing.assert_close(run(), whole, rtol=0, atol=1e-5)


def test_callbacks_see_every_step_and_can_end_the_run(pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append((step, int(timestep), tuple(tensors["latents"].shape)))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    options = {"num_inference_steps": 5, "output_type": "latent", "callback_on_step_end": callback}
    made = pipeline(make_video(1), **options).frames
    assert [step for step, *_ in steps] == [0, 1] and steps[0][2] == tuple(made.shape)
    assert steps[0][1] > steps[1][1] and not made.any()


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDPMScheduler])
def test_schedulers_can_be_swapped(in_latents, scheduler):
    options = {"num_inference_steps": 12, "output_type": "pt"}
    usual = in_latents(make_video(1), generator=torch.Generator().manual_seed(0), **options).frames
    in_latents.scheduler = scheduler.from_config(in_latents.scheduler.config)
    made = in_latents(make_video(1), generator=torch.Generator().manual_seed(0), **options).frames
    assert made.isfinite().all() and made.shape == usual.shape and not torch.equal(made, usual)
    if scheduler is not DDPMScheduler:  # solvers of the same equation
        assert (made - usual).abs().mean() < 0.1


def test_saved_and_loaded_it_gives_the_same(pipeline, tmp_path):
    video, told = make_video(1), texts(pipeline, 1)
    expected = pipeline(video, told, generator=torch.Generator().manual_seed(0), **STEPS).frames
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(VideoUpscalePipeline.from_pretrained(tmp_path))
    assert loaded.adapters().keys() == pipeline.adapters().keys()
    assert torch.equal(loaded(video, told, generator=torch.Generator().manual_seed(0), **STEPS).frames, expected)
    names = ("factor", "max_noise_level", "align_corners")
    assert [loaded.config[name] for name in names] == [pipeline.config[name] for name in names]


def test_adapters_go_in_from_files(stable_upscaler, randomise, tmp_path):
    adapters = {
        "unet": randomise(inject(stable_upscaler.unet)),
        "vae": randomise(inject(stable_upscaler.vae, TemporalConfig.for_decoder())),
    }
    for name, adapter in adapters.items():
        adapter.save_pretrained(tmp_path / name)
        adapter.remove()
    with pytest.raises(
        ValueError, match=r"from_image_pipeline: expected an adapter, or a UNet with temporal layers, g"
    ):
        VideoUpscalePipeline.from_image_pipeline(stable_upscaler)
    pipeline = VideoUpscalePipeline.from_image_pipeline(
        stable_upscaler, adapter=tmp_path / "unet", decoder=tmp_path / "vae", scheduler=EulerDiscreteScheduler()
    )
    assert set(pipeline.adapters()) == {"unet", "vae"} and isinstance(pipeline.scheduler, EulerDiscreteScheduler)
    assert pipeline.config.factor == 2 and pipeline.unet is stable_upscaler.unet


class Letters:
    """In place of T5's tokenizer, which needs a file of its own."""

    def __call__(self, texts, padding, max_length=0, **options):
        length = max_length if padding == "max_length" else max(map(len, texts))
        rows = [[ord(letter) % 30 for letter in text] + [0] * (length - len(text)) for text in texts]
        ids = torch.tensor(rows).reshape(len(texts), length)
        return SimpleNamespace(input_ids=ids, attention_mask=(ids > 0).long())


def test_deepfloyd_upscales_with_the_tokens_of_its_own_pipeline(text_unet, randomise):
    encoder = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    image_pipeline = IFSuperResolutionPipeline(
        tokenizer=None,
        text_encoder=T5EncoderModel(encoder).eval(),
        unet=text_unet(in_channels=6, out_channels=6, class_embed_type="timestep"),
        scheduler=DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2"),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    image_pipeline.tokenizer = Letters()
    randomise(inject(image_pipeline.unet))
    pipeline = quiet(VideoUpscalePipeline.from_image_pipeline(image_pipeline))
    assert pipeline.config.factor == 4 and pipeline.config.align_corners
    expected, _ = image_pipeline.encode_prompt(["A Road "], do_classifier_free_guidance=False, device="cpu")
    assert torch.equal(pipeline.upscaler.conditioning(["A Road "])["encoder_hidden_states"], expected)
    made = pipeline(make_video(1, 2, 8, 8), "a road", **STEPS).frames
    assert made.shape == (1, 2, 3, 32, 32) and made.isfinite().all()
    pipeline.text_encoder = None
    options = {"prompt_embeds": expected, "guidance_scale": 1.0, **STEPS}
    assert pipeline(make_video(1, 2, 8, 8), **options).frames.isfinite().all()


def test_the_shipped_upscaler_keeps_what_it_is_given():
    upscaler = load_shipped_upscaler()
    inject(upscaler.unet)
    pipeline = quiet(VideoUpscalePipeline.from_image_pipeline(upscaler))
    (clip,) = driving_clips((64, 96), 1, 2, first=HELD_OUT)
    video = shrunk(clip.frames[None], 4)
    made = pipeline(
        video.transpose(1, 2), num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).frames.transpose(1, 2)
    assert made.shape == (1, 3, 2, 64, 96)
    assert psnr(shrunk(made, 4), video) > 30
    bilinear = F.interpolate(fold_frames(video), (64, 96), mode="bilinear")
    assert made.diff(dim=-1).abs().mean() > 1.1 * bilinear.diff(dim=-1).abs().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "gif"}, r"VideoUpscalePipeline: output_type: expected one of pil, .* got 'gif'"),
        ({"noise_level": 1000}, r"VideoUpscalePipeline: noise_level: expected 0 to 999, got 1000"),
        ({"prompt": ["a road"]}, r"prompt: expected one for all or one for each of 2 clips, got 1"),
        ({"negative_prompt": ["a"] * 3}, r"negative_prompt: expected one for all or one for each of 2 .* got 3"),
        (
            {"prompt_embeds": torch.zeros(1, 12, 16)},
            r"prompt_embeds: expected one row for each of 2 clips.* got 1 rows",
        ),
        (
            {"prompt_embeds": torch.zeros(2, 12, 16), "prompt": "a"},
            r"prompt_embeds: expected one row .*no prompt beside it, got 2 rows and prompt='a'",
        ),
        ({"generator": [torch.Generator()]}, r"VideoUpscalePipeline: generator: expected .* each of 2 clips, got 1 on"),
        (
            {"latents": torch.zeros(2, 4, 3, 8, 8)},
            r"latents: expected shape \(2, 4, 3, 16, 12\), got \(2, 4, 3, 8, 8\)",
        ),
        ({"window": 2, "window_overlap": 2}, r"windows: overlap: expected 0 to below window=2, got 2"),
        ({"tile": (8, 8), "tile_overlap": 8}, r"windows: overlap: expected 0 to below window=8, got 8"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            r"tensor_inputs: expected some of \['latents'\], got \['no",
        ),
    ],
)
def test_what_does_not_fit_is_refused(in_latents, options, message):
    with pytest.raises(ValueError, match=message):
        in_latents(make_video(), **{"num_inference_steps": 1, **options})


def test_text_for_a_model_that_reads_none_and_none_for_one_that_does_are_refused(in_pixels, in_latents):
    with pytest.raises(ValueError, match=r"prompt: expected None for an upscaler that reads no text"):
        in_pixels(make_video(), "a road")
    in_latents.text_encoder = None
    with pytest.raises(
        ValueError, match=r"VideoUpscalePipeline: prompt_embeds: expected a tensor, since there is no te"
    ):
        in_latents(make_video())
    with pytest.raises(ValueError, match=r"negative_prompt_embeds: expected a tensor, .*got None; .*guidance_scale=1"):
        in_latents(make_video(), prompt_embeds=torch.zeros(2, 12, 16))


def test_what_is_no_video_or_no_upscaler_is_refused(in_pixels, stable_diffusion, stable_upscaler):
    three = build_upscaler(UpscalerConfig(channels=(8, 8, 16), norm_groups=4, head_dim=8, factor=2))
    inject(three.unet)
    with pytest.raises(ValueError, match=r"VideoUpscalePipeline: video: expected frames, got str; pass images"):
        in_pixels("clip.mp4")
    with pytest.raises(
        ValueError, match=r"VideoUpscalePipeline: low_res: expected .* in multiples of 4, .* got 18 x 16"
    ):
        VideoUpscalePipeline.from_image_pipeline(three)(make_video(1, 2, 9, 8))
    with pytest.raises(ValueError, match=r"from_pipeline: expected a StableDiffusionUpscalePipeline or IFSuper"):
        VideoUpscalePipeline.from_image_pipeline(stable_diffusion)
    with pytest.raises(
        ValueError, match=r"expected an Upscaler without a conditioner, got one with; pass the pipeline"
    ):
        VideoUpscalePipeline.from_image_pipeline(Upscaler.from_pipeline(stable_upscaler))
