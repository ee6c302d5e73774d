"""Stage "upscale": patches, noise on the low-resolution clips, training of temporal layers, the command."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.adapters import TemporalAdapter, TemporalConfig, adapter_of, inject
from temporal_layers.recipes import cli
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.stages.clips import driving_clips
from temporal_layers.recipes.stages.upscale import (
    UpscaleConfig,
    train_image_upscaler,
    train_upscaler,
)
from temporal_layers.recipes.stages.upscale_patches import UpscaleObjective, UpscaleSamples
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig
from temporal_layers.recipes.upscaler import Upscaler, UpscalerConfig, build_upscaler, load_shipped_upscaler, shrunk

TINY = UpscalerConfig(channels=(8, 16), norm_groups=4, head_dim=8, factor=2)


@pytest.fixture
def upscaler():
    return build_upscaler(TINY, seed=0)


def make_clips(clips=2, frames=5, height=16, width=24):
    return torch.rand(clips, 3, frames, height, width, generator=torch.Generator().manual_seed(0))


def test_a_patch_is_the_same_place_at_both_resolutions(upscaler):
    clips = make_clips()
    samples = UpscaleSamples(upscaler, clips, num_frames=3, patch=8, seed=1)
    corners = set()
    for position in range(24):
        frames, noise, timestep, given, given_noise, level = samples(position)
        assert frames.shape == noise.shape == given.shape == given_noise.shape == (3, 3, 8, 8)
        assert timestep.shape == level.shape == ()
        windows = (2 * clips - 1).unfold(2, 3, 1).unfold(3, 8, 1).unfold(4, 8, 1)  # clip, 3, start, y, x, f, h, w
        equal = (windows.permute(0, 2, 3, 4, 1, 5, 6, 7) == frames).flatten(4).all(-1)
        assert equal.sum() == 1
        row, start, top, left = equal.nonzero()[0].tolist()
        small = F.avg_pool2d(2 * clips[row, :, start : start + 3].transpose(0, 1) - 1, 2)
        large = F.interpolate(small, (16, 24), mode="bilinear")[..., top : top + 8, left : left + 8]
        torch.testing.assert_close(given.transpose(0, 1), large)
        assert top % 2 == left % 2 == 0
        corners.add((top, left))
    assert max(top for top, _ in corners) > 4 and max(left for _, left in corners) > 8


def test_low_resolution_clips_may_be_given(upscaler):
    clips, low_res = make_clips(), make_clips(height=8, width=12)
    given = UpscaleSamples(upscaler, clips, low_res, num_frames=5, patch=None, seed=1)(0)[3]
    row = UpscaleSamples(upscaler, clips, low_res, num_frames=5, patch=None, seed=1).order[0]
    large = F.interpolate(low_res[row].transpose(0, 1), (16, 24), mode="bilinear").transpose(0, 1)
    torch.testing.assert_close(given, 2 * large - 1)


def test_samples_of_a_stream_are_those_of_memory(upscaler):
    upscaler.conditioner = lambda captions: {"words": torch.tensor([[float(len(c))] for c in captions])}
    clips = (make_clips(frames=3) * 255).to(torch.uint8)
    conditioning = upscaler.conditioning(["a", "abc"])
    options = {"num_frames": 3, "patch": None, "drop": 0.3, "seed": 4}
    stored = UpscaleSamples(upscaler, clips, None, conditioning, **options)
    streamed = UpscaleSamples(upscaler, None, **options)
    dropped = 0
    for position in range(16):
        sample, row = stored(position), stored.order[position]
        batch = streamed.complete_batch(
            clips[row : row + 1], {"words": conditioning["words"][row : row + 1]}, [position]
        )
        # The stream was told of a window already, for which the other one draws a number first.
        assert torch.equal(sample[0], batch[0][0]) and torch.equal(sample[3], batch[3][0])
        assert sample[6].item() in (0.0, conditioning["words"][row].item())
        dropped += sample[6].item() == 0
    assert 0 < dropped < 12


def test_noise_of_one_level_a_clip_is_added_in_closed_form(upscaler):
    given, noise = make_clips(clips=3) * 2 - 1, torch.randn(3, 3, 5, 16, 24)
    levels = torch.tensor([0, 20, 199])
    noisy = upscaler.augmented(given, noise, levels)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # DDPM's schedule
    for row, level in enumerate(levels.tolist()):
        bar = (1 - betas[: level + 1]).prod()
        expected = bar.sqrt() * given[row].double() + (1 - bar).sqrt() * noise[row].double()
        torch.testing.assert_close(
            noisy[row].double(), expected, rtol=0, atol=1e-5
        )  # the schedule is a float32 product


def test_the_unet_is_told_the_one_level_of_each_clip(upscaler, monkeypatch):
    seen = []
    forward = upscaler.unet.forward

    def spy(sample, timestep, class_labels=None, **words):
        seen.append((timestep.tolist(), class_labels.tolist(), tuple(sample.shape)))
        return forward(sample, timestep, class_labels=class_labels, **words)

    monkeypatch.setattr(upscaler.unet, "forward", spy)
    samples = UpscaleSamples(upscaler, make_clips(), num_frames=3, patch=8)
    batch = [torch.stack(column) for column in zip(samples(0), samples(1), strict=True)]
    UpscaleObjective(upscaler)(*batch)
    (timesteps, labels, shape), levels = seen[0], batch[5].tolist()
    assert shape == (6, 6, 8, 8)
    assert labels == [levels[0]] * 3 + [levels[1]] * 3 and levels[0] != levels[1]
    assert timesteps == batch[2].repeat_interleave(3).tolist()


def test_levels_and_timesteps_cover_their_range(upscaler):
    samples = UpscaleSamples(upscaler, make_clips(), num_frames=1, patch=4)
    drawn = [samples(position) for position in range(300)]
    levels, timesteps = (torch.stack([sample[index] for sample in drawn]) for index in (5, 2))
    assert levels.min() < 10 and 190 <= levels.max() < 200
    assert timesteps.min() < 40 and 960 <= timesteps.max() < 1000


@pytest.mark.parametrize("injected", [False, True])
def test_objective_is_the_velocity_loss_of_the_image_upscaler_frame_by_frame(upscaler, injected):
    if injected:
        inject(upscaler.unet)
    samples = UpscaleSamples(upscaler, make_clips(), num_frames=3, patch=8)
    batch = [torch.stack(column) for column in zip(samples(0), samples(1), strict=True)]
    loss = UpscaleObjective(upscaler)(*batch)["loss"]
    frames, noise, timesteps, given, given_noise, levels = batch
    total = 0.0
    with torch.no_grad():
        for f in range(3):
            low = upscaler.low_res_scheduler.add_noise(given[:, :, f], given_noise[:, :, f], levels)
            noisy = upscaler.scheduler.add_noise(frames[:, :, f], noise[:, :, f], timesteps)
            output = upscaler.unet(torch.cat([noisy, low], 1), timesteps, class_labels=levels).sample
            target = upscaler.scheduler.get_velocity(frames[:, :, f], noise[:, :, f], timesteps)
            total += (output - target).square().mean() / 3
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)


def test_a_patch_gets_what_a_whole_frame_gets_there(upscaler):
    """Away from the patch's edge, a UNet that is convolutions only says the same of a patch as of the whole."""
    unet = upscaler.unet
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.GroupNorm) or "attentions" in name.split(".")[-2:-1]:
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, _First())
    clip = make_clips(clips=1, frames=2, height=80, width=80)
    low_res = unfold_frames(upscaler.enlarged(fold_frames(shrunk(clip, 2))), 2)
    noisy, levels = torch.randn(clip.shape), torch.tensor([20])
    with torch.no_grad():
        whole = upscaler.predict(noisy, torch.tensor([500]), low_res, levels, {})
        cut = (..., slice(8, 72), slice(4, 68))
        patch = upscaler.predict(noisy[cut], torch.tensor([500]), low_res[cut], levels, {})
    torch.testing.assert_close(patch[..., 28:36, 28:36], whole[cut][..., 28:36, 28:36], rtol=1e-4, atol=1e-5)
    assert (patch - whole[cut]).abs().max() > 1e-3  # its edge is another matter


class _First(nn.Module):
    def forward(self, value, *args, **words):
        return value


def test_training_overfits_one_clip_and_leaves_the_image_upscaler_alone():
    upscaler = load_shipped_upscaler()
    clips = driving_clips((64, 96), 1, 4)[0].frames[None, ..., 32:64, 32:64]
    before = {name: value.clone() for name, value in upscaler.unet.state_dict().items()}
    config = OptimConfig(steps=60, batch_size=2, lr=3e-3, weight_decay=0.0)
    adapter, history = train_upscaler(upscaler, clips, None, config, num_frames=4, patch=16, progress=False)
    assert len(history) == 60
    samples = UpscaleSamples(upscaler, clips, num_frames=4, patch=16, seed=9)
    fixed = [torch.stack(column) for column in zip(*map(samples, range(32)), strict=True)]
    misled = [*fixed[:3], fixed[3].roll(1, dims=0), *fixed[4:]]  # the low-resolution frames of another place
    shuffled = list(fixed)
    for index in (0, 1, 3, 4):  # each frame as it was, beside others than it was
        shuffled[index] = torch.stack([fixed[index].roll(shift, dims=0)[:, :, shift] for shift in range(4)], dim=2)
    shuffled[2], shuffled[5] = (fixed[index][:1].expand(32) for index in (2, 5))
    straight = [*fixed[:2], shuffled[2], *fixed[3:5], shuffled[5]]
    objective = UpscaleObjective(upscaler)

    def loss(batch):
        return objective(*batch)["loss"].item()

    with torch.no_grad():
        with adapter.disabled():
            untrained, alone, alone_shuffled = loss(fixed), loss(straight), loss(shuffled)
        assert alone == pytest.approx(alone_shuffled, rel=1e-3)  # the image upscaler does not see the difference
        assert loss(fixed) < 0.8 * untrained
        assert loss(fixed) < 0.5 * loss(misled)
        assert loss(straight) < 0.9 * loss(shuffled)
    after = upscaler.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not upscaler.unet.training and adapter_of(upscaler.unet).sites == adapter.sites


def test_all_parameters_can_be_trained(upscaler):
    before = {name: value.clone() for name, value in upscaler.unet.named_parameters()}
    config = OptimConfig(steps=2, batch_size=2, lr=1e-3, weight_decay=0.0)
    adapter, _ = train_upscaler(
        upscaler, make_clips(), None, config, num_frames=3, patch=8, train="all", progress=False
    )
    spatial = dict(adapter.named_parameters("spatial"))
    assert len(spatial) == len(before)
    assert all(not torch.equal(before[name], value) for name, value in spatial.items())


def test_image_training_learns_from_the_low_resolution_frame(upscaler):
    frames = driving_clips((32, 48), 1, 2)[0].frames.transpose(0, 1)
    config = OptimConfig(steps=150, batch_size=4, lr=1e-2, weight_decay=0.0)
    history = train_image_upscaler(upscaler, frames, None, config, patch=16, progress=False)
    assert sum(history[-20:]) < 0.4 * sum(history[:20])
    samples = UpscaleSamples(upscaler, frames[:, :, None], num_frames=1, patch=16, seed=9)
    fixed = [torch.stack(column) for column in zip(*map(samples, range(32)), strict=True)]
    blind = list(fixed)
    blind[3] = fixed[3].roll(1, dims=0)
    objective = UpscaleObjective(upscaler)
    with torch.no_grad():
        assert objective(*fixed)["loss"] < 0.8 * objective(*blind)["loss"]
    assert not any(parameter.requires_grad for parameter in upscaler.unet.parameters())


def test_training_repeats_with_its_seed():
    def run(seed):
        config = OptimConfig(steps=3, batch_size=2, lr=1e-3)
        options = {"num_frames": 3, "patch": 8, "seed": seed, "progress": False}
        return train_upscaler(build_upscaler(TINY), make_clips(), None, config, **options)[1]

    assert run(0) == run(0) != run(1)


def test_the_command_trains_an_upscaler_then_its_temporal_layers(tmp_path):
    common = ["--data.clips", "8", "--data.clip-frames", "16", "--data.driving.height", "32", "--size", "32", "48"]
    common += ["--data.driving.width", "48", "--optim.steps", "2", "--optim.batch-size", "2", "--patch", "16"]
    common += ["--new.channels", "8", "16", "--new.norm-groups", "4", "--new.head-dim", "8", "--num-frames", "4"]
    common += ["--spare-frames", "0"]
    image, video = tmp_path / "image", tmp_path / "video"
    assert cli.main(["train", "upscale", "--train", "image", "--model", "new", "--out", str(image), *common]) == 0
    words = [
        "--model",
        str(image / "model"),
        "--out",
        str(video),
        "--train",
        "all",
        "--held-out",
        "6",
        "--sampling-steps",
        "1",
    ]
    assert cli.main(["train", "upscale", *words, *common]) == 0
    upscaler = Upscaler.from_pretrained(image / "model")
    assert upscaler.unet.config.block_out_channels == [8, 16]
    upscaler.unet.load_state_dict(type(upscaler.unet).from_pretrained(video / "unet").state_dict())
    TemporalAdapter.from_pretrained(upscaler.unet, video / "adapter")
    result = json.loads((video / "result.json").read_text())
    assert {"video psnr", "frame-wise psnr", "bilinear psnr", "video clip_frechet"} <= set(result["held_out"])
    assert len((video / "losses.jsonl").read_text().splitlines()) == 2
    assert {"config.json", "versions.json"} <= {path.name for path in video.iterdir()}


def test_the_command_trains_an_upscaler_in_latents(tmp_path):
    words = ["--data.clips", "2", "--data.clip-frames", "12", "--data.driving.height", "32", "--size", "32", "48"]
    words += ["--data.driving.width", "48", "--optim.steps", "1", "--optim.batch-size", "2", "--patch", "32"]
    words += ["--new.channels", "8", "16", "--new.norm-groups", "4", "--new.head-dim", "8", "--num-frames", "4"]
    image = tmp_path / "image"
    options = ["--train", "image", "--model", "new", "--latents", "--out", str(image)]
    assert cli.main(["train", "upscale", *options, *words]) == 0
    upscaler = Upscaler.from_pretrained(image / "model")
    assert (upscaler.cell, upscaler.channels, upscaler.unet.config.in_channels) == (4, 4, 7)
    shipped = load_shipped().vae
    for name, weight in upscaler.vae.state_dict().items():
        torch.testing.assert_close(weight, shipped.state_dict()[name], rtol=1e-3, atol=1e-5)
    options = ["--model", str(image / "model"), "--out", str(tmp_path / "video")]
    assert cli.main(["train", "upscale", *options, *words]) == 0
    TemporalAdapter.from_pretrained(upscaler.unet, tmp_path / "video" / "adapter")


def test_the_command_streams_videos(tmp_path):
    words = ["--model", "new", "--out", str(tmp_path), "--streamed", "--loader.workers", "0", "--patch", "16"]
    words += ["--optim.steps", "1", "--new.channels", "8", "16", "--new.norm-groups", "4", "--data.clip-frames", "6"]
    assert cli.main(["train", "upscale", *words, "--size", "32", "48", "--num-frames", "4"]) == 0
    assert (tmp_path / "adapter" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "expected num_frames and size of at least 1, .*got num_frames=0"),
        ({"latents": True}, "latents: expected False with model='', .*got True; it belongs to model='new'"),
        ({"label_drop": 1.5}, "label_drop: expected a value from 0 to 1, got 1.5"),
        ({"train": "image", "start_from": "a"}, "expected neither temporal nor start_from with train='image'"),
        ({"temporal": "a", "start_from": "b"}, "expected temporal or start_from, .*got both"),
        ({"held_out": 3}, "held_out: expected 0, or 6 or more .*got 3 with 'driving'"),
        ({"engine": EngineConfig(validate_every=5)}, "validate_every: expected 0 without held_out clips, got 5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=f"UpscaleConfig: .*{message}"):
        UpscaleConfig(**options)


@pytest.mark.parametrize(
    ("clips", "options", "message"),
    [
        (make_clips()[0], {}, r"clips: expected \(clips, 3, frames, .*num_frames=3 frames, got \(3, 5"),
        (make_clips(frames=2), {}, r"clips: expected .*num_frames=3 frames, got \(2, 3, 2"),
        (make_clips(width=25), {}, r"expected frames with height and width in multiples of the factor 2, got 16 x 25"),
        (make_clips(), {"patch": 18}, r"patch: expected a multiple of 2 that fits into frames of 16 x 24, got 18"),
        (make_clips(), {"patch": 7}, r"patch: expected a multiple of 2 .*got 7"),
        (make_clips(), {"low_res": make_clips()}, r"low_res: expected shape \(2, 3, 5, 8, 12\) beside the clips, got"),
    ],
)
def test_training_refuses_what_does_not_fit(upscaler, clips, options, message):
    config = OptimConfig(steps=1, batch_size=1, lr=1e-3)
    with pytest.raises(ValueError, match=f"train_upscaler: {message}"):
        train_upscaler(upscaler, clips, None, config, **{"num_frames": 3, "patch": 8, **options})
    assert not hasattr(upscaler.unet, "_temporal_state")


def test_image_training_refuses_temporal_layers(upscaler):
    inject(upscaler.unet, TemporalConfig())
    with pytest.raises(ValueError, match="train_image_upscaler: expected a UNet without temporal layers, got one with"):
        train_image_upscaler(upscaler, make_clips()[:, :, 0], patch=8)
