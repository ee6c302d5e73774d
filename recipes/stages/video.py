"""Stage "video": temporal alignment. Trains the injected temporal layers and nothing else (Video LDM, section 3.1).

Each clip gets one noise level and independent noise per frame; the loss is the image model's own, so its noise
schedule and its kind of prediction stay as they are. Latents are computed once.

    python -m temporal_layers.recipes.stages.video --out runs/video
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.adapters import TemporalAdapter, TemporalConfig, inject
from temporal_layers.recipes.bases import Conditioning, LabelBase, VideoBase
from temporal_layers.recipes.driving import DrivingClip, DrivingConfig, DrivingCorpus
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.training.engine import Batch, OptimConfig, RunFolder, fit

DRIVING_FPS = 10.0
"""Rate of the driving clips in the video stages: a whole number of hundredths of a second a frame, as GIF needs."""

SHIPPED_ADAPTER = Path(__file__).parents[1] / "weights" / "driving_video"

DEFAULT_OPTIM = OptimConfig(steps=400, batch_size=2, lr=3e-3, warmup=0.1, weight_decay=0.0, ema_decay=0.98)


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Stage "video" on the generated corpus.

    Attributes:
        out: Folder of the run; ``adapter/`` in it is what ``TemporalAdapter.from_pretrained`` loads.
        seed: Seed of the data, the initial weights, the batches and the noise.
        num_clips: Clips to render and encode once.
        num_frames: Frames of a training window.
        spare_frames: Frames rendered beyond that, from which the window is drawn.
        optim: Training of the temporal layers.
        label_drop: Share of clips trained without conditioning, for classifier-free guidance.
        fps: Frames per second of the clips.
    """

    out: Path = Path("runs/video")
    seed: int = 0
    num_clips: int = 256
    num_frames: int = 16
    spare_frames: int = 8
    optim: OptimConfig = DEFAULT_OPTIM
    label_drop: float = 0.1
    fps: float = DRIVING_FPS


class VideoObjective(nn.Module):
    """The image model's denoising loss on clips.

    Args:
        base: The image model, temporal layers injected.
        names: Names of the conditioning tensors, in the order in which ``forward`` gets them.
    """

    def __init__(self, base: VideoBase, names: Sequence[str]) -> None:
        super().__init__()
        self.unet = base.unet  # registered, so that its trainable parameters are found
        self.base = [base]  # not registered
        self.names = tuple(names)

    def forward(
        self,
        latents: Float[Tensor, "batch channels frames height width"],
        noise: Float[Tensor, "batch channels frames height width"],
        timesteps: Tensor,
        *conditioning: Tensor,
    ) -> dict[str, Tensor]:
        """Squared error of the prediction, averaged over everything."""
        base = self.base[0]
        noisy = base.scheduler.add_noise(latents, noise, timesteps)
        output = base.predict(noisy, timesteps, dict(zip(self.names, conditioning, strict=True)))
        return {"loss": F.mse_loss(output.float(), denoising_target(base.scheduler, latents, noise, timesteps).float())}


def denoising_target(scheduler: object, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is asked for: noise, velocity or the clean latents, as the scheduler's configuration says.

    Raises:
        ValueError: If the kind of prediction is unknown.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise ValueError(f"denoising_target: expected prediction_type epsilon, v_prediction or sample, got {kind!r}")


def clip_noise(
    shape: Sequence[int], *, correlation: float = 0.0, generator: torch.Generator | None = None
) -> Float[Tensor, "batch channels frames height width"]:
    """Standard normal noise whose frames share a part: "mixed" noise (PYoCo, Ge et al. 2023, section 4).

    Args:
        shape: ``(batch, channels, frames, height, width)``.
        correlation: Correlation between the frames of a clip, from 0 (independent, as in the Video LDM) to 1 (equal).
        generator: Source of the noise.

    Raises:
        ValueError: If the correlation is out of range.
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"clip_noise: correlation: expected a value from 0 to 1, got {correlation}")
    own = torch.randn(*shape, generator=generator)
    if correlation == 0:
        return own
    shared = torch.randn(*shape[:2], 1, *shape[3:], generator=generator)
    return correlation**0.5 * shared + (1 - correlation) ** 0.5 * own


def video_batches(
    latents: Float[Tensor, "clips channels frames height width"],
    conditioning: Conditioning,
    dropped: Conditioning,
    config: OptimConfig,
    *,
    num_frames: int,
    label_drop: float,
    num_timesteps: int,
    noise_correlation: float = 0.0,
    seed: int,
) -> Iterator[Batch]:
    """Endless batches: a window of each drawn clip, noise, one timestep a clip, conditioning or, at times, none.

    Args:
        latents: Clips of at least ``num_frames`` frames.
        conditioning: One row a clip.
        dropped: One row that says nothing.
        config: Batch size.
        num_frames: Frames of a window.
        label_drop: Share of clips whose conditioning is dropped.
        num_timesteps: Timesteps of the noise schedule.
        noise_correlation: Correlation between the noise of a clip's frames; see ``clip_noise``.
        seed: Seed of everything drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    size, spare = config.batch_size, latents.shape[2] - num_frames
    while True:
        rows = torch.randint(len(latents), (size,), generator=generator)
        starts = torch.randint(spare + 1, (size,), generator=generator).tolist()
        windows = [slice(start, start + num_frames) for start in starts]
        clips = torch.stack([latents[row, :, window] for row, window in zip(rows, windows, strict=True)])
        noise = clip_noise(clips.shape, correlation=noise_correlation, generator=generator)
        timesteps = torch.randint(num_timesteps, (size,), generator=generator)
        drop = torch.rand(size, generator=generator) < label_drop
        kept = [value[rows] for value in conditioning.values()]
        for name, value in zip(conditioning, kept, strict=True):
            value[drop.to(value.device)] = dropped[name][0]
        yield (clips, noise, timesteps, *kept)


def train_video(
    base: VideoBase,
    latents: Float[Tensor, "clips channels frames height width"],
    conditioning: Conditioning,
    config: OptimConfig = DEFAULT_OPTIM,
    *,
    num_frames: int,
    temporal: TemporalConfig | None = None,
    label_drop: float = 0.1,
    noise_correlation: float = 0.0,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    run: RunFolder | None = None,
    progress: bool = True,
    on_checkpoint: Callable[[TemporalAdapter, int], None] | None = None,
) -> tuple[TemporalAdapter, list[float]]:
    """Inject temporal layers into ``base.unet`` and train them with the image model frozen.

    Args:
        base: The image model.
        latents: Clips of at least ``num_frames`` frames.
        conditioning: One row a clip.
        config: Steps, learning rate and so on.
        num_frames: Frames of a training window.
        temporal: What to inject; the paper's layout if None.
        label_drop: Share of clips trained without conditioning.
        noise_correlation: Correlation between the noise of a clip's frames; sample with the same.
        seed: Seed of the initial weights and the batches.
        accelerator: Device and precision; a default one if None.
        run: Folder that gets the losses.
        progress: Whether to show a progress bar.
        on_checkpoint: Called every ``config.checkpoint_every`` steps with the adapter, averaged weights in place, and
            the number of finished steps.

    Returns:
        The adapter, frozen image model included, and the loss of each step.

    Raises:
        ValueError: If there are no clips, or they are shorter than ``num_frames``.
    """
    if latents.ndim != 5 or len(latents) == 0 or latents.shape[2] < num_frames:
        raise ValueError(
            f"train_video: latents: expected (clips, channels, frames, height, width) with at least one clip of at "
            f"least num_frames={num_frames} frames, got {tuple(latents.shape)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = inject(base.unet, temporal).freeze()
    base.unet.train()
    batches = video_batches(
        latents,
        conditioning,
        base.no_conditioning(1),
        config,
        num_frames=num_frames,
        label_drop=label_drop,
        num_timesteps=base.scheduler.config.num_train_timesteps,
        noise_correlation=noise_correlation,
        seed=seed,
    )
    history = fit(
        VideoObjective(base, list(conditioning)),
        batches,
        config,
        name="temporal layers",
        groups=adapter.parameter_groups(lr=config.lr, weight_decay=config.weight_decay),
        accelerator=accelerator,
        run=run,
        progress=progress,
        on_checkpoint=None if on_checkpoint is None else functools.partial(on_checkpoint, adapter),
    )
    base.unet.eval()
    return adapter, history


def encode_clips(
    base: VideoBase, clips: Float[Tensor, "clips 3 frames height width"]
) -> Float[Tensor, "clips channels frames height width"]:
    """Latents of clips, frame by frame (the encoder is the image model's, as in the paper), on the CPU."""
    return torch.stack([base.encode(clip.transpose(0, 1)).transpose(0, 1).cpu() for clip in clips])


def driving_clips(
    size: tuple[int, int], count: int, num_frames: int, *, fps: float = DRIVING_FPS, first: int = 0, seed: int = 0
) -> list[DrivingClip]:
    """Clips ``first`` to ``first + count - 1`` of the driving corpus at a frame size ``(height, width)``."""
    corpus = DrivingCorpus(DrivingConfig(height=size[0], width=size[1], fps=fps), seed=seed)
    return [corpus.clip(index, num_frames) for index in range(first, first + count)]


def load_shipped_adapter(device: str = "cpu") -> tuple[LabelBase, int]:
    """The shipped image model with the shipped temporal layers in it, and for how many steps these were trained."""
    base = LabelBase(load_shipped())
    TemporalAdapter.from_pretrained(base.unet, SHIPPED_ADAPTER)
    base.ldm.to(device)
    training = json.loads((SHIPPED_ADAPTER / "training.json").read_text())
    return base, training["config"]["optim"]["steps"]


def alphas(adapter: TemporalAdapter) -> dict[str, float]:
    """Mean alpha of every temporal layer by the name of its site."""
    return {name: layer.blend.alpha.mean().item() for name, layer in adapter.layers.items()}


def run_video_stage(config: VideoConfig) -> TemporalAdapter:
    """Run the whole stage on the shipped image LDM and write adapter, losses and configuration to ``config.out``."""
    accelerator = Accelerator()
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    started = time.perf_counter()
    ldm = load_shipped()
    base = LabelBase(ldm)
    accelerator.print(f"rendering {config.num_clips} clips")
    # Training clips of the image stage are fair game here, held-out ones are not.
    length = config.num_frames + config.spare_frames
    clips = driving_clips(base.frame_size, config.num_clips, length, fps=config.fps, seed=config.seed)
    latents = encode_clips(base, torch.stack([clip.frames for clip in clips]))
    conditioning = base.conditioning([clip.label for clip in clips], [clip.caption for clip in clips])
    ldm.to(accelerator.device)
    adapter, history = train_video(
        base,
        latents,
        conditioning,
        config.optim,
        num_frames=config.num_frames,
        label_drop=config.label_drop,
        seed=config.seed + 7919 * accelerator.process_index,
        accelerator=accelerator,
        run=run,
        on_checkpoint=lambda made, step: made.save_pretrained(config.out / f"adapter-{step}") if run else None,
    )
    if run is not None:
        adapter.save_pretrained(config.out / "adapter")
        run.write("alphas.json", alphas(adapter))
        tail = history[-max(1, len(history) // 10) :]
        run.write("result.json", {"seconds": time.perf_counter() - started, "loss": sum(tail) / len(tail)})
    return adapter


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    run_video_stage(tyro.cli(VideoConfig, description=__doc__, prog="temporal-layers train video", args=arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
