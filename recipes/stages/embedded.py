"""Stage "embedded": lists the models that come with the package, and makes any of them again.

Without options it lists them. The settings that each was made with stand in `MODELS` and nowhere else; they end as
folders in half precision, as in the package. A run that was interrupted goes on where it was.

    temporal-layers train embedded --models driving_prediction driving_interpolation
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from temporal_layers.adapters import AdapterWeights
from temporal_layers.recipes.data.sources import DataConfig
from temporal_layers.recipes.driving import DrivingConfig
from temporal_layers.recipes.embedded import KEY_FPS, KEY_FRAMES, VIDEO_FPS, WEIGHTS
from temporal_layers.recipes.image_ldm import ImageLDM
from temporal_layers.recipes.stages.clips import DRIVING, ClipsConfig
from temporal_layers.recipes.stages.decoder import DEFAULT_OPTIONS, DecoderConfig, run_decoder_stage
from temporal_layers.recipes.stages.image import ImageConfig, run_image_stage
from temporal_layers.recipes.stages.interpolate import InterpolateConfig, run_interpolate_stage
from temporal_layers.recipes.stages.predict import PredictConfig, run_predict_stage
from temporal_layers.recipes.stages.upscale import UpscaleConfig, run_upscale_stage
from temporal_layers.recipes.stages.video import VideoConfig, run_video_stage
from temporal_layers.recipes.training.configs import parse, plain
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig
from temporal_layers.recipes.upscaler import Upscaler, UpscalerConfig

_ENGINE = EngineConfig(resume="auto")

_RUN: dict[type, Callable[[Any], Any]] = {
    ImageConfig: run_image_stage,
    VideoConfig: run_video_stage,
    PredictConfig: run_predict_stage,
    InterpolateConfig: run_interpolate_stage,
    DecoderConfig: run_decoder_stage,
    UpscaleConfig: run_upscale_stage,
}


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A model that comes with the package.

    Attributes:
        name: Of its folder in ``recipes/weights``.
        purpose: What it is, in a few words.
        settings: Of the runs that make it, in order. Paths in them start from the folder of all runs.
    """

    name: str
    purpose: str
    settings: tuple[Any, ...]


def _driving(fps: float, *, clips: int, frames: int, size: tuple[int, int] = (64, 96)) -> DataConfig:
    config = DrivingConfig(height=size[0], width=size[1], fps=fps)
    return dataclasses.replace(DRIVING, clips=clips, clip_frames=frames, driving=config)


def _clips(fps: float, *, clips: int, frames: int) -> ClipsConfig:
    return ClipsConfig(data=_driving(fps, clips=clips, frames=frames))


LARGE = (256, 384)
"""Height and width of the upscaled frames in pixels."""

MODELS: tuple[Embedded, ...] = (
    Embedded(
        name="driving",
        purpose="image model: autoencoder, UNet, labels; 64 x 96 pixels",
        settings=(
            ImageConfig(out=Path("driving"), threads=1, engine=_ENGINE),
            ImageConfig(
                out=Path("driving_decoder_of_images"),
                train="decoder",
                start_from=Path("driving/model"),
                threads=1,
                autoencoder=OptimConfig(
                    steps=3000, batch_size=8, lr=2e-3, ema_decay=0.995, checkpoint_every=500, weight_decay=0.0
                ),
                engine=_ENGINE,
            ),
        ),
    ),
    Embedded(
        name="driving_video",
        purpose="temporal layers for 16 frames at 10 per second, without frame context",
        settings=(
            VideoConfig(
                out=Path("driving_video"),
                clips=_clips(10.0, clips=1536, frames=20),
                optim=OptimConfig(
                    steps=4800,
                    batch_size=2,
                    lr=2e-3,
                    warmup=0.05,
                    weight_decay=0.0,
                    ema_decay=0.999,
                    checkpoint_every=250,
                ),
                engine=_ENGINE,
            ),
        ),
    ),
    Embedded(
        name="driving_prediction",
        purpose="key frames at 1.875 per second, from none, one or two that are given",
        settings=(
            PredictConfig(
                out=Path("driving_prediction"),
                clips=_clips(KEY_FPS, clips=1536, frames=10),
                num_frames=KEY_FRAMES,
                inject="both",
                max_noise_level=100,
                given=(0.34, 0.33, 0.33),
                optim=OptimConfig(
                    steps=2000,
                    batch_size=3,
                    lr=2e-3,
                    warmup=0.05,
                    weight_decay=0.0,
                    ema_decay=0.998,
                    checkpoint_every=250,
                ),
                engine=_ENGINE,
            ),
        ),
    ),
    Embedded(
        name="driving_interpolation",
        purpose="three frames between two, at 1.875 and at 7.5 per second",
        settings=(
            InterpolateConfig(
                out=Path("driving_interpolation"),
                clips=_clips(VIDEO_FPS, clips=1024, frames=17),
                inject="both",
                optim=OptimConfig(
                    steps=2000,
                    batch_size=4,
                    lr=2e-3,
                    warmup=0.05,
                    weight_decay=0.0,
                    ema_decay=0.998,
                    checkpoint_every=250,
                ),
                engine=_ENGINE,
            ),
        ),
    ),
    Embedded(
        name="driving_decoder",
        purpose="temporal layers of the autoencoder's decoder, at 30 frames per second",
        settings=(
            DecoderConfig(
                out=Path("driving_decoder"),
                data=_driving(VIDEO_FPS, clips=384, frames=16),
                options=dataclasses.replace(DEFAULT_OPTIONS, latent_noise=0.2, disc_weight=0.5, disc_start=150),
                optim=OptimConfig(
                    steps=500,
                    batch_size=1,
                    lr=2e-3,
                    warmup=0.1,
                    weight_decay=0.0,
                    ema_decay=0.99,
                    checkpoint_every=100,
                ),
                engine=_ENGINE,
            ),
        ),
    ),
    Embedded(
        name="driving_upscaler",
        purpose="upscaler in pixels, 16 x 24 to 64 x 96, of single frames",
        settings=(
            UpscaleConfig(
                out=Path("driving_upscaler"),
                train="image",
                model="new",
                data=_driving(10.0, clips=4096, frames=64),
                optim=OptimConfig(steps=3000, batch_size=8, lr=3e-3, weight_decay=0.0, ema_decay=0.995),
                engine=_ENGINE,
            ),
        ),
    ),
    Embedded(
        name="driving_latent_upscaler",
        purpose="upscaler in latents, 64 x 96 to 256 x 384, of single frames",
        settings=(
            UpscaleConfig(
                out=Path("driving_latent_upscaler"),
                train="image",
                model="new",
                new=UpscalerConfig(channels=(32, 64, 96)),
                latents=True,
                data=_driving(VIDEO_FPS, clips=3072, frames=64, size=LARGE),
                size=LARGE,
                patch=128,
                optim=OptimConfig(
                    steps=3000,
                    batch_size=8,
                    lr=2e-3,
                    warmup=0.05,
                    weight_decay=0.0,
                    ema_decay=0.998,
                    checkpoint_every=500,
                ),
                engine=_ENGINE,
            ),
        ),
    ),
    Embedded(
        name="driving_latent_upscaler_video",
        purpose="temporal layers of the upscaler in latents, at 30 frames per second",
        settings=(
            UpscaleConfig(
                out=Path("driving_latent_upscaler_video"),
                model="latent",
                data=_driving(VIDEO_FPS, clips=192, frames=16, size=LARGE),
                size=LARGE,
                patch=128,
                spare_frames=4,
                optim=OptimConfig(
                    steps=400,
                    batch_size=2,
                    lr=2e-3,
                    warmup=0.1,
                    weight_decay=0.0,
                    ema_decay=0.99,
                    checkpoint_every=100,
                ),
                engine=_ENGINE,
            ),
        ),
    ),
)
"""In the order in which they can be made: some start from others, as these come with the package."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedConfig:
    """Which models to make again.

    Attributes:
        out: Folder with a folder for each model; the runs are in ``runs`` in it.
        models: Names of the models, or ``all``; none lists them.
    """

    out: Path = Path("runs/embedded")
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [model.name for model in MODELS]
        unknown = [name for name in self.models if name not in (*names, "all")]
        if unknown:
            raise ValueError(f"EmbeddedConfig: models: expected some of {names}, or 'all', got {unknown}")


def placed(settings: Any, runs: Path) -> Any:
    """Settings of a run whose paths start from a folder.

    Args:
        settings: Of a stage.
        runs: The folder.
    """
    paths = {name: getattr(settings, name, None) for name in ("out", "start_from")}
    return dataclasses.replace(settings, **{name: runs / p for name, p in paths.items() if isinstance(p, Path)})


def make(model: Embedded, out: Path) -> Path:
    """Make a model again, by all of its runs.

    Args:
        model: One of `MODELS`.
        out: Folder that gets a folder of the model, and ``runs``.

    Returns:
        The folder of the model, with weights in half precision and ``training.json``: settings, versions and results.
    """
    for settings in model.settings:
        _RUN[type(settings)](placed(settings, out / "runs"))
    return keep(model, out / "runs", out / model.name)


def keep(model: Embedded, runs: Path, folder: Path) -> Path:
    """Write what the runs of a model left behind as it comes with the package.

    Args:
        model: One of `MODELS`.
        runs: Folder of the runs.
        folder: Of the model.
    """
    last = runs / model.settings[-1].out
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model.settings[-1], ImageConfig):
        ImageLDM.from_pretrained(last / "model").save_pretrained(folder)
    elif (last / "model").is_dir():
        Upscaler.from_pretrained(last / "model").save_pretrained(folder, with_vae=False)
    else:
        AdapterWeights.load(last / "adapter").save_pretrained(folder, dtype=torch.float16)
    records = [
        {"config": plain(settings), "result": json.loads((runs / settings.out / "result.json").read_text())}
        for settings in model.settings
    ]
    versions = json.loads((last / "versions.json").read_text())
    record = {"versions": versions, **(records[0] if len(records) == 1 else {"runs": records})}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return folder


def listing() -> list[str]:
    """A line for each model: its name, its size, what it is."""
    sizes = [
        sum(path.stat().st_size for path in (WEIGHTS / model.name).rglob("*") if path.is_file()) for model in MODELS
    ]
    return [
        f"{model.name:<30} {size / 1e6:5.1f} MB  {model.purpose}" for model, size in zip(MODELS, sizes, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    config = parse(EmbeddedConfig, arguments, prog="temporal-layers train embedded", description=__doc__)
    if not config.models:
        print("\n".join(listing()))
    for model in MODELS:
        if "all" in config.models or model.name in config.models:
            print(f"{model.name}: {make(model, config.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
