"""Every class of the catalogue, injected into a tiny random model and run."""

import importlib.util
from pathlib import Path

import diffusers
import pytest
import torch

from temporal_layers.adapters import TemporalConfig, inject, plan

spec = importlib.util.spec_from_file_location("census", Path(__file__).parent / "census.py")
census = importlib.util.module_from_spec(spec)
spec.loader.exec_module(census)

EVERYTHING = TemporalConfig(resamplers=True)
FRAMES = 3


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def per_frame(conditioning, frames):
    """Conditioning of clips repeated for their frames, spelled out."""
    if isinstance(conditioning, dict):
        return {name: per_frame(value, frames) for name, value in conditioning.items()}
    if conditioning is None:
        return None
    return torch.stack([row for row in conditioning for _ in range(frames)])


def kinds(model, **config):
    return [site.kind for site in plan(model, TemporalConfig(transformer_policy="after_attention", **config))]


class Unet:
    """Runs a UNet of the census on clips, and on the same clips as images."""

    entries = census.UNETS

    def __init__(self, entry):
        self.entry, self.model = entry, entry.make().eval()
        channels, height, width = entry.sample
        self.clips = torch.randn(2, channels, FRAMES, height, width)
        self.conditioning = entry.conditioning(2)
        self.steps = torch.tensor([0.25, 0.75])

    def run(self, clips):
        return self.model(clips, self.steps, **self.conditioning).sample

    def run_images(self, images):
        steps, conditioning = per_frame(self.steps, FRAMES), per_frame(self.conditioning, FRAMES)
        return self.model(images, steps, **conditioning).sample


class Decoder(Unet):
    """Runs the decoder of an autoencoder of the census."""

    entries = census.AUTOENCODERS

    def options(self):
        with_noise = isinstance(self.model, diffusers.ConsistencyDecoderVAE)
        return {"generator": torch.Generator().manual_seed(0)} if with_noise else {}

    def run(self, clips):
        return self.model.decode(clips, **self.options()).sample

    run_images = run


@pytest.fixture(params=[(kind, name) for kind in (Unet, Decoder) for name in kind.entries], ids=lambda param: param[1])
def case(request):
    kind, name = request.param
    return kind(kind.entries[name])


def test_the_sites_are_those_of_the_structure(case):
    entry = case.entry
    plain, everything = kinds(case.model), kinds(case.model, resamplers=True)
    assert plain.count("resnet") == entry.resnets
    assert plain.count("attention") == entry.attentions == everything.count("attention")
    assert everything.count("resnet") == entry.resnets + entry.resamplers


def test_a_fresh_injection_is_the_image_model_and_leaves_it_whole(case, fold, fingerprint):
    images = fold(case.clips)
    expected = case.run_images(images)
    before = fingerprint(case.model)
    adapter = inject(case.model, EVERYTHING)
    assert torch.equal(fold(case.run(case.clips)), expected)
    assert torch.equal(case.run_images(images), expected)
    adapter.remove()
    assert fingerprint(case.model) == before


def test_trained_layers_mix_the_frames_of_a_clip_and_nothing_else(case, fold, randomise):
    images = fold(case.clips)
    plain = case.run_images(images)
    adapter = randomise(inject(case.model, EVERYTHING), std=0.05)
    clips = case.run(case.clips)
    changed = case.clips.clone()
    changed[0, :, 2] += 1
    moved = (case.run(changed) - clips).abs().amax(dim=(1, 3, 4))
    assert (moved[0] > 1e-5).all(), "frames do not mix"
    assert moved[1].max() <= 1e-5 * clips.abs().max(), "clips mix"
    adapter.num_frames = FRAMES
    torch.testing.assert_close(case.run_images(images), fold(clips), rtol=1e-5, atol=1e-5)
    with adapter.disabled():
        assert torch.equal(case.run_images(images), plain)
        assert torch.equal(fold(case.run(case.clips)), plain)


@pytest.mark.parametrize("name", census.AUTOENCODERS)
def test_clips_are_encoded_frame_by_frame(name, fold):
    model = census.AUTOENCODERS[name].make().eval()
    clips = torch.randn(2, 3, FRAMES, 16, 16)

    def latents(x):
        output = model.encode(x)
        posterior = getattr(output, "latent_dist", None)
        return output[0] if posterior is None else posterior.mode()

    expected = latents(fold(clips))
    inject(model)
    assert torch.equal(fold(latents(clips)), expected)


def test_the_mask_of_an_inpainting_decoder_is_one_a_frame(fold):
    model = census.AUTOENCODERS["asymmetric"].make().eval()
    clips, image, mask = (
        torch.randn(2, 4, FRAMES, 4, 4),
        torch.randn(2, 3, FRAMES, 8, 8),
        torch.rand(2, 1, FRAMES, 8, 8),
    )
    expected = model.decode(fold(clips), image=fold(image), mask=fold(mask)).sample
    inject(model)
    assert torch.equal(fold(model.decode(clips, image=image, mask=mask).sample), expected)


VIDEO = {
    "ModelScope": lambda: diffusers.UNet3DConditionModel(
        block_out_channels=(4, 8), norm_num_groups=4, cross_attention_dim=4, attention_head_dim=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ),
    "AnimateDiff": lambda: diffusers.UNetMotionModel(
        block_out_channels=(4, 8), norm_num_groups=4, cross_attention_dim=4,
        layers_per_block=1, motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=2,
    ),
    "Stable Video Diffusion": lambda: diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), num_attention_heads=(2, 2), cross_attention_dim=8, layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        projection_class_embeddings_input_dim=24, addition_time_embed_dim=8,
    ),
    "temporal decoder": lambda: diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), layers_per_block=1
    ),
    "CogVideoX": diffusers.AutoencoderKLCogVideoX,
    "Wan": diffusers.AutoencoderKLWan,
    "LTX": diffusers.AutoencoderKLLTXVideo,
    "Mochi": diffusers.AutoencoderKLMochi,
    "Hunyuan video": diffusers.AutoencoderKLHunyuanVideo,
    "Cosmos": diffusers.AutoencoderKLCosmos,
    "Magvit": diffusers.AutoencoderKLMagvit,
    "Allegro": diffusers.AutoencoderKLAllegro,
    "Qwen image": diffusers.AutoencoderKLQwenImage,
    "Qwen image 2.1": diffusers.AutoencoderKLQwenImage21,
    "VidTok": diffusers.AutoencoderVidTok,
    "Hunyuan video 1.5": diffusers.AutoencoderKLHunyuanVideo15,
    "KVAE video": diffusers.AutoencoderKLKVAEVideo,
}  # fmt: skip


@pytest.mark.parametrize("name", VIDEO)
def test_video_models_are_refused(name):
    with torch.device("meta"):
        model = VIDEO[name]()
    with pytest.raises(ValueError, match=r"expected an image model, got a video model: '.*' is a "):
        plan(model)


@pytest.mark.parametrize("make", [diffusers.UVit2DModel, diffusers.AutoencoderRAE, diffusers.ControlNetModel])
def test_models_without_a_registration_are_refused(make):
    with torch.device("meta"):
        model = make()
    with pytest.raises(ValueError, match=f"got {make.__name__}; .* or add its class with register_model"):
        plan(model)
