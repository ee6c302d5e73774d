"""Clips per second of the loader, per worker, against a bare PyAV loop that does the same work on the same files.

Run ``python -m temporal_layers.recipes.data.bench``; with ``--path`` on videos of your own. On a busy machine only the
seconds of processor time per clip, which Linux counts for every process, can be compared. The bare loop opens each
file, seeks, decodes in one thread, scales, cuts and stacks, in one process with nothing around it: what the loader adds
is the order, the checks of each file, the transport between processes, and the waiting of workers for each other.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from av.video.reformatter import VideoReformatter

from temporal_layers.recipes.data.decoding import Window, covering, cut
from temporal_layers.recipes.data.items import VideoItem
from temporal_layers.recipes.data.loader import ClipStream, LoaderConfig
from temporal_layers.recipes.data.sampling import SamplingConfig, Schedule
from temporal_layers.recipes.data.sources import DataConfig, Source, make_source
from temporal_layers.recipes.data.video_io import bunny_path, read_video, write_video


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Attributes:
        path: Videos, as for ``DataConfig``; some are made if None.
        frames: Of a clip.
        size: Height and width of a clip.
        fps: Rate of a clip.
        clips: Decoded in each measurement.
        batch_size: Of the loader.
        workers: Numbers of workers to measure.
        repeats: Of each measurement, in turns; the median counts.
    """

    path: str | None = None
    frames: int = 16
    size: tuple[int, int] = (256, 384)
    fps: float = 8.0
    clips: int = 64
    batch_size: int = 4
    workers: tuple[int, ...] = (1, 2)
    repeats: int = 5


def write_samples(folder: Path, *, count: int = 6, height: int = 360, width: int = 640) -> None:
    """Videos as stock footage has them: H.264, 25 frames per second, 5 seconds, one key frame."""
    frames = read_video(bunny_path()).frames
    indices = torch.arange(125) * 12.5 / 25
    for number in range(count):
        still = frames[:, ((indices + 4 * number) % frames.shape[1]).long()]
        large = F.interpolate(still.transpose(0, 1), size=(height, width), mode="bicubic").clamp(0, 1)
        write_video(folder / f"{number:02d}.mp4", large.transpose(0, 1), 25)


def bare_window(path: str, window: Window) -> torch.Tensor:
    """What ``PyAvDecoder.window`` does with a well-made file, and nothing else."""
    reformatter, frames = VideoReformatter(), []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        native = float(stream.average_rate)
        length = float(stream.duration * stream.time_base)
        start = window.share * max(0.0, length - window.seconds(native))
        if start > 0:
            container.seek(int(start / stream.time_base), stream=stream)
        held = None
        for frame in container.decode(stream):
            while held is not None and start + len(frames) / window.fps < frame.time - 0.1 / native:
                size = covering((held.height, held.width), window.size)
                rgb = reformatter.reformat(
                    held, width=size[1], height=size[0], format="rgb24", interpolation="BICUBIC", threads=1
                )
                frames.append(rgb.to_ndarray()[cut(size, window)])
                if len(frames) == window.num_frames:
                    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous()
            held = frame
    raise ValueError(f"bare_window: {path}: expected {window.num_frames} frames, got {len(frames)}")


def _draws(source: Sequence[VideoItem], sampling: SamplingConfig, config: BenchConfig) -> Iterator[tuple[str, Window]]:
    schedule = Schedule([np.arange(len(source))], 0)
    for number in range(config.clips // config.batch_size):
        for draw in schedule.batch(number, config.batch_size):
            yield source[draw.item].file.path, sampling.window(sampling.buckets[0], 0, draw.position)


@dataclass
class Timing:
    """One measurement: seconds on the clock and of processor time in the processes that decode, per clip."""

    seconds: float
    processor: float


def _processor_seconds(processes: Sequence[multiprocessing.process.BaseProcess]) -> float:
    """Processor time of workers so far, of this process if there are none; not a number where the system hides it."""
    if not processes:
        return time.process_time()
    try:
        fields = [Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split() for process in processes]
    except OSError:
        return math.nan
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def _time_loader(source: Source, sampling: SamplingConfig, config: BenchConfig, workers: int) -> Timing:
    stream = ClipStream(source, sampling, LoaderConfig(workers=workers))
    batches = stream.batches(0, batch_size=config.batch_size)
    # Enough batches before the clock that every worker runs at its pace and its store of batches is full.
    for _ in islice(batches, 4 * max(workers, 1)):
        pass
    processes = multiprocessing.active_children()
    started, used = time.perf_counter(), _processor_seconds(processes)
    clips = sum(len(batch.frames) for batch in islice(batches, max(1, config.clips // config.batch_size)))
    timing = Timing((time.perf_counter() - started) / clips, (_processor_seconds(processes) - used) / clips)
    stream.close()
    return timing


def measure(config: BenchConfig) -> dict[str, list[Timing]]:
    """Timings of every repeat, by what was measured."""
    timings: dict[str, list[Timing]] = {}
    with ExitStack() as stack:
        path = config.path
        if path is None:
            path = stack.enter_context(tempfile.TemporaryDirectory())
            write_samples(Path(path))
        source = make_source(DataConfig(path=path))
        sampling = SamplingConfig(buckets=((config.frames, *config.size),), fps=config.fps)
        draws = list(_draws(source, sampling, config))
        for _ in range(config.repeats):
            started, used = time.perf_counter(), time.process_time()
            for file, window in draws:
                bare_window(file, window)
            spent = (time.perf_counter() - started) / len(draws), (time.process_time() - used) / len(draws)
            timings.setdefault("bare", []).append(Timing(*spent))
            for workers in (0, *config.workers):
                timings.setdefault(f"{workers} workers", []).append(_time_loader(source, sampling, config, workers))
    return timings


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = tyro.cli(BenchConfig, description=__doc__, prog="bench", args=arguments)
    torch.set_num_threads(1)
    timings = measure(config)
    medians = {
        name: Timing(*(statistics.median(getattr(each, key) for each in runs) for key in ("seconds", "processor")))
        for name, runs in timings.items()
    }
    bare = medians["bare"]
    print(f"{config.frames} frames of {config.size[0]}x{config.size[1]} at {config.fps:g} fps, {config.clips} clips")
    print(f"{'':<10} {'clips/s':>8} {'per worker':>11} {'of bare':>8} {'processor s/clip':>17} {'bare / this':>12}")
    for name, median in medians.items():
        workers = 1 if name == "bare" else max(1, int(name.split()[0]))
        rate = 1 / median.seconds
        # The system counts processor time of other processes in hundredths of a second: short runs may have none.
        ratio = bare.processor / median.processor if median.processor else math.nan
        print(
            f"{name:<10} {rate:8.2f} {rate / workers:11.2f} {rate / workers * bare.seconds:8.2f} "
            f"{median.processor:17.4f} {ratio:12.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
