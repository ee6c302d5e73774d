"""Measure how good generated videos are, by a named protocol.

GENERATED and REAL are folders of videos (or .csv files, or .tar archives), or the word ``driving`` for held-out clips
of the generated corpus. docs/evaluation.md says what each number means.

    temporal-layers evaluate SAMPLES driving
    temporal-layers evaluate SAMPLES VIDEOS --preset rds-fvd --network i3d_torchscript.pt
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import DataConfig, Source, make_source
from temporal_layers.recipes.driving import DrivingConfig
from temporal_layers.recipes.evaluation.evaluate import Options, evaluate
from temporal_layers.recipes.evaluation.presets import PRESETS, Preset
from temporal_layers.recipes.evaluation.processes import rank_and_size
from temporal_layers.recipes.evaluation.results import Evaluation
from temporal_layers.recipes.stages.clips import DRIVING_FPS
from temporal_layers.recipes.stages.image import HELD_OUT
from temporal_layers.recipes.training.configs import from_words

PresetName = Literal[tuple(PRESETS)]  # type: ignore[valid-type]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure.

    Attributes:
        generated: Videos to judge.
        real: Videos to compare with; not needed for scores of one set.
        preset: The protocol.
        network: File, folder or repository of the preset's network, if it does not come with the package; of LPIPS with
            ``reconstruction-lpips``.
        samples: Clips of each set, if not those of the preset. The result is no longer the preset's.
        num_frames: Frames of a clip, likewise.
        fps: Rate of the clips, likewise.
        size: Height and width that frames are brought to; those of the first generated video if None.
        cache: Folder in which statistics of the real set are kept, for the next time.
        seed: Of which clips are taken.
        batch_size: Clips at a time.
        device: Of the network; a GPU if there is one, if empty.
        loader: How videos are decoded.
        json: Print JSON in place of a table.
    """

    generated: Annotated[str, tyro.conf.Positional]
    real: Annotated[str | None, tyro.conf.Positional] = None
    preset: PresetName = "driving"
    network: str = ""
    samples: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    size: tuple[int, int] | None = None
    cache: Path | None = None
    seed: int = 0
    batch_size: int = 8
    device: str = ""
    loader: LoaderConfig = LoaderConfig()
    json: bool = False


def chosen_preset(config: EvaluateConfig) -> tuple[Preset, tuple[str, ...]]:
    """The preset with what the settings change, and the names of what they do.

    Raises:
        ValueError: If a network is named that the preset does not take, or none that it needs.
    """
    preset = PRESETS[config.preset]
    asked = {name: getattr(config, name) for name in ("samples", "num_frames", "fps")}
    changes: dict[str, Any] = {
        name: value for name, value in asked.items() if value not in (None, getattr(preset, name))
    }
    measures = list(preset.measures)
    takes = [index for index, one in enumerate(measures) if one.network is not None and one.network.kind != "driving"]
    for index in takes:
        network = replace(measures[index].network, path=config.network or measures[index].network.path)
        if not network.path:
            raise ValueError(
                f"evaluate: {config.preset}: expected --network with a {network.kind} file of {network.name}, got "
                "none; docs/evaluation.md says what it has to be, and the preset 'driving' needs none"
            )
        measures[index] = replace(measures[index], network=network)
    if config.network and not takes and not any(measure.kind == "lpips" for measure in measures):
        raise ValueError(f"evaluate: network: expected none with the preset {config.preset!r}, got {config.network!r}")
    return replace(preset, measures=tuple(measures), **changes), tuple(changes)


def open_set(path: str, preset: Preset, *, second: bool) -> Source:
    """The videos at a path; ``driving`` stands for as many held-out clips as are needed, other ones for each set."""
    if path != "driving":
        return make_source(DataConfig(path=path, caption=""))
    first = HELD_OUT + (preset.samples if second else 0)
    rate = DrivingConfig(fps=DRIVING_FPS if preset.fps is None else preset.fps)
    return make_source(DataConfig(clips=preset.samples, first=first, clip_frames=preset.num_frames, driving=rate))


def show(found: Evaluation, title: str, console: Console) -> None:
    """Print a table of the numbers, and what they depend on below it."""
    table = Table("measure", "generated", "real", "samples", title=title, title_justify="left")
    for one in found.measures:
        spread = "" if one.spread is None else f" ± {one.spread:.2g}"
        counts = str(one.samples) if one.real_samples in (None, one.samples) else f"{one.samples}, {one.real_samples}"
        real = "" if one.real is None else f"{one.real:.4g}"
        table.add_row(escape(one.name), f"{one.value:.4g}{spread}", real, counts)
    console.print(table)
    height, width = found.sampling["size"]
    rates = ", ".join(f"{name} {rate:.4g} fps" for name, rate in found.fps.items())
    console.print(f"{found.sampling['num_frames']} frames of {height} x {width}; {rates}; version {found.version}")
    networks = {one.network["name"]: one.network["digest"] for one in found.measures if one.network}
    for name, digest in networks.items():
        console.print(f"network {name}: weights {digest}", highlight=False)
    rates = list(found.fps.values())
    if max(rates) > 1.05 * min(rates):
        console.print("The sets differ in rate, and so in motion: bring them to one with --fps.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code.

    Raises:
        ValueError: If something cannot be measured, with the reason.
    """
    presets = "\n".join(["Presets:", *(f"  {name}: {one.about}" for name, one in PRESETS.items())])
    about = f"{__doc__}\n{presets}"
    config = from_words(EvaluateConfig, arguments, prog="temporal-layers evaluate", description=about)
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    try:
        found, title = _run(config)
        if rank_and_size()[0] == 0 and config.json:
            print(json.dumps({"preset": title, **found.as_dict()}, indent=2))
        elif rank_and_size()[0] == 0:
            show(found, title, Console())
    finally:
        if started:
            dist.destroy_process_group()
    return 0


def _run(config: EvaluateConfig) -> tuple[Evaluation, str]:
    preset, changed = chosen_preset(config)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    options = Options(
        batch_size=config.batch_size,
        device=config.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"),
        loader=config.loader,
        cache=config.cache,
        lpips=config.network or "lpips",
    )
    found = evaluate(
        open_set(config.generated, preset, second=True),
        None if config.real is None else open_set(config.real, preset, second=False),
        preset,
        size=config.size,
        seed=config.seed,
        options=options,
    )
    return found, config.preset + (f", other {', '.join(changed)}" if changed else "")


if __name__ == "__main__":
    sys.exit(main())
