"""Measures, on the generated corpus and a CPU, what each stage of the Video LDM is for; writes a table.

Each comparison of the paper is made with small models, a short training and several seeds. Runs that are there already
are kept, so an interrupted command goes on where it was.

    temporal-layers results --out runs/results
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from temporal_layers.recipes.evidence.comparisons import arm_table, comparison_table
from temporal_layers.recipes.evidence.corpus import Corpus, render_corpus
from temporal_layers.recipes.evidence.jobs import COMPARISONS, JOBS, Scale
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import versions

CLIP_FRAMES = 17
"""Of the corpus: what interpolation needs at its coarse rate, (5 - 1) * 4 + 1."""


@dataclass(frozen=True, kw_only=True)
class EvidenceConfig:
    """The runs behind the table.

    Attributes:
        out: Folder of the numbers of each run, of ``results.json`` and of ``results.md``.
        seeds: One run of everything for each.
        only: Names of runs to make; all if empty.
        processes: Runs at a time, each on one thread.
        train_clips: Clips to train on.
        held_out: Clips to measure against, and as many again to measure.
        scale: How much every run does.
        run: Make this one run, in this process; for the command itself.
    """

    out: Path = Path("runs/results")
    seeds: tuple[int, ...] = (0, 1, 2)
    only: tuple[str, ...] = ()
    processes: int = 2
    train_clips: int = 160
    held_out: int = 32
    scale: Scale = Scale()
    run: str | None = None

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in JOBS:
                raise ValueError(f"EvidenceConfig: only: expected names among {', '.join(JOBS)}, got {name!r}")
        if not self.seeds or self.processes < 1:
            raise ValueError(
                f"EvidenceConfig: expected a seed and a process at least, got seeds={self.seeds} and "
                f"processes={self.processes}"
            )


def run_evidence(config: EvidenceConfig) -> Path:
    """Make all runs that are missing and write the tables; returns the path of the Markdown."""
    config.out.mkdir(parents=True, exist_ok=True)
    settings = {**asdict(config.scale), "train_clips": config.train_clips, "held_out": config.held_out}
    _check_same_settings(config.out / "settings.json", settings)
    corpus = config.out / "corpus.safetensors"
    if not corpus.exists():
        print(f"rendering {config.train_clips + 2 * config.held_out} clips", flush=True)
        render_corpus(train=config.train_clips, held_out=config.held_out, num_frames=CLIP_FRAMES).save(corpus)
    missing = [
        (name, seed)
        for seed in config.seeds
        for name in config.only or JOBS
        if not _path(config.out, name, seed).exists()
    ]
    with ThreadPoolExecutor(config.processes) as pool:
        for name, seed, seconds in pool.map(lambda one: _in_process(config, *one), missing):
            print(f"{name}, seed {seed}: {seconds:.0f} s", flush=True)
    return write_tables(config.out)


def _path(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-{seed}.json"


def _check_same_settings(path: Path, settings: dict) -> None:
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(
            f"run_evidence: expected the settings in {path}, with which its runs were made, got {settings}; choose "
            "another folder with --out"
        )
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _in_process(config: EvidenceConfig, name: str, seed: int) -> tuple[str, int, float]:
    started = time.perf_counter()
    scale = [word for key, value in asdict(config.scale).items() for word in (f"--scale.{key}", str(value))]
    command = [sys.executable, "-P", "-m", __spec__.name, "--out", str(config.out), "--run", name]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--seeds", str(seed), *scale], env={**os.environ, **threads}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"run_evidence: {name} with seed {seed} failed:\n{done.stderr[-2000:]}")
    return name, seed, time.perf_counter() - started


def run_one(config: EvidenceConfig) -> None:
    """Make one run in this process and write its numbers."""
    [seed] = config.seeds
    torch.set_num_threads(1)
    started = time.process_time()
    arms = JOBS[config.run](Corpus.load(config.out / "corpus.safetensors"), config.scale, seed)
    record = {"arms": arms, "seed": seed, "seconds": round(time.process_time() - started, 1)}
    path = _path(config.out, config.run, seed)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    unfinished.replace(path)


def _records(out: Path) -> Iterator[dict]:
    for name in JOBS:
        for path in sorted(out.glob(f"{name}-[0-9]*.json")):
            yield json.loads(path.read_text())


def write_tables(out: Path) -> Path:
    """Put the numbers of all runs in a folder together: ``results.json`` and ``results.md``."""
    results: dict[str, dict[int, dict[str, float]]] = {}
    seconds = 0.0
    for record in _records(out):
        seconds += record["seconds"]
        for arm, numbers in record["arms"].items():
            results.setdefault(arm, {})[record["seed"]] = numbers
    document = {
        "settings": json.loads((out / "settings.json").read_text()),
        "versions": versions(),
        "machine": platform.processor() or platform.machine(),
        "core_minutes": round(seconds / 60, 1),
        "results": results,
    }
    (out / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    path = out / "results.md"
    tables = [comparison_table(COMPARISONS, results), arm_table(results)]
    path.write_text("\n\n".join([*tables, f"{document['core_minutes']} core minutes in all."]) + "\n", encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse(EvidenceConfig, arguments, prog="temporal-layers results", description=__doc__)
    if config.run is not None:
        run_one(config)
        return 0
    print(run_evidence(replace(config, only=tuple(dict.fromkeys(config.only)))).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
