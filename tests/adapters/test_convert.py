"""Published video weights in image models, against diffusers' video models with the same weights."""

import importlib.util
from pathlib import Path

import pytest
import torch

from temporal_layers.adapters.convert import detect, export_foreign, image_model_of, load_foreign, micro_conditioning

spec = importlib.util.spec_from_file_location("video_models", Path(__file__).parent / "video_models.py")
video = importlib.util.module_from_spec(spec)
spec.loader.exec_module(video)

PRECISIONS = [pytest.param(torch.float32, 1e-6, id="float32"), pytest.param(torch.float64, 1e-9, id="float64")]
FRAMES, BATCH = (2, 5), 2


def relative(ours, theirs):
    """Relative error: the largest in float64, root mean square in float32.

    In float32 the largest of some thousand rounding errors of a whole model is no measure: either model is up to 1e-6
    away from the float64 result (0.7 to 1.0e-6 for SVD), in different directions.
    """
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    order = float("inf") if ours.dtype == torch.float64 else 2
    norm = torch.linalg.vector_norm
    return (norm(ours - theirs, order) / norm(theirs, order)).item()


@torch.no_grad()
def compare(adapter, ours, theirs, bound):
    """Bound the difference of two functions of the clip length; see to it that the temporal layers count at all."""
    for frames in FRAMES:
        seed = 10 + frames
        torch.manual_seed(seed)
        found = ours(frames)
        torch.manual_seed(seed)
        expected = theirs(frames)
        assert relative(found, expected) <= bound
        torch.manual_seed(seed)
        with adapter.disabled():
            assert relative(ours(frames), expected) > 1e-3


def unet_inputs(frames, dtype, channels=4):
    return torch.randn(BATCH, channels, frames, 8, 8, dtype=dtype), torch.randn(BATCH, 3, 12, dtype=dtype)


def assert_same_file(exported, tensors):
    assert exported.keys() == tensors.keys()
    for key, value in tensors.items():
        assert exported[key].dtype == value.dtype
        assert torch.equal(exported[key], value), key


@pytest.mark.parametrize("style", ["diffusers", "original"])
@pytest.mark.parametrize("version", ["v1", "v2", "v3", "sdxl"])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_animatediff(version, style, dtype, bound):
    motion = video.animatediff(version, dtype)
    tensors = video.motion_part(motion)
    if style == "original":
        tensors = video.animatediff_original(tensors)
    unet = video.image_unet_of(motion)
    adapter, report = load_foreign(unet, tensors, in_norm="clip")
    source = report.source
    assert (source.family, source.style, source.version) == ("animatediff", style, version)
    assert source.max_frames == (24 if version == "v1" else 32)
    extra = {}
    if version == "sdxl":
        torch.manual_seed(1)
        ids, text = torch.randn(BATCH, 6, dtype=dtype), torch.randn(BATCH, 16, dtype=dtype)
        extra = {"added_cond_kwargs": {"time_ids": ids, "text_embeds": text}}

    def ours(frames):
        clips, text = unet_inputs(frames, dtype)
        return unet(clips, 7, text, **extra).sample

    def theirs(frames):
        clips, text = unet_inputs(frames, dtype)
        return motion(clips, 7, text.repeat_interleave(frames, 0), **extra).sample

    compare(adapter, ours, theirs, bound)
    assert_same_file(export_foreign(adapter), tensors)


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_animatediff_as_its_authors_normalise(dtype, bound):
    motion = video.animatediff("v2", dtype)
    tensors, unet = video.animatediff_original(video.motion_part(motion)), video.image_unet_of(motion)
    adapter, _ = load_foreign(unet, tensors)
    assert adapter.config.transformer.in_norm == "frame"
    for name, module in list(motion.named_modules()):
        if name.split(".")[-2:-1] == ["motion_modules"]:
            module.norm = video.PerFrameNorm(module.norm)

    def ours(frames):
        clips, text = unet_inputs(frames, dtype)
        return unet(clips, 7, text).sample

    def theirs(frames):
        clips, text = unet_inputs(frames, dtype)
        return motion(clips, 7, text.repeat_interleave(frames, 0)).sample

    compare(adapter, ours, theirs, bound)


SVD = [
    pytest.param(video.svd, lambda model: model.state_dict(), "diffusers", id="diffusers"),
    pytest.param(video.svd, video.svd_sgm, "sgm", id="sgm"),
    pytest.param(video.svd_plain_level, lambda model: model.state_dict(), "diffusers", id="plain-level"),
    pytest.param(lambda dtype: video.svd(dtype, depth=2), video.svd_sgm, "sgm", id="depth-2"),
]


@pytest.mark.parametrize(("make", "named", "style"), SVD)
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_svd(make, named, style, dtype, bound):
    model = make(dtype)
    tensors = named(model)
    unet = image_model_of(tensors, head_dim=16)
    adapter, report = load_foreign(unet, tensors)
    assert (report.source.family, report.source.style, report.source.whole) == ("svd", style, True)

    def ours(frames):
        clips, text = unet_inputs(frames, dtype, model.config.in_channels)
        labels = micro_conditioning(torch.tensor([[6.0, 127.0, 0.02]] * BATCH, dtype=dtype), 16)
        return unet(clips, 0.7, text, class_labels=labels).sample

    def theirs(frames):
        clips, text = unet_inputs(frames, dtype, model.config.in_channels)
        ids = torch.tensor([[6.0, 127.0, 0.02]] * BATCH, dtype=dtype)
        return model(clips.transpose(1, 2), 0.7, text, ids).sample.transpose(1, 2)

    compare(adapter, ours, theirs, bound)
    assert_same_file(export_foreign(adapter), tensors)


@pytest.mark.parametrize("style", ["diffusers", "sgm"])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_svd_decoder(style, dtype, bound):
    model = video.svd_decoder(dtype)
    tensors = model.state_dict() if style == "diffusers" else video.svd_decoder_sgm(model)
    vae = image_model_of(tensors)
    adapter, report = load_foreign(vae, tensors)
    assert (report.source.family, report.source.style) == ("svd-decoder", style)

    def ours(frames):
        return vae.decode(torch.randn(BATCH, 4, frames, 4, 4, dtype=dtype)).sample

    def theirs(frames):
        latents = torch.randn(BATCH, 4, frames, 4, 4, dtype=dtype).transpose(1, 2).flatten(0, 1)
        return model.decode(latents, num_frames=frames).sample.unflatten(0, (BATCH, frames)).transpose(1, 2)

    compare(adapter, ours, theirs, bound)
    assert_same_file(export_foreign(adapter), tensors)
    clips = torch.randn(1, 3, 2, 8, 8, dtype=dtype)
    encoded = vae.encode(clips).latent_dist.mode().transpose(1, 2).flatten(0, 1)
    assert relative(encoded, model.encode(clips.transpose(1, 2).flatten(0, 1)).latent_dist.mode()) <= bound


@pytest.mark.parametrize("style", ["diffusers", "original"])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_modelscope(style, dtype, bound):
    model = video.modelscope(dtype)
    tensors = model.state_dict() if style == "diffusers" else video.modelscope_original(model)
    unet = image_model_of(tensors, head_dim=8)
    adapter, report = load_foreign(unet, tensors)
    assert (report.source.family, report.source.style) == ("modelscope", style)

    def ours(frames):
        clips, text = unet_inputs(frames, dtype)
        return unet(clips, 7, text).sample

    def theirs(frames):
        clips, text = unet_inputs(frames, dtype)
        return model(clips, 7, text).sample

    compare(adapter, ours, theirs, bound)
    assert_same_file(export_foreign(adapter), tensors)


def test_a_file_with_unet_and_autoencoder():
    unet, vae = video.svd_sgm(video.svd()), video.svd_decoder_sgm(video.svd_decoder())
    both = unet | vae | {"conditioner.embedders.0.weight": torch.zeros(2)}
    assert detect(both).family == "svd"
    assert detect(both, "autoencoder").family == "svd-decoder"
    adapter, report = load_foreign(image_model_of(both, part="autoencoder"), both)
    assert "another part of the file" in report.ignored["conditioner.embedders.0.weight"]
    assert all(name in report.ignored for name in unet)
    assert_same_file(export_foreign(adapter), vae)
