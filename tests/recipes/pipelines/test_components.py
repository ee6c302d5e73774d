"""Components of video pipelines: shared with image pipelines, saved as image models with adapters beside them."""

import copy
import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    VQModel,
)
from safetensors.torch import load_file

from temporal_layers.adapters import TemporalAdapter, TemporalConfig, inject
from temporal_layers.recipes.bases import LabelBase, PipelineBase
from temporal_layers.recipes.pipelines import injected
from temporal_layers.recipes.pipelines.components import TemporalPipeline
from temporal_layers.recipes.sampling.sampler import Sampler
from temporal_layers.recipes.stages.personal import TwoTexts


@pytest.fixture
def vq_pipeline(unconditional):
    vqvae = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    return LDMPipeline(vqvae, unconditional.unet, DDIMScheduler(clip_sample=False))


@pytest.fixture
def injected_pipeline(randomise):
    """A pipeline of an image pipeline, temporal layers in its UNet and, if it has one, its decoder."""

    def injected_pipeline(image_pipeline):
        autoencoder = getattr(image_pipeline, "vae", None) or getattr(image_pipeline, "vqvae", None)
        randomise(inject(image_pipeline.unet))
        if autoencoder is not None:
            randomise(inject(autoencoder, TemporalConfig.for_decoder()))
        return TemporalPipeline.from_image_pipeline(image_pipeline)

    return injected_pipeline


@pytest.fixture(params=["stable_diffusion", "stable_diffusion_xl", "unconditional", "vq_pipeline", "label_model"])
def image_pipeline(request):
    return request.getfixturevalue(request.param)


def outputs(pipeline):
    """What the models say of the same clips."""
    base = pipeline.base
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, base.latent_shape[0], 3, *base.latent_shape[1:], generator=generator)
    frames = torch.rand(1, 3, 2, *base.frame_size, generator=generator)
    told = base.conditioning([0, 1], ["a day road", "a night road"])
    with torch.no_grad():
        return base.predict(latents, torch.tensor(300), told), base.decode(latents), pipeline.encode_clips(frames)


def test_saved_and_loaded_it_gives_the_same_bit_for_bit(image_pipeline, tmp_path, injected_pipeline):
    pipeline = injected_pipeline(image_pipeline)
    expected = outputs(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = TemporalPipeline.from_pretrained(tmp_path)
    assert loaded.adapters().keys() == pipeline.adapters().keys()
    for value, other in zip(outputs(loaded), expected, strict=True):
        assert torch.equal(value, other)
    assert dict(loaded.config) | {"_name_or_path": None} == dict(pipeline.config) | {"_name_or_path": None}
    for one, other in zip(outputs(pipeline), expected, strict=True):  # saving changed nothing
        assert torch.equal(one, other)


def test_files_hold_the_image_model_and_the_adapters_apart(stable_diffusion, tmp_path, injected_pipeline):
    plain = copy.deepcopy(stable_diffusion)
    pipeline = injected_pipeline(stable_diffusion)
    pipeline.save_pretrained(tmp_path)
    for name, model, cls in (("unet", plain.unet, UNet2DConditionModel), ("vae", plain.vae, AutoencoderKL)):
        stored = load_file(tmp_path / name / "diffusion_pytorch_model.safetensors")
        assert stored.keys() == model.state_dict().keys()
        assert all(torch.equal(stored[key], value) for key, value in model.state_dict().items())
        assert type(cls.from_pretrained(tmp_path / name)) is cls
    image = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, feature_extractor=None)
    assert type(image.unet) is UNet2DConditionModel
    for name, model in (("temporal_adapter", plain.unet), ("temporal_decoder", plain.vae)):
        TemporalAdapter.from_pretrained(model, tmp_path / name)
    assert torch.equal(outputs(TemporalPipeline.from_image_pipeline(plain))[0], outputs(pipeline)[0])
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"] and index["_class_name"] == "TemporalPipeline"


def test_an_image_pipeline_loads_without_adapters(stable_diffusion, tmp_path):
    stable_diffusion.save_pretrained(tmp_path)
    pipeline = TemporalPipeline.from_pretrained(tmp_path)
    assert pipeline.adapters() == {}
    with pytest.raises(ValueError, match=r"TemporalPipeline: unet: expected temporal layers, got none; make the pipe"):
        _ = pipeline.adapter
    with pytest.raises(ValueError, match=r"TemporalPipeline: vae: expected temporal layers, got none"):
        _ = pipeline.decoder


def test_a_unet_that_is_passed_keeps_its_layers(stable_diffusion, tmp_path, injected_pipeline):
    injected_pipeline(stable_diffusion).save_pretrained(tmp_path)
    other = copy.deepcopy(stable_diffusion.unet)
    layers = TemporalAdapter(other).layers
    pipeline = TemporalPipeline.from_pretrained(tmp_path, unet=other)
    assert pipeline.unet is other and all(pipeline.adapter.layers[name] is layer for name, layer in layers.items())


def test_from_the_hub_the_adapters_are_fetched_as_well(stable_diffusion, tmp_path, monkeypatch, injected_pipeline):
    injected_pipeline(stable_diffusion).save_pretrained(tmp_path)
    asked = []

    def download(repository, **options):
        asked.append((repository, options))
        return str(tmp_path)

    # What diffusers fetches itself, in place of the network.
    monkeypatch.setattr(DiffusionPipeline, "download", classmethod(lambda cls, name, **options: str(tmp_path)))
    monkeypatch.setattr(injected, "snapshot_download", download)
    pipeline = TemporalPipeline.from_pretrained("somebody/something", revision="main")
    assert asked == [
        (
            "somebody/something",
            {"allow_patterns": ["temporal_adapter/*", "temporal_decoder/*"], "revision": "main"},
        )
    ]
    assert pipeline.adapters().keys() == {"unet", "vae"}


def test_components_are_shared_and_adapters_loaded_into_them(stable_diffusion, tmp_path, injected_pipeline):
    twin = copy.deepcopy(stable_diffusion)
    made = injected_pipeline(stable_diffusion)
    made.adapter.save_pretrained(tmp_path / "unet")
    made.decoder.save_pretrained(tmp_path / "vae")
    pipeline = TemporalPipeline.from_image_pipeline(twin, adapter=tmp_path / "unet", decoder=tmp_path / "vae")
    assert pipeline.unet is twin.unet and pipeline.vae is twin.vae and pipeline.text_encoder is twin.text_encoder
    assert torch.equal(outputs(pipeline)[0], outputs(made)[0]) and torch.equal(outputs(pipeline)[1], outputs(made)[1])
    assert isinstance(pipeline.scheduler, DDIMScheduler)


def test_an_image_pipeline_without_layers_is_refused(stable_diffusion):
    with pytest.raises(ValueError, match=r"from_image_pipeline: expected an adapter, or a UNet with temporal layers"):
        TemporalPipeline.from_image_pipeline(stable_diffusion)
    with pytest.raises(ValueError, match="PipelineBase: expected a pipeline whose unet"):
        TemporalPipeline.from_image_pipeline(DiffusionPipeline())


def test_the_base_is_of_the_kind_of_the_image_model(stable_diffusion, label_model, injected_pipeline):
    pipeline = injected_pipeline(stable_diffusion)
    pipeline.unet.train().requires_grad_(True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    base = pipeline.base
    assert isinstance(base, PipelineBase) and base.scheduler is pipeline.scheduler
    assert pipeline.unet.training and all(parameter.requires_grad for parameter in pipeline.unet.parameters())
    labelled = injected_pipeline(label_model).base
    assert isinstance(labelled, LabelBase) and labelled.frame_size == (32, 48)
    assert labelled.ldm.labels == ("day", "night")


def test_original_text_encoders_are_told_to_the_temporal_layers(stable_diffusion, tmp_path, randomise):
    original = copy.deepcopy(stable_diffusion)
    for parameter in stable_diffusion.text_encoder.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    randomise(inject(stable_diffusion.unet))
    pipeline = TemporalPipeline.from_image_pipeline(stable_diffusion, temporal_text=original)
    assert pipeline.text_encoder is stable_diffusion.text_encoder
    assert pipeline.temporal_text_encoder is original.text_encoder
    reference = TwoTexts(PipelineBase(stable_diffusion), PipelineBase(original))
    told, expected = (base.conditioning([0], ["a road"]) for base in (pipeline.base, reference))
    assert told.keys() == expected.keys() and all(torch.equal(told[key], expected[key]) for key in told)
    assert not torch.equal(told["encoder_hidden_states"], told["temporal_encoder_hidden_states"])
    pipeline.save_pretrained(tmp_path)
    loaded = TemporalPipeline.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded)[0], outputs(pipeline)[0])
    assert pipeline.text_encoder is stable_diffusion.text_encoder


def test_prompts_are_encoded_by_the_code_of_diffusers(stable_diffusion, stable_diffusion_xl, injected_pipeline):
    for image, kind in ((stable_diffusion, StableDiffusionPipeline), (stable_diffusion_xl, StableDiffusionXLPipeline)):
        assert type(image) is kind
        options = {
            "prompt": ["a day road", "a night"],
            "device": torch.device("cpu"),
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
        }
        expected = image.encode_prompt(**options)
        got = injected_pipeline(image).encode_prompt(**options)
        assert len(got) == len(expected)
        assert all(torch.equal(value, other) for value, other in zip(got, expected, strict=True))


def test_casting_moves_all_components(stable_diffusion, injected_pipeline):
    pipeline = injected_pipeline(stable_diffusion).to(torch.bfloat16)
    assert pipeline.dtype == pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    assert {p.dtype for _, p in pipeline.adapter.named_parameters("temporal")} == {torch.bfloat16}
    assert {p.dtype for _, p in pipeline.adapter.named_parameters("alpha")} == {torch.float32}


def test_half_precision_files_load_in_half_precision(stable_diffusion, tmp_path, injected_pipeline):
    injected_pipeline(stable_diffusion).save_pretrained(tmp_path)
    pipeline = TemporalPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert {p.dtype for _, p in pipeline.adapter.named_parameters("temporal")} == {torch.float16}


def test_the_order_of_offloading_names_components():
    named = TemporalPipeline.model_cpu_offload_seq.split("->")
    modules = {"unet", "vae"} | {name for name in TemporalPipeline._optional_components if "tokenizer" not in name}
    assert set(named) == modules and named[-2:] == ["unet", "vae"]


def test_textual_inversion_and_lora_come_with_diffusers_loaders(stable_diffusion, tmp_path, injected_pipeline):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    twin = copy.deepcopy(stable_diffusion)
    twin.unet.add_adapter(LoraConfig(target_modules=["to_q"], r=2, init_lora_weights=False), "style")
    layers = get_peft_model_state_dict(twin.unet, adapter_name="style")
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipeline = injected_pipeline(stable_diffusion)
    before = outputs(pipeline)[0]
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    twin.unet.disable_adapters()
    with_lora = outputs(pipeline)[0]
    assert not torch.allclose(with_lora, before, atol=1e-3)
    pipeline.unload_lora_weights()
    assert torch.equal(outputs(pipeline)[0], before)
    pipeline.load_textual_inversion({"<new>": torch.randn(16) * 3}, token="<new>")
    told = pipeline.base.conditioning([0, 0], ["a <new>", "a road"])["encoder_hidden_states"]
    assert not torch.allclose(told[0], told[1], atol=1e-2)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_pipeline_with_a_lora_is_not_saved_as_something_else(stable_diffusion, tmp_path, injected_pipeline, part):
    from peft import LoraConfig, inject_adapter_in_model

    pipeline = injected_pipeline(stable_diffusion)
    inject_adapter_in_model(LoraConfig(target_modules=["to_q", "q_proj"], r=2), getattr(pipeline, part), "style")
    match = rf"TemporalPipeline.save_pretrained: {part}: expected the image model's own layers, got a LoRA .*fuse_lora"
    with pytest.raises(ValueError, match=match):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_layers_that_were_taken_out_do_not_come_back_from_an_earlier_save(
    stable_diffusion, tmp_path, injected_pipeline
):
    pipeline = injected_pipeline(stable_diffusion)
    pipeline.save_pretrained(tmp_path)
    pipeline.decoder.remove()
    pipeline.save_pretrained(tmp_path)
    assert TemporalPipeline.from_pretrained(tmp_path).adapters().keys() == {"unet"}
    assert not (tmp_path / "temporal_decoder").exists()


class Halfway:
    """A denoiser that says that everything is clean already."""

    def __call__(self, noisy, timestep, region):
        return torch.zeros_like(noisy)


def run(pipeline, callback, **options):
    sampler = Sampler(DDIMScheduler(prediction_type="sample", clip_sample=False), 4)
    start = sampler.start(torch.ones(1, 3, 2, 4, 4))
    return pipeline.denoise(Halfway(), sampler, start, callback_on_step_end=callback, **options)


def test_callbacks_change_latents_and_end_the_run(unconditional, injected_pipeline):
    pipeline = injected_pipeline(unconditional)
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        if step == 1:
            pipe._interrupt = True
        return {"latents": tensors["latents"] + 10 * step}

    result = run(pipeline, callback)
    assert [step for step, *_ in seen] == [0, 1] and seen[0][2] == ["latents"] and pipeline.interrupt
    assert result.min() > 5
    assert (run(pipeline, None) == 0).all() and not pipeline.interrupt  # begins anew
    run(pipeline, lambda pipe, step, timestep, tensors: seen.append(tensors), callback_on_step_end_tensor_inputs=[])
    assert seen[-1] == {}
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs: expected some of \['latents'\], got"):
        run(pipeline, callback, callback_on_step_end_tensor_inputs=["noise"])
