"""The command `temporal-layers evaluate`: presets, networks, output, exit codes."""

import json

import pytest
import torch
from torch import nn

from temporal_layers.recipes import cli
from temporal_layers.recipes.evaluation.command import EvaluateConfig, chosen_preset, main, open_set
from temporal_layers.recipes.evaluation.presets import PRESETS

QUICK = ("--loader.workers", "0", "--num-frames", "4")


class Pooled(nn.Module):
    def forward(
        self, clips: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> torch.Tensor:
        return clips.flatten(2).mean(2)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "pooled.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.script(Pooled()).save(path)
    return str(path)


def test_json_has_everything(folders, script, tmp_path, capsys):
    words = [*map(str, folders), "--preset", "rds-fvd", "--network", script, "--samples", "12", "--fps", "10"]
    cache = ["--cache", str(tmp_path / "cache")]
    assert cli.main(["evaluate", *words, *QUICK, *cache, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preset"] == "rds-fvd, other samples, num_frames, fps"
    assert [one["name"] for one in found["measures"]] == ["FVD[i3d]", "KVD[i3d]"]
    assert found["measures"][0]["network"]["size"] == [224, 224]
    assert found["measures"][0]["value"] > 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_table(folders, capsys):
    assert main([str(folders[0]), str(folders[0]), "--preset", "reconstruction", "--samples", "14", *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "PSNR" in shown and "100" in shown and "14" in shown
    assert "4 frames of 16 x 24" in shown and "10 fps" in shown


def test_different_rates_are_pointed_out(folders, script, tmp_path, helpers, capsys):
    slow = helpers.write_set(tmp_path / "slow", helpers.make_clips(12), fps=5.0)
    words = [str(folders[0]), str(slow), "--preset", "ucf101-fvd", "--network", script, "--samples", "12", *QUICK]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "differ in rate" in shown and "FVD[i3d]" in shown and "network i3d: weights" in shown


def test_failures_say_why_and_return_1(folders, capsys):
    generated, real = map(str, folders)
    for words, reason in (
        ([generated, real, "--preset", "rds-fvd"], "expected --network with a torchscript file of i3d, got none"),
        ([generated, real, "--network", "x.pt"], "network: expected none with the preset 'driving', got 'x.pt'"),
        ([generated, "--preset", "reconstruction"], "real: expected a set to compare with"),
        ([generated, real, "--preset", "reconstruction"], "expected at least 128 videos"),
        ([f"{generated}/none", real], "expected a folder, a .csv file"),
    ):
        assert cli.main(["evaluate", *words]) == 1
        assert reason in capsys.readouterr().err


def test_presets_take_the_network_that_is_named():
    preset, changed = chosen_preset(EvaluateConfig(generated="x", preset="rds-fvd", network="i3d.pt", samples=100))
    assert {measure.network.path for measure in preset.measures} == {"i3d.pt"}
    assert preset.samples == 100 and changed == ("samples",)
    preset, changed = chosen_preset(EvaluateConfig(generated="x", preset="msrvtt-clipsim", samples=2990))
    assert preset == PRESETS["msrvtt-clipsim"] and changed == ()
    preset, _ = chosen_preset(EvaluateConfig(generated="x", preset="reconstruction-lpips", network="vgg.pt"))
    assert preset == PRESETS["reconstruction-lpips"]


def test_the_word_driving_stands_for_other_clips_on_each_side():
    preset = PRESETS["driving"]
    real, generated = (open_set("driving", preset, second=second) for second in (False, True))
    assert len(real) == len(generated) == preset.samples
    assert not {item.key for item in real} & {item.key for item in generated}
    assert real[0].file.config.fps == preset.fps and real[0].file.num_frames == preset.num_frames
