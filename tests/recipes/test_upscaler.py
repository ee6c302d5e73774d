"""Upscalers: in pixels and in latents, of diffusers' pipelines, and upscaling of clips with them."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    IFSuperResolutionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.adapters import adapter_of, inject
from temporal_layers.recipes.sampling.regions import windows
from temporal_layers.recipes.sampling.upscaling import upscale_clips
from temporal_layers.recipes.stages.clips import driving_clips
from temporal_layers.recipes.stages.image import HELD_OUT, psnr
from temporal_layers.recipes.stages.upscale import train_upscaler
from temporal_layers.recipes.stages.upscale_metrics import measure_upscaler
from temporal_layers.recipes.stages.upscale_patches import UpscaleObjective, UpscaleSamples
from temporal_layers.recipes.training.engine import OptimConfig
from temporal_layers.recipes.training.streams import generator_at
from temporal_layers.recipes.upscaler import (
    Upscaler,
    UpscalerConfig,
    build_upscaler,
    load_shipped_upscaler,
    load_upscaler,
    shrunk,
)

TINY = UpscalerConfig(channels=(8, 16), norm_groups=4, head_dim=8, factor=2)


@pytest.fixture
def upscaler():
    return build_upscaler(TINY, seed=0)


def make_low_res(clips=2, frames=3, height=8, width=12):
    return torch.rand(clips, 3, frames, height, width, generator=torch.Generator().manual_seed(0))


def mix_frames(unet, seed=0):
    """Temporal layers that do something."""
    adapter = inject(unet)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers.values():
            for parameter in layer.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapter


def test_shrunk_is_the_mean_over_areas():
    frames = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 1, 4, 6)
    small = shrunk(frames, 2)
    assert small.shape == (2, 3, 1, 2, 3)
    assert small[1, 2, 0, 1, 2] == frames[1, 2, 0, 2:4, 4:6].mean()


def test_enlarged_frames_keep_their_place(upscaler):
    ramp = torch.arange(16, dtype=torch.float32).expand(1, 3, 8, 16)
    large = upscaler.enlarged(ramp)
    expected = (torch.arange(32) + 0.5) / 2 - 0.5
    torch.testing.assert_close(large[0, 0, 3, 1:-1], expected[1:-1])


def test_without_temporal_layers_a_clip_is_its_frames(upscaler):
    low_res = make_low_res()
    noisy, given = torch.randn(2, 3, 3, 16, 24), torch.randn(2, 3, 3, 16, 24)
    levels, timesteps = torch.tensor([3, 150]), torch.tensor([10, 900])
    with torch.no_grad():
        output = upscaler.predict(noisy, timesteps, given, levels, {})
        frame = upscaler.unet(torch.cat([noisy, given], 1)[1:, :, 2], timesteps[1:], class_labels=levels[1:]).sample
    torch.testing.assert_close(output[1:, :, 2], frame, rtol=1e-4, atol=1e-5)
    plain = upscale_clips(upscaler, low_res, num_inference_steps=2)
    adapter = mix_frames(upscaler.unet)
    torch.testing.assert_close(upscale_clips(upscaler, low_res, frame_by_frame=True, num_inference_steps=2), plain)
    with adapter.disabled():
        torch.testing.assert_close(upscale_clips(upscaler, low_res, num_inference_steps=2), plain, rtol=0, atol=1e-5)
    assert (upscale_clips(upscaler, low_res, num_inference_steps=2) - plain).abs().max() > 1e-2
    assert plain.shape == (2, 3, 3, 16, 24) and plain.min() >= 0 and plain.max() <= 1


def test_the_noise_of_a_clip_does_not_depend_on_its_batch(upscaler):
    low_res = make_low_res(clips=3)
    options = {"num_inference_steps": 2, "eta": 0.5}
    one, three = (upscale_clips(upscaler, low_res, batch_size=size, **options) for size in (1, 3))
    torch.testing.assert_close(one, three, rtol=0, atol=1e-5)
    assert (upscale_clips(upscaler, low_res, seed=1, **options) - one).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((5, 8), [(0, 5)]),
        ((16, 8), [(0, 8), (8, 16)]),
        ((13, 8), [(0, 8), (5, 13)]),
        ((16, 8, 4), [(0, 8), (4, 12), (8, 16)]),
        ((9, 4, 3), [(0, 4), (1, 5), (2, 6), (3, 7), (4, 8), (5, 9)]),
    ],
)
def test_windows_cover_the_clip(arguments, expected):
    assert [(window.start, window.stop) for window in windows(*arguments)] == expected


def test_windows_without_overlap_are_clips_of_their_own(upscaler, monkeypatch):
    mix_frames(upscaler.unet)
    seen = []
    predict = upscaler.predict

    def spy(noisy, timestep, given, *rest, **words):
        output = predict(noisy, timestep, given, *rest, **words)
        seen.append((noisy, timestep, given, output))
        return output

    monkeypatch.setattr(upscaler, "predict", spy)
    low_res = make_low_res(clips=1, frames=6)
    upscale_clips(upscaler, low_res, window=3, num_inference_steps=1)
    assert [noisy.shape[2] for noisy, *_ in seen] == [3, 3]
    first = [torch.cat([seen[0][index], seen[1][index]], dim=2) for index in (0, 2)]
    seen.clear()
    upscale_clips(upscaler, low_res, window=6, num_inference_steps=1)
    torch.testing.assert_close(first[0], seen[0][0])  # the same noise
    torch.testing.assert_close(first[1], seen[0][2])


def test_where_windows_overlap_their_predictions_are_averaged(upscaler, monkeypatch):
    """Each prediction is the number of its window, so with one step the result has their means in closed form."""
    calls = iter(range(1, 100))
    monkeypatch.setattr(upscaler, "predict", lambda noisy, *rest, **words: torch.full_like(noisy, next(calls) / 10))
    monkeypatch.setattr(upscaler, "decode", lambda result: result)
    result = upscale_clips(upscaler, make_low_res(clips=1, frames=6), window=4, overlap=2, num_inference_steps=1)
    # One step from a signal of zero: the result is minus the velocity.
    for frame, expected in enumerate([0.1, 0.1, 0.15, 0.15, 0.2, 0.2]):
        torch.testing.assert_close(result[0, :, frame], torch.full((3, 16, 24), -expected), rtol=0, atol=1e-5)


def test_upscaling_a_linear_problem_gives_the_known_answer(upscaler, monkeypatch):
    """If a frame is known to be its enlarged low-resolution one, the exact prediction leads there from any noise."""
    bars = upscaler.scheduler.alphas_cumprod

    def predict(noisy, timestep, given, levels, conditioning, **words):
        bar = bars[timestep]
        noise = (noisy - bar.sqrt() * given) / (1 - bar).sqrt()
        return bar.sqrt() * noise - (1 - bar).sqrt() * given

    monkeypatch.setattr(upscaler, "predict", predict)
    low_res = make_low_res()
    large = unfold_frames(F.interpolate(fold_frames(low_res), scale_factor=2, mode="bilinear"), 3)
    for eta in (0.0, 0.9):
        result = upscale_clips(upscaler, low_res, noise_level=0, num_inference_steps=20, eta=eta)
        assert (result - large).abs().mean() < 0.01  # level 0 has noise of variance 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_level": 1000}, "upscale_clips: noise_level: expected 0 to 999, got 1000"),
        ({"eta": 1.0}, "Sampler: eta: expected a value from 0 to below 1, got 1.0"),
        ({"window": 4, "overlap": 4}, "windows: overlap: expected 0 to below window=4, got 4"),
    ],
)
def test_upscaling_refuses_options_out_of_range(upscaler, options, message):
    with pytest.raises(ValueError, match=message):
        upscale_clips(upscaler, make_low_res(), **options)


def test_upscaling_refuses_a_single_clip(upscaler):
    with pytest.raises(ValueError, match=r"upscale_clips: low_res: expected \(clips, 3, frames, .*got \(3, 3, 8, 12\)"):
        upscale_clips(upscaler, make_low_res()[0])


def test_saving_leaves_the_temporal_layers_out(upscaler, tmp_path):
    plain = upscale_clips(upscaler, make_low_res(), num_inference_steps=2)
    adapter = mix_frames(upscaler.unet)
    upscaler.save_pretrained(tmp_path)
    assert adapter_of(upscaler.unet).sites == adapter.sites and upscaler.unet.dtype == torch.float32
    loaded = load_upscaler(tmp_path)
    assert (loaded.factor, loaded.max_noise_level) == (2, 200)
    torch.testing.assert_close(
        upscale_clips(loaded, make_low_res(), num_inference_steps=2), plain, rtol=0, atol=2e-2
    )  # weights in half precision
    assert "_name_or_path" not in (tmp_path / "unet" / "config.json").read_text()


def test_built_in_latents_it_is_a_stable_diffusion_upscaler(stable_upscaler):
    """The layout of `StableDiffusionUpscalePipeline`: noisy latents beside low-resolution pixels."""
    vae = stable_upscaler.vae
    made = build_upscaler(TINY, vae)
    assert made.unet.config.in_channels == stable_upscaler.unet.config.in_channels == 7
    assert made.unet.config.out_channels == stable_upscaler.unet.config.out_channels == 4
    assert (made.cell, made.channels, made.vae) == (2, 4, vae)
    frames = upscale_clips(made, make_low_res(), num_inference_steps=2)
    assert frames.shape == (2, 3, 3, 16, 24) and frames.std() > 0
    pixels = 2 * make_low_res()[0].transpose(0, 1) - 1
    assert made.enlarged(pixels) is pixels


@pytest.mark.parametrize("with_vae", [True, False])
def test_an_upscaler_in_latents_is_saved_with_its_autoencoder_or_without(stable_upscaler, tmp_path, with_vae):
    made = build_upscaler(TINY, stable_upscaler.vae)
    plain = upscale_clips(made, make_low_res(), num_inference_steps=2)
    mix_frames(made.unet)
    made.save_pretrained(tmp_path, with_vae=with_vae)
    assert (tmp_path / "vae").is_dir() == with_vae and made.vae.dtype == torch.float32
    loaded = load_upscaler(tmp_path) if with_vae else Upscaler.from_pretrained(tmp_path, vae=stable_upscaler.vae)
    assert not loaded.unet.training and not any(weight.requires_grad for weight in loaded.unet.parameters())
    torch.testing.assert_close(
        upscale_clips(loaded, make_low_res(), num_inference_steps=2), plain, rtol=0, atol=3e-2
    )  # weights in half precision
    if not with_vae:
        with pytest.raises(ValueError, match=r"vae: expected an autoencoder, as .* in latents without one, got"):
            Upscaler.from_pretrained(tmp_path)


def test_an_upscaler_in_pixels_takes_no_autoencoder(upscaler, tmp_path, stable_upscaler):
    upscaler.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"vae: expected None, as .* upscaler in pixels, got AutoencoderKL"):
        Upscaler.from_pretrained(tmp_path, vae=stable_upscaler.vae)


def test_refused_folders_and_parts(upscaler, tmp_path, stable_upscaler, stable_diffusion):
    with pytest.raises(ValueError, match=r"Upscaler.from_pretrained: expected a folder .*of class Upscaler, got "):
        Upscaler.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Upscaler.save_pretrained: expected an upscaler without captions"):
        Upscaler.from_pipeline(stable_upscaler).save_pretrained(tmp_path)
    assert isinstance(stable_diffusion, StableDiffusionPipeline)
    with pytest.raises(
        ValueError, match=r"from_pipeline: expected a StableDiffusionUpscalePipeline or IF.* got StableD"
    ):
        Upscaler.from_pipeline(stable_diffusion)
    parts = {"unet": upscaler.unet, "scheduler": upscaler.scheduler, "low_res_scheduler": upscaler.low_res_scheduler}
    with pytest.raises(ValueError, match=r"Upscaler: max_noise_level: expected 1 to 1000, .*got 2000"):
        Upscaler(**parts, max_noise_level=2000)
    with pytest.raises(ValueError, match=r"Upscaler: factor: expected a multiple of the autoencoder's 2, .*got 3"):
        Upscaler(**parts, vae=stable_upscaler.vae, factor=3)


def test_in_latents_frame_by_frame_is_the_pipeline_of_diffusers(stable_upscaler, monkeypatch):
    upscaler = Upscaler.from_pipeline(stable_upscaler)
    assert (upscaler.factor, upscaler.cell, upscaler.channels, upscaler.max_noise_level) == (2, 2, 4, 350)
    low_res = make_low_res(clips=1, frames=1, height=16, width=16)
    # Both without the noise on the low-resolution frame, of which each draws its own.
    monkeypatch.setattr(stable_upscaler.low_res_scheduler, "add_noise", lambda image, *rest: image)
    options = {"noise_level": 30, "num_inference_steps": 4, "guidance_scale": 2.0}
    mine = upscale_clips(upscaler, low_res, upscaler.conditioning(["a road"]), **options)
    generator = generator_at(0, 0, "upscaling")
    torch.randn(3, 1, 16, 16, generator=generator)
    latents = torch.randn(4, 1, 16, 16, generator=generator)
    stable_upscaler.set_progress_bar_config(disable=True)
    theirs = stable_upscaler("a road", low_res[:, :, 0], latents=latents[None, :, 0], output_type="np", **options)
    theirs = torch.from_numpy(theirs.images).permute(0, 3, 1, 2)
    torch.testing.assert_close(mine[:, :, 0], theirs, rtol=0, atol=1e-4)
    text = upscaler.conditioning(["a road"])
    assert (upscale_clips(upscaler, low_res, text, **{**options, "guidance_scale": 1.0}) - mine).abs().max() > 1e-3


def test_in_latents_temporal_layers_train_on_encoded_patches(stable_upscaler):
    upscaler = Upscaler.from_pipeline(stable_upscaler)
    clips = make_low_res(frames=4, height=32, width=48)
    conditioning = upscaler.conditioning(["a road", "day"])
    samples = UpscaleSamples(upscaler, clips, None, conditioning, num_frames=3, patch=16, seed=2)
    frames, noise, _, given, _, level, text = samples(0)
    assert frames.shape == (3, 3, 16, 16) and noise.shape == (4, 3, 8, 8) and given.shape == (3, 3, 8, 8)
    torch.testing.assert_close(given, shrunk(frames[None], 2)[0])  # the same place
    assert 0 <= level < 350 and text.shape == (12, 16)
    batch = [torch.stack(column) for column in zip(samples(0), samples(1), strict=True)]
    loss = UpscaleObjective(upscaler, ["encoder_hidden_states"])(*batch)["loss"]
    total, pipeline = 0.0, stable_upscaler
    with torch.no_grad():
        for f in range(3):
            z = pipeline.vae.encode(batch[0][:, :, f]).latent_dist.mode() * pipeline.vae.config.scaling_factor
            noisy = pipeline.scheduler.add_noise(z, batch[1][:, :, f], batch[2])
            low = pipeline.low_res_scheduler.add_noise(batch[3][:, :, f], batch[4][:, :, f], batch[5])
            output = pipeline.unet(torch.cat([noisy, low], 1), batch[2], batch[6], class_labels=batch[5]).sample
            total += (output - upscaler.scheduler.get_velocity(z, batch[1][:, :, f], batch[2])).square().mean() / 3
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)
    before = {name: value.clone() for name, value in upscaler.vae.state_dict().items()}
    config = OptimConfig(steps=3, batch_size=2, lr=1e-2)
    adapter, history = train_upscaler(
        upscaler, clips, conditioning, config, num_frames=3, patch=16, label_drop=0.5, progress=False
    )
    assert len(history) == 3
    assert all(torch.equal(value, before[name]) for name, value in upscaler.vae.state_dict().items())
    low_res = make_low_res(clips=1, frames=3, height=16, width=24)
    video = upscale_clips(upscaler, low_res, num_inference_steps=2)
    assert video.shape == (1, 3, 3, 32, 48)
    with adapter.disabled():
        assert not torch.equal(video, upscale_clips(upscaler, low_res, num_inference_steps=2))


def test_deepfloyd_is_an_upscaler_in_pixels(text_unet):
    unet = text_unet(in_channels=6, out_channels=6, class_embed_type="timestep")
    pipeline = IFSuperResolutionPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=unet,
        scheduler=DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2"),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipeline.encode_prompt = lambda prompt, **words: (torch.zeros(len(prompt), 12, 16), None)
    upscaler = Upscaler.from_pipeline(pipeline)
    assert (upscaler.factor, upscaler.cell, upscaler.channels) == (4, 1, 3)
    low_res = make_low_res(frames=2)
    torch.testing.assert_close(
        upscaler.enlarged(fold_frames(low_res)),
        F.interpolate(fold_frames(low_res), (32, 48), mode="bilinear", align_corners=True),  # as that pipeline does
    )
    clips = make_low_res(frames=2, height=32, width=48)
    adapter, _ = train_upscaler(
        upscaler,
        clips,
        None,
        OptimConfig(steps=1, batch_size=1, lr=1e-3),
        num_frames=2,
        patch=16,
        progress=False,
    )
    assert upscale_clips(upscaler, low_res, num_inference_steps=2).shape == (2, 3, 2, 32, 48)
    assert isinstance(unet, UNet2DConditionModel) and adapter.sites


def test_measuring_knows_a_perfect_upscaler(upscaler, monkeypatch):
    clips = torch.rand(6, 3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    mix_frames(upscaler.unet)
    frozen = clips[:, :, :1].expand_as(clips)
    made = {True: frozen, False: clips}
    module = "temporal_layers.recipes.stages.upscale_metrics.upscale_clips"
    monkeypatch.setattr(module, lambda upscaler, low_res, frame_by_frame=False, **words: made[frame_by_frame])
    numbers = measure_upscaler(upscaler, clips)
    assert numbers["video"]["flicker"] == 0 and numbers["video"]["clip_frechet"] < 1e-6
    assert numbers["video"]["psnr"] == float("inf")
    changes = (clips[:, :, 1:] - clips[:, :, :-1]).abs().mean().item()
    assert numbers["frame-wise"]["flicker"] == pytest.approx(changes, rel=1e-5)
    assert numbers["frame-wise"]["frame_difference"] == 0
    assert numbers["frame-wise"]["clip_frechet"] > 10
    large = F.interpolate(fold_frames(shrunk(clips, 2)), (16, 16), mode="bilinear")
    assert numbers["bilinear"]["psnr"] == pytest.approx(psnr(unfold_frames(large, 16), clips), rel=1e-5)
    adapter_of(upscaler.unet).remove()
    assert set(measure_upscaler(upscaler, clips)) == {"bilinear", "frame-wise"}


def test_the_shipped_upscaler_uses_what_it_is_given():
    """Frames of clips that it was not trained on: as many details as the low-resolution frame does not have."""
    upscaler = load_shipped_upscaler()
    clips = torch.stack([clip.frames for clip in driving_clips((64, 96), 3, 1, first=HELD_OUT)])
    low_res = shrunk(clips, 4)
    made = upscale_clips(upscaler, low_res, num_inference_steps=10)
    other = upscale_clips(upscaler, low_res.roll(1, dims=0), num_inference_steps=10)
    assert psnr(made, clips) > psnr(other, clips) + 5
    bilinear = F.interpolate(fold_frames(low_res), (64, 96), mode="bilinear")

    def detail(frames):
        return frames.diff(dim=-1).abs().mean()

    assert abs(detail(made) - detail(clips)) < 0.5 * abs(detail(bilinear) - detail(clips))
    assert psnr(shrunk(made, 4), low_res) > 30
