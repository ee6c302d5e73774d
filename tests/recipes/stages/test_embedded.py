"""The models that come with the package: what is in their folders, and the runs that make them."""

import dataclasses
import json

import pytest
import torch

from temporal_layers import ContextConfig, fold_frames
from temporal_layers.recipes import cli
from temporal_layers.recipes.bases import LabelBase
from temporal_layers.recipes.conditioning import ContextPlanes, interpolation_mask, prediction_mask
from temporal_layers.recipes.data.sources import DataConfig
from temporal_layers.recipes.embedded import (
    KEY_FRAMES,
    WEIGHTS,
    load_shipped_decoder,
    load_shipped_interpolation,
    load_shipped_prediction,
    load_shipped_video_upscaler,
)
from temporal_layers.recipes.stages.embedded import MODELS, EmbeddedConfig, make, placed
from temporal_layers.recipes.stages.image import ImageConfig
from temporal_layers.recipes.training.configs import plain
from temporal_layers.recipes.training.engine import OptimConfig

BY_NAME = {model.name: model for model in MODELS}
OLDER = ("driving", "driving_video", "driving_upscaler")
"""Their settings have changed names since they were made."""


def shrunk(settings):
    """The same run on next to nothing: one step of one clip."""
    changes = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, OptimConfig):
            changes[field.name] = dataclasses.replace(value, steps=1, batch_size=1)
        elif isinstance(value, DataConfig):
            changes[field.name] = dataclasses.replace(value, clips=3)
        elif field.name == "held_out":
            changes[field.name] = 0
        elif field.name == "num_stills":
            changes[field.name] = 2
        elif dataclasses.is_dataclass(value):
            changes[field.name] = shrunk(value)
    return dataclasses.replace(settings, **changes)


def test_every_model_is_listed(capsys):
    assert set(BY_NAME) <= {path.name for path in WEIGHTS.iterdir()}
    assert cli.main(["train", "embedded"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(BY_NAME)
    assert all(float(line.split()[1]) > 0.1 for line in lines)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in OLDER])
def test_the_settings_are_those_that_the_model_was_made_with(name):
    (settings,) = BY_NAME[name].settings
    stored = json.loads((WEIGHTS / name / "training.json").read_text())
    assert stored["config"] == plain(settings)
    assert {"torch", "diffusers"} <= set(stored["versions"]) and stored["result"]["loss"] > 0
    assert f"temporal-layers train embedded --models {name}" in (WEIGHTS / name / "README.md").read_text()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in OLDER else []) for name in BY_NAME]
)
def test_a_model_is_made_from_its_settings(name, tmp_path):
    model = dataclasses.replace(BY_NAME[name], settings=tuple(shrunk(each) for each in BY_NAME[name].settings))
    folder = make(model, tmp_path)
    assert folder == tmp_path / name
    shipped, made = (
        {path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.name != "README.md"}
        for root in (WEIGHTS / name, folder)
    )
    assert made == shipped
    for path in made:
        if path.suffix == ".safetensors":
            assert abs((folder / path).stat().st_size - (WEIGHTS / name / path).stat().st_size) < 2000
        if path.name == "config.json":
            one, other = (json.loads((root / path).read_text()) for root in (folder, WEIGHTS / name))
            assert one.get("sites") == other.get("sites") and one.get("metadata") == other.get("metadata")


def test_paths_of_a_run_start_from_the_folder_of_all_runs(tmp_path):
    first, second = (placed(settings, tmp_path) for settings in BY_NAME["driving"].settings)
    assert isinstance(first, ImageConfig) and first.start_from is None
    assert second.start_from == first.out / "model" == tmp_path / "driving" / "model"
    prediction = placed(BY_NAME["driving_prediction"].settings[0], tmp_path)
    assert prediction.start_from == "shipped" and prediction.out == tmp_path / "driving_prediction"


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"models: expected some of \['driving', .*'all', got \['driving_car'\]"):
        EmbeddedConfig(models=("driving", "driving_car"))


@pytest.mark.parametrize(
    ("load", "planes", "mask"),
    [
        (load_shipped_prediction, ContextPlanes(max_noise_level=100), prediction_mask(1, KEY_FRAMES)),
        (load_shipped_interpolation, ContextPlanes(max_noise_level=250, rate=True), interpolation_mask(5)),
    ],
)
def test_a_frame_context_has_its_planes_and_is_heard(load, planes, mask):
    base, adapter = load()
    assert isinstance(base, LabelBase) and ContextPlanes.of(adapter) == planes
    assert adapter.config.context == ContextConfig(channels=planes.channels, inject="both")
    generator = torch.Generator().manual_seed(0)
    latents, noisy = torch.randn(2, 1, 4, len(mask), *base.latent_shape[1:], generator=generator)
    context = planes.build(latents, mask[None])
    rest = (noisy, torch.tensor(900), base.conditioning([0], [""]))
    with torch.no_grad():
        told, untold = (base.predict(*rest, frame_context=value) for value in (context, planes.without(context)))
    assert (told - untold).abs().mean() > 0.01


def test_the_decoder_makes_frames_of_a_clip_together():
    vae, adapter = load_shipped_decoder()
    latents = torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = vae.decode(latents).sample
        with adapter.disabled():
            apart = vae.decode(fold_frames(latents)).sample
    assert together.shape == (1, 3, 3, 32, 48)
    assert (together - apart.reshape(3, 3, 32, 48).transpose(0, 1)).abs().mean() > 1e-3


def test_the_video_upscaler_works_in_latents():
    upscaler, adapter = load_shipped_video_upscaler()
    assert (upscaler.factor, upscaler.cell, upscaler.channels) == (4, 4, 4)
    assert adapter.model is upscaler.unet
