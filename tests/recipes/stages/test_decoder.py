"""Stage "decoder": batches, what is trained and what is not, a clip learned by heart, the stage from end to end."""

import json

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL

from temporal_layers.adapters import TemporalAdapter, TemporalConfig, adapter_of
from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sampling import Bucket, SamplingConfig
from temporal_layers.recipes.data.sources import DataConfig
from temporal_layers.recipes.driving import DrivingConfig
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.stages import decoder as stage
from temporal_layers.recipes.stages.clips import driving_clips
from temporal_layers.recipes.stages.decoder import DecoderConfig, train_decoder
from temporal_layers.recipes.stages.decoder_batches import (
    DecoderOptions,
    DecoderStream,
    check_frame_size,
    clip_stream,
)
from temporal_layers.recipes.stages.decoder_metrics import decode_clips, measure_decoder
from temporal_layers.recipes.stages.discriminator import DiscriminatorConfig
from temporal_layers.recipes.stages.image import HELD_OUT
from temporal_layers.recipes.stages.upscale import read_clips
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig
from temporal_layers.recipes.training.streams import SampleStream

SMALL = DiscriminatorConfig(width=4, num_layers=2)


def make_vae():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).eval()


def optim(**changes):
    return OptimConfig(**{"steps": 2, "batch_size": 2, "lr": 1e-3, "weight_decay": 0.0, **changes})


def options(**changes):
    return DecoderOptions(**{"num_frames": 3, "discriminator": SMALL, **changes})


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def numbered_clips(count=3, frames=6, height=20, width=24):
    """Clips in which the value of a pixel says which it is: clip, frame, row, column."""
    grids = torch.meshgrid(*(torch.arange(size) for size in (count, frames, height, width)), indexing="ij")
    return torch.stack([grids[0] * frames + grids[1], grids[2], grids[3]], dim=1).to(torch.uint8)


def stream(source, vae, seed=0, accumulation=1, **changes):
    return DecoderStream(source, vae, options(**changes), seed=seed, accumulation=accumulation)


def drawn(source, first=0, count=1, **where):
    batches = source.batches(first, **{"batch_size": 2, **where})
    return [next(batches) for _ in range(count)]


def test_batches_are_patches_of_all_places_of_all_clips():
    clips = numbered_clips()
    seen = set()
    for frames, noise, judged in drawn(stream(clip_stream(clips, seed=0), make_vae(), crop=16), count=60):
        assert frames.shape == (2, 3, 3, 16, 16) and frames.dtype == torch.float32
        assert noise.abs().max() == 0 and judged.tolist() == [1, 1]
        for patch in (frames * 255).round().int():
            clip, frame = divmod(int(patch[0, 0, 0, 0]), 6)
            row, column = int(patch[1, 0, 0, 0]), int(patch[2, 0, 0, 0])
            window = clips[clip, :, frame : frame + 3, row : row + 16, column : column + 16]
            assert torch.equal(patch, window.int())
            seen.add((clip, frame, row, column))
    for axis, sizes in enumerate((3, 4, 5, 9)):
        assert {place[axis] for place in seen} == set(range(sizes))


def test_batches_repeat_with_the_seed_can_be_entered_anywhere_and_shared_between_processes():
    source, vae = clip_stream(numbered_clips(), seed=0), make_vae()
    first = drawn(stream(source, vae, crop=16, latent_noise=0.5), count=4)
    again = drawn(stream(source, vae, crop=16, latent_noise=0.5), first=2, count=2)
    for ours, theirs in zip(first[2:], again, strict=True):
        assert all(map(torch.equal, ours, theirs))
    halves = [
        drawn(stream(source, vae, crop=16, latent_noise=0.5), count=4, batch_size=1, rank=rank, world_size=2)
        for rank in range(2)
    ]
    for whole, *parts in zip(first, *halves, strict=True):
        assert all(map(torch.equal, whole, (torch.cat(column) for column in zip(*parts, strict=True))))
    other = drawn(stream(source, vae, seed=1, crop=16))
    assert not torch.equal(other[0][0], first[0][0])


def test_noise_has_the_latents_shape_and_scale_and_a_level_for_each_clip():
    batches = drawn(stream(clip_stream(numbered_clips(), seed=0), make_vae(), latent_noise=0.4), count=40)
    noise = torch.cat([batch[1] for batch in batches])
    assert noise.shape == (80, 4, 3, 10, 12)
    levels = noise.flatten(1).std(1) * 0.5  # scaling_factor
    assert levels.max() < 0.43 and levels.min() < 0.05 and levels.mean().item() == pytest.approx(0.2, abs=0.04)


def test_the_decoder_is_judged_from_its_step_on():
    for accumulation in (1, 2):
        source = stream(clip_stream(numbered_clips(), seed=0), make_vae(), accumulation=accumulation, disc_start=3)
        judged = [batch[2].unique().tolist() for batch in drawn(source, count=4 * accumulation)]
        assert judged == [[0.0]] * 3 * accumulation + [[1.0]] * accumulation


def test_any_stream_of_clips_will_do():
    source = SampleStream(lambda position: (numbered_clips()[position % 3], torch.tensor(7)))
    frames, _, _ = drawn(stream(source, make_vae(), crop=16))[0]
    assert [int(255 * frame[0, 0, 0, 0] + 0.5) // 6 for frame in frames] == [0, 1]


@pytest.mark.parametrize("train", ["temporal", "decoder"])
def test_only_what_should_be_is_trained(train):
    vae = make_vae()
    before = copied(vae)
    clips = torch.rand(2, 3, 4, 16, 16)
    latents = vae.encode(clips[:, :, 0]).latent_dist.mode()
    frames = vae.decode(latents).sample
    adapter, history = train_decoder(vae, clips, optim(lr=1e-2), options(train=train), progress=False)
    assert len(history) == 2 and not vae.training
    after = vae.state_dict()
    kept = {name for name, value in before.items() if torch.equal(after[name], value)}
    behind = {name for name in before if name.startswith(("decoder.", "post_quant_conv."))}
    frozen = set(before) if train == "temporal" else set(before) - behind
    assert kept == frozen
    assert {name.split(".")[0] for name in frozen} >= {"encoder", "quant_conv"}
    assert torch.equal(vae.encode(clips[:, :, 0]).latent_dist.mode(), latents)
    with adapter.disabled():
        assert torch.equal(vae.decode(latents).sample, frames) is (train == "temporal")
    moved = [name for name, layer in adapter.layers.items() if layer.convs[-1].weight.abs().max() > 0]
    assert len(moved) == len(adapter.layers)


def test_training_repeats_with_its_seed():
    def weights(seed):
        torch.manual_seed(0)
        vae = make_vae()
        clips = torch.rand(3, 3, 4, 16, 16)
        train_decoder(vae, clips, optim(), options(latent_noise=0.2), seed=seed, progress=False)
        return vae.decoder.mid_block.resnets[0].temporal.convs[1].weight

    first, again, other = (weights(seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_one_clip_is_learned_by_heart():
    vae = load_shipped().vae
    clip = driving_clips((32, 48), 1, 4)[0].frames[None]
    encoder = copied(vae.encoder)
    chosen = options(num_frames=4, disc_weight=0.1, latent_noise=0.3)
    config = optim(steps=30, batch_size=1, lr=1e-2, ema_decay=0.9)
    adapter, _ = train_decoder(vae, clip, config, chosen, progress=False)
    trained = measure_decoder(vae, clip, latent_noise=0.3, seed=1)
    with adapter.disabled():
        untrained = measure_decoder(vae, clip, latent_noise=0.3, seed=1)
    assert trained["psnr"] > untrained["psnr"] + 2
    assert trained["flicker"] < 0.75 * untrained["flicker"]
    assert all(torch.equal(value, encoder[name]) for name, value in vae.encoder.state_dict().items())


KINDS = {
    "vq": lambda: diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=16,
        latent_channels=4,
    ),
    "asymmetric": lambda: diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 8),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 8),
        norm_num_groups=4,
    ),
    "tiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    "dc": lambda: diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_autoencoder_with_an_image_decoder_can_be_trained(kind):
    vae = KINDS[kind]().eval()
    encoder = copied(vae.encoder)
    layers = TemporalConfig.for_decoder()
    adapter, history = train_decoder(
        vae, torch.rand(2, 3, 3, 16, 16), optim(lr=1e-2), options(latent_noise=0.1), temporal=layers, progress=False
    )
    assert len(history) == 2
    assert all(layer.convs[-1].weight.abs().max() > 0 for layer in adapter.layers.values())
    assert all(torch.equal(value, encoder[name]) for name, value in vae.encoder.state_dict().items())
    assert decode_clips(vae, torch.rand(1, 3, 3, 16, 16)).shape == (1, 3, 3, 16, 16)


def test_training_goes_on_with_layers_that_are_there():
    vae, clips = make_vae(), torch.rand(2, 3, 4, 16, 16)
    first, _ = train_decoder(vae, clips, optim(), options(disc_weight=0), progress=False)
    layer = vae.decoder.mid_block.resnets[0].temporal
    second, _ = train_decoder(vae, clips, optim(), options(disc_weight=0), progress=False)
    assert vae.decoder.mid_block.resnets[0].temporal is layer and second.sites == first.sites


FLAGS = (
    "--data.clips 2 --held-out 2 --data.clip-frames 4 --spare-frames 1 --size 32 48 --optim.steps 2 "
    "--options.num-frames 3 --options.crop 32 --options.latent-noise 0.2 --options.disc-start 1 "
    "--options.discriminator.width 4"
)


def test_the_whole_stage_leaves_weights_measures_and_pictures(tmp_path, capsys):
    assert stage.main(["--out", str(tmp_path), *FLAGS.split(), "--options.train", "decoder", "--svd-layout"]) == 0
    assert "after_noisy" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"before", "after", "before_noisy", "after_noisy", "loss", "seconds"}
    assert result["before_noisy"]["psnr"] < result["before"]["psnr"]
    assert result["before"] != result["after"]
    records = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1]
    assert all("discriminator/loss" in record for record in records)
    assert ["generator/adversarial_weight" in record for record in records] == [False, True]
    assert (tmp_path / "before-after.png").stat().st_size > 1000
    assert (tmp_path / "before-after.mp4").stat().st_size > 1000
    assert json.loads((tmp_path / "config.json").read_text())["options"]["train"] == "decoder"
    vae = AutoencoderKL.from_pretrained(tmp_path / "model").eval()
    shipped = load_shipped().vae
    assert torch.equal(vae.encoder.conv_in.weight, shipped.encoder.conv_in.weight)
    assert not torch.equal(vae.decoder.conv_in.weight, shipped.decoder.conv_in.weight)
    TemporalAdapter.from_pretrained(vae, tmp_path / "adapter")
    assert any(site.kind == "conv_out" for site in adapter_of(vae).sites)


def test_a_stage_goes_on_from_files_streams_its_clips_and_validates(tmp_path):
    vae = load_shipped().vae
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    first, second = tmp_path / "first", tmp_path / "second"
    options = TemporalConfig.for_decoder().to_dict()
    (tmp_path / "layers.json").write_text(json.dumps(options))
    model = f"--model {tmp_path / 'pipeline'} --subfolder vae"
    assert stage.main(["--out", str(first), *f"{FLAGS} {model} --temporal {tmp_path / 'layers.json'}".split()]) == 0
    more = "--streamed --loader.workers 0 --engine.validate-every 2 --options.disc-weight 0"
    assert stage.main(["--out", str(second), *f"{FLAGS} {more} --start-from {first / 'adapter'}".split()]) == 0
    adapter = TemporalAdapter.from_pretrained(vae, second / "adapter")
    assert adapter.config.resblock.norm == "clip"  # what the file said
    records = [json.loads(line) for line in (second / "losses.jsonl").read_text().splitlines()]
    result = json.loads((second / "result.json").read_text())
    validation = next(record for record in records if "validation/psnr" in record)
    assert validation["validation/psnr"] == pytest.approx(result["after"]["psnr"], abs=1e-6)
    assert validation["validation/flicker_noisy"] == pytest.approx(result["after_noisy"]["flicker"], abs=1e-6)
    data = DataConfig(clips=2, first=HELD_OUT, clip_frames=16, driving=DrivingConfig(fps=10.0))
    held_out = read_clips(data, SamplingConfig(buckets=(Bucket(16, 32, 48),)), LoaderConfig())[0]
    assert measure_decoder(vae, held_out)["psnr"] == pytest.approx(result["after"]["psnr"], abs=1e-4)


def test_bad_settings_are_refused(tmp_path):
    for changes, text in (
        ({"train": "all"}, "train 'temporal' or 'decoder', got 'all'"),
        ({"num_frames": 1}, "num_frames of at least 2, got 1; temporal layers learn"),
        ({"crop": -1}, "crop of at least 0, got -1"),
        ({"disc_weight": -0.5}, "disc_weight of at least 0, got -0.5"),
    ):
        with pytest.raises(ValueError, match=f"DecoderOptions: expected {text}"):
            DecoderOptions(**changes)
    with pytest.raises(ValueError, match=r"DecoderConfig: expected size of at least 1, .* spare_frames=-1"):
        DecoderConfig(spare_frames=-1)
    with pytest.raises(ValueError, match=r"DecoderConfig: expected one of temporal, start_from and svd_layout, .*True"):
        DecoderConfig(svd_layout=True, start_from=tmp_path)
    with pytest.raises(ValueError, match=r"DecoderConfig: held_out: expected 0 with data.path='videos', got 16"):
        DecoderConfig(data=DataConfig(path="videos"))
    with pytest.raises(ValueError, match=r"DecoderConfig: engine.validate_every: expected 0 without held_out .* got 5"):
        DecoderConfig(held_out=0, engine=EngineConfig(validate_every=5))


def test_bad_clips_and_models_are_refused():
    vae, clips = make_vae(), torch.rand(2, 3, 3, 16, 16)
    with pytest.raises(ValueError, match=r"clip_stream: expected clips .* at least one, got \(0, 3, 3, 16, 16\)"):
        train_decoder(vae, clips[:0], optim(), options())
    with pytest.raises(ValueError, match=r"DecoderStream: expected clips of at least 3 frames of 32 x 32 pixels, got"):
        train_decoder(vae, clips, optim(), options(crop=32), progress=False)
    with pytest.raises(ValueError, match=r"check_frame_size: expected .* multiples .* got \(17, 17\), which it makes"):
        train_decoder(vae, clips, optim(), options(crop=17))
    with pytest.raises(
        ValueError, match=r"train_decoder: expected a crop of at least 12 pixels .* num_layers=2, got 8"
    ):
        train_decoder(make_vae(), clips, optim(), options(crop=8))
    with pytest.raises(ValueError, match=r"train_decoder: expected an autoencoder .* that runs once, got Linear; pass"):
        train_decoder(torch.nn.Linear(1, 1), clips, optim(), options())
    assert check_frame_size(vae, (16, 24)) == (4, 8, 12)
