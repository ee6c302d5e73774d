"""Stage "image": trains the autoencoder, then the UNet, on single frames; also adapts both to a user's frames.

The video stage starts from what this one leaves behind and keeps it frozen.  Nothing here sees two frames of a clip
together: each frame is drawn from a clip of its own.

    temporal-layers train image --out runs/image
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import DataConfig
from temporal_layers.recipes.driving import LABELS, DrivingConfig, DrivingCorpus
from temporal_layers.recipes.image_ldm import ImageLDM, ImageLDMConfig, build_image_ldm, sample_images
from temporal_layers.recipes.stages.image_objectives import (
    AutoencoderObjective,
    AutoencoderSamples,
    DenoisingObjective,
    DenoisingSamples,
    as_float,
)
from temporal_layers.recipes.stages.stills import read_stills, render_stills
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, fit, make_accelerator
from temporal_layers.recipes.training.streams import SampleStream

HELD_OUT = 1 << 20
"""Clips from this index on are never trained on by the recipes of this repository."""


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Stage "image".

    Attributes:
        out: Folder of the run; ``model/`` in it is what ``ImageLDM.from_pretrained`` loads.
        seed: Seed of the data, the initial weights, the batches and the noise.
        data: Videos that the frames are from.
        labels: Names of the classes, in the order of the labels in the data.
        loader: How videos are decoded.
        num_stills: How many frames to read once and train on.
        model: Sizes of the networks.
        autoencoder: Training of the autoencoder.
        unet: Training of the UNet.
        engine: How the runs are carried out.
        kl_weight: Weight of the autoencoder's KL term (mean over latent elements).
        detail_weight: Weight of the loss on differences of neighbouring pixels, which keeps edges crisp.
        label_drop: Share of labels replaced by the null label, for classifier-free guidance.
        threads: CPU threads of PyTorch; 0 leaves its choice alone.
        train: Which parts to train. ``decoder`` goes on with the decoder alone (settings of ``autoencoder``), which
            leaves the latents, and so a UNet trained on them, as they are.
        start_from: Model folder to go on from instead of untrained weights; ``train="unet"`` needs one.
    """

    out: Path = Path("runs/image")
    seed: int = 0
    data: DataConfig = DataConfig(path="driving")
    labels: tuple[str, ...] = LABELS
    loader: LoaderConfig = LoaderConfig()
    num_stills: int = 8192
    model: ImageLDMConfig = field(default_factory=ImageLDMConfig)
    autoencoder: OptimConfig = OptimConfig(
        steps=1800, batch_size=8, lr=2.5e-3, ema_decay=0.995, checkpoint_every=300, weight_decay=0.0
    )
    unet: OptimConfig = OptimConfig(steps=2600, batch_size=32, lr=2e-3, ema_decay=0.997, checkpoint_every=400)
    engine: EngineConfig = EngineConfig()
    kl_weight: float = 1e-4
    detail_weight: float = 1.0
    label_drop: float = 0.1
    threads: int = 0
    train: Literal["both", "autoencoder", "decoder", "unet"] = "both"
    start_from: Path | None = None

    def __post_init__(self) -> None:
        if self.train in ("unet", "decoder") and self.start_from is None:
            raise ValueError(
                f"ImageConfig: expected start_from, a folder with a trained autoencoder, with train={self.train!r}, "
                "got None; train both parts or name a folder"
            )


def save_grid(
    path: Path | str, frames: Float[Tensor, "frames 3 height width"], *, columns: int, scale: int = 2
) -> None:
    """Write frames in [0, 1] as one PNG, row by row, enlarged by a whole factor; a short last row is left out."""
    frames = frames[: len(frames) // columns * columns]
    grid = rearrange((frames * 255).round().to(torch.uint8), "(r c) rgb h w -> (r h) (c w) rgb", c=columns)
    image = Image.fromarray(grid.numpy())
    image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS).save(path)


@torch.no_grad()
def encode_stills(ldm: ImageLDM, frames: Tensor, *, batch_size: int = 32) -> Float[Tensor, "frames channels h w"]:
    """Scaled latents of stored frames, chunk by chunk, on the CPU."""
    parts = [ldm.encode(as_float(part).to(ldm.device)).cpu() for part in frames.split(batch_size)]
    return torch.cat(parts)


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of frames in [0, 1], from the squared error over all of them."""
    return float(-10 * torch.log10((output - target).square().mean()))


def train_autoencoder(
    ldm: ImageLDM,
    frames: Tensor,
    config: OptimConfig,
    *,
    kl_weight: float = 1e-4,
    detail_weight: float = 1.0,
    seed: int = 0,
    measure_scale: bool = True,
    train_encoder: bool = True,
    run: RunFolder | None = None,
    **engine: Any,
) -> list[float]:
    """Train ``ldm.vae`` in place and measure its scaling factor.

    Args:
        ldm: The model.
        frames: (count, 3, height, width), uint8 or float in [0, 1].
        config: Steps, learning rate and so on.
        kl_weight: Weight of the KL term.
        detail_weight: Weight of the edge loss.
        seed: Seed of the batches.
        measure_scale: Whether to set ``scaling_factor`` to the reciprocal standard deviation of the latents; False
            keeps the latent space of a UNet that is already trained.
        train_encoder: False trains the decoder alone, so that the latents stay what they are.
        run: Folder that gets losses and, at checkpoints, the model and reconstructions.
        **engine: Further arguments of `fit`: accelerator, engine, progress.

    Returns:
        The loss of each step.
    """
    _check_frames("train_autoencoder", ldm, frames)
    height, width = frames.shape[-2:]
    latent_shape = (ldm.latent_shape[0], height // ldm.factor, width // ldm.factor)

    def checkpoint(step: int) -> None:
        if measure_scale:
            measure_scaling_factor(ldm, frames)
        _save_reconstructions(ldm, frames[:6], run, step)

    ldm.vae.requires_grad_(True)
    if not train_encoder:
        ldm.vae.encoder.requires_grad_(False)
        ldm.vae.quant_conv.requires_grad_(False)
    history = fit(
        AutoencoderObjective(ldm.vae, kl_weight=kl_weight, detail_weight=detail_weight),
        SampleStream(AutoencoderSamples(frames, latent_shape=latent_shape, seed=seed)),
        config,
        name="autoencoder",
        seed=seed,
        run=run,
        on_checkpoint=checkpoint,
        **engine,
    )
    checkpoint(config.steps)
    ldm.vae.requires_grad_(False)
    return history


def measure_scaling_factor(ldm: ImageLDM, frames: Tensor, *, count: int = 256) -> None:
    """Set the autoencoder's scaling factor so that the latents of the frames have a standard deviation of 1.

    Args:
        ldm: The model, changed in place.
        frames: (any, 3, height, width), uint8 or float in [0, 1].
        count: About how many of the frames to use, evenly spread.
    """
    ldm.vae.register_to_config(scaling_factor=1.0)
    deviation = encode_stills(ldm, frames[:: max(1, len(frames) // count)]).std().item()
    ldm.vae.register_to_config(scaling_factor=1.0 / deviation)


def train_image_unet(
    ldm: ImageLDM,
    frames: Tensor,
    labels: Tensor,
    config: OptimConfig,
    *,
    label_drop: float = 0.1,
    seed: int = 0,
    run: RunFolder | None = None,
    **engine: Any,
) -> list[float]:
    """Train ``ldm.unet`` and ``ldm.conditioner`` in place on latents that are computed once.

    Args:
        ldm: The model, its autoencoder trained.
        frames: (count, 3, height, width), uint8 or float in [0, 1].
        labels: (count,), int64, up to and including the null label.
        config: Steps, learning rate and so on.
        label_drop: Share of labels replaced by the null label.
        seed: Seed of the batches.
        run: Folder that gets losses and, at checkpoints, the model and samples.
        **engine: Further arguments of `fit`: accelerator, engine, progress.

    Returns:
        The loss of each step.
    """
    _check_frames("train_image_unet", ldm, frames)
    if len(labels) != len(frames):
        raise ValueError(
            f"train_image_unet: expected one label per frame, got {len(labels)} labels for {len(frames)} frames"
        )
    latents = encode_stills(ldm, frames)

    ldm.unet.requires_grad_(True)
    ldm.conditioner.requires_grad_(True)
    samples = DenoisingSamples(
        latents,
        labels,
        null_label=ldm.conditioner.null_label,
        label_drop=label_drop,
        num_timesteps=ldm.scheduler.config.num_train_timesteps,
        seed=seed,
    )
    history = fit(
        DenoisingObjective(ldm),
        SampleStream(samples),
        config,
        name="unet",
        seed=seed,
        run=run,
        on_checkpoint=lambda step: _save_samples(ldm, run, step),
        **engine,
    )
    _save_samples(ldm, run, config.steps)
    ldm.unet.requires_grad_(False)
    ldm.conditioner.requires_grad_(False)
    return history


def _save_reconstructions(ldm: ImageLDM, frames: Tensor, run: RunFolder | None, step: int) -> None:
    if run is None:
        return
    target = as_float(frames)
    output = ldm.decode(encode_stills(ldm, frames).to(ldm.device)).cpu()
    save_grid(run.path / f"reconstructions-{step:05d}.png", torch.cat([target, output]), columns=len(frames))
    run.log(stage="autoencoder", finished=step, psnr_training_frames=psnr(output, target))
    ldm.save_pretrained(run.path / "model")


def _save_samples(ldm: ImageLDM, run: RunFolder | None, step: int) -> None:
    if run is None:
        return
    shown = torch.arange(24) % len(ldm.labels)
    images = sample_images(ldm, shown, generator=torch.Generator().manual_seed(7)).cpu()
    save_grid(run.path / f"samples-{step:05d}.png", images, columns=6)
    ldm.save_pretrained(run.path / "model")


def finetune_frames(
    ldm: ImageLDM,
    frames: Tensor,
    *,
    labels: Tensor | None = None,
    autoencoder: OptimConfig | None = None,
    unet: OptimConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Adapt a trained image LDM to other frames, in place: the paper's brief image fine-tune (section 4.2).

    The latent scale is kept, so the UNet starts from what it knows; ``frame_size`` becomes that of the frames.

    Args:
        ldm: A trained model.
        frames: (count, 3, height, width), uint8 or float in [0, 1]; sides in multiples of ``ldm.factor``.
        labels: (count,) int64; all null labels if None.
        autoencoder: Training of the autoencoder; 300 steps if None.
        unet: Training of the UNet; 600 steps if None.
        seed: Seed of the batches.
        progress: Whether to show progress bars.
    """
    autoencoder = autoencoder or OptimConfig(steps=300, batch_size=4, lr=5e-4, ema_decay=0.98, weight_decay=0.0)
    unet = unet or OptimConfig(steps=600, batch_size=16, lr=5e-4, ema_decay=0.99)
    if labels is None:
        labels = torch.full((len(frames),), ldm.conditioner.null_label)
    train_autoencoder(ldm, frames, autoencoder, seed=seed, measure_scale=False, progress=progress)
    train_image_unet(ldm, frames, labels, unet, seed=seed, progress=progress)
    ldm.frame_size = (frames.shape[2], frames.shape[3])


def _check_frames(who: str, ldm: ImageLDM, frames: Tensor) -> None:
    if frames.ndim != 4 or frames.shape[1] != 3 or any(side % ldm.factor for side in frames.shape[2:]):
        raise ValueError(
            f"{who}: expected frames (count, 3, height, width) with sides in multiples of {ldm.factor}, got "
            f"{tuple(frames.shape)}; crop or resize them first"
        )
    if len(frames) == 0:
        raise ValueError(f"{who}: expected at least one frame, got none")


def _stills(config: ImageConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Frames as bytes, their labels, and frames to measure with, in [0, 1]."""
    size, count = (config.model.height, config.model.width), config.num_stills
    if config.data.path == "driving":
        corpus = DrivingCorpus(DrivingConfig(height=size[0], width=size[1]), seed=config.seed)
        return *render_stills(corpus, count), as_float(render_stills(corpus, 64, first=HELD_OUT)[0])
    frames, labels = read_stills(config.data, count + 64, size, loader=config.loader, seed=config.seed)
    highest = int(labels.max())
    if highest >= len(config.labels):
        raise ValueError(
            f"ImageConfig: labels: expected a name for each of the labels 0 to {highest} of the data, got "
            f"{len(config.labels)} names"
        )
    return frames[:count], labels[:count], as_float(frames[count:])


def run_image_stage(config: ImageConfig) -> ImageLDM:
    """Run the whole stage and write the model, losses, samples and what it took to ``config.out``."""
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(config.engine, config.out)
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    clock = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(part: str) -> None:
        seconds[part] = round(time.perf_counter() - clock - sum(seconds.values()), 1)

    accelerator.print(f"reading {config.num_stills} frames")
    frames, labels, held_out = _stills(config)
    lap("read")
    if config.start_from is None:
        ldm = build_image_ldm(config.model, config.labels, seed=config.seed)
    else:
        ldm = ImageLDM.from_pretrained(config.start_from)
    ldm.to(accelerator.device)
    engine = {"seed": config.seed, "accelerator": accelerator, "engine": config.engine, "run": run}
    if config.train != "unet":
        weights = {"kl_weight": config.kl_weight, "detail_weight": config.detail_weight}
        whole = config.train != "decoder"
        train_autoencoder(
            ldm, frames, config.autoencoder, measure_scale=whole, train_encoder=whole, **weights, **engine
        )
    quality = psnr(ldm.decode(ldm.encode(held_out.to(ldm.device))).cpu(), held_out)
    accelerator.print(f"held-out reconstruction {quality:.2f} dB")
    lap("autoencoder")
    if config.train in ("both", "unet"):
        train_image_unet(ldm, frames, labels, config.unet, label_drop=config.label_drop, **engine)
        lap("unet")
    if run is not None:
        ldm.save_pretrained(run.path / "model")
        run.write("result.json", {"psnr_held_out": quality, "seconds": seconds})
    return ldm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage from the command line; words of the process if ``arguments`` is None."""
    run_image_stage(parse(ImageConfig, arguments, prog="temporal-layers train image", description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
