"""A report of a run, one HTML file to open anywhere: clips before and after, curves, numbers, attention, settings.

Reads what a training left in its folder. Where that has an adapter, two clips are sampled from the same noise, frame by
frame and with the temporal layers, and it is recorded whom frames attend to.

    temporal-layers report runs/video
    temporal-layers report runs/video --samples 0    # only what is in the folder, without loading the model
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from temporal_layers.adapters import TemporalAdapter
from temporal_layers.recipes.bases import VideoBase, load_base
from temporal_layers.recipes.inspection import AttentionRecord, alphas_over_training, record_attention
from temporal_layers.recipes.report.page import Report, Table, write_report
from temporal_layers.recipes.sampling.clips import sample_clips
from temporal_layers.recipes.sheets import contact_sheet
from temporal_layers.recipes.training.configs import from_words

PIXELS = ((0.35, 0.25), (0.7, 0.5))
"""Where attention is shown: somewhere in the upper left, and in the middle of the lower half."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to report on.

    Attributes:
        run: Folder of a training run, or of the demo.
        out: HTML file; ``report.html`` in the folder if None.
        samples: Clips to sample before and after, where the run has an adapter; 0 loads no model.
        num_frames: Frames of those; those of the training if None.
        sampling_steps: Denoising steps.
        pictures: Further image files to show, such as plots of a benchmark.
        seed: Of the sampling.
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    samples: int = 2
    num_frames: int | None = None
    sampling_steps: int = 20
    pictures: tuple[Path, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0 or self.sampling_steps < 1:
            raise ValueError(
                "report: expected samples of at least 0 and sampling_steps of at least 1, got "
                f"samples={self.samples} and sampling_steps={self.sampling_steps}"
            )


def run_report(config: ReportConfig) -> Path:
    """Write the report.

    Returns:
        The HTML file.

    Raises:
        ValueError: If the folder is not that of a run.
    """
    folder = config.run
    if not (folder / "config.json").is_file() or not (folder / "losses.jsonl").is_file():
        raise ValueError(
            f"report: run: expected the folder of a run, with config.json and losses.jsonl, got {folder}; give the "
            "folder that was the --out of the training"
        )
    settings, records = _read(folder, "config.json"), _records(folder)
    samples = _sampled(config, settings) if config.samples and (folder / "adapter").is_dir() else _Samples()
    stages = list(dict.fromkeys(record["stage"] for record in records))
    report = Report(
        title=f"{folder.resolve().name}: {', '.join(stages) or 'no step taken yet'}",
        summary=samples.summary,
        clips={**samples.clips, **_last_validation(folder, ".mp4")},
        pictures={
            **samples.sheets,
            **_last_validation(folder, ".png"),
            **{path.stem: path for path in (*sorted(folder.glob("*.png")), *config.pictures)},
        },
        tables=_tables(_read(folder, "result.json"), _read(folder, "metrics.json")),
        losses={name: [r["loss"] for r in records if r["stage"] == name and "loss" in r] for name in stages},
        curves=_curves(records),
        alphas=_read(folder, "alphas.json"),
        attention=samples.attention,
        config=flat(settings),
        environment=_read(folder, "versions.json"),
        command=f"temporal-layers report {folder}",
    )
    return write_report(config.out or folder / "report.html", report)


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return json.loads(path.read_text()) if path.is_file() else {}


def _records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "losses.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]  # a run may be writing behind the last line's end


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _last_validation(folder: Path, suffix: str) -> dict[str, Path]:
    """Files of the last validation, by caption."""
    files = sorted((folder / "validation").glob(f"step-*{suffix}"))
    if not files:
        return {}
    step = files[-1].name[: len("step-00000000")]
    kept = [file for file in files if file.name.startswith(step)]
    return {f"validation, {file.stem}": file for file in kept}


def _tables(*results: Mapping[str, Any]) -> list[Table]:
    """The numbers of results: those that stand alone, and each mapping of rows with the same columns."""
    tables = []
    for result in results:
        plain = {name: value for name, value in result.items() if not isinstance(value, Mapping | list)}
        if plain:
            tables.append(Table({name: {"value": value} for name, value in plain.items()}))
        for name, value in result.items():
            if isinstance(value, Mapping) and value:
                tables.append(_table(name, value))
    return tables


def _table(name: str, rows: Mapping[str, Any]) -> Table:
    nested = [value for value in rows.values() if isinstance(value, Mapping)]
    if len(nested) == len(rows) and len({tuple(row) for row in nested}) == 1:
        return Table({key: _shown(row) for key, row in rows.items()}, name)
    return Table({key: {"value": value} for key, value in flat(rows).items()}, name)


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: "-" if value is None else value for key, value in row.items()}


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Alphas, gradient norms and the numbers of the validations over the steps."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {
        "alpha of each layer: the weight of the image branch": alphas_over_training(records)
    }
    for prefix, caption in (("grad_norm/", "norm of the gradient"), ("validation/", "validation")):
        keys = dict.fromkeys(key for record in records for key in record if key.startswith(prefix))
        for key in keys:
            name = key.removeprefix(prefix)
            points = [(record["step"], record[key]) for record in records if key in record]
            curves[f"{caption}: {name}"] = {name: _thinned(points)}
    return curves


def _thinned(points: list[tuple[float, float]], limit: int = 240) -> list[tuple[float, float]]:
    return points[:: max(1, len(points) // limit)]


@dataclass
class _Samples:
    """What was sampled for the report."""

    clips: dict[str, Tensor] = field(default_factory=dict)
    sheets: dict[str, Path] = field(default_factory=dict)
    attention: AttentionRecord | None = None
    summary: str = ""


def _sampled(config: ReportConfig, settings: Mapping[str, Any]) -> _Samples:
    base = load_base(settings.get("clips", {}).get("model", ""))
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    adapter = TemporalAdapter.from_pretrained(base.unet, config.run / "adapter")
    length = config.num_frames or settings.get("num_frames", 8)
    generator = torch.Generator().manual_seed(config.seed)
    channels, height, width = base.latent_shape
    noise = torch.randn(config.samples, channels, length, height, width, generator=generator)
    rows = _prompts(base, config.samples)
    options = {"num_inference_steps": config.sampling_steps, "seed": config.seed}
    before = sample_clips(base, rows, noise, frame_by_frame=True, **options)
    with record_attention(adapter, PIXELS) as attention:
        after = sample_clips(base, rows, noise, **options)
    clips = {}
    for number in range(config.samples):
        clips |= {f"{number}: frame by frame": before[number], f"{number}: with temporal layers": after[number]}
    sheet = (config.out or config.run / "report.html").with_suffix(".sheet.png")
    contact_sheet(clips, sheet, num_columns=min(8, length), scale=max(1, 192 // after.shape[-1]))
    text = "Clips come from the same noise before and after the temporal layers were put in."
    return _Samples(clips, {"sampled for this report": sheet}, attention, text)


def _prompts(base: VideoBase, count: int) -> dict[str, Tensor]:
    return base.conditioning(range(count), ["a video"] * count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = from_words(ReportConfig, arguments, prog="temporal-layers report", description=__doc__)
    print(run_report(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
