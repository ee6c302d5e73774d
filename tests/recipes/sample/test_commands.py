"""The sampling commands, from words to files, on tiny models and on the shipped one."""

import json
import re

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file

from temporal_layers.adapters import inject
from temporal_layers.recipes.bases import LabelBase
from temporal_layers.recipes.cli import main
from temporal_layers.recipes.data.video_io import read_video, write_video
from temporal_layers.recipes.pipelines.cascade import VideoCascade
from temporal_layers.recipes.pipelines.prediction import VideoPredictionPipeline
from temporal_layers.recipes.pipelines.video_ldm import VideoLDMPipeline
from temporal_layers.recipes.sample import options
from temporal_layers.recipes.sample.inputs import read_clip, read_frames, read_latents, save_latents
from temporal_layers.recipes.stages.personal_files import save_personal

FEW = ["--steps", "1", "--guidance-scale", "1"]


@pytest.fixture(scope="module")
def folder(cascade_parts, tmp_path_factory):
    """Pipelines as a user would have saved them."""
    folder = tmp_path_factory.mktemp("pipelines")
    VideoCascade(*cascade_parts).save_pretrained(folder)
    pipeline = VideoLDMPipeline(**cascade_parts[0].components, labels=["day", "night"], frame_size=[16, 24])
    pipeline.save_pretrained(folder / "video")
    return folder


def sample(*words):
    assert main(["sample", *map(str, words)]) == 0


def record(out):
    return json.loads(out.with_name(f"{out.stem}.json").read_text())


def test_a_clip_of_a_label(folder, tmp_path, capsys):
    out = tmp_path / "night.png"
    sample("label", "night", "--model", folder / "video", "--num-frames", 3, "--out", out, "--seed", 5, *FEW)
    assert capsys.readouterr().out.strip() == str(out)
    clip = read_video(out)
    assert clip.frames.shape == (3, 3, 16, 24) and clip.fps == pytest.approx(10)
    pipeline = VideoLDMPipeline.from_pretrained(folder / "video")
    words = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
    expected = pipeline("night", num_frames=3, generator=torch.Generator().manual_seed(5), **words).frames[0]
    torch.testing.assert_close(clip.frames, expected.transpose(0, 1), atol=0.51 / 255, rtol=0)
    found = record(out)
    assert found["seed"] == 5 and found["complete"] and found["command"] == "temporal-layers sample label"
    assert found["settings"]["prompt"] == "night" and found["settings"]["steps"] == 1
    assert (tmp_path / "night.sheet.png").is_file()


def test_labels_are_listed(folder, capsys):
    sample("label", "list", "--model", folder / "video")
    assert capsys.readouterr().out == "  0  day\n  1  night\n"


def test_several_clips_are_those_of_the_seeds_behind_each_other(folder, tmp_path):
    words = ["label", "1", "--model", folder / "video", "--num-frames", 2, "--no-sheet", *FEW]
    sample(*words, "--out", tmp_path / "a.png", "--seed", 7, "--count", 2)
    sample(*words, "--out", tmp_path / "b.png", "--seed", 8)
    assert (tmp_path / "a-1.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a-0.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert record(tmp_path / "a-1.png")["seed"] == 8 and not list(tmp_path.glob("*.sheet.png"))


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # of diffusers
def test_a_clip_out_of_a_clip_and_another_scheduler(folder, tmp_path):
    write_video(tmp_path / "in.mp4", torch.rand(3, 4, 16, 24), 12.0)
    words = ["--video", tmp_path / "in.mp4", "--strength", 0.5, "--steps", 4, "--guidance-scale", 1]
    words += ["--scheduler", "DPMSolverMultistepScheduler", "--negative", "day"]
    sample("label", "--model", folder / "video", "--out", tmp_path / "out", *words)
    assert len(list((tmp_path / "out").glob("*.png"))) == 4 and record(tmp_path / "out")["fps"] == 12


def test_a_roll_out_from_an_image_goes_on_where_it_was(folder, tmp_path):
    Image.new("RGB", (24, 16), (10, 200, 30)).save(tmp_path / "start.png")
    words = ["predict", "day", "--model", folder / "key_frames", "--image", tmp_path / "start.png", "--window", 4]
    words += [*FEW, "--latents", tmp_path / "latents", "--no-sheet"]
    sample(*words, "--num-frames", 5, "--out", tmp_path / "a.png")
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents" / "a").rglob("*.safetensors")}
    sample(*words, "--num-frames", 8, "--out", tmp_path / "a.png")
    assert read_video(tmp_path / "a.png").frames.shape == (3, 8, 16, 24)
    assert stored and all(path.stat().st_mtime_ns == time for path, time in stored.items())
    sample(*words[:-3], "--no-sheet", "--num-frames", 8, "--out", tmp_path / "whole.png")
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_interpolation_raises_the_rate(folder, tmp_path):
    write_video(tmp_path / "keys.png", torch.rand(3, 3, 16, 24), 2.0)
    words = ["--levels", 1, "--prompt", "night", "--context-noise-level", 10, *FEW]
    sample(
        "interpolate", tmp_path / "keys.png", "--model", folder / "interpolation", "--out", tmp_path / "a.png", *words
    )
    clip = read_video(tmp_path / "a.png")
    assert clip.frames.shape == (3, 9, 16, 24) and clip.fps == pytest.approx(8)


def test_upscaling(folder, tmp_path):
    write_video(tmp_path / "small.mp4", torch.rand(3, 3, 16, 24), 5.0)
    words = ["--steps", 1, "--window", 2, "--overlap", 1, "--tile", 16, 24, "--tile-overlap", 8]
    sample("upscale", tmp_path / "small.mp4", "--model", folder / "upscaling", "--out", tmp_path / "a.mp4", *words)
    clip = read_video(tmp_path / "a.mp4")
    assert clip.frames.shape == (3, 3, 32, 48) and clip.fps == 5


def test_the_cascade_and_what_it_keeps(folder, tmp_path):
    words = ["--key-frames", 2, "--steps", 1, "--interpolation-steps", 1, "--upscale-steps", 1, "--guidance-scale", 1]
    sample("cascade", "day", "--model", folder, "--out", tmp_path / "a.mp4", "--keep", *words)
    clip = read_video(tmp_path / "a.mp4")
    assert clip.frames.shape == (3, 17, 32, 48) and clip.fps == 30
    stages = tmp_path / "a.stages"
    names = {"key-frames.safetensors", "interpolation.safetensors", "decoding.mp4"}
    assert {path.name for path in stages.iterdir()} == names
    sample(
        "decode", stages / "interpolation.safetensors", "--model", folder / "interpolation", "--out", tmp_path / "b.png"
    )
    sample("cascade", "day", "--model", folder, "--out", tmp_path / "c.png", "--no-upscale", *words)
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert record(tmp_path / "b.png")["fps"] == 30 and not (tmp_path / "c.stages").exists()
    latents = stages / "interpolation.safetensors"
    words = ["--model", folder / "interpolation", "--frame-by-frame", "--out", tmp_path / "d.png"]
    sample("decode", latents, *words)
    assert (tmp_path / "d.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_a_text(stable_diffusion, tmp_path):
    stable_diffusion.save_pretrained(tmp_path / "image")
    adapter = inject(stable_diffusion.unet)
    adapter.save_pretrained(tmp_path / "motion")
    words = ["--adapter", tmp_path / "motion", "--num-frames", 2, "--steps", 1, "--height", 32, "--width", 32]
    sample("text", "a road", "--model", tmp_path / "image", "--out", tmp_path / "a.gif", *words)
    assert read_video(tmp_path / "a.gif").frames.shape == (3, 2, 32, 32)


def test_layers_that_were_trained_together_with_a_unet(stable_diffusion, tmp_path, capsys):
    """Asked for without it, they are refused: on another UNet they would give other clips."""
    stable_diffusion.save_pretrained(tmp_path / "image")
    with torch.no_grad():
        stable_diffusion.unet.conv_out.weight.mul_(2)
    stable_diffusion.unet.save_pretrained(tmp_path / "run" / "unet")
    inject(stable_diffusion.unet).save_pretrained(tmp_path / "run" / "adapter")
    words = ["--model", tmp_path / "image", "--adapter", tmp_path / "run" / "adapter", "--num-frames", 2]
    words = [str(word) for word in [*words, "--steps", 1, "--height", 32, "--width", 32]]
    assert main(["sample", "text", "a road", *words, "--out", str(tmp_path / "a.png")]) == 1
    assert f"pass --unet {tmp_path / 'run' / 'unet'}" in capsys.readouterr().err
    sample("text", "a road", *words, "--unet", tmp_path / "run" / "unet", "--out", tmp_path / "a.png")
    (tmp_path / "run" / "model_index.json").write_text("{}")  # a pipeline's folder says nothing of a training
    sample("text", "a road", *words, "--out", tmp_path / "d.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "d.png").read_bytes()
    (tmp_path / "run" / "adapter").rename(tmp_path / "adapter")  # away from its UNet, the image model's own is taken
    words[3] = str(tmp_path / "adapter")
    sample("text", "a road", *words, "--out", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert main(["sample", "text", "a road", *words, "--unet", str(tmp_path), "--out", str(tmp_path / "c.png")]) == 1
    assert "--unet: expected the folder of a UNet" in capsys.readouterr().err


def test_a_subject_under_the_same_temporal_layers(folder, tmp_path):
    original = VideoLDMPipeline.from_pretrained(folder / "video")
    ldm = original.base.ldm
    ldm_folder = tmp_path / "image"
    original.adapter.save_pretrained(tmp_path / "motion")
    original.adapter.remove()
    ldm.save_pretrained(ldm_folder)
    ldm.add_label("orange", like="day")
    save_personal(LabelBase(ldm), tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": str(ldm_folder)}))
    words = ["--personal", tmp_path / "run", "--adapter", tmp_path / "motion", "--num-frames", 2, *FEW]
    sample("dream", "orange", *words, "--out", tmp_path / "a.png")
    assert read_video(tmp_path / "a.png").frames.shape == (3, 2, 16, 24)


def test_ctrl_c_leaves_what_is_finished(folder, tmp_path, capsys, monkeypatch):
    made = []
    whole = VideoLDMPipeline.__call__

    def once(self, *args, **words):
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return whole(self, *args, **words)

    monkeypatch.setattr(VideoLDMPipeline, "__call__", once)
    words = ["--model", str(folder / "video"), "--num-frames", "2", "--out", str(tmp_path / "a.png"), "--count", "3"]
    assert main(["sample", "label", *words, *FEW]) == options.INTERRUPTED
    assert "sample label: stopped; nothing of" in capsys.readouterr().err
    assert (tmp_path / "a-0.png").is_file() and not (tmp_path / "a-1.png").exists()


def test_ctrl_c_in_a_roll_out_leaves_the_windows_that_are_done(folder, tmp_path, capsys, monkeypatch):
    whole = VideoPredictionPipeline.stream

    def two_parts(self, *args, **words):
        parts = whole(self, *args, **words)
        yield next(parts)
        yield next(parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoPredictionPipeline, "stream", two_parts)
    words = [
        "--model",
        str(folder / "key_frames"),
        "--num-frames",
        "12",
        "--window",
        "4",
        "--out",
        str(tmp_path / "a.png"),
    ]
    assert main(["sample", "predict", *words, *FEW]) == options.INTERRUPTED
    assert "has what was finished" in capsys.readouterr().err
    assert not record(tmp_path / "a.png")["complete"] and 0 < read_video(tmp_path / "a.png").frames.shape[1] < 12


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["label", "--out", "a.avi"], "--out: expected .mp4"),
        (["label", "--adapter", "x"], "--adapter, --decoder and --unet: expected --model beside them"),
        (["label", "--count", "0"], "--count and --steps: expected at least 1, got 0"),
        (["text", "a road"], "--model: expected one that reads text"),
        (["label", "night", "--scheduler", "Best"], "--scheduler: expected one of .*DDIMScheduler.* got 'Best'"),
        (["dream", "--personal", "nowhere"], "--personal: expected the folder of a run .* got nowhere"),
        (["predict", "--image", "a.png", "--clip", "b.mp4"], "--image and --clip: expected one of them, got both"),
        (["decode", "nowhere.safetensors"], "nowhere.safetensors: expected a .safetensors file of latents"),
        (["label", "--image", "nowhere.png"], "nowhere.png: expected an image file"),
        (["label", "--strength", "0.5"], "strength: expected video beside it, got none"),
        (["label", "--fps", "0"], "--fps: expected more than 0, got 0.0"),
        (["label", "--device", "best"], "--device: expected a device that is there, such as 'cpu', got 'best'"),
        (["label", "--model", "/nowhere"], "expected a folder, or a repository of the hub .* got '/nowhere'"),
        (
            ["upscale", "a.mp4", "--model", "/nowhere"],
            "expected a folder, or a repository of the hub .* got '/nowhere'",
        ),
    ],
)
def test_refusals(words, text, capsys):
    try:
        status = main(["sample", *words])
    except SystemExit as error:
        status = error.code
    said = " ".join(capsys.readouterr().err.replace("|", " ").split())  # boxes break lines
    assert status in (1, 2) and re.search(text, said), said


def test_layers_beside_a_pipeline_that_has_its_own_are_refused(folder, capsys):
    for command, name in (("label", "video"), ("upscale", "upscaling")):
        for option in ("--adapter", "--decoder", "--unet"):
            assert main(["sample", command, "--model", str(folder / name), option, "motion", *FEW[:2]]) == 1
            said = capsys.readouterr().err
            assert re.search(
                rf"--adapter, --decoder and --unet: expected an image model .* got .*{name}, which was saved", said
            )


def test_a_pipeline_of_another_kind_is_named(folder, capsys):
    assert main(["sample", "upscale", "a.mp4", "--model", str(folder / "video")]) == 1
    assert "expected an image pipeline of diffusers, got" in (said := capsys.readouterr().err)
    assert "which holds a VideoLDMPipeline; name the image model" in said


def test_a_text_of_digits_is_a_text_and_so_is_none(stable_diffusion, cascade_parts):
    assert options.asked("1984", stable_diffusion) == "1984" and options.asked("", stable_diffusion) == ""
    assert options.asked("1", cascade_parts[0]) == 1 and options.asked("", cascade_parts[0]) is None


def test_a_scheduler_whose_package_is_missing(monkeypatch):
    def needs(config):
        raise ImportError("\nEulerDiscreteScheduler requires the sde library\n")

    monkeypatch.setattr(EulerDiscreteScheduler, "from_config", needs)
    with pytest.raises(ValueError, match=r"^--scheduler: EulerDiscreteScheduler requires the sde library$"):
        options.scheduler("EulerDiscreteScheduler", DDIMScheduler())


def test_files_in(tmp_path):
    for index in (2, 0, 1):
        Image.new("RGB", (8, 4), (index * 100, 0, 0)).save(tmp_path / f"{index}.png")
    clip = read_clip(tmp_path)
    assert clip.frames.shape == (3, 3, 4, 8) and (clip.frames[0].diff(dim=0) > 0).all()
    assert read_clip(tmp_path, (2, 2), num_frames=2).frames.shape == (3, 2, 2, 2)
    assert len(read_frames([tmp_path / "1.png"])) == 1
    save_latents(tmp_path / "deep" / "z.safetensors", torch.ones(1, 4, 2, 3, 3), 7.5)
    latents, fps = read_latents(tmp_path / "deep" / "z.safetensors")
    assert fps == 7.5 and latents.shape == (1, 4, 2, 3, 3)
    save_file({"latents": torch.ones(3)}, tmp_path / "flat.safetensors")
    with pytest.raises(ValueError, match=r"flat.safetensors: expected 'latents' \(clips, .* got \{'latents': \(3,\)\}"):
        read_latents(tmp_path / "flat.safetensors")
