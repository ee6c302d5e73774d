"""Stage "video": objective, batches, training of the temporal layers alone, sampling."""

import dataclasses
import json
import math

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from temporal_layers import fold_frames
from temporal_layers.adapters import TemporalAdapter, TemporalConfig, adapter_of
from temporal_layers.recipes import cli
from temporal_layers.recipes.bases import LabelBase
from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import DataConfig
from temporal_layers.recipes.data.video_io import write_video
from temporal_layers.recipes.driving import LABELS
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm
from temporal_layers.recipes.sampling.clips import sample_clips
from temporal_layers.recipes.stages.clips import (
    ClipsConfig,
    TensorClips,
    driving_clips,
    encode_clips,
    open_clips,
    open_pixels,
)
from temporal_layers.recipes.stages.image import HELD_OUT
from temporal_layers.recipes.stages.temporal import alphas, trainable_adapter
from temporal_layers.recipes.stages.video import VideoObjective, load_shipped_adapter, train_video
from temporal_layers.recipes.training.engine import OptimConfig

TINY = ImageLDMConfig(
    height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 32), num_heads=2, context_dim=8, num_tokens=2
)


@pytest.fixture
def base():
    return LabelBase(build_image_ldm(TINY, ("day", "night"), seed=0))


def make_latents(base, clips=3, frames=5):
    return torch.randn(clips, base.latent_shape[0], frames, *base.latent_shape[1:])


def make_clips(base):
    return TensorClips(make_latents(base), {"labels": torch.arange(3) % 2})


def test_objective_gives_each_clip_one_noise_level_and_each_frame_its_own_noise(base):
    latents, noise = make_latents(base, clips=2, frames=3), make_latents(base, clips=2, frames=3)
    timesteps, labels = torch.tensor([100, 700]), torch.tensor([0, 1])
    train_video(
        base, TensorClips(latents, {"labels": labels}), OptimConfig(steps=1, batch_size=1, lr=1e-9), num_frames=3
    )
    loss = VideoObjective(base, ["labels"])(latents, noise, timesteps, labels)["loss"]
    total = 0.0
    with torch.no_grad():  # frame by frame: a fresh adapter is the image model
        for frame in range(3):
            z, e = latents[:, :, frame], noise[:, :, frame]
            noisy = base.scheduler.add_noise(z, e, timesteps)
            output = base.ldm.unet(noisy, timesteps, base.ldm.conditioner(labels)).sample
            total += (output - base.scheduler.get_velocity(z, e, timesteps)).square().mean() / 3
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)


def test_training_overfits_one_clip_and_leaves_the_image_model_alone(base):
    clip = driving_clips((32, 48), 1, 4)[0]
    latents = encode_clips(base, clip.frames[None])
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    config = OptimConfig(steps=80, batch_size=2, lr=1e-2, weight_decay=0.0)
    conditioning = {"labels": torch.tensor([0])}
    adapter, history = train_video(
        base, TensorClips(latents, conditioning), config, num_frames=4, label_drop=0.0, progress=False
    )
    assert len(history) == 80
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(16, *latents.shape[1:], generator=generator)
    fixed = (latents.expand_as(noise), noise, torch.arange(0, 1000, 63), torch.zeros(16, dtype=torch.int64))
    objective = VideoObjective(base, ["labels"])
    with torch.no_grad():
        trained = objective(*fixed)["loss"]
        with adapter.disabled():
            untrained = objective(*fixed)["loss"]
    assert trained < 0.7 * untrained
    after = base.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(abs(alpha - 0.5) > 1e-3 for alpha in alphas(adapter).values())
    assert not base.unet.training
    assert isinstance(adapter, TemporalAdapter) and adapter_of(base.unet).sites == adapter.sites


def test_checkpoints_hold_the_averaged_weights_of_their_step(base):
    seen = {}

    def keep(adapter, step):
        seen[step] = {name: value.clone() for name, value in adapter.state_dict().items()}

    config = OptimConfig(steps=4, batch_size=1, lr=1e-2, schedule="constant", ema_decay=0.9, checkpoint_every=2)
    options = {"num_frames": 3, "progress": False}
    adapter, _ = train_video(base, make_clips(base), config, on_checkpoint=keep, **options)
    assert list(seen) == [2, 4]
    final = adapter.state_dict()
    assert all(torch.equal(value, final[name]) for name, value in seen[4].items())
    assert any(not torch.equal(value, final[name]) for name, value in seen[2].items())


def test_training_repeats_with_its_seed():
    def run(seed):
        base = LabelBase(build_image_ldm(TINY, ("day",), seed=0))
        latents = torch.randn(2, 4, 4, 8, 12, generator=torch.Generator().manual_seed(5))
        config = OptimConfig(steps=3, batch_size=2, lr=1e-3)
        conditioning = {"labels": torch.zeros(2, dtype=torch.int64)}
        return train_video(base, TensorClips(latents, conditioning), config, num_frames=3, seed=seed, progress=False)[1]

    assert run(0) == run(0) != run(1)


@pytest.mark.parametrize(("guidance_scale", "eta"), [(1.0, 0.0), (2.5, 0.0), (1.0, 0.99)])
def test_frame_by_frame_is_the_image_model_and_the_disabled_adapter(base, guidance_scale, eta):
    noise = make_latents(base, clips=2, frames=3)
    conditioning = base.conditioning([0, 1], ["", ""])
    options = {"num_inference_steps": 2, "guidance_scale": guidance_scale, "eta": eta, "batch_size": 1}
    images = sample_clips(base, conditioning, noise, frame_by_frame=True, **options)
    assert images.shape == (2, 3, 3, 16, 24) and images.min() >= 0 and images.max() <= 1
    if eta == 0:
        single = sample_clips(base, base.conditioning([1], [""]), noise[1:, :, 2:], frame_by_frame=True, **options)
        torch.testing.assert_close(single[0, :, 0], images[1, :, 2], rtol=0, atol=1e-4)
    config = OptimConfig(steps=20, batch_size=2, lr=1e-2)
    adapter, _ = train_video(base, TensorClips(noise, conditioning), config, num_frames=3, progress=False)
    with adapter.disabled():
        disabled = sample_clips(base, conditioning, noise, **options)
    torch.testing.assert_close(disabled, images, rtol=0, atol=1e-5)
    assert (sample_clips(base, conditioning, noise, **options) - images).abs().max() > 1e-2


def test_fresh_noise_in_each_step_gives_the_distribution_of_the_data(base, monkeypatch):
    """For data N(0, 0.25) the best prediction is linear, and any eta must lead from noise back to that variance."""
    bars = base.scheduler.alphas_cumprod

    def predict(noisy, timestep, conditioning):
        bar = bars[timestep]
        clean = noisy * 0.25 * bar.sqrt() / (0.25 * bar + 1 - bar)
        noise = (noisy - bar.sqrt() * clean) / (1 - bar).sqrt()
        return bar.sqrt() * noise - (1 - bar).sqrt() * clean

    monkeypatch.setattr(base, "predict", predict)
    monkeypatch.setattr(base, "decode", lambda latents: latents)
    noise = torch.randn(2, 4, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    first, again, other, none = (
        sample_clips(base, {}, noise, num_inference_steps=500, eta=eta, seed=seed)
        for eta, seed in ((0.99, 0), (0.99, 0), (0.99, 1), (0.0, 0))
    )
    assert torch.equal(first, again)
    for clips in (first, other, none):
        assert clips.std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.corrcoef(torch.stack([none.flatten(), noise.flatten()]))[0, 1] > 0.99
    assert torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1] < 0.3


@pytest.mark.parametrize("eta", [-0.1, 1.0])
def test_sampling_refuses_an_eta_out_of_range(base, eta):
    with pytest.raises(ValueError, match=r"Sampler: eta: expected a value from 0 to below 1, got"):
        sample_clips(base, {}, make_latents(base), eta=eta)


def test_encode_clips_encodes_each_frame(base):
    clips = torch.rand(2, 3, 3, 16, 24)
    latents = encode_clips(base, clips)
    torch.testing.assert_close(fold_frames(latents), base.encode(fold_frames(clips)), rtol=1e-4, atol=1e-4)


def test_all_parameters_can_be_trained_and_images_keep_clear_of_the_temporal_layers(base):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    config = OptimConfig(steps=2, batch_size=2, lr=1e-3, weight_decay=0.0)
    given = (make_clips(base), config)
    adapter, history = train_video(base, *given, num_frames=3, train="all", image_share=1.0, progress=False)
    after = base.unet.state_dict()
    spatial = [name for name, _ in adapter.named_parameters("spatial")]
    assert all(not torch.equal(before[name], after[name]) for name in spatial)
    fresh = adapter.state_dict()
    adapter.remove()
    again = trainable_adapter(base.unet, None, "temporal", seed=0)
    assert all(torch.equal(value, fresh[name]) for name, value in again.state_dict().items())
    assert len(history) == 2


def test_training_goes_on_with_layers_that_are_there(base):
    config = OptimConfig(steps=1, batch_size=1, lr=1e-2)
    given = (make_clips(base), config)
    adapter, _ = train_video(base, *given, num_frames=3, progress=False)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    again, _ = train_video(base, *given, num_frames=3, progress=False, seed=1)
    assert again.sites == adapter.sites
    moved = [name for name, value in again.state_dict().items() if not torch.equal(value, before[name])]
    assert moved and max((again.state_dict()[name] - before[name]).abs().max() for name in moved) < 0.011
    with pytest.raises(ValueError, match=r"trainable_adapter: temporal: expected None for a UNet that has temporal"):
        train_video(base, *given, num_frames=3, temporal=TemporalConfig())


def test_images_are_refused_where_they_would_train_nothing(base):
    with pytest.raises(ValueError, match=r"train_video: image_share: expected 0 with train='temporal', .* got 0\.5"):
        config = OptimConfig(steps=1, batch_size=1, lr=1.0)
        train_video(base, make_clips(base), config, num_frames=3, image_share=0.5)


@pytest.mark.parametrize(("count", "frames", "got"), [(0, 5, "no clip"), (2, 2, "one of 2")])
def test_training_refuses_clips_that_are_too_few_or_too_short(base, count, frames, got):
    clips = TensorClips(torch.zeros(count, 4, frames, 8, 12), {"labels": torch.zeros(count, dtype=torch.int64)})
    with pytest.raises(ValueError, match=rf"train_video: clips: expected at least one, .*3 frames, got {got};"):
        train_video(base, clips, OptimConfig(steps=1, batch_size=1, lr=1e-3), num_frames=3)
    assert not hasattr(base.unet, "_temporal_state")


def test_shipped_adapter_predicts_held_out_clips_better_than_the_image_model():
    base, steps = load_shipped_adapter()
    assert steps == 4800 and not base.unet.training
    clip = driving_clips(base.frame_size, 1, 16, first=HELD_OUT)[0]
    latents = encode_clips(base, clip.frames[None])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    objective, conditioning = VideoObjective(base, ["labels"]), torch.tensor([clip.label])
    adapter = adapter_of(base.unet)
    with torch.no_grad():
        for timestep in (450, 650, 800):
            given = (latents, noise, torch.tensor([timestep]), conditioning)
            trained = objective(*given)["loss"]
            with adapter.disabled():
                untrained = objective(*given)["loss"]
            assert trained < 0.8 * untrained, timestep


def run_stage(tmp_path, *words):
    assert cli.main(["train", "video", "--out", str(tmp_path / "run"), *words]) == 0
    return tmp_path / "run"


@pytest.fixture
def driver():
    """A tiny model with the labels of the driving corpus."""
    return LabelBase(build_image_ldm(TINY, LABELS, seed=0))


def small_stage(tmp_path, driver):
    driver.ldm.save_pretrained(tmp_path / "model")
    return [
        *("--clips.model", str(tmp_path / "model"), "--num-frames", "3"),
        *("--optim.steps", "2", "--optim.batch-size", "1"),
        *("--clips.data.clips", "2", "--clips.data.clip-frames", "4", "--clips.loader.workers", "0"),
        *("--clips.data.driving.height", "32", "--clips.data.driving.width", "48"),
    ]


@pytest.mark.parametrize("latents", ["cached", "streamed"])
def test_the_stage_leaves_an_adapter_that_loads(driver, tmp_path, latents):
    run = run_stage(tmp_path, *small_stage(tmp_path, driver), "--clips.latents", latents)
    adapter = TemporalAdapter.from_pretrained(driver.unet, run / "adapter")
    assert len(json.loads((run / "alphas.json").read_text())) == len(adapter.sites)
    records = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1] and all(math.isfinite(r["loss"]) for r in records)
    assert json.loads((run / "config.json").read_text())["clips"]["latents"] == latents
    assert {"config.json", "versions.json", "result.json"} <= {path.name for path in run.iterdir()}
    assert (run / "cache").exists() == (latents == "cached")


def test_a_cache_is_shared_by_the_command_and_by_stages_of_other_lengths(driver, tmp_path, capsys):
    words = small_stage(tmp_path, driver)
    data = ["--data.path", "driving", "--data.clips", "2", "--data.clip-frames", "4", "--loader.workers", "0"]
    data += ["--data.driving.height", "32", "--data.driving.width", "48", "--data.driving.fps", "10"]
    where = ["--out", str(tmp_path / "cache"), "--model", str(tmp_path / "model"), "--dtype", "float16"]
    assert cli.main(["data", "cache", *where, *data]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    for frames in ("3", "4"):
        out = tmp_path / frames
        run_stage(out, *words, "--clips.cache", str(tmp_path / "cache"), "--num-frames", frames)
        assert not (out / "run" / "cache").exists()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before
    other = [*words, "--clips.cache", str(tmp_path / "cache"), "--clips.stride", "2"]
    assert cli.main(["train", "video", "--out", str(tmp_path / "other"), *other]) == 1
    assert "expected a cache of the same model, data and settings, got one with stride=1" in capsys.readouterr().err


def test_cached_clips_that_are_too_short_are_left_out_and_reported(driver, tmp_path, capsys):
    for name, frames in (("short", 2), ("long", 5)):
        write_video(tmp_path / "videos" / f"{name}.mp4", torch.rand(3, frames, 16, 24), 8)
    config = ClipsConfig(data=DataConfig(path=str(tmp_path / "videos")), loader=LoaderConfig(workers=0))
    clips = open_clips(driver, config, out=tmp_path, min_frames=3, accelerator=Accelerator())
    assert len(clips) == 1 and clips.num_frames(0) == 5 and clips.latents(0, 1, 4).shape == (4, 3, 8, 12)
    assert clips.conditioning(0)["labels"].tolist() == [0]
    assert "1 of 2 clips have fewer than 3 frames: left out" in capsys.readouterr().out
    assert len(open_clips(driver, config, out=tmp_path, min_frames=2, accelerator=Accelerator())) == 2


def test_streamed_clips_come_in_buckets(driver, tmp_path):
    for name, height, frames in (("flat", 16, 3), ("tall", 24, 6)):
        write_video(tmp_path / "videos" / f"{name}.mp4", torch.rand(3, frames, height, 16 * 24 // height), 8)
    words = ["--clips.data.path", str(tmp_path / "videos"), "--clips.data.kind", "folder"]
    words += ["--clips.latents", "streamed", "--clips.buckets", "2", "16", "24", "4", "24", "16"]
    run = run_stage(tmp_path, *small_stage(tmp_path, driver), *words, "--optim.steps", "4")
    assert len((run / "losses.jsonl").read_text().splitlines()) == 4
    config = ClipsConfig(data=DataConfig(path=str(tmp_path / "videos")), latents="streamed")
    config = dataclasses.replace(config, buckets=((2, 16, 24), (4, 24, 16)), loader=LoaderConfig(workers=0))
    stream = open_pixels(driver, config, lambda latents, *rest: latents, num_frames=3, seed=0)
    shapes = {tuple(batch.shape[2:]) for batch, _ in zip(stream.batches(0, batch_size=1), range(4), strict=False)}
    assert shapes == {(2, 8, 12), (4, 12, 8)}
    with pytest.raises(ValueError, match=r"buckets: expected none with cached latents, which have one size, got \(\("):
        ClipsConfig(buckets=((2, 16, 24),))
    with pytest.raises(ValueError, match=r"latents: expected 'cached' or 'streamed', got 'stored'"):
        ClipsConfig(latents="stored")


def test_the_stage_trains_everything_goes_on_and_shows_clips(driver, tmp_path):
    (tmp_path / "temporal.yaml").write_text("resblock: null\n")
    words = [*small_stage(tmp_path, driver), "--train", "all", "--image-share", "0.5", "--optim.checkpoint-every", "1"]
    words += ["--engine.validate-every", "2", "--validation.sampling-steps", "1"]
    run = run_stage(tmp_path, *words, "--temporal", str(tmp_path / "temporal.yaml"))
    assert sorted(path.name for path in (run / "validation").iterdir()) == [
        "step-00000002-0.mp4", "step-00000002-1.mp4", "step-00000002.png",
    ]  # fmt: skip
    unet = UNet2DConditionModel.from_pretrained(run / "unet")
    before = driver.unet.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    adapter = TemporalAdapter.from_pretrained(unet, run / "adapter")
    assert adapter.config.resblock is None
    on = run_stage(tmp_path / "on", *small_stage(tmp_path, driver), "--start-from", str(run / "adapter"))
    assert TemporalAdapter.from_pretrained(driver.unet, on / "adapter").config.resblock is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image-share", "0.5"], "image_share: expected 0 with train='temporal', got 0.5"),
        (["--image-share", "0.5", "--train", "all", "--clips.latents", "streamed"], "expected 0 with streamed clips"),
        (["--label-drop", "2"], "label_drop: expected a value from 0 to 1, got 2.0"),
        (["--num-frames", "0"], "num_frames: expected at least 1, got 0"),
        (["--temporal", "a.yaml", "--start-from", "b"], "expected temporal or start_from"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_loads(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "video", *words])
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("stage", "data", "more"),
    [("video", "clips.data", []), ("decoder", "data", ["--held-out", "0"]), ("upscale", "data", [])],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "layers.yaml: expected a readable file of settings"),
        ("include: [no_such_block]", "expected a pattern that is found in the name of a site, got 'no_such_block'"),
    ],
)
def test_layers_that_make_no_sense_are_refused_before_videos_are_looked_at(
    stage, data, more, text, message, tmp_path, capsys
):
    layers = tmp_path / "layers.yaml"
    if text is not None:
        layers.write_text(text)
    words = [f"--{data}.path", str(tmp_path / "nowhere"), "--temporal", str(layers), "--out", str(tmp_path / "run")]
    assert cli.main(["train", stage, *words, *more]) == 1
    assert message in capsys.readouterr().err
