"""Stage "upscale": makes an upscaler for images one for clips (Video LDM, section 3.4).

Temporal layers are injected as in stage "video" and trained on patches alone, since both resolutions are there at
every place; what is upscaled later are whole frames. The low-resolution frames of a clip get noise of one level.
With --train image the stage trains the upscaler for images itself.

    python -m temporal_layers.recipes.stages.upscale --out runs/upscale
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from temporal_layers.adapters import TemporalAdapter, TemporalConfig
from temporal_layers.recipes.bases import Conditioning
from temporal_layers.recipes.driving import DrivingConfig, DrivingCorpus
from temporal_layers.recipes.metrics import clip_frechet, frame_difference
from temporal_layers.recipes.stages.image import HELD_OUT, psnr, render_stills
from temporal_layers.recipes.stages.image_objectives import as_float
from temporal_layers.recipes.stages.upscale_patches import UpscaleObjective, UpscaleSamples, shrunk
from temporal_layers.recipes.stages.video import DRIVING_FPS, Trained, driving_clips, trainable_adapter
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import OptimConfig, RunFolder, fit
from temporal_layers.recipes.training.streams import SampleStream
from temporal_layers.recipes.upscaler import Upscaler, UpscalerConfig, build_upscaler, load_shipped_upscaler
from temporal_layers.recipes.upscaling import upscale_clips

DEFAULT_OPTIM = OptimConfig(steps=400, batch_size=2, lr=2e-3, warmup=0.1, weight_decay=0.0, ema_decay=0.98)
DEFAULT_IMAGE_OPTIM = OptimConfig(steps=3000, batch_size=16, lr=2e-3, warmup=0.1, weight_decay=0.0, ema_decay=0.997)


@dataclass(frozen=True, kw_only=True)
class UpscaleConfig:
    """Stage "upscale" on the generated corpus, from 16 x 24 pixels to 64 x 96.

    Attributes:
        out: Folder of the run: ``adapter/`` in it is what ``TemporalAdapter.from_pretrained`` loads, ``model/`` what
            ``Upscaler.from_pretrained`` loads, as far as they were trained.
        seed: Seed of the data, the initial weights, the patches and the noise.
        train: ``temporal`` layers alone, as the paper does, or ``all`` parameters of the UNet on clips; or the UNet
            without temporal layers on single frames (``image``).
        start_from: Folder of an upscaler; None for the shipped one, or with ``train="image"`` an untrained one.
        model: Sizes of an untrained one.
        num_clips: Clips to render once.
        num_frames: Frames of a training window.
        spare_frames: Frames rendered beyond that, from which the window is drawn.
        num_stills: Frames to render once with ``train="image"``.
        patch: Height and width of the training patches in pixels of the result.
        optim: Training on clips.
        image_optim: Training on single frames.
        fps: Frames per second of the clips.
        held_out_clips: Clips of 16 frames to measure the result on; 0 for none.
    """

    out: Path = Path("runs/upscale")
    seed: int = 0
    train: Literal["temporal", "all", "image"] = "temporal"
    start_from: Path | None = None
    model: UpscalerConfig = UpscalerConfig()
    num_clips: int = 128
    num_frames: int = 8
    spare_frames: int = 8
    num_stills: int = 4096
    patch: int = 32
    optim: OptimConfig = DEFAULT_OPTIM
    image_optim: OptimConfig = DEFAULT_IMAGE_OPTIM
    fps: float = DRIVING_FPS
    held_out_clips: int = 8

    def __post_init__(self) -> None:
        if self.held_out_clips != 0 and self.held_out_clips < 6:
            raise ValueError(
                f"UpscaleConfig: held_out_clips: expected 0 or at least 6, got {self.held_out_clips}; the Frechet "
                "distance needs more windows than it has features"
            )


def train_upscaler(
    upscaler: Upscaler,
    clips: Tensor,
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
        clips: (clips, 3, frames, height, width) at the resolution of the result, in [0, 1] or bytes.
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
    _check_clips("train_upscaler", upscaler, clips, low_res, num_frames, patch)
    adapter = trainable_adapter(upscaler.unet, temporal, train, seed=seed)
    history = _fit(
        upscaler,
        UpscaleSamples(
            upscaler,
            clips,
            low_res,
            upscaler.conditioning([""] * len(clips)) if conditioning is None else conditioning,
            upscaler.conditioning([""]),
            num_frames=num_frames,
            patch=patch,
            drop=label_drop,
            seed=seed,
        ),
        config,
        name="temporal layers",
        seed=seed,
        groups=adapter.parameter_groups(
            lr=config.lr, spatial_lr=config.lr if train == "all" else None, weight_decay=config.weight_decay
        ),
        on_checkpoint=None if on_checkpoint is None else functools.partial(on_checkpoint, adapter),
        **engine,
    )
    return adapter, history


def train_image_upscaler(
    upscaler: Upscaler,
    frames: Tensor,
    config: OptimConfig = DEFAULT_IMAGE_OPTIM,
    *,
    patch: int | None,
    conditioning: Conditioning | None = None,
    label_drop: float = 0.1,
    seed: int = 0,
    **engine: Any,
) -> list[float]:
    """Train ``upscaler.unet``, without temporal layers, on patches of single frames, in place.

    Args:
        upscaler: In pixels or in latents.
        frames: (count, 3, height, width) at the resolution of the result, in [0, 1] or bytes.
        config: Steps, learning rate and so on.
        patch: Height and width of a patch in pixels of the result; None for whole frames.
        conditioning: One row a frame; what says nothing if None.
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
    clips = frames.unsqueeze(2)
    _check_clips("train_image_upscaler", upscaler, clips, None, 1, patch)
    upscaler.unet.train().requires_grad_(True)
    samples = UpscaleSamples(
        upscaler,
        clips,
        None,
        upscaler.conditioning([""] * len(clips)) if conditioning is None else conditioning,
        upscaler.conditioning([""]),
        num_frames=1,
        patch=patch,
        drop=label_drop,
        seed=seed,
    )
    history = _fit(upscaler, samples, config, name="upscaler", seed=seed, **engine)
    upscaler.unet.requires_grad_(False)
    return history


def _fit(upscaler: Upscaler, samples: UpscaleSamples, config: OptimConfig, **engine: Any) -> list[float]:
    objective = UpscaleObjective(upscaler, list(samples.conditioning))
    history = fit(objective, SampleStream(samples), config, **engine)
    upscaler.unet.eval()
    return history


def _check_clips(
    who: str, upscaler: Upscaler, clips: Tensor, low_res: Tensor | None, num_frames: int, patch: int | None
) -> None:
    factor = upscaler.factor
    if clips.ndim != 5 or len(clips) == 0 or clips.shape[1] != 3 or clips.shape[2] < num_frames:
        raise ValueError(
            f"{who}: clips: expected (clips, 3, frames, height, width) with at least one clip of at least "
            f"num_frames={num_frames} frames, got {tuple(clips.shape)}"
        )
    height, width = clips.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"{who}: clips: expected height and width in multiples of the factor {factor}, got {height} x {width}; "
            "crop them"
        )
    if patch is not None and (patch % factor or not factor <= patch <= min(height, width)):
        raise ValueError(
            f"{who}: patch: expected a multiple of {factor} that fits into frames of {height} x {width}, got {patch}"
        )
    expected = (*clips.shape[:3], height // factor, width // factor)
    if low_res is not None and tuple(low_res.shape) != expected:
        raise ValueError(f"{who}: low_res: expected shape {expected} beside the clips, got {tuple(low_res.shape)}")


def measure_upscaler(
    upscaler: Upscaler, clips: Float[Tensor, "clips 3 frames height width"], **sampling: Any
) -> dict[str, dict[str, float]]:
    """Compare upscaled clips with what they were made from, frame by frame, with temporal layers, and bilinear.

    Args:
        upscaler: With temporal layers; without, there is no row ``video``.
        clips: In [0, 1], at least six of 16 frames.
        **sampling: Further arguments of `upscale_clips`.

    Returns:
        By name of the upscaling (``bilinear``, ``frame-wise``, ``video``): ``clip_frechet`` against the real clips, the
        ``flicker`` (mean absolute error of the changes from frame to frame), the ``frame_difference`` and the ``psnr``.
    """
    low_res, (height, width) = shrunk(clips, upscaler.factor), clips.shape[-2:]
    bilinear = F.interpolate(low_res.flatten(0, 1), (height, width), mode="bilinear")
    upscaled = {
        "bilinear": bilinear.unflatten(0, clips.shape[:2]),
        "frame-wise": upscale_clips(upscaler, low_res, frame_by_frame=True, **sampling),
    }
    if getattr(upscaler.unet, "_temporal_state", None) is not None:
        upscaled["video"] = upscale_clips(upscaler, low_res, **sampling)
    return {
        name: {
            "clip_frechet": clip_frechet(made, clips),
            "flicker": (made.diff(dim=2) - clips.diff(dim=2)).abs().mean().item(),
            "frame_difference": frame_difference(made),
            "psnr": psnr(made, clips),
        }
        for name, made in upscaled.items()
    }


def run_upscale_stage(config: UpscaleConfig) -> Upscaler:
    """Run the whole stage and write what was trained, losses, configuration and measurements to ``config.out``."""
    accelerator = Accelerator()
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    started = time.perf_counter()
    if config.start_from is not None:
        upscaler = Upscaler.from_pretrained(config.start_from)
    elif config.train == "image":
        upscaler = build_upscaler(config.model, seed=config.seed)
    else:
        upscaler = load_shipped_upscaler()
    given = {"patch": config.patch, "seed": config.seed, "accelerator": accelerator, "run": run}
    size, adapter = (64, 96), None
    if config.train == "image":
        frames, _ = render_stills(DrivingCorpus(DrivingConfig(), seed=config.seed), config.num_stills)
        upscaler.to(accelerator.device)
        history = train_image_upscaler(upscaler, frames, config.image_optim, **given)
    else:
        length = config.num_frames + config.spare_frames
        made = driving_clips(size, config.num_clips, length, fps=config.fps, seed=config.seed)
        clips = torch.stack([(clip.frames * 255).round().to(torch.uint8) for clip in made])
        upscaler.to(accelerator.device)
        options = {"num_frames": config.num_frames, "train": config.train, **given}
        adapter, history = train_upscaler(upscaler, clips, None, config.optim, **options)
    seconds = time.perf_counter() - started
    if run is not None:
        if adapter is not None:
            adapter.save_pretrained(config.out / "adapter")
        if config.train != "temporal":
            upscaler.save_pretrained(config.out / "model")
        tail = history[-max(1, len(history) // 10) :]
        result: dict[str, Any] = {"seconds": seconds, "loss": sum(tail) / len(tail)}
        if config.held_out_clips:
            held_out = driving_clips(size, config.held_out_clips, 16, fps=config.fps, first=HELD_OUT, seed=config.seed)
            result["held_out"] = measure_upscaler(
                upscaler, as_float(torch.stack([clip.frames for clip in held_out])), window=config.num_frames
            )
        run.write("result.json", result)
    return upscaler


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    run_upscale_stage(parse(UpscaleConfig, arguments, prog="temporal-layers train upscale", description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
