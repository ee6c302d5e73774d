"""The image LDM: its parts against diffusers, saving, sampling, and the weights that come with the package."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from temporal_layers.recipes.driving import LABELS, DrivingCorpus
from temporal_layers.recipes.image_ldm import (
    SHIPPED_WEIGHTS,
    ImageLDM,
    ImageLDMConfig,
    LabelConditioner,
    build_image_ldm,
    load_shipped,
    make_scheduler,
    sample_images,
)
from temporal_layers.recipes.stages.image import HELD_OUT, psnr
from temporal_layers.recipes.stages.image_objectives import DenoisingObjective

TINY = ImageLDMConfig(
    height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 32), num_heads=2, context_dim=8, num_tokens=2
)


@pytest.fixture
def tiny():
    return build_image_ldm(TINY, ("day", "night"), seed=0)


@pytest.fixture(scope="module")
def shipped():
    return load_shipped()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- parts ----------------------------------------------------------------------------------------------------------


def test_encode_and_decode_are_the_autoencoder_with_its_scale(tiny):
    tiny.vae.register_to_config(scaling_factor=0.7)
    frames = torch.rand(5, 3, 16, 24)
    with torch.no_grad():
        expected = 0.7 * tiny.vae.encode(2 * frames - 1).latent_dist.mode()
        output = (tiny.vae.decode(expected / 0.7).sample / 2 + 0.5).clamp(0, 1)
    latents = tiny.encode(frames, batch_size=2)
    assert latents.shape == (5, *tiny.latent_shape) == (5, 4, 8, 12)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(tiny.decode(latents, batch_size=3), output)
    assert not latents.requires_grad


def test_initial_weights_depend_on_the_seed_alone(tiny):
    state = torch.get_rng_state()
    again, other = build_image_ldm(TINY, ("a", "b"), seed=0), build_image_ldm(TINY, ("a", "b"), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in tiny.unet.state_dict().items():
        assert torch.equal(value, again.unet.state_dict()[name]), name
    assert not torch.equal(tiny.unet.conv_in.weight, other.unet.conv_in.weight)


def test_the_schedule_ends_in_pure_noise_and_sampling_starts_there():
    scheduler = make_scheduler()
    assert scheduler.alphas_cumprod[-1] < 1e-6
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    assert scheduler.config.prediction_type == "v_prediction"


def test_the_conditioner_looks_up_one_row_a_label_and_comes_back_from_its_config():
    conditioner = LabelConditioner(num_labels=3, dim=4, num_tokens=2)
    labels = torch.tensor([2, 0, conditioner.null_label])
    tokens = conditioner(labels)
    assert tokens.shape == (3, 2, 4)
    torch.testing.assert_close(tokens.flatten(1), conditioner.tokens.weight[labels])
    again = LabelConditioner.from_config(conditioner.config)
    assert again.tokens.weight.shape == conditioner.tokens.weight.shape == (4, 8)


def test_only_the_upper_level_goes_without_attention(tiny):
    assert [type(block).__name__ for block in tiny.unet.down_blocks] == ["DownBlock2D", "CrossAttnDownBlock2D"]
    assert [type(block).__name__ for block in tiny.unet.up_blocks] == ["CrossAttnUpBlock2D", "UpBlock2D"]


# -- saving ---------------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_rounded_to_half_precision_once(tiny, tmp_path):
    tiny.vae.register_to_config(scaling_factor=0.61)
    tiny.save_pretrained(tmp_path / "first")
    assert next(tiny.unet.parameters()).dtype == torch.float32
    loaded = ImageLDM.from_pretrained(tmp_path / "first")
    for part in ("vae", "unet", "conditioner"):
        saved = getattr(loaded, part).state_dict()
        for name, value in getattr(tiny, part).state_dict().items():
            assert saved[name].dtype == torch.float32
            assert torch.equal(saved[name], value.half().float()), f"{part}.{name}"
    assert loaded.vae.config.scaling_factor == 0.61
    assert (loaded.labels, loaded.frame_size) == (tiny.labels, tiny.frame_size)
    assert torch.equal(loaded.scheduler.alphas_cumprod, tiny.scheduler.alphas_cumprod)
    assert loaded.scheduler.config.prediction_type == tiny.scheduler.config.prediction_type
    assert loaded.scheduler.config.timestep_spacing == tiny.scheduler.config.timestep_spacing
    assert not (loaded.unet.training or loaded.vae.training)

    loaded.save_pretrained(tmp_path / "second")
    first, second = (sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert not any(str(tmp_path) in path.read_text() for path in second if path.suffix == ".json")


def test_each_part_loads_by_itself_with_diffusers(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float32)
    assert torch.equal(unet.conv_in.weight, tiny.unet.conv_in.weight.half().float())
    assert isinstance(AutoencoderKL.from_pretrained(tmp_path / "vae"), AutoencoderKL)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder with a model_index\.json of class ImageLDM, got"):
        ImageLDM.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match=r"write one with ImageLDM\.save_pretrained"):
        ImageLDM.from_pretrained(tmp_path)


# -- sampling -------------------------------------------------------------------------------------------------------


def test_sampling_follows_its_generator_labels_and_noise(tiny):
    labels = torch.tensor([0, 1, 1])

    def sample(seed=0, **options):
        return sample_images(tiny, labels, generator=generator(seed), num_inference_steps=3, **options)

    images = sample()
    assert images.shape == (3, 3, 16, 24)
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, sample())
    assert not torch.equal(images, sample(seed=1))
    noise = torch.randn(3, *tiny.latent_shape, generator=generator(0))
    assert torch.equal(images, sample_images(tiny, labels, noise=noise, num_inference_steps=3))
    swapped = sample_images(tiny, 1 - labels, noise=noise, num_inference_steps=3)
    assert not torch.allclose(images, swapped, atol=1e-5)


def test_sampling_is_what_diffusers_pipeline_does_with_the_same_parts(tiny):
    pipeline = StableDiffusionPipeline(
        vae=tiny.vae,
        unet=tiny.unet,
        scheduler=make_scheduler(),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.tensor([0, 1])
    noise = torch.randn(2, *tiny.latent_shape)
    expected = pipeline(
        prompt_embeds=tiny.conditioner(labels),
        negative_prompt_embeds=tiny.conditioner(torch.full((2,), tiny.conditioner.null_label)),
        latents=noise,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    images = sample_images(tiny, labels, noise=noise, num_inference_steps=4, guidance_scale=3.0)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_guidance_of_one_is_the_conditioned_model_alone(tiny):
    labels, noise = torch.tensor([1, 0]), torch.randn(2, *tiny.latent_shape)
    plain = sample_images(tiny, labels, noise=noise, num_inference_steps=2, guidance_scale=1.0)
    nearly = sample_images(tiny, labels, noise=noise, num_inference_steps=2, guidance_scale=1.0 + 1e-6)
    torch.testing.assert_close(plain, nearly, atol=1e-4, rtol=0)


# -- errors ---------------------------------------------------------------------------------------------------------


def test_wrong_shapes_and_labels_are_refused(tiny):
    with pytest.raises(
        ValueError, match=r"ImageLDM\.encode: expected frames \(batch, 3, .* of 2, got \(1, 3, 15, 24\)"
    ):
        tiny.encode(torch.zeros(1, 3, 15, 24))
    with pytest.raises(ValueError, match=r"ImageLDM\.decode: expected latents \(batch, 4, .* got \(1, 3, 8, 12\)"):
        tiny.decode(torch.zeros(1, 3, 8, 12))
    with pytest.raises(ValueError, match=r"sample_images: expected noise of shape \(2, 4, 8, 12\) for 2 labels"):
        sample_images(tiny, torch.tensor([0, 1]), noise=torch.zeros(1, 4, 8, 12))
    with pytest.raises(ValueError, match=r"expected labels from 0 to 2 \(the null label\), got -1 to 1"):
        tiny.conditioner(torch.tensor([1, -1]))
    with pytest.raises(ValueError, match="got 3 to 3"):
        tiny.conditioner(torch.tensor([3]))


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="expected at least two levels in vae_channels and unet_channels"):
        ImageLDMConfig(vae_channels=(8,))
    with pytest.raises(ValueError, match="expected height and width in multiples of 4 and at least 16, got 66x96"):
        ImageLDMConfig(height=66)
    with pytest.raises(ValueError, match="build_image_ldm: expected at least one label, got none"):
        build_image_ldm(TINY, ())


# -- shipped weights ------------------------------------------------------------------------------------------------


def test_shipped_weights_fit_the_corpus_and_the_budget(shipped):
    assert shipped.labels == LABELS
    corpus = DrivingCorpus()
    assert shipped.frame_size == (corpus.config.height, corpus.config.width)
    assert sum(path.stat().st_size for path in SHIPPED_WEIGHTS.rglob("*")) < 10.5e6
    assert {p.dtype for part in (shipped.vae, shipped.unet) for p in part.parameters()} == {torch.float32}


def test_shipped_autoencoder_holds_frames_it_never_saw(shipped):
    frames, _ = DrivingCorpus().stills(range(HELD_OUT + 1000, HELD_OUT + 1024))
    latents = shipped.encode(frames)
    assert psnr(shipped.decode(latents), frames) > 32.5
    assert latents.std() == pytest.approx(1.0, abs=0.1)


def test_shipped_unet_denoises_frames_it_never_saw_better_with_their_label(shipped):
    frames, labels = DrivingCorpus().stills(range(HELD_OUT + 2000, HELD_OUT + 2024))
    latents = shipped.encode(frames)
    noise = torch.randn(latents.shape, generator=generator())
    timesteps = torch.linspace(60, 999, len(frames)).long()[torch.randperm(len(frames), generator=generator())]
    objective = DenoisingObjective(shipped)
    with torch.no_grad():
        right = objective(latents, labels, noise, timesteps)["loss"]
        wrong = objective(latents, (labels + 6) % len(LABELS), noise, timesteps)["loss"]
        nothing = shipped.scheduler.get_velocity(latents, noise, timesteps).square().mean()
    assert right < 0.4 * nothing
    assert right < wrong


def test_shipped_samples_are_as_dark_and_as_saturated_as_their_labels_say(shipped):
    names = ("day clear", "night clear", "dusk clear", "day fog")
    labels = torch.tensor([LABELS.index(name) for name in names]).repeat_interleave(3)
    images = sample_images(shipped, labels, generator=generator(), num_inference_steps=8)
    day, night, dusk, fog = images.unflatten(0, (4, 3)).mean((1, 3, 4))
    assert night.mean() < 0.6 * day.mean()
    # The sky of a sunset is redder than blue, the sky of a clear day bluer than red.
    upper = images[:, :, :20].unflatten(0, (4, 3)).mean((1, 3, 4))
    assert upper[2, 0] > upper[2, 2] and upper[0, 2] > upper[0, 0]
    assert fog.max() - fog.min() < upper[0].max() - upper[0].min()
    assert dusk.mean() < day.mean()
