"""Look at every video of a data set: how many, how long, how large, at which rate, and which cannot be read and why.

temporal-layers data check videos
temporal-layers data check table.csv --thorough --json   # every frame; for machines
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from temporal_layers.recipes.data.decoding import DecoderName
from temporal_layers.recipes.data.probing import Probe, probe_all
from temporal_layers.recipes.data.sources import DataConfig, Source, make_source
from temporal_layers.recipes.training.configs import from_words

_MOST_COMMON = 8


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What to look at.

    Attributes:
        path: A folder, a .csv file, .tar archives or ``driving``; see ``DataConfig``.
        kind: What ``path`` is; ``auto`` tells by its name and content.
        root: Folder that the paths in a CSV file start from.
        index_folder: Where indices of archives and results are kept for the next time, and for training.
        decoder: ``pyav``, or ``torchcodec`` if it is installed.
        workers: Processes; 0 for none but this.
        thorough: Decode every frame, not only the first.
        json: Print JSON in place of a table.
        strict: Return exit code 1 if a video is bad.
    """

    path: Annotated[str, tyro.conf.Positional]
    kind: Literal["auto", "folder", "csv", "shards", "driving"] = "auto"
    root: Path | None = None
    index_folder: Path | None = None
    decoder: DecoderName = "pyav"
    workers: int = 2
    thorough: bool = False
    json: bool = False
    strict: bool = False


def summary(source: Source, probes: Sequence[Probe]) -> dict[str, Any]:
    """Counts and ranges over a source, and the bad videos by name with the reason.

    Args:
        source: The items.
        probes: One for each.
    """
    found = [probe.info for probe in probes if probe.info is not None]
    items = [source[index] for index in range(len(source))]
    bad = {item.file.name: probe.fault for item, probe in zip(items, probes, strict=True) if probe.info is None}
    rates = Counter(f"{info.fps:.5g}" for info in found)
    sizes = Counter(f"{info.height}x{info.width}" for info in found)
    return {
        "videos": len(probes),
        "readable": len(found),
        "hours": sum(info.duration for info in found) / 3600,
        "seconds": _range([info.duration for info in found if info.duration > 0]),
        "without_duration": sum(info.duration <= 0 for info in found),
        "sizes": dict(sizes.most_common()),
        "fps": dict(rates.most_common()),
        "captions": len({item.caption for item in items}),
        "labels": len({item.label for item in items}),
        "bad": bad,
    }


def _range(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def show(facts: dict[str, Any], console: Console) -> None:
    """Print a summary as a table, with the bad videos below it."""
    table = Table("what", "found", show_header=False)
    table.add_row("videos", f"{facts['readable']} of {facts['videos']} readable, {facts['hours']:.4g} hours")
    if facts["seconds"]:
        table.add_row("seconds", "{least:.4g} to {most:.4g}, median {median:.4g}".format(**facts["seconds"]))
    if facts["without_duration"]:
        table.add_row("without a length", str(facts["without_duration"]))
    for name, unit in (("sizes", ""), ("fps", " fps")):
        common = list(facts[name].items())
        lines = [f"{value}{unit}: {count}" for value, count in common[:_MOST_COMMON]]
        lines += [f"{len(common) - _MOST_COMMON} others"] if len(common) > _MOST_COMMON else []
        table.add_row(name, "\n".join(lines))
    table.add_row("different captions", str(facts["captions"]))
    table.add_row("different labels", str(facts["labels"]))
    console.print(table)
    if facts["bad"]:
        console.print(f"{len(facts['bad'])} bad:", markup=False)
        for name, reason in facts["bad"].items():
            console.print(f"  {reason if name in reason else f'{name}: {reason}'}", markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = from_words(CheckConfig, arguments, prog="temporal-layers data check", description=__doc__)
    try:
        source = make_source(
            DataConfig(path=config.path, kind=config.kind, root=config.root, index_folder=config.index_folder)
        )
        store = None if config.index_folder is None else config.index_folder / "probes.jsonl"
        found = probe_all(source, decoder=config.decoder, workers=config.workers, thorough=config.thorough, store=store)
        progress = Console(stderr=True)
        probes = list(track(found, "probing", total=len(source), console=progress, disable=not progress.is_terminal))
    except ValueError as error:
        print(f"temporal-layers data check: {error}", file=sys.stderr)
        return 1
    facts = summary(source, probes)
    if config.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts, Console())
    return int(config.strict and bool(facts["bad"]))


if __name__ == "__main__":
    sys.exit(main())
