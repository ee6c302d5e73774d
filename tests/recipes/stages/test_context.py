"""Stages "predict" and "interpolate": samples, loss, layers that take a context, training, and what a run leaves."""

import json

import pytest
import torch

from temporal_layers.adapters import TemporalAdapter, TemporalConfig, adapter_of, inject
from temporal_layers.recipes import cli
from temporal_layers.recipes.bases import LabelBase
from temporal_layers.recipes.conditioning import ContextPlanes, interpolation_mask, prediction_mask
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm, load_shipped
from temporal_layers.recipes.sampling.context import ContextSampling
from temporal_layers.recipes.sampling.interpolation import sample_interpolation
from temporal_layers.recipes.stages.clips import ClipsConfig, TensorClips
from temporal_layers.recipes.stages.context import (
    ContextObjective,
    context_effect,
    window_length,
    with_context,
)
from temporal_layers.recipes.stages.context_stage import split_clips
from temporal_layers.recipes.stages.interpolate import (
    STRIDES,
    InterpolateConfig,
    interpolate_samples,
    train_interpolate,
)
from temporal_layers.recipes.stages.predict import PredictConfig, predict_samples, train_predict
from temporal_layers.recipes.stages.video import VideoObjective
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig
from temporal_layers.recipes.training.streams import SampleStream

TINY = ImageLDMConfig(
    height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 32), num_heads=2, context_dim=8, num_tokens=2
)
ONE_STEP = OptimConfig(steps=1, batch_size=1, lr=1e-9)


@pytest.fixture
def base():
    return LabelBase(build_image_ldm(TINY, ("day", "night"), seed=0))


def numbered(clips=3, frames=20):
    """Clips in which every value says its clip and its frame."""
    values = 100.0 * torch.arange(clips)[:, None] + torch.arange(frames)
    latents = values[:, None, :, None, None].expand(clips, 4, frames, 8, 12).clone()
    return TensorClips(latents, {"labels": torch.arange(clips) % 2})


def still(clips=2, frames=3):
    """Clips that do not move and have nothing in common: what is in a frame can be known from another one only."""
    images = torch.randn(clips, 4, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    return TensorClips(images.expand(-1, -1, frames, -1, -1).clone(), {"labels": torch.zeros(clips, dtype=torch.int64)})


def blind_guess(clips):
    """Smallest squared error of any guess that does not depend on which of two clips it is: that of their mean."""
    return ((clips.values[0] - clips.values[1]) / 2).square().mean().item()


def test_samples_of_prediction(base):
    clips = numbered()
    samples = predict_samples(base, clips, num_frames=4, given=(0.25, 0.25, 0.5), label_drop=0.3, seed=1)
    counts, starts, drops = [], set(), 0
    for position in range(300):
        window, noise, timestep, context, label = samples(position)
        assert window.shape == noise.shape == (4, 4, 8, 12) and timestep.shape == () and context.shape == (5, 4, 8, 12)
        row, start = divmod(int(window[0, 0, 0, 0]), 100)
        assert window[0, :, 0, 0].tolist() == [100 * row + start + frame for frame in range(4)]
        count = int(context[4, :, 0, 0].sum())
        assert torch.equal(context, samples.planes.build(window, prediction_mask(count, 4)))
        drops += int(label == base.ldm.conditioner.null_label)
        assert label in (base.ldm.conditioner.null_label, row % 2)
        counts.append(count)
        starts.add(start)
    shares = torch.bincount(torch.tensor(counts), minlength=3) / 300
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.25, 0.5]), rtol=0, atol=0.1)
    assert starts == set(range(17)) and 0.2 < drops / 300 < 0.4
    assert all(torch.equal(a, b) for a, b in zip(samples(7), samples(7), strict=True))


def test_samples_of_interpolation_are_of_two_rates_and_say_which(base):
    samples = interpolate_samples(base, numbered(), context_drop=0.25, seed=1)
    assert window_length(5, STRIDES) == 17
    seen, given, levels = set(), 0, set()
    for position in range(200):
        window, _, _, context, _ = samples(position)
        stride = int(window[0, 1, 0, 0] - window[0, 0, 0, 0])
        assert (window[0].diff(dim=0) == stride).all()
        assert (context[6] == {4: 0.0, 1: 1.0}[stride]).all()  # the label of the rate
        mask = context[4, :, 0, 0]
        assert mask.tolist() in ([1, 0, 0, 0, 1], [0] * 5)
        seen.add(stride)
        given += int(mask[0])
        if mask[0]:
            level = round(250 * context[5, 0, 0, 0].item())
            share = base.scheduler.alphas_cumprod[level - 1] if level else torch.ones(())
            noise = (context[:4, [0, 4]] - share.sqrt() * window[:, [0, 4]]) / (1 - share + 1e-12).sqrt()
            assert level == 0 or 0.8 < noise.std() < 1.2
            levels.add(level)
    assert seen == {1, 4} and 130 < given < 170
    assert min(levels) < 25 and max(levels) > 225 and max(levels) <= 250


def test_windows_that_come_from_elsewhere_are_completed_in_the_same_way(base):
    clips = numbered(3, 17)
    samples = interpolate_samples(base, clips, seed=2)
    batch = next(SampleStream(samples).batches(5, batch_size=2))
    rows = [samples.order[position] for position in (10, 11)]
    labels = {"labels": clips.rows["labels"][rows]}
    other = samples.complete_batch(clips.values[rows], labels, [10, 11])
    for one, two in zip(batch, other, strict=True):
        assert torch.equal(one, two)


def test_the_loss_is_that_of_video_over_all_frames_or_the_unknown_ones(base):
    planes = ContextPlanes()
    latents, noise = torch.randn(2, 2, 4, 3, 8, 12)
    timesteps, labels = torch.tensor([100, 700]), torch.tensor([0, 1])
    adapter = with_context(base, planes, None, "both")
    context = planes.build(latents, prediction_mask(torch.tensor([1, 2]), 3))
    plain = VideoObjective(base, ["labels"])(latents, noise, timesteps, labels)["loss"]
    fresh = ContextObjective(base, ["labels"], planes)(latents, noise, timesteps, context, labels)
    torch.testing.assert_close(fresh["loss"], plain)
    with torch.no_grad():
        for layer in adapter.layers.values():
            if getattr(layer, "context_in", None) is not None:
                layer.context_in.weight.normal_(std=0.2)
    losses = {}
    for over in ("all", "unknown"):
        losses[over] = ContextObjective(base, ["labels"], planes, over)(latents, noise, timesteps, context, labels)
    assert not torch.allclose(losses["all"]["loss"], plain, rtol=1e-3)
    noisy = base.scheduler.add_noise(latents, noise, timesteps)
    output = base.unet(noisy, timesteps, base.ldm.conditioner(labels), frame_context=context).sample
    errors = (output - base.scheduler.get_velocity(latents, noise, timesteps)).square()
    unknown = torch.cat([errors[0, :, 1:].flatten(), errors[1, :, 2:].flatten()]).mean()
    torch.testing.assert_close(losses["all"]["loss"], errors.mean())
    torch.testing.assert_close(losses["unknown"]["loss"], unknown)
    torch.testing.assert_close(losses["all"]["unknown"], unknown.detach())
    assert losses["unknown"]["loss"].requires_grad and not losses["all"]["unknown"].requires_grad


def test_prediction_overfits_and_believes_the_given_frames(base):
    """Told one frame of a still clip at pure noise, the rest is right; told that of the other clip, it is the other."""
    clips = still()
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    config = OptimConfig(steps=70, batch_size=4, lr=2e-2, weight_decay=0.0)
    adapter, history = train_predict(base, clips, config, num_frames=3, label_drop=0.0, progress=False)
    assert len(history) == 70 and not base.unet.training
    after = adapter.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # the image model is left alone
    effect = context_effect(
        base, ContextPlanes.of(adapter), clips.values, clips.rows, prediction_mask(1, 3), timesteps=(999,)
    )
    blind = blind_guess(clips)
    assert effect["given"] < 0.85 * blind and effect["swapped"] > 2 * blind


def test_interpolation_overfits_and_believes_the_given_frames(base):
    clips = still(frames=17)
    config = OptimConfig(steps=50, batch_size=4, lr=1e-2, weight_decay=0.0)
    adapter, _ = train_interpolate(
        base, clips, config, train="all", inject="input", label_drop=0.0, loss_over="unknown", progress=False
    )
    planes, blind = ContextPlanes.of(adapter), blind_guess(clips)
    assert planes == ContextPlanes(max_noise_level=250, rate=True)
    for rate in (0.0, 1.0):
        effect = context_effect(
            base, planes, clips.values[:, :, :5], clips.rows, interpolation_mask(5), rate=rate, timesteps=(999,)
        )
        assert effect["given"] < 0.8 * blind and effect["swapped"] > 2.5 * blind
    made = sample_interpolation(
        base, planes, clips.rows, clips.values[:, :, [0, 4, 8]], ContextSampling(num_inference_steps=4), rate=0.0
    )
    assert made.shape == (2, 4, 9, 8, 12)
    middle = made[:, :, [1, 2, 3, 5, 6, 7]]
    own = (middle - clips.values[:, :, :6]).square().mean()
    other = (middle - clips.values[:, :, :6].flip(0)).square().mean()
    assert own < blind < other


def test_layers_that_take_no_context_are_made_to(base):
    layers = inject(base.unet, TemporalConfig())
    with torch.no_grad():
        for parameter in (p for layer in layers.layers.values() for p in layer.parameters()):
            parameter.normal_(std=0.1)
    latents, timesteps = torch.randn(1, 4, 3, 8, 12), torch.tensor([500])
    labels = {"labels": torch.tensor([1])}
    expected = base.predict(latents, timesteps, labels)
    planes = ContextPlanes(rate=True)
    adapter = with_context(base, planes, None, "both")
    context = torch.randn(1, 6, 3, 8, 12)
    assert torch.equal(base.predict(latents, timesteps, labels, frame_context=context), expected)
    assert ContextPlanes.of(adapter) == planes and adapter_of(base.unet).config.context == planes.config("both")
    assert with_context(base, planes, None, "both").config == adapter.config  # goes on
    with pytest.raises(
        ValueError, match=r"with_context: expected temporal layers with ContextConfig\(channels=5, .*got"
    ):
        with_context(base, ContextPlanes(), None, "both")
    with pytest.raises(ValueError, match=r"with_context: temporal: expected None for a UNet that has temporal layers"):
        with_context(base, planes, TemporalConfig(), "both")


def test_windows_that_are_decoded_as_they_are_needed(tmp_path):
    flags = ["--out", str(tmp_path), "--clips.latents", "streamed", "--optim.steps", "1", "--optim.batch-size", "1"]
    flags += ["--clips.data.clips", "2", "--clips.data.clip-frames", "17", "--clips.loader.workers", "0"]
    assert cli.main(["train", "interpolate", *flags]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["held_out"] is None
    assert ContextPlanes.of(TemporalAdapter.from_pretrained(load_shipped().unet, tmp_path / "adapter")).rate


@pytest.mark.parametrize("stage", ["predict", "interpolate"])
def test_a_run_from_the_command_line(stage, tmp_path):
    out = tmp_path / "run"
    flags = ["--out", str(out), "--optim.steps", "1", "--optim.batch-size", "1", "--held-out", "2"]
    flags += ["--clips.data.clips", "3", "--clips.data.clip-frames", "17", "--clips.loader.workers", "0"]
    flags += ["--train", "all"] if stage == "interpolate" else ["--num-frames", "4", "--max-noise-level", "20"]
    flags += ["--engine.validate-every", "1"]
    assert cli.main(["train", stage, *flags]) == 0
    result = json.loads((out / "result.json").read_text())
    names = {"predict": ["1 given", "2 given"], "interpolate": ["stride 4", "stride 1"]}[stage]
    assert list(result["held_out"]) == names
    assert set(result["held_out"][names[0]]) == {"given", "swapped", "none"}
    step, validation = map(json.loads, (out / "losses.jsonl").read_text().splitlines())
    assert "loss" in step and validation[f"validation/{names[0]}/given"] == pytest.approx(
        result["held_out"][names[0]]["given"]
    )
    assert json.loads((out / "config.json").read_text())["held_out"] == 2 and (out / "versions.json").is_file()
    base = LabelBase(load_shipped())
    if stage == "interpolate":
        assert "temporal" not in "".join(type(base.unet).from_pretrained(out / "unet").state_dict())
    adapter = TemporalAdapter.from_pretrained(base.unet, out / "adapter")
    planes = ContextPlanes.of(adapter)
    assert planes == ContextPlanes(max_noise_level=20 if stage == "predict" else 250, rate=stage == "interpolate")
    context = torch.zeros(1, planes.channels, 2, 16, 24)
    base.predict(torch.randn(1, 4, 2, 16, 24), torch.tensor(5), {"labels": torch.tensor([0])}, frame_context=context)


def test_held_out_clips_are_the_last_ones():
    clips = numbered(5, 6)
    used, (latents, rows) = split_clips(clips, 2, 4)
    assert len(used) == 3 and used.num_frames(2) == 6
    assert torch.equal(used.latents(2, 1, 3), clips.values[2, :, 1:3])
    assert torch.equal(latents, clips.values[3:, :, :4]) and rows["labels"].tolist() == [1, 0]
    assert split_clips(clips, 0, 4) == (clips, None)
    with pytest.raises(ValueError, match=r"held_out: expected fewer than all 5 clips, got 5; 0 trains on all"):
        split_clips(clips, 5, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: PredictConfig(num_frames=1), r"PredictConfig\.num_frames: expected a whole number of at least 2"),
        (lambda: PredictConfig(given=(1, 1, 1), num_frames=2), r"PredictConfig: given: expected .* at most 1 .* got 3"),
        (lambda: PredictConfig(given=()), r"draw_given: probabilities: expected numbers of at least 0"),
        (lambda: PredictConfig(inject="skip"), r"PredictConfig\.inject: expected one of 'resblock', .* got 'skip'"),
        (lambda: PredictConfig(train="some"), r"PredictConfig\.train: expected one of 'temporal', 'all', got 'some'"),
        (lambda: PredictConfig(loss_over="no"), r"PredictConfig\.loss_over: expected one of 'all', 'unknown', got"),
        (lambda: PredictConfig(max_noise_level=-1), r"PredictConfig\.max_noise_level: expected a whole number of"),
        (lambda: PredictConfig(label_drop=2.0), r"PredictConfig\.label_drop: expected a value from 0 to 1, got 2\.0"),
        (lambda: PredictConfig(noise_correlation=-1), r"PredictConfig\.noise_correlation: expected a value from 0"),
        (lambda: PredictConfig(held_out=1), r"PredictConfig\.held_out: expected 0, or at least two clips .* got 1"),
        (lambda: PredictConfig(start_from="no"), r"PredictConfig\.start_from: expected 'shipped', .* got 'no', which"),
        (
            lambda: PredictConfig(clips=ClipsConfig(model="x")),
            r"PredictConfig\.start_from: expected 'scratch' or a folder with clips\.model='x', got 'shipped'",
        ),
        (lambda: InterpolateConfig(pairs=0), r"InterpolateConfig\.pairs: expected a whole number of at least 1, got 0"),
        (lambda: InterpolateConfig(context_drop=1.0), r"InterpolateConfig: context_drop: .* below 1, got 1\.0"),
    ],
)  # fmt: skip
def test_settings_out_of_range(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_validation_needs_held_out_clips():
    with pytest.raises(
        ValueError, match=r"PredictConfig.engine.validate_every: expected 0 without held-out clips, got 5"
    ):
        PredictConfig(engine=EngineConfig(validate_every=5), held_out=0)


def test_training_refuses_what_it_cannot_do(base):
    with pytest.raises(
        ValueError, match=r"ContextSamples: clips: expected .* all of at least 17 frames, got one of 16"
    ):
        train_interpolate(base, numbered(2, 16), ONE_STEP)
    with pytest.raises(ValueError, match=r"ContextSamples: clips: expected at least one, .* 4 frames, got no clip"):
        train_predict(base, numbered(0, 16), ONE_STEP, num_frames=4)
    with pytest.raises(
        ValueError, match=r"train_predict: given: expected probabilities of 0 to at most 1 given frames"
    ):
        train_predict(base, numbered(), ONE_STEP, num_frames=2)
    with pytest.raises(
        ValueError, match=r"train_interpolate: context_drop: expected a share from 0 to below 1, got -0"
    ):
        train_interpolate(base, numbered(), ONE_STEP, context_drop=-0.5)
    with pytest.raises(ValueError, match=r"context_effect: latents: expected at least two clips, got 1"):
        context_effect(base, ContextPlanes(), torch.randn(1, 4, 3, 8, 12), {}, prediction_mask(1, 3))
    assert not hasattr(base.unet, "_temporal_state")
