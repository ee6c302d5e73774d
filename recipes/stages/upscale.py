"""Stage "upscale": makes an upscaler for images one for clips (Video LDM, section 3.4).

Temporal layers are injected as in stage "video" and trained on patches alone, since every place has both
resolutions; what is upscaled later are whole frames. The low-resolution frames of a clip get noise of one level.
With --train image the stage trains the upscaler for images itself.

    temporal-layers train upscale --out runs/upscale
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from temporal_layers.adapters import TemporalAdapter, TemporalConfig
from temporal_layers.recipes.bases import Conditioning
from temporal_layers.recipes.data.decoding import make_decoder
from temporal_layers.recipes.data.loader import BadVideos, ClipBatch, LoaderConfig, open_stream
from temporal_layers.recipes.data.sampling import Bucket, SamplingConfig
from temporal_layers.recipes.data.sources import DataConfig, make_source
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.stages.clips import DRIVING
from temporal_layers.recipes.stages.image import HELD_OUT
from temporal_layers.recipes.stages.image_objectives import as_float
from temporal_layers.recipes.stages.temporal import (
    Trained,
    fit_adapter,
    layers_in_file,
    save_trained,
    trainable_adapter,
)
from temporal_layers.recipes.stages.upscale_metrics import measure_upscaler
from temporal_layers.recipes.stages.upscale_patches import UpscaleObjective, UpscaleSamples
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, fit, make_accelerator
from temporal_layers.recipes.training.streams import Batch, SampleStream, Stream
from temporal_layers.recipes.upscaler import Upscaler, UpscalerConfig, build_upscaler, load_upscaler

DEFAULT_OPTIM = OptimConfig(steps=300, batch_size=2, lr=3e-3, warmup=0.1, weight_decay=0.0, ema_decay=0.98)


@dataclass(frozen=True, kw_only=True)
class UpscaleConfig:
    """Stage "upscale"; by default on the generated corpus, from 16 x 24 pixels to 64 x 96.

    Attributes:
        out: Folder of the run: ``adapter/`` in it is what ``TemporalAdapter.from_pretrained`` loads; ``model/`` what
            ``Upscaler.from_pretrained`` loads, with ``train="image"``; ``unet/`` the UNet, where all of it was trained.
        seed: Seed of the data, the initial weights, the patches and the noise.
        train: ``temporal`` layers alone, as the paper does, or ``all`` parameters of the UNet, on clips; or the UNet
            without temporal layers on single frames (``image``).
        model: Upscaler for images to start from: a folder, or a pipeline of diffusers, see `load_upscaler`; empty for
            the shipped one; ``new`` for an untrained one.
        new: Sizes of an untrained one.
        latents: Of an untrained one: whether it works in latents of the shipped image model's autoencoder, as Stable
            Diffusion's upscaler does in those of its own, or in pixels.
        temporal: File of a ``TemporalConfig`` (.yaml, .toml or .json) that says what to inject; the paper's layout if
            None.
        start_from: Folder of an adapter to go on from, in place of fresh layers.
        data: The videos.
        size: Height and width that they are brought to.
        fps: Rate of the clips; None keeps that of the videos.
        stride: Or: every ``stride``-th frame.
        num_frames: Frames of a training window; 1 with ``train="image"``, whatever is said here.
        spare_frames: Frames in memory beyond that, from which the window is drawn.
        streamed: Decode videos as they are needed, in place of holding a clip of each in memory.
        loader: How videos are decoded.
        patch: Height and width of the training patches in pixels of the result; 0 for whole frames.
        optim: Training.
        engine: How the run is carried out.
        label_drop: Share of clips trained without their caption, for classifier-free guidance.
        held_out: Clips of 16 frames, of the generated corpus, to measure the result on; 0 for none.
        sampling_steps: Denoising steps for that.
    """

    out: Path = Path("runs/upscale")
    seed: int = 0
    train: Literal["temporal", "all", "image"] = "temporal"
    model: str = ""
    new: UpscalerConfig = UpscalerConfig()
    latents: bool = False
    temporal: Path | None = None
    start_from: Path | None = None
    data: DataConfig = DRIVING
    size: tuple[int, int] = (64, 96)
    fps: float | None = None
    stride: int = 1
    num_frames: int = 8
    spare_frames: int = 8
    streamed: bool = False
    loader: LoaderConfig = LoaderConfig()
    patch: int = 32
    optim: OptimConfig = DEFAULT_OPTIM
    engine: EngineConfig = EngineConfig()
    label_drop: float = 0.1
    held_out: int = 0
    sampling_steps: int = 10

    def __post_init__(self) -> None:
        if min(self.num_frames, *self.size) < 1 or min(self.spare_frames, self.patch) < 0:
            raise ValueError(
                "UpscaleConfig: expected num_frames and size of at least 1, spare_frames and patch of at least 0, got "
                f"num_frames={self.num_frames}, size={self.size}, spare_frames={self.spare_frames}, patch={self.patch}"
            )
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"UpscaleConfig: label_drop: expected a value from 0 to 1, got {self.label_drop}")
        if self.latents and self.model != "new":
            raise ValueError(
                f"UpscaleConfig: latents: expected False with model={self.model!r}, which says what it works in, got "
                "True; it belongs to model='new'"
            )
        if self.train == "image" and (self.temporal is not None or self.start_from is not None):
            raise ValueError(
                "UpscaleConfig: expected neither temporal nor start_from with train='image', which knows no clips; "
                "train the upscaler for images first, then the temporal layers with model=.../model"
            )
        if self.temporal is not None and self.start_from is not None:
            raise ValueError("UpscaleConfig: expected temporal or start_from, whose layers say what they are, got both")
        if self.held_out != 0 and (self.held_out < 6 or self.data.path != "driving"):
            raise ValueError(
                f"UpscaleConfig: held_out: expected 0, or 6 or more with data.path='driving', got {self.held_out} with "
                f"{self.data.path!r}; the Frechet distance needs more windows than it has features, and measure other "
                "data with measure_upscaler"
            )
        if self.engine.validate_every and not self.held_out:
            raise ValueError(
                "UpscaleConfig: engine.validate_every: expected 0 without held_out clips, got "
                f"{self.engine.validate_every}; say how many with held_out"
            )


def train_upscaler(
    upscaler: Upscaler,
    clips: Tensor | Stream,
    conditioning: Conditioning | None = None,
    config: OptimConfig = DEFAULT_OPTIM,
    *,
    num_frames: int,
    patch: int | None,
    low_res: Tensor | None = None,
    temporal: TemporalConfig | None = None,
    train: Trained = "temporal",
    label_drop: float = 0.1,
    seed: int = 0,
    on_checkpoint: Callable[[TemporalAdapter, int], None] | None = None,
    **engine: Any,
) -> tuple[TemporalAdapter, list[float]]:
    """Train temporal layers in ``upscaler.unet``, which are injected unless they are there, on patches of clips.

    Args:
        upscaler: For images, in pixels or in latents.
        clips: (clips, 3, frames, height, width) at the resolution of the result, in [0, 1] or bytes; or a stream of
            what `UpscaleSamples` makes, which then has had the options of samples that follow.
        conditioning: One row a clip, of ``upscaler.conditioning``; what says nothing if None.
        config: Steps, learning rate and so on.
        num_frames: Frames of a training window.
        patch: Height and width of a patch in pixels of the result; None for whole frames.
        low_res: The same clips at the low resolution; the mean over areas if None.
        temporal: What to inject; the paper's layout if None.
        train: ``temporal`` layers alone, as the paper does, or ``all`` parameters of the UNet.
        label_drop: Share of clips trained without conditioning, for classifier-free guidance.
        seed: Seed of the initial weights and the patches.
        on_checkpoint: Called every ``config.checkpoint_every`` steps with the adapter, averaged weights in place, and
            the number of finished steps.
        **engine: Further arguments of `fit`: accelerator, run, engine, progress, validate.

    Returns:
        The adapter, UNet included, and the loss of each step.

    Raises:
        ValueError: If the clips, ``low_res`` or ``patch`` do not fit together, or ``temporal`` is given for a UNet that
            has temporal layers.
    """
    if isinstance(clips, Tensor):
        _check_clips("train_upscaler", upscaler, clips, low_res, num_frames, patch)
        options = {"num_frames": num_frames, "patch": patch, "drop": label_drop, "seed": seed}
        clips = SampleStream(UpscaleSamples(upscaler, clips, low_res, conditioning, **options))
    adapter = trainable_adapter(upscaler.unet, temporal, train, seed=seed)
    objective = UpscaleObjective(upscaler, list(upscaler.conditioning([""])))
    return fit_adapter(adapter, objective, clips, config, train=train, seed=seed, on_checkpoint=on_checkpoint, **engine)


def train_image_upscaler(
    upscaler: Upscaler,
    frames: Tensor | Stream,
    conditioning: Conditioning | None = None,
    config: OptimConfig = DEFAULT_OPTIM,
    *,
    patch: int | None,
    label_drop: float = 0.1,
    seed: int = 0,
    **engine: Any,
) -> list[float]:
    """Train ``upscaler.unet``, without temporal layers, on patches of single frames, in place.

    Args:
        upscaler: In pixels or in latents.
        frames: (count, 3, height, width) at the resolution of the result, in [0, 1] or bytes; or a stream of what
            `UpscaleSamples` makes of clips of one frame.
        conditioning: One row a frame; what says nothing if None.
        config: Steps, learning rate and so on.
        patch: Height and width of a patch in pixels of the result; None for whole frames.
        label_drop: Share of frames trained without conditioning.
        seed: Seed of the patches.
        **engine: Further arguments of `fit`.

    Returns:
        The loss of each step.

    Raises:
        ValueError: If frames and ``patch`` do not fit together, or the UNet has temporal layers.
    """
    if getattr(upscaler.unet, "_temporal_state", None) is not None:
        raise ValueError(
            "train_image_upscaler: expected a UNet without temporal layers, got one with; remove() them, or train all "
            "by train_upscaler(..., train='all')"
        )
    if isinstance(frames, Tensor):
        clips = frames.unsqueeze(2)
        _check_clips("train_image_upscaler", upscaler, clips, None, 1, patch)
        options = {"num_frames": 1, "patch": patch, "drop": label_drop, "seed": seed}
        frames = SampleStream(UpscaleSamples(upscaler, clips, None, conditioning, **options))
    upscaler.unet.train().requires_grad_(True)
    objective = UpscaleObjective(upscaler, list(upscaler.conditioning([""])))
    history = fit(objective, frames, config, name="upscaler", seed=seed, **engine)
    upscaler.unet.eval().requires_grad_(False)
    return history


def _check_clips(
    who: str, upscaler: Upscaler, clips: Tensor, low_res: Tensor | None, num_frames: int, patch: int | None
) -> None:
    if clips.ndim != 5 or len(clips) == 0 or clips.shape[1] != 3 or clips.shape[2] < num_frames:
        raise ValueError(
            f"{who}: clips: expected (clips, 3, frames, height, width) with at least one clip of at least "
            f"num_frames={num_frames} frames, got {tuple(clips.shape)}"
        )
    check_sizes(who, upscaler, clips.shape[-2:], patch)
    height, width = (side // upscaler.factor for side in clips.shape[-2:])
    expected = (*clips.shape[:3], height, width)
    if low_res is not None and tuple(low_res.shape) != expected:
        raise ValueError(f"{who}: low_res: expected shape {expected} beside the clips, got {tuple(low_res.shape)}")


def check_sizes(who: str, upscaler: Upscaler, size: Sequence[int], patch: int | None) -> None:
    """Raise a ValueError unless frames of a size ``(height, width)`` can be shrunk, and patches cut from them."""
    factor, (height, width) = upscaler.factor, size
    if height % factor or width % factor:
        raise ValueError(
            f"{who}: expected frames with height and width in multiples of the factor {factor}, got {height} x "
            f"{width}; crop them"
        )
    if patch is not None and (patch % factor or not factor <= patch <= min(height, width)):
        raise ValueError(
            f"{who}: patch: expected a multiple of {factor} that fits into frames of {height} x {width}, got {patch}"
        )


def read_clips(
    data: DataConfig, sampling: SamplingConfig, loader: LoaderConfig, *, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """One window of every video, in memory, and its caption; what cannot be read is reported and left out.

    Returns:
        Bytes (clips, 3, frames, height, width), and captions.

    Raises:
        ValueError: If too many videos cannot be read.
    """
    source, decoder = make_source(data), make_decoder(loader.decoder)
    bad = BadVideos(len(source), loader.max_bad_share)
    clips, captions = [], []
    for index in range(len(source)):
        item = source[index]
        try:
            clips.append(decoder.window(item.file, sampling.window(sampling.buckets[0], seed, index))[0])
            captions.append(item.caption)
            bad.add(index)
        except ValueError as error:
            bad.add(index, item.file.name, str(error), in_training=False)
    bad.check()
    if bad.reasons:
        print(bad)
    return torch.stack(clips), captions


def _upscaler(config: UpscaleConfig) -> Upscaler:
    if config.model != "new":
        return load_upscaler(config.model)
    return build_upscaler(config.new, load_shipped().vae if config.latents else None, seed=config.seed)


def _samples(upscaler: Upscaler, config: UpscaleConfig) -> Stream:
    """The stream of a run, of videos in memory or decoded as they are needed."""
    still, patch = config.train == "image", config.patch or None
    check_sizes("UpscaleConfig", upscaler, config.size, patch)
    num_frames = 1 if still else config.num_frames
    held = num_frames if still or config.streamed else num_frames + config.spare_frames
    sampling = SamplingConfig(buckets=(Bucket(held, *config.size),), fps=config.fps, stride=config.stride)
    options = {"num_frames": num_frames, "patch": patch, "drop": config.label_drop, "seed": config.seed}
    if not config.streamed:
        clips, captions = read_clips(config.data, sampling, config.loader, seed=config.seed)
        return SampleStream(UpscaleSamples(upscaler, clips, None, upscaler.conditioning(captions), **options))
    samples = UpscaleSamples(upscaler, None, **options)

    def prepare(batch: ClipBatch) -> Batch:
        return samples.complete_batch(batch.frames, upscaler.conditioning(batch.captions), batch.positions)

    return open_stream(config.data, sampling, config.loader, seed=config.seed, prepare=prepare)


def _held_out(config: UpscaleConfig) -> Tensor:
    data = dataclasses.replace(config.data, first=HELD_OUT, clips=config.held_out, clip_frames=16)
    sampling = SamplingConfig(buckets=(Bucket(16, *config.size),), fps=config.fps, stride=config.stride)
    return as_float(read_clips(data, sampling, config.loader)[0])


def run_upscale_stage(config: UpscaleConfig) -> Upscaler:
    """Run the whole stage and write what was trained, losses, configuration and measurements to ``config.out``."""
    accelerator = make_accelerator(config.engine, config.out)
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    started = time.perf_counter()
    upscaler = _upscaler(config).to(accelerator.device)
    temporal = layers_in_file(config.temporal, upscaler.unet)
    if config.start_from is not None:
        TemporalAdapter.from_pretrained(upscaler.unet, config.start_from)
    stream = _samples(upscaler, config)
    held_out = _held_out(config) if config.held_out else None

    def measure(step: int = 0) -> dict[str, float]:
        training = upscaler.unet.training
        upscaler.unet.eval()
        options = {"window": config.num_frames, "num_inference_steps": config.sampling_steps}
        numbers = measure_upscaler(upscaler, held_out, **options)
        upscaler.unet.train(training)
        return {f"{name} {metric}": value for name, row in numbers.items() for metric, value in row.items()}

    given = {
        "seed": config.seed,
        "patch": config.patch or None,
        "accelerator": accelerator,
        "engine": config.engine,
        "run": run,
        "validate": measure,
    }
    if config.train == "image":
        history = train_image_upscaler(upscaler, stream, None, config.optim, **given)
        if run is not None:
            _save_image(upscaler, config.out)
    else:
        options = {"num_frames": config.num_frames, "temporal": temporal, "train": config.train, **given}
        adapter, history = train_upscaler(upscaler, stream, None, config.optim, **options)
        if run is not None:
            save_trained(adapter, config.out, train=config.train)
    if run is not None:
        run.finish(history, started=started, **({} if held_out is None else {"held_out": measure()}))
    return upscaler


def _save_image(upscaler: Upscaler, out: Path) -> None:
    if upscaler.conditioner is None:
        upscaler.save_pretrained(out / "model")
    else:  # the rest of the pipeline is where it was
        upscaler.unet.save_pretrained(out / "unet")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    run_upscale_stage(parse(UpscaleConfig, arguments, prog="temporal-layers train upscale", description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
