"""The demo end to end, with tiny models and few steps: files, numbers, repeatability, the user's own input."""

import io
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console

from temporal_layers.adapters import TemporalAdapter, inject
from temporal_layers.recipes import cli, demo
from temporal_layers.recipes.data.video_io import bunny_path, read_video
from temporal_layers.recipes.demo import DemoConfig, compare, run_demo
from temporal_layers.recipes.driving import LABELS, DrivingConfig, DrivingCorpus
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm
from temporal_layers.recipes.stages.clips import driving_clips
from temporal_layers.recipes.stages.image import HELD_OUT
from temporal_layers.recipes.training.engine import OptimConfig

FILES = ("before.mp4", "after.mp4", "contact_sheet.png", "report.html")
FILES += tuple(f"before-after.{suffix}" for suffix in ("mp4", "gif", "webp"))


def quick(out, **options):
    defaults = {
        "num_frames": 5,
        "num_clips": 2,
        "spare_frames": 1,
        "samples": 2,
        "sampling_steps": 2,
        "optim": OptimConfig(steps=2, batch_size=1, lr=1e-3),
    }
    return DemoConfig(out=out, **(defaults | options))


@pytest.fixture
def silent():
    return Console(file=io.StringIO(), width=120)


@pytest.fixture
def tiny_ldm(tmp_path):
    config = ImageLDMConfig(height=32, width=48, vae_channels=(8, 8), unet_channels=(16, 32), num_heads=2)
    build_image_ldm(config, ("day", "night") * 6, seed=0).save_pretrained(tmp_path / "ldm")
    return str(tmp_path / "ldm")


def test_demo_writes_everything_it_names(tiny_ldm, tmp_path, silent):
    out = tmp_path / "out"
    result = run_demo(quick(out, base=tiny_ldm), silent)
    for name in FILES:
        assert (out / name).stat().st_size > 100, name
    assert result.before.shape == result.after.shape == (2, 3, 5, 32, 48)
    clip = read_video(out / "before-after.mp4")
    assert clip.frames.shape[1] == 5 and clip.fps == 10
    table = json.loads((out / "metrics.json").read_text())["table"]
    assert list(table) == ["real", "frame by frame", "trained here: 2 steps", "real, frozen", "real, shuffled"]
    assert list(result.clips) == list(table)[1:3] and not (out / "shipped.mp4").exists()
    assert table["real, frozen"]["frame difference"] == 0
    assert "temporal parameters trained" in silent.file.getvalue()
    page = (out / "report.html").read_text()
    assert "trained here: 2 steps" in page and f"--base {tiny_ldm}" in page
    unet = UNet2DConditionModel.from_pretrained(tiny_ldm, subfolder="unet", torch_dtype=torch.float32)
    loaded = TemporalAdapter.from_pretrained(unet, out / "adapter")
    for name, value in result.adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_driving_clips_to_compare_with_are_held_out_and_of_the_kinds_that_are_sampled(tiny_ldm):
    base = demo.load_base(tiny_ldm)
    footage = demo.generated_footage(base, DemoConfig(num_clips=1, spare_frames=0, num_frames=2, samples=7))
    assert footage.real.shape == (28, 3, 2, 32, 48) and len(footage.conditioning["labels"]) == 7
    corpus = DrivingCorpus(DrivingConfig(height=32, width=48, fps=10.0))
    ours = [i for i in range(HELD_OUT, HELD_OUT + 200) if LABELS[corpus.label(i)] in demo.SHOWN]
    held_out = {corpus.clip(i, 2).frames.numpy().tobytes(): corpus.label(i) for i in ours}
    labels = [held_out[clip.numpy().tobytes()] for clip in footage.real]
    assert [LABELS[label] for label in labels] == [demo.SHOWN[i % 6] for i in range(28)]
    assert footage.conditioning["labels"].tolist() == labels[:7]
    assert len({clip.numpy().tobytes() for clip in footage.real}) == 28


def test_driving_model_is_shown_with_the_shipped_adapter_too(tiny_ldm, tmp_path, silent, monkeypatch):
    def tiny_base():
        return demo.load_base(tiny_ldm)

    longer = tiny_base()
    adapter = inject(longer.unet)
    with torch.no_grad():
        for parameter in next(iter(adapter.layers.values())).parameters():
            parameter.add_(0.5)
    monkeypatch.setattr(demo, "load_shipped", lambda: tiny_base().ldm)
    monkeypatch.setattr(demo, "load_shipped_adapter", lambda device: (longer, 4800))
    out = tmp_path / "out"
    result = run_demo(quick(out), silent)
    assert list(result.clips) == ["frame by frame", "trained here: 2 steps", "shipped: 4800 steps"]
    assert list(result.clips) == list(result.table)[1:4]
    shipped = result.clips["shipped: 4800 steps"]
    assert shipped.shape == result.after.shape
    assert (shipped - result.before).abs().max() > 1e-3 and not torch.equal(shipped, result.after)
    assert (out / "shipped.mp4").stat().st_size > 100
    assert "with the shipped adapter, 4800 steps" in silent.file.getvalue()


def test_demo_repeats_with_its_seed(tiny_ldm, tmp_path, silent):
    runs = [run_demo(quick(tmp_path / str(i), base=tiny_ldm, seed=s), silent) for i, s in enumerate((1, 1, 2))]
    assert torch.equal(runs[0].after, runs[1].after) and runs[0].table == runs[1].table
    assert not torch.equal(runs[0].before, runs[2].before)


def test_demo_runs_on_a_stable_diffusion_folder(stable_diffusion, tmp_path, silent):
    stable_diffusion.save_pretrained(tmp_path / "pipeline")
    result = run_demo(quick(tmp_path / "out", base=str(tmp_path / "pipeline"), guidance_scale=3.0), silent)
    assert result.after.shape == (2, 3, 5, 32, 32)
    assert not torch.equal(result.after, result.before)


def test_demo_runs_on_an_unconditional_pipeline(unconditional, tmp_path, silent):
    unconditional.save_pretrained(tmp_path / "pipeline")
    assert run_demo(quick(tmp_path / "out", base=str(tmp_path / "pipeline")), silent).after.shape == (2, 3, 5, 32, 32)


def test_real_clip_goes_through_the_whole_chain(tiny_ldm, tmp_path, silent, monkeypatch):
    """Big Buck Bunny: decode, autoencoder, frame fine-tune, injected UNet, training step, sampling, encode."""
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "bunny.mp4").write_bytes(bunny_path().read_bytes())
    (videos / "broken.mp4").write_bytes(b"not a video")
    (videos / "notes.txt").write_text("not a video either")
    monkeypatch.setattr(demo, "load_shipped", lambda: demo.load_base(tiny_ldm).ldm)
    one = OptimConfig(steps=1, batch_size=1, lr=1e-4)
    config = quick(tmp_path / "out", videos=videos, num_clips=9, finetune_autoencoder=one, finetune_unet=one)
    result = run_demo(config, silent)
    assert result.after.shape == (2, 3, 5, 32, 48) and result.after.isfinite().all()
    assert read_video(tmp_path / "out" / "after.mp4").frames.shape[1] == 5
    told = silent.file.getvalue()
    assert "fine-tuned" in told and "broken.mp4" in told


def test_videos_that_cannot_be_used_end_with_a_message(tmp_path, capsys):
    assert cli.main(["demo", "--videos", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_config_is_checked():
    with pytest.raises(ValueError, match=r"DemoConfig: expected num_frames, num_clips, samples .* got 0, 72"):
        DemoConfig(num_frames=0)


def test_a_frozen_and_a_shuffled_clip_score_badly():
    clips = torch.stack([clip.frames for clip in driving_clips((32, 48), 8, 16)])
    table = compare({"before": clips[:2], "after": clips[2:4]}, clips, seed=0)
    agreement = {name: row["motion agreement"] for name, row in table.items()}
    assert agreement["real"] > agreement["real, shuffled"] and agreement["real"] > agreement["real, frozen"]
