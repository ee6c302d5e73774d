"""Times whole UNets: the image model, the same with this library's layers, and diffusers' own video models.

python -m temporal_layers.recipes.model_bench            a GPU if there is one: Stable Diffusion 1.5's size, 16 frames
python -m temporal_layers.recipes.model_bench --device cpu --out results     a fifth of the width, in seconds

Each video model of diffusers is met by its own image model and by that model with this library's layers, with the same
weights. Before anything is timed the two video models have to give the same clip.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
import tyro
from diffusers import UNet2DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from temporal_layers.adapters.convert import image_model_of, load_foreign, micro_conditioning
from temporal_layers.recipes.training.run_folder import versions

TOLERANCE = 1e-3  # of the largest value, in fp32: rounding over some hundred layers, while a wrong layer gives 0.1
TIME_IDS = (7.0, 127.0, 0.02)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to time.

    Attributes:
        device: Where; a GPU if there is one.
        frames: Frames of the clip.
        width: Channels of the first level; 320 on a GPU and 64 on a CPU if not given.
        size: Height and width of the latents; 64 on a GPU and 16 on a CPU if not given.
        dtype: ``float32`` or ``bfloat16``; the latter on a GPU if not given.
        rounds: Timed passes of each model, which take turns.
        out: Folder for the JSON file; nothing is written if not given.
    """

    device: Literal["cuda", "cpu"] | None = None
    frames: int = 16
    width: int | None = None
    size: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    rounds: int = 5
    out: Path | None = None

    def resolved(self) -> BenchConfig:
        """With the device and its sizes filled in."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        defaults = {"width": 320, "size": 64, "dtype": "bfloat16"} if device == "cuda" else {"width": 64, "size": 16}
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, device=device, **{"dtype": self.dtype or "float32", **missing})


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model: a call on a clip ``(1, 4, frames, size, size)`` that returns one."""

    name: str
    model: nn.Module
    call: Callable[[nn.Module, Tensor], Tensor]


def _levels(config: BenchConfig) -> dict[str, Any]:
    return {
        "sample_size": config.size,
        "block_out_channels": tuple(config.width * factor for factor in (1, 2, 4, 4)),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "in_channels": 4,
        "out_channels": 4,
    }


def animatediff(config: BenchConfig, text: Tensor) -> list[Entry]:
    """Stable Diffusion 1.5's UNet, ours with AnimateDiff's layers, and ``UNetMotionModel``."""
    image = UNet2DConditionModel(**_levels(config), attention_head_dim=8)
    peer = UNetMotionModel(
        **_levels(config), num_attention_heads=8, motion_num_attention_heads=8, motion_max_seq_length=32
    ).eval()
    image.load_state_dict({name: value for name, value in peer.state_dict().items() if "motion_modules" not in name})
    ours = copy.deepcopy(image)
    tensors = {name: value for name, value in peer.state_dict().items() if "motion_modules" in name}
    load_foreign(ours, tensors, num_heads=8, in_norm="clip")

    def on_clips(model: nn.Module, clip: Tensor) -> Tensor:
        return model(clip, 500, text).sample

    def on_frames(model: nn.Module, clip: Tensor) -> Tensor:
        frames = clip.transpose(1, 2).flatten(0, 1)
        return model(frames, 500, text.expand(len(frames), -1, -1)).sample

    def with_a_text_a_frame(model: nn.Module, clip: Tensor) -> Tensor:
        return model(clip, 500, text.expand(clip.shape[2], -1, -1)).sample

    return [
        Entry(name="image model", model=image.eval(), call=on_frames),
        Entry(name="ours", model=ours.eval(), call=on_clips),
        Entry(name="UNetMotionModel", model=peer, call=with_a_text_a_frame),
    ]


def stable_video(config: BenchConfig, text: Tensor) -> list[Entry]:
    """Stable Video Diffusion's image model in the size of Stable Diffusion 1.5, ours, and diffusers' video model."""
    heads = tuple(max(1, channels // 64) for channels in _levels(config)["block_out_channels"])
    peer = UNetSpatioTemporalConditionModel(
        **_levels(config), num_attention_heads=heads, num_frames=config.frames
    ).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name.endswith("mix_factor"):
                parameter.normal_()
    tensors = peer.state_dict()
    head_dim = config.width // heads[0]
    image = image_model_of(tensors, head_dim=head_dim)
    ours = copy.deepcopy(image)
    load_foreign(ours, tensors)
    ids = torch.tensor([TIME_IDS], device=text.device, dtype=text.dtype)
    labels = micro_conditioning(ids, peer.config.addition_time_embed_dim)

    def on_clips(model: nn.Module, clip: Tensor) -> Tensor:
        return model(clip, 500, text, class_labels=labels).sample

    def on_frames(model: nn.Module, clip: Tensor) -> Tensor:
        frames = clip.transpose(1, 2).flatten(0, 1)
        count = len(frames)
        return model(frames, 500, text.expand(count, -1, -1), class_labels=labels.expand(count, -1)).sample

    def with_frames_first(model: nn.Module, clip: Tensor) -> Tensor:
        return model(clip.transpose(1, 2), 500, text, added_time_ids=ids).sample.transpose(1, 2)

    return [
        Entry(name="image model", model=image.eval(), call=on_frames),
        Entry(name="ours", model=ours.eval(), call=on_clips),
        Entry(name="UNetSpatioTemporalConditionModel", model=peer, call=with_frames_first),
    ]


PAIRS = {"AnimateDiff": animatediff, "Stable Video Diffusion": stable_video}


@torch.no_grad()
def difference(entries: list[Entry], frames: int, device: str) -> float:
    """Largest difference of our clip and the peer's in fp32, relative to the largest value."""
    _, ours, peer = entries
    size = 8  # small, and of a size that every level can halve
    clip = torch.randn(1, 4, min(frames, 4), size, size, device=device)
    results = [entry.call(entry.model, clip) for entry in (ours, peer)]
    return ((results[0] - results[1]).abs().max() / results[1].abs().max()).item()


def passes(entries: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call, ``rounds`` times by turns after one to warm up.

    Device time on a GPU; on a CPU the time of the thread, which other processes disturb least, with several threads
    that of the clock on the wall.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: dict[str, list[float]] = {name: [] for name in entries}
    for turn in range(rounds + 1):
        for name, call in entries.items():
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                seconds = start.elapsed_time(end) / 1e3
            else:
                began = clock()
                call()
                seconds = clock() - began
            if turn > 0:
                samples[name].append(seconds)
    return samples


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Bytes that a call holds at its worst beyond those there before, as PyTorch's allocator counts them."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    held = most = 0
    for _, change in sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"):
        held += change
        most = max(most, held)
    return most


@torch.no_grad()
def measure(pair: str, config: BenchConfig) -> dict[str, Any]:
    """Check and time the three models of a pair.

    Args:
        pair: Key of :data:`PAIRS`.
        config: With everything filled in.

    Returns:
        The difference of the two video models, and a row for each model.

    Raises:
        ValueError: If the two video models do not give the same clip.
    """
    torch.manual_seed(0)
    text = torch.randn(1, 77, 768, device=config.device)
    entries = PAIRS[pair](config, text)
    for entry in entries:
        nn.Module.to(entry.model, config.device)
    error = difference(entries, config.frames, config.device)
    if not error < TOLERANCE:
        raise ValueError(
            f"model_bench: {pair}: expected the clip of {entries[2].name} within {TOLERANCE}, got a difference of "
            f"{error:.1e}; two models that compute different things cannot be compared"
        )
    dtype = getattr(torch, config.dtype)
    del entries, text
    torch.manual_seed(0)
    text = torch.randn(1, 77, 768, device=config.device, dtype=dtype)
    entries = PAIRS[pair](config, text)
    clip = torch.randn(1, 4, config.frames, config.size, config.size, device=config.device, dtype=dtype)
    calls, parameters = {}, {}
    for entry in entries:
        model = nn.Module.to(entry.model, config.device, dtype)  # diffusers' own warns about layers that none has
        parameters[entry.name] = sum(parameter.numel() for parameter in model.parameters())
        calls[entry.name] = lambda entry=entry: entry.call(entry.model, clip)
        if entry is not entries[2]:  # which has 5-D weights, or views that copy in that layout
            twin = nn.Module.to(copy.deepcopy(model), memory_format=torch.channels_last)
            parameters[f"{entry.name}, channels-last"] = parameters[entry.name]
            calls[f"{entry.name}, channels-last"] = lambda entry=entry, twin=twin: entry.call(twin, clip)
    samples = passes(calls, config.rounds, config.device)
    rows = []
    for name, seconds in samples.items():
        low, *_, high = quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 2
        peak = peak_bytes(calls[name], config.device)
        row = {"model": name, "parameters": parameters[name], "peak_bytes": peak, "samples": len(seconds)}
        rows.append(row | {"seconds": median(seconds), "p20": low, "p80": high})
    return {"difference": error, "rows": rows}


def overhead(rows: list[dict[str, Any]], who: str) -> float:
    """Time of the temporal layers as a share of the image model's, each in its fastest layout."""

    def best(name: str) -> float:
        return min(row["seconds"] for row in rows if row["model"].split(",")[0] == name)

    return best(who) / best("image model") - 1


def table(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| layers | model | parameters | ms, median (p20 to p80) | temporal overhead | peak MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for pair, result in document["pairs"].items():
        for row in result["rows"]:
            name, _, layout = row["model"].partition(",")
            share = "" if name == "image model" or layout else f"{overhead(result['rows'], name):.0%}"
            times = f"{1e3 * row['seconds']:.0f} ({1e3 * row['p20']:.0f} to {1e3 * row['p80']:.0f})"
            lines.append(
                f"| {pair} | {row['model']} | {row['parameters'] / 1e6:.1f} M | {times} | {share} | "
                f"{row['peak_bytes'] / 1e6:.0f} |"
            )
    return "\n".join(lines)


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure all pairs; returns what is written."""
    config = config.resolved()
    shape = {name: getattr(config, name) for name in ("frames", "width", "size", "dtype", "rounds")}
    pairs = {pair: measure(pair, config) for pair in PAIRS}
    return {"machine": machine(config.device), "shape": shape, "pairs": pairs}


def machine(device: str) -> dict[str, Any]:
    """What a result depends on beside the sources.

    ``load`` is the mean number of processes that wanted a core in the last minute: above the threads, it was shared.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    cores = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
    return {"device": name, "kind": device, **cores, **versions()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = tyro.cli(BenchConfig, description=__doc__, prog="model_bench", args=arguments)
    document = run(config)
    print(table(document))
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", document["machine"]["device"].lower())
        path = config.out / f"models-{name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
