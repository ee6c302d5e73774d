"""Image models as bases of the video stages: the label LDM and diffusers' pipelines."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel

from temporal_layers.recipes.bases import LabelBase, PipelineBase, load_base
from temporal_layers.recipes.denoising import kind_of_prediction
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm
from temporal_layers.recipes.sampling.clips import sample_clips
from temporal_layers.recipes.stages.clips import TensorClips
from temporal_layers.recipes.stages.validation import ClipValidation, ValidationConfig
from temporal_layers.recipes.stages.video import train_video
from temporal_layers.recipes.training.engine import OptimConfig


def check_base(base, *, size, latent_shape):
    """What every base has to offer, on folded and on 5-D latents."""
    assert base.frame_size == size and base.latent_shape == latent_shape
    frames = torch.rand(2, 3, *size)
    latents = base.encode(frames)
    assert latents.shape == (2, *latent_shape)
    decoded = base.decode(latents)
    assert decoded.shape == frames.shape and decoded.min() >= 0 and decoded.max() <= 1
    for conditioning in (base.conditioning([0, 1], ["a day road", "a night road"]), base.no_conditioning(2)):
        assert all(len(value) == 2 for value in conditioning.values())
        with torch.no_grad():
            assert base.predict(latents, torch.tensor([3, 500]), conditioning).shape == latents.shape
    assert isinstance(base.scheduler, DDIMScheduler)


def test_label_base_loads_from_its_folder(tmp_path):
    config = ImageLDMConfig(height=32, width=48, vae_channels=(8, 8), unet_channels=(16, 32), num_heads=2)
    ldm = build_image_ldm(config, ("day", "night"), seed=0)
    ldm.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    assert isinstance(base, LabelBase)
    check_base(base, size=(32, 48), latent_shape=(4, 16, 24))
    assert base.conditioning([1, 0], ["", ""])["labels"].tolist() == [1, 0]
    assert base.no_conditioning(2)["labels"].tolist() == [2, 2]


def test_a_label_model_takes_its_tokens_as_well():
    config = ImageLDMConfig(height=32, width=48, vae_channels=(8, 8), unet_channels=(16, 32), num_heads=2)
    base = LabelBase(build_image_ldm(config, ("day", "night"), seed=0))
    latents, labels = torch.randn(2, 4, 16, 24), torch.tensor([0, 1])
    with torch.no_grad():
        expected = base.predict(latents, torch.tensor(3), {"labels": labels})
        tokens = {"encoder_hidden_states": base.ldm.conditioner(labels)}
        assert torch.equal(base.predict(latents, torch.tensor(3), tokens), expected)


def test_a_pipeline_can_stay_trainable(stable_diffusion):
    stable_diffusion.unet.train()
    base = PipelineBase(stable_diffusion, freeze=False)
    assert base.unet.training and all(parameter.requires_grad for parameter in base.unet.parameters())


def test_stable_diffusion_predicts_what_its_own_unet_does(stable_diffusion, tmp_path):
    stable_diffusion.save_pretrained(tmp_path / "pipeline")
    base = load_base(tmp_path / "pipeline")
    check_base(base, size=(32, 32), latent_shape=(4, 16, 16))
    latents = torch.randn(2, 4, 16, 16)
    conditioning = base.conditioning([0, 0], ["a day road", "a night video"])
    text, _ = stable_diffusion.encode_prompt(["a day road", "a night video"], "cpu", 1, False)
    with torch.no_grad():
        expected = stable_diffusion.unet(latents, 7, encoder_hidden_states=text).sample
        torch.testing.assert_close(base.predict(latents, torch.tensor(7), conditioning), expected)
    frames = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        mode = stable_diffusion.vae.encode(2 * frames - 1).latent_dist.mode()
    torch.testing.assert_close(base.encode(frames), mode * stable_diffusion.vae.config.scaling_factor)
    assert base.scheduler.config.beta_schedule == "scaled_linear"
    assert not any(parameter.requires_grad for parameter in base.unet.parameters())


def test_stable_diffusion_xl_gets_pooled_text_and_sizes(stable_diffusion_xl):
    base = PipelineBase(stable_diffusion_xl)
    check_base(base, size=(32, 32), latent_shape=(4, 16, 16))
    conditioning = base.conditioning([0], ["a road"])
    assert conditioning["encoder_hidden_states"].shape == (1, 12, 32)
    assert conditioning["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


def test_unconditional_pixel_model_needs_no_autoencoder(unconditional):
    base = PipelineBase(unconditional)
    check_base(base, size=(32, 32), latent_shape=(3, 32, 32))
    assert base.conditioning([0], ["a road"]) == {}
    frames = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(base.decode(base.encode(frames)), frames)


def test_pipelines_without_a_known_unet_are_refused(stable_diffusion, unconditional):
    stable_diffusion.unet = None
    with pytest.raises(ValueError, match=r"PipelineBase: expected a pipeline whose unet .* with NoneType; choose"):
        PipelineBase(stable_diffusion)
    unconditional.unet = StableDiffusionPipeline.from_pipe  # not a module either
    with pytest.raises(ValueError, match="got DDPMPipeline with"):
        PipelineBase(unconditional)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"in_channels": 9},
            r"that takes what it predicts, got 9 channels in and 4 out .*; choose the text-to-image model",
        ),
        ({"time_cond_proj_dim": 8}, r"without time_cond_proj_dim, got 8: a latent consistency model, .*; use its LoRA"),
        ({"sample_size": None}, r"that says its sample_size, got None; set it with unet.register_to_config"),
    ],
)
def test_models_that_are_called_in_another_way_are_refused(stable_diffusion, options, message):
    config = {name: value for name, value in stable_diffusion.unet.config.items() if not name.startswith("_")}
    stable_diffusion.unet = UNet2DConditionModel(**{**config, **options})
    with pytest.raises(ValueError, match=rf"PipelineBase: expected a UNet {message}"):
        PipelineBase(stable_diffusion)


def test_a_pipeline_that_matches_flows_is_trained_and_sampled_as_one(stable_diffusion):
    stable_diffusion.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    base = PipelineBase(stable_diffusion)
    assert kind_of_prediction(base.scheduler) == "flow"
    channels, height, width = base.latent_shape
    clips = TensorClips(torch.randn(2, channels, 3, height, width), base.conditioning([0, 0], ["day", "night"]))
    config = OptimConfig(steps=2, batch_size=1, lr=1e-3)
    _, losses = train_video(base, clips, config, num_frames=2, progress=False)
    assert len(losses) == 2
    noise = torch.randn(1, channels, 2, height, width)
    frames = sample_clips(base, base.conditioning([0], ["day"]), noise, num_inference_steps=2, guidance_scale=2.0)
    assert frames.shape == (1, 3, 2, *base.frame_size) and frames.isfinite().all()
    validated = ClipValidation(base, ValidationConfig(prompts=("day",), sampling_steps=1), 2, None)(1)
    assert validated["frame_difference"] >= 0


def test_the_model_that_comes_with_the_package_has_no_name():
    assert isinstance(load_base(), LabelBase) and load_base("").frame_size == (64, 96)


@pytest.mark.parametrize("zeros", [True, False])
def test_nothing_is_to_stable_diffusion_xl_what_it_guides_away_from(stable_diffusion_xl, zeros):
    stable_diffusion_xl.register_to_config(force_zeros_for_empty_prompt=zeros)
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    _, negative, _, pooled = stable_diffusion_xl.encode_prompt(["a road"] * 2, device="cpu", **options)
    found = PipelineBase(stable_diffusion_xl).no_conditioning(2)
    torch.testing.assert_close(found["encoder_hidden_states"], negative)
    torch.testing.assert_close(found["text_embeds"], pooled)
    assert found["time_ids"].any()
