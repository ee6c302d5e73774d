"""A diffusers pipeline that knows images only, run unchanged on an injected model."""

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from temporal_layers.adapters import TemporalConfig, inject

FRAMES = 3


@pytest.fixture
def text_parts():
    """A tokenizer of single letters and a tiny text encoder, of a class."""

    def text_parts(encoder=CLIPTextModel):
        letters = [*"abcdefghijklmnopqrstuvwxyz"]
        tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        config = CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            projection_dim=12,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8), encoder(config).eval()

    return text_parts


@pytest.fixture
def pipe(make_unet, make_vae, text_parts):
    """Stable Diffusion with tiny random parts."""
    tokenizer, text_encoder = text_parts()
    pipe = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_clips(pipe, latents, prompts, steps, guidance):
    """Classifier-free guidance and DDIM on clips, written out."""
    pipe.scheduler.set_timesteps(steps)
    text, empty = pipe.encode_prompt(prompts, "cpu", 1, True)
    for step in pipe.scheduler.timesteps:
        conditional = pipe.unet(latents, step, text).sample
        unconditional = pipe.unet(latents, step, empty).sample
        noise = unconditional + guidance * (conditional - unconditional)
        latents = pipe.scheduler.step(noise, step, latents).prev_sample
    return latents


def test_pipeline_with_folded_frames_equals_a_loop_on_clips(pipe, randomise, fold):
    unet, vae = randomise(inject(pipe.unet)), randomise(inject(pipe.vae, TemporalConfig.for_decoder()))
    latents = torch.randn(2, 4, FRAMES, 8, 8)
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0, "num_images_per_prompt": FRAMES}
    prompts = ["a b c", "d e"]
    with torch.no_grad():
        expected = sample_clips(pipe, latents, prompts, 2, 3.0)
        pixels = pipe.vae.decode(expected / pipe.vae.config.scaling_factor).sample
        unet.num_frames = vae.num_frames = FRAMES
        result = pipe(prompts, latents=fold(latents), output_type="latent", **arguments).images
        images = pipe(prompts, latents=fold(latents), output_type="pt", **arguments).images
    torch.testing.assert_close(result, fold(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images, fold(pixels * 0.5 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    with unet.disabled(), torch.no_grad():
        still = pipe(prompts, latents=fold(latents), output_type="latent", **arguments).images
    assert not torch.allclose(still, result, atol=1e-2)


def test_a_wrong_number_of_images_is_an_error(pipe):
    inject(pipe.unet).num_frames = FRAMES
    with pytest.raises(ValueError, match=r"expected a batch that is a multiple of num_frames=3 .* got 8 images"):
        pipe("a", num_inference_steps=1, num_images_per_prompt=4)


def test_saving_the_pipeline_and_the_adapter(pipe, randomise, tmp_path):
    adapter = randomise(inject(pipe.unet))
    pipe.save_pretrained(tmp_path / "pipe")
    adapter.save_pretrained(tmp_path / "adapter")
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "pipe" / "unet")
    assert not any("temporal" in key for key in plain.state_dict())
    loaded = type(adapter).from_pretrained(plain, tmp_path / "adapter")
    weights = pipe.unet.state_dict()
    assert plain.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.model.state_dict().items())


def test_pipelines_made_of_each_other_share_the_layers(pipe, randomise):
    randomise(inject(pipe.unet))
    named = StableDiffusionImg2ImgPipeline.from_pipe(pipe, unet=pipe.unet, requires_safety_checker=False)
    for other in (AutoPipelineForImage2Image.from_pipe(pipe, requires_safety_checker=False), named):
        assert type(other) is StableDiffusionImg2ImgPipeline
        assert other.unet is pipe.unet


def test_casting_the_pipeline_keeps_alpha_wide(pipe):
    adapter = inject(pipe.unet)
    pipe.to(torch.bfloat16)
    assert {parameter.dtype for _, parameter in adapter.named_parameters("temporal")} == {torch.bfloat16}
    assert {parameter.dtype for _, parameter in adapter.named_parameters("alpha")} == {torch.float32}


@pytest.fixture
def make_pipeline(pipe, text_parts, make_unet, make_vae):
    """Other pipelines by name, with what a call of each takes for some frames."""
    quiet = {"safety_checker": None, "feature_extractor": None}
    noise, pictures = torch.randn(2 * FRAMES, 4, 8, 8), torch.rand(2 * FRAMES, 3, 16, 16)

    def xl():
        tokenizer, encoder = text_parts()
        tokenizer_2, encoder_2 = text_parts(CLIPTextModelWithProjection)
        unet = make_unet(
            cross_attention_dim=24,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=36,
        )
        parts = (make_vae(), encoder, encoder_2, tokenizer, tokenizer_2, unet, pipe.scheduler)
        return StableDiffusionXLPipeline(*parts, add_watermarker=False), lambda rows: {"latents": noise[rows]}

    def image_to_image():
        made = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        return made, lambda rows: {"image": pictures[rows], "strength": 0.7}

    def upscale():
        unet = make_unet(in_channels=7, num_class_embeds=1000)
        parts = (
            make_vae(scaling_factor=0.08333),
            pipe.text_encoder,
            pipe.tokenizer,
            unet,
            DDPMScheduler(),
            pipe.scheduler,
        )
        return StableDiffusionUpscalePipeline(*parts, **quiet), lambda rows: {"image": pictures[rows, :, :8, :8]}

    return {"xl": xl, "image to image": image_to_image, "upscale": upscale}


@pytest.mark.parametrize("name", ["xl", "image to image", "upscale"])
def test_pipelines_for_images_make_clips(make_pipeline, randomise, name):
    made, arguments = make_pipeline[name]()
    made.set_progress_bar_config(disable=True)
    prompts = ["a b"] * FRAMES + ["c"] * FRAMES

    def run(rows):
        generators = [torch.Generator().manual_seed(row) for row in range(2 * FRAMES)[rows]]
        options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
        return made(prompts[rows], generator=generators, **arguments(rows), **options).images

    both = slice(0, 2 * FRAMES)
    with torch.no_grad():
        images = run(both)
        adapter = randomise(inject(made.unet))
        torch.testing.assert_close(run(both), images, rtol=1e-4, atol=1e-4)  # no clip length: images
        adapter.num_frames = FRAMES
        clips = run(both)
        assert (clips - images).abs().max() > 2e-3  # well beyond the tolerance
        for rows in (slice(0, FRAMES), slice(FRAMES, 2 * FRAMES)):  # each clip as if it were alone
            torch.testing.assert_close(run(rows), clips[rows], rtol=1e-4, atol=1e-4)
        with adapter.disabled():
            torch.testing.assert_close(run(both), images, rtol=1e-4, atol=1e-4)


def test_textual_inversion(pipe, randomise):
    # It changes the text encoder and the tokenizer only.
    options = {"num_inference_steps": 2, "output_type": "latent", "latents": torch.randn(1, 4, 8, 8)}
    with torch.no_grad():
        pipe.load_textual_inversion({"<new>": torch.randn(12) * 3}, token="<new>")
        expected, without = (pipe(prompt, **options).images for prompt in ("a <new>", "a b"))
        assert not torch.allclose(expected, without, atol=1e-3)
        adapter = randomise(inject(pipe.unet))
        torch.testing.assert_close(pipe("a <new>", **options).images, expected, rtol=1e-4, atol=1e-4)
        pipe.unload_textual_inversion()
        pipe.load_textual_inversion({"<other>": torch.randn(12) * 3}, token="<other>")  # after the injection
        with adapter.disabled():
            result = pipe("a <other>", **options).images
        adapter.remove()
        assert torch.equal(result, pipe("a <other>", **options).images)


def test_a_saved_pipeline_loads_as_the_image_pipeline(pipe, randomise, tmp_path):
    options = {"num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": FRAMES}
    latents = torch.randn(FRAMES, 4, 8, 8)
    with torch.no_grad():
        image = pipe("a b", latents=latents, **options).images
        adapter = randomise(inject(pipe.unet))
        adapter.num_frames = FRAMES
        clip = pipe("a b", latents=latents, **options).images
        pipe.save_pretrained(tmp_path / "pipe")
        adapter.save_pretrained(tmp_path / "adapter")
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.unet) is UNet2DConditionModel
        torch.testing.assert_close(loaded("a b", latents=latents, **options).images, image, rtol=1e-4, atol=1e-4)
        type(adapter).from_pretrained(loaded.unet, tmp_path / "adapter").num_frames = FRAMES
        torch.testing.assert_close(loaded("a b", latents=latents, **options).images, clip, rtol=1e-4, atol=1e-4)
