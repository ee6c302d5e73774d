"""A diffusers pipeline that knows images only, run unchanged on an injected model."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from temporal_layers.adapters import TemporalConfig, inject

FRAMES = 3


@pytest.fixture
def pipe(make_unet, make_vae, tmp_path):
    """Stable Diffusion with tiny random parts and a tokenizer of single letters."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    pipe = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=CLIPTextModel(text).eval(),
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


def test_casting_the_pipeline_keeps_alpha_wide(pipe):
    adapter = inject(pipe.unet)
    pipe.to(torch.bfloat16)
    assert {parameter.dtype for _, parameter in adapter.named_parameters("temporal")} == {torch.bfloat16}
    assert {parameter.dtype for _, parameter in adapter.named_parameters("alpha")} == {torch.float32}
