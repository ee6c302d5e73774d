"""The whole job in a few minutes on a CPU: an image model flickers, temporal layers are trained, the video holds.

Loads the shipped image model, samples clips frame by frame, injects temporal layers, trains them with the image model
frozen, samples again from the same noise, and once more with the shipped adapter, the same layers after a longer
training. Writes all as MP4, GIF and WebP, a contact sheet, the adapter, the numbers and a report.

    temporal-layers demo
    temporal-layers demo --videos FOLDER    # on your own clips
    temporal-layers demo --base FOLDER_OR_ID  # on any Stable Diffusion, DDPM or LDM pipeline of diffusers
"""

from __future__ import annotations

import dataclasses
import itertools
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from temporal_layers.adapters import TemporalAdapter
from temporal_layers.recipes.bases import Conditioning, LabelBase, VideoBase, load_base
from temporal_layers.recipes.data.clip_reader import ClipReader
from temporal_layers.recipes.data.video_io import list_videos, write_video
from temporal_layers.recipes.driving import LABELS, DrivingConfig, DrivingCorpus
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.inspection import alphas_over_training
from temporal_layers.recipes.metrics import clip_frechet, frame_difference, motion_agreement
from temporal_layers.recipes.report.page import Report, write_report
from temporal_layers.recipes.report.page import Table as Numbers
from temporal_layers.recipes.sampling.clips import sample_clips
from temporal_layers.recipes.sheets import contact_sheet, side_by_side
from temporal_layers.recipes.stages.clips import DRIVING_FPS, TensorClips, encode_clips
from temporal_layers.recipes.stages.image import HELD_OUT, finetune_frames
from temporal_layers.recipes.stages.temporal import alphas
from temporal_layers.recipes.stages.video import DEFAULT_OPTIM, load_shipped_adapter, train_video
from temporal_layers.recipes.training.configs import from_words
from temporal_layers.recipes.training.engine import OptimConfig, RunFolder, versions

CAPTION = "a video"
"""Text for clips that come without one."""

SHOWN = ("day clear", "dusk clear", "day rain", "night clear", "night rain", "dusk snow")
"""Labels of the driving clips that are sampled and compared with, in turn."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo.

    Attributes:
        out: Folder for everything it writes.
        seed: Seed of data, weights, batches and noise: the same seed on the same machine gives the same result.
        videos: Folder of video files to train on instead of the generated driving corpus. The shipped image model is
            first fine-tuned on their frames.
        base: Image pipeline to start from instead of the shipped model: a folder or an id on the Hugging Face hub.
        fps: Frames per second of the clips; files are resampled to it.
        num_frames: Frames of a clip.
        num_clips: Clips to train on; with ``videos``, the most that are read.
        spare_frames: Frames of a training clip beyond ``num_frames``, from which the window is drawn.
        samples: Clips to sample before, after and, on the driving model, with the shipped adapter.
        sampling_steps: Denoising steps.
        eta: Fresh noise in each of them, from 0 (none: DDIM) to below 1 (nearly DDPM).
        guidance_scale: Classifier-free guidance; 1 turns it off.
        optim: Training of the temporal layers.
        finetune_autoencoder: Training of the shipped autoencoder on the frames of ``videos``.
        finetune_unet: Training of the shipped image UNet on the frames of ``videos``.
    """

    out: Path = Path("demo")
    seed: int = 0
    videos: Path | None = None
    base: str | None = None
    fps: float = DRIVING_FPS
    num_frames: int = 16
    num_clips: int = 72
    spare_frames: int = 8
    samples: int = 6
    sampling_steps: int = 30
    eta: float = 0.99
    guidance_scale: float = 1.0
    optim: OptimConfig = dataclasses.replace(DEFAULT_OPTIM, steps=150)
    finetune_autoencoder: OptimConfig = OptimConfig(steps=150, batch_size=4, lr=5e-4, ema_decay=0.95, weight_decay=0.0)
    finetune_unet: OptimConfig = OptimConfig(steps=300, batch_size=16, lr=5e-4, ema_decay=0.98)

    def __post_init__(self) -> None:
        if min(self.num_frames, self.num_clips, self.samples, self.sampling_steps) < 1 or self.spare_frames < 0:
            raise ValueError(
                "DemoConfig: expected num_frames, num_clips, samples and sampling_steps of at least 1 and spare_frames "
                f"of at least 0, got {self.num_frames}, {self.num_clips}, {self.samples}, {self.sampling_steps} and "
                f"{self.spare_frames}"
            )


@dataclass(frozen=True)
class Footage:
    """Clips to train on and clips to compare with.

    Attributes:
        train: Training clips, ``(clips, 3, frames, height, width)`` in [0, 1].
        train_conditioning: One row a training clip.
        real: Clips that were not trained on, ``num_frames`` long, where there are enough.
        conditioning: What to sample: one row a sample.
        note: Where the clips come from.
    """

    train: Tensor
    train_conditioning: Conditioning
    real: Tensor
    conditioning: Conditioning
    note: str


def generated_footage(base: VideoBase, config: DemoConfig) -> Footage:
    """Clips of the driving corpus; those to compare with are held out from every training in this repository."""
    length = config.num_frames + config.spare_frames
    height, width = base.frame_size
    corpus = DrivingCorpus(DrivingConfig(height=height, width=width, fps=config.fps), seed=config.seed)
    train = [corpus.clip(index, length) for index in range(config.num_clips)]
    real = [corpus.clip(index, config.num_frames) for index in _held_out(corpus, 4 * config.samples)]
    shown = real[: config.samples]
    return Footage(
        train=torch.stack([clip.frames for clip in train]),
        train_conditioning=base.conditioning([clip.label for clip in train], [clip.caption for clip in train]),
        real=torch.stack([clip.frames for clip in real]),
        conditioning=base.conditioning([clip.label for clip in shown], [clip.caption for clip in shown]),
        note="generated driving clips",
    )


def _held_out(corpus: DrivingCorpus, count: int) -> list[int]:
    """Held-out clips whose labels take turns, so that few samples show much and real ones are of the same kinds."""
    ahead = {label: itertools.count(HELD_OUT) for label in SHOWN}
    return [
        next(index for index in ahead[label] if LABELS[corpus.label(index)] == label)
        for label in itertools.islice(itertools.cycle(SHOWN), count)
    ]


def own_footage(base: VideoBase, config: DemoConfig) -> Footage:
    """Clips of the user's files. A quarter is held out to compare with, if there are at least four."""
    length = config.num_frames + config.spare_frames
    reader = ClipReader(list_videos(config.videos), num_frames=length, size=base.frame_size, fps=config.fps)
    clips = []
    for clip in reader:
        clips.append(clip.frames)
        if len(clips) == config.num_clips:
            break
    held_out = len(clips) // 4
    train = torch.stack(clips[: len(clips) - held_out])
    real = torch.stack(clips[len(clips) - held_out :] if held_out else clips)[:, :, : config.num_frames]
    note = f"{reader.report}; {held_out} held out" if held_out else f"{reader.report}; compared with the training clips"
    return Footage(
        train=train,
        train_conditioning=_plain_conditioning(base, len(train)),
        real=real,
        conditioning=_plain_conditioning(base, config.samples),
        note=note,
    )


def _plain_conditioning(base: VideoBase, count: int) -> Conditioning:
    if isinstance(base, LabelBase):
        return base.no_conditioning(count)  # own clips have none of the driving corpus's labels
    return base.conditioning([0] * count, [CAPTION] * count)


def measure(clips: Tensor, real: Tensor) -> dict[str, float | None]:
    """The numbers of one row: frame difference, motion agreement, Frechet distance to real clips.

    The last is None if there are too few clips for it.
    """
    try:
        distance = clip_frechet(clips, real)
    except ValueError:
        distance = None
    return {
        "frame difference": float(frame_difference(clips)),
        "motion agreement": float(motion_agreement(clips)),
        "Frechet distance": None if distance is None else float(distance),
    }


def compare(clips: Mapping[str, Tensor], real: Tensor, seed: int) -> dict[str, dict[str, float | None]]:
    """Rows for real and sampled clips, and for two ways to cheat: real clips frozen, and with frames shuffled.

    Args:
        clips: Row to sampled clips, as many in each.
        real: Real clips. If there are at least twice as many, the first are measured against the others.
        seed: Seed of the shuffling.
    """
    count = len(next(iter(clips.values())))
    shown, reference = (real[:count], real[count:]) if len(real) >= 2 * count else (real, real)
    order = torch.randperm(real.shape[2], generator=torch.Generator().manual_seed(seed))
    rows = {
        "real": shown,
        **clips,
        "real, frozen": shown[:, :, :1].expand_as(shown),
        "real, shuffled": shown[:, :, order],
    }
    return {name: measure(row, reference) for name, row in rows.items()}


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        adapter: The trained temporal layers.
        clips: Caption to clips ``(clips, 3, frames, height, width)``, all from the same noise: frame by frame, with
            the temporal layers trained here and, on the driving model, with the shipped adapter.
        table: Numbers by row and column.
        losses: Training loss of each step.
        seconds: Wall time of the parts.
    """

    adapter: TemporalAdapter
    clips: dict[str, Tensor]
    table: dict[str, dict[str, float | None]]
    losses: list[float]
    seconds: dict[str, float]

    @property
    def before(self) -> Tensor:
        """The clips frame by frame."""
        return next(iter(self.clips.values()))

    @property
    def after(self) -> Tensor:
        """The clips with the temporal layers trained here."""
        return list(self.clips.values())[1]


class _Clock:
    def __init__(self, console: Console) -> None:
        self.console, self.seconds, self.last = console, {}, time.perf_counter()

    def __call__(self, name: str, text: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
        self.console.print(f"[dim]{self.seconds[name]:6.1f} s[/dim]  {text}")


def run_demo(config: DemoConfig, console: Console | None = None) -> DemoResult:
    """Run the demo and write everything to ``config.out``.

    Args:
        config: What to do.
        console: Where to report; the terminal if None.
    """
    console = console or Console()
    clock = _Clock(console)
    base = LabelBase(load_shipped()) if config.base is None else load_base(config.base)
    run = RunFolder(config.out, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock("load", f"image model loaded: {config.base or 'the shipped driving model'}, on {device}")
    footage = generated_footage(base, config) if config.videos is None else own_footage(base, config)
    clock("clips", f"{len(footage.train)} training clips of {footage.train.shape[2]} frames: {footage.note}")
    if config.videos is not None and config.base is None:
        frames = footage.train.transpose(1, 2).flatten(0, 1)
        finetune_frames(
            base.ldm, frames, autoencoder=config.finetune_autoencoder, unet=config.finetune_unet, seed=config.seed
        )
        clock("finetune", f"image model fine-tuned on {len(frames)} frames")
    base.to(device)
    latents = encode_clips(base, footage.train)
    clock("encode", "training clips encoded, frame by frame")
    generator = torch.Generator().manual_seed(config.seed)
    channels, height, width = base.latent_shape
    noise = torch.randn(config.samples, channels, config.num_frames, height, width, generator=generator)
    options = {
        "num_inference_steps": config.sampling_steps,
        "guidance_scale": config.guidance_scale,
        "eta": config.eta,
        "seed": config.seed,
    }
    clips = {"frame by frame": sample_clips(base, footage.conditioning, noise, frame_by_frame=True, **options)}
    clock("before", f"{config.samples} clips sampled frame by frame")
    adapter, losses = train_video(
        base,
        TensorClips(latents, footage.train_conditioning),
        config.optim,
        num_frames=config.num_frames,
        seed=config.seed,
        run=run,
    )
    clock("train", f"temporal layers trained: {len(losses)} steps, loss {_tail(losses):.4f}")
    clips[f"trained here: {len(losses)} steps"] = sample_clips(base, footage.conditioning, noise, **options)
    clock("after", f"{config.samples} clips sampled again, from the same noise")
    if config.videos is None and config.base is None:
        longer, steps = load_shipped_adapter(device)
        clips[f"shipped: {steps} steps"] = sample_clips(longer, footage.conditioning, noise, **options)
        clock("shipped", f"{config.samples} clips sampled with the shipped adapter, {steps} steps, from the same noise")
    table = compare(clips, footage.real, config.seed)
    clock("measure", "clips measured")
    result = DemoResult(adapter, clips, table, losses, clock.seconds)
    _write(result, config, run, footage)
    clock("write", f"everything written to {config.out}")
    _show(result, config, console)
    return result


def _tail(losses: Sequence[float]) -> float:
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _count(adapter: TemporalAdapter, *groups: str) -> int:
    return sum(parameter.numel() for group in groups for _, parameter in adapter.named_parameters(group))


def _write(result: DemoResult, config: DemoConfig, run: RunFolder, footage: Footage) -> None:
    out, fps, scale = config.out, config.fps, 2 if footage.real.shape[-1] <= 256 else 1
    count = min(3, config.samples)
    for name, clips in zip(("before", "after", "shipped"), result.clips.values(), strict=False):
        write_video(out / f"{name}.mp4", torch.cat(list(clips[:count]), dim=2), fps)
    together = side_by_side({caption: clips[:count] for caption, clips in result.clips.items()}, scale=scale)
    for suffix in (".mp4", ".gif", ".webp"):
        write_video(out / f"before-after{suffix}", together, fps)
    rows = {"real": footage.real[0]}
    for i in range(count):
        rows |= {f"{i + 1} {caption}": clips[i] for caption, clips in result.clips.items()}
    columns = min(8, footage.real.shape[2])
    sheet = contact_sheet(rows, out / "contact_sheet.png", num_columns=columns, scale=scale)
    result.adapter.save_pretrained(out / "adapter")
    run.write("metrics.json", {"table": result.table, "seconds": result.seconds})
    rows = {name: {key: "-" if v is None else v for key, v in row.items()} for name, row in result.table.items()}
    report = Report(
        title="From images to video",
        summary=(
            "An image diffusion model samples every frame by itself, so the frames do not belong together. Temporal "
            "layers are inserted behind its layers and trained on clips while the image model stays frozen. All clips "
            "of a row start from the same noise."
        ),
        clips={", ".join(result.clips): together},
        fps=fps,
        pictures={"Frames of each clip, one clip a row": sheet},
        tables=[
            Numbers(
                rows,
                "Frame difference: mean absolute change from frame to frame. Motion agreement: how well the motion "
                "between two frames predicts the next; 0 for frozen clips, about 0 or below for flickering ones. "
                "Frechet distance: between features of clips and of real clips, lower is better; a small one of this "
                "library, not FVD.",
            )
        ],
        losses={"temporal layers": result.losses},
        curves={"Alpha of each layer over the training": alphas_over_training(run.records())},
        alphas=alphas(result.adapter),
        config=dataclasses.asdict(config),
        environment={**versions(), "processor": platform.processor() or platform.machine()},
        command="temporal-layers demo " + " ".join(_changed(config)),
    )
    write_report(out / "report.html", report)


def _changed(config: DemoConfig) -> list[str]:
    default = DemoConfig()
    return [
        f"--{field.name.replace('_', '-')} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    ]


def _show(result: DemoResult, config: DemoConfig, console: Console) -> None:
    columns = list(next(iter(result.table.values())))
    table = Table("clips", *columns)
    for name, row in result.table.items():
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in row.values()))
    console.print(table)
    temporal, spatial = _count(result.adapter, "temporal", "alpha"), _count(result.adapter, "spatial")
    console.print(
        f"{temporal:,} temporal parameters trained, {spatial:,} of the image model frozen, "
        f"{sum(result.seconds.values()):.0f} s in all"
    )
    console.print(f"Look at {config.out / 'before-after.gif'} and {config.out / 'report.html'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the demo; returns the exit code."""
    config = from_words(DemoConfig, arguments, prog="temporal-layers demo", description=__doc__)
    run_demo(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
