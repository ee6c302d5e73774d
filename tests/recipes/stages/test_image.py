"""Stage "image": losses and batches against closed forms, training on a few frames, the whole stage in small."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import DataConfig
from temporal_layers.recipes.data.video_io import write_video
from temporal_layers.recipes.driving import LABELS, DrivingConfig, DrivingCorpus
from temporal_layers.recipes.image_ldm import ImageLDM, ImageLDMConfig, build_image_ldm
from temporal_layers.recipes.stages import image as stage
from temporal_layers.recipes.stages.image import (
    ImageConfig,
    encode_stills,
    finetune_frames,
    measure_scaling_factor,
    psnr,
    save_grid,
    train_autoencoder,
    train_image_unet,
)
from temporal_layers.recipes.stages.image_objectives import (
    AutoencoderObjective,
    AutoencoderSamples,
    DenoisingObjective,
    DenoisingSamples,
    as_float,
    detail_loss,
)
from temporal_layers.recipes.stages.stills import read_stills, render_stills
from temporal_layers.recipes.training.engine import OptimConfig
from temporal_layers.recipes.training.streams import SampleStream

TINY = ImageLDMConfig(
    height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 16), num_heads=2, context_dim=8, num_tokens=2
)


def options(**changes):
    return OptimConfig(**{"steps": 2, "batch_size": 4, "lr": 4e-3, "weight_decay": 0.0, **changes})


@pytest.fixture
def tiny():
    return build_image_ldm(TINY, LABELS, seed=0)


@pytest.fixture(scope="module")
def stills():
    """Eight frames (3, 16, 24) as bytes, and their labels."""
    frames, labels = render_stills(DrivingCorpus(DrivingConfig(height=32, width=48)), 8)
    return F.avg_pool2d(frames.float(), 2).byte(), labels


def test_detail_loss_is_blind_to_a_shift_and_equals_numpy():
    target = torch.rand(2, 3, 16, 24)
    assert detail_loss(target + 0.3, target) < 1e-6
    output = torch.rand(2, 3, 16, 24)
    error, expected = (output - target).double().numpy(), 0.0
    for _ in range(3):
        expected += np.abs(np.diff(error, axis=3)).mean() + np.abs(np.diff(error, axis=2)).mean()
        height, width = error.shape[2] // 2, error.shape[3] // 2
        error = error.reshape(2, 3, height, 2, width, 2).mean((3, 5))
    assert detail_loss(output, target).item() == pytest.approx(expected / 3, rel=1e-5)


def test_autoencoder_objective_adds_up_and_its_kl_is_torchs(tiny):
    frames, noise = torch.rand(2, 3, 16, 24), torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        losses = AutoencoderObjective(tiny.vae, kl_weight=0.3, detail_weight=2.0)(frames, noise)
        posterior = tiny.vae.encode(2 * frames - 1).latent_dist
        gaussian = torch.distributions.Normal(posterior.mean, posterior.std)
        kl = torch.distributions.kl_divergence(gaussian, torch.distributions.Normal(0.0, 1.0)).mean()
        output = tiny.vae.decode(posterior.mean + posterior.std * noise).sample
        error = output - (2 * frames - 1)
    torch.testing.assert_close(losses["kl"], kl)
    torch.testing.assert_close(losses["mse"], error.square().mean())
    expected = error.abs().mean() + losses["mse"] + 2 * losses["detail"] + 0.3 * kl
    torch.testing.assert_close(losses["loss"], expected)


def test_denoising_objective_compares_with_the_velocity(tiny):
    latents, noise = torch.randn(3, 4, 8, 12), torch.randn(3, 4, 8, 12)
    timesteps, labels = torch.tensor([0, 500, 999]), torch.tensor([0, 5, 12])
    bar = tiny.scheduler.alphas_cumprod[timesteps].view(3, 1, 1, 1)
    signal, sigma = bar.sqrt(), (1 - bar).sqrt()
    with torch.no_grad():
        loss = DenoisingObjective(tiny)(latents, labels, noise, timesteps)["loss"]
        output = tiny.unet(
            signal * latents + sigma * noise, timesteps, encoder_hidden_states=tiny.conditioner(labels)
        ).sample
    torch.testing.assert_close(loss, (output - (signal * noise - sigma * latents)).square().mean())


def test_samples_visit_every_frame_once_an_epoch_and_repeat_with_the_seed():
    frames = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)

    def rows(seed, count=20):
        draw = AutoencoderSamples(frames, latent_shape=(1, 1, 1), seed=seed)
        return [round(255 * draw(position)[0][0, 0, 0].item()) for position in range(count)]

    first = rows(0)
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10)) and first[:10] != first[10:]
    assert rows(0) == first != rows(1)


def test_small_sets_fill_a_batch_by_repetition():
    draw = AutoencoderSamples(torch.rand(3, 3, 4, 4), latent_shape=(4, 2, 2), seed=0)
    batch, noise = next(SampleStream(draw).batches(0, batch_size=8))
    assert batch.shape == (8, 3, 4, 4) and noise.shape == (8, 4, 2, 2)


def test_denoising_samples_drop_labels_as_often_as_asked_and_draw_all_timesteps():
    draw = DenoisingSamples(
        torch.zeros(16, 4, 2, 2),
        torch.zeros(16, dtype=torch.long),
        null_label=7,
        label_drop=0.25,
        num_timesteps=10,
        seed=0,
    )
    latents, labels, noise, timesteps = next(SampleStream(draw).batches(0, batch_size=2000))
    assert set(labels.tolist()) == {0, 7}
    assert (labels == 7).float().mean() == pytest.approx(0.25, abs=0.04)
    assert set(timesteps.tolist()) == set(range(10))
    assert noise.std() == pytest.approx(1, abs=0.05) and latents.abs().max() == 0


def test_psnr_of_a_known_error():
    target = torch.full((2, 3, 4, 4), 0.5)
    assert psnr(target + 0.1, target) == pytest.approx(20.0, abs=1e-4)
    assert psnr(target + 0.01, target) == pytest.approx(40.0, abs=1e-3)


def test_stored_bytes_are_the_rendered_frames():
    corpus = DrivingCorpus(DrivingConfig(height=32, width=48))
    stored, stored_labels = render_stills(corpus, 66, first=5)
    frames, labels = corpus.stills(range(5, 71))
    assert stored.dtype == torch.uint8
    assert (as_float(stored) - frames).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(stored_labels, labels)
    assert as_float(frames) is frames


def test_the_autoencoder_learns_a_few_frames_and_measures_its_scale(tiny, stills):
    before = psnr(tiny.decode(encode_stills(tiny, stills[0])), as_float(stills[0]))
    history = train_autoencoder(tiny, stills[0], options(steps=60, lr=1e-2, ema_decay=0.9), progress=False)
    after = psnr(tiny.decode(encode_stills(tiny, stills[0])), as_float(stills[0]))
    assert after > before + 3
    assert np.mean(history[-5:]) < 0.5 * history[0]
    assert encode_stills(tiny, stills[0]).std().item() == pytest.approx(1.0, rel=1e-4)
    assert not any(p.requires_grad for p in tiny.vae.parameters())


def test_training_the_decoder_alone_leaves_the_latents_as_they_are(tiny, stills):
    measure_scaling_factor(tiny, stills[0])
    latents, scale = encode_stills(tiny, stills[0]), tiny.vae.config.scaling_factor
    before = {name: value.clone() for name, value in tiny.vae.state_dict().items()}
    config = options(steps=5)
    train_autoencoder(tiny, stills[0], config, measure_scale=False, train_encoder=False, progress=False)
    torch.testing.assert_close(encode_stills(tiny, stills[0]), latents, atol=1e-5, rtol=0)
    assert tiny.vae.config.scaling_factor == scale
    after = tiny.vae.state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if name.startswith(("encoder.", "quant_conv."))}


def test_the_unet_learns_a_few_latents(tiny, stills):
    measure_scaling_factor(tiny, stills[0])
    history = train_image_unet(tiny, *stills, options(steps=40, batch_size=8, lr=1e-2), progress=False)
    # Predicting zero costs about 1; the rest of a short run is dominated by the draw of noise levels.
    assert np.mean(history[:3]) > 0.8
    assert np.mean(history[-10:]) < 0.7
    assert not any(p.requires_grad for p in (*tiny.unet.parameters(), *tiny.conditioner.parameters()))


def test_training_repeats_with_its_seed(stills):
    def losses(seed):
        ldm = build_image_ldm(TINY, LABELS, seed=0)
        return train_image_unet(ldm, *stills, options(), seed=seed, progress=False)

    assert losses(0) == losses(0) != losses(1)


def test_finetuning_adapts_to_new_frames_and_keeps_the_latent_scale(tiny):
    rows = torch.linspace(0, 1, 16)[:, None].expand(16, 32)
    frames = torch.stack([torch.stack([rows, 1 - rows, torch.full_like(rows, 0.2 * i)]) for i in range(4)])
    tiny.vae.register_to_config(scaling_factor=0.8)
    before = psnr(tiny.decode(tiny.encode(frames)), frames)
    unet_before = {name: value.clone() for name, value in tiny.unet.state_dict().items()}
    finetune_frames(tiny, frames, autoencoder=options(steps=40, lr=1e-2), unet=options(steps=3), progress=False)
    assert psnr(tiny.decode(tiny.encode(frames)), frames) > before + 4
    assert tiny.vae.config.scaling_factor == 0.8
    assert tiny.frame_size == (16, 32)
    assert any(not torch.equal(value, unet_before[name]) for name, value in tiny.unet.state_dict().items())
    used = [tiny.conditioner.null_label]
    fresh = build_image_ldm(TINY, LABELS, seed=0).conditioner.tokens.weight
    moved = (tiny.conditioner.tokens.weight - fresh).abs().amax(1) > 1e-4
    assert moved.nonzero().flatten().tolist() == used


def test_a_grid_holds_the_frames_in_reading_order(tmp_path):
    frames = torch.zeros(5, 3, 8, 10)
    frames[:, 0] = torch.arange(5).view(5, 1, 1) / 5
    save_grid(tmp_path / "grid.png", frames, columns=2, scale=3)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 8 * 3, 2 * 10 * 3, 3)
    centres = pixels[12::24, 15::30, 0]
    assert centres.tolist() == [[0, 51], [102, 153]]


def test_the_whole_stage_leaves_a_model_losses_sheets_and_results(tmp_path):
    flags = "--num-stills 6 --model.height 32 --model.width 48 --model.vae-channels 8 8 8 --model.unet-channels 16 16"
    steps = "--autoencoder.steps 2 --autoencoder.batch-size 2 --unet.steps 2 --unet.batch-size 2 --model.num-heads 2"
    assert stage.main(["--out", str(tmp_path / "run"), *flags.split(), *steps.split()]) == 0
    run = tmp_path / "run"
    loaded = ImageLDM.from_pretrained(run / "model")
    assert loaded.labels == LABELS and loaded.frame_size == (32, 48)
    assert loaded.vae.config.scaling_factor != 0.18215
    records = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["stage"] == "unet"] == [0, 1]
    assert math.isfinite(json.loads((run / "result.json").read_text())["psnr_held_out"])
    assert (run / "samples-00002.png").exists() and (run / "reconstructions-00002.png").exists()

    again = tmp_path / "again"
    stage.main(
        ["--out", str(again), "--train", "unet", "--start-from", str(run / "model"), *flags.split(), *steps.split()]
    )
    second = ImageLDM.from_pretrained(again / "model")
    assert torch.equal(second.vae.encoder.conv_in.weight, loaded.vae.encoder.conv_in.weight)
    assert not torch.equal(second.unet.conv_in.weight, loaded.unet.conv_in.weight)


def test_bad_input_is_refused(tiny):
    good, labels = torch.rand(2, 3, 16, 24), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"train_autoencoder: expected frames .* multiples of 2, got \(2, 3, 15, 24\)"):
        train_autoencoder(tiny, torch.rand(2, 3, 15, 24), options(), progress=False)
    with pytest.raises(ValueError, match="train_autoencoder: expected at least one frame, got none"):
        train_autoencoder(tiny, good[:0], options(), progress=False)
    with pytest.raises(ValueError, match=r"train_image_unet: expected frames .* crop or resize them first"):
        train_image_unet(tiny, good[:, :1], labels, options(), progress=False)
    with pytest.raises(ValueError, match="expected one label per frame, got 1 labels for 2 frames"):
        train_image_unet(tiny, good, labels[:1], options(), progress=False)
    for part in ("unet", "decoder"):
        with pytest.raises(
            ValueError, match=f"expected start_from, a folder with a trained .* train='{part}', got None"
        ):
            ImageConfig(train=part)


def test_stills_of_videos_are_frames_of_them(tmp_path):
    clip = torch.rand(3, 6, 16, 24).mul(0.2) + torch.linspace(0.1, 0.7, 6)[None, :, None, None]
    write_video(tmp_path / "a.mp4", clip, 8)
    loader = LoaderConfig(workers=0)
    frames, labels = read_stills(DataConfig(path=str(tmp_path), label=3), 12, (16, 24), loader=loader, seed=1)
    assert frames.shape == (12, 3, 16, 24) and frames.dtype == torch.uint8 and labels.tolist() == [3] * 12
    levels = as_float(frames).mean((1, 2, 3))
    distance = (levels[:, None] - clip.mean((0, 2, 3))).abs()
    assert distance.min(1).values.max() < 0.03 and len(set(distance.argmin(1).tolist())) > 2
    again, _ = read_stills(DataConfig(path=str(tmp_path), label=3), 12, (16, 24), loader=loader, seed=1)
    assert torch.equal(again, frames)


def test_the_stage_trains_on_videos_and_wants_names_for_their_labels(tmp_path):
    clip = torch.rand(3, 4, 16, 24)
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", clip, 8)
    quick = OptimConfig(steps=1, batch_size=1, lr=1e-3)
    config = ImageConfig(
        out=tmp_path / "run",
        data=DataConfig(path=str(tmp_path), label=1),
        labels=("one", "two"),
        loader=LoaderConfig(workers=0),
        num_stills=2,
        model=TINY,
        autoencoder=quick,
        unet=quick,
    )
    assert stage.run_image_stage(config).labels == ("one", "two")
    assert ImageLDM.from_pretrained(tmp_path / "run" / "model").labels == ("one", "two")
    with pytest.raises(ValueError, match=r"labels: expected a name for each of the labels 0 to 1 .* got 1 names"):
        stage.run_image_stage(dataclasses.replace(config, labels=("one",)))
