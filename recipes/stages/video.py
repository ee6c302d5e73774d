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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.adapters import TemporalAdapter, TemporalConfig, adapter_of, inject
from temporal_layers.recipes.bases import Conditioning, LabelBase, VideoBase
from temporal_layers.recipes.driving import DrivingClip, DrivingConfig, DrivingCorpus
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.stages.denoising import ClipSamples, noised
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import OptimConfig, RunFolder, fit
from temporal_layers.recipes.training.streams import SampleStream

DRIVING_FPS = 10.0
"""Rate of the driving clips in the video stages: a whole number of hundredths of a second a frame, as GIF needs."""

SHIPPED_ADAPTER = Path(__file__).parents[1] / "weights" / "driving_video"

Trained = Literal["temporal", "all"]

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
        marks_images: Whether ``image_only`` comes in front of them.
    """

    def __init__(self, base: VideoBase, names: Sequence[str], *, marks_images: bool = False) -> None:
        super().__init__()
        self.unet = base.unet  # registered, so that its trainable parameters are found
        self.base = [base]  # not registered
        self.names, self.marks_images = tuple(names), marks_images

    def forward(
        self,
        latents: Float[Tensor, "batch channels frames height width"],
        noise: Float[Tensor, "batch channels frames height width"],
        timesteps: Tensor,
        *rest: Tensor,
    ) -> dict[str, Tensor]:
        """Squared error of the prediction, averaged over everything."""
        base = self.base[0]
        image_only, conditioning = (rest[0], rest[1:]) if self.marks_images else (None, rest)
        noisy, told, target = noised(base.scheduler, latents, noise, timesteps)
        marks = {} if image_only is None else {"image_only": image_only}
        output = base.predict(noisy, told, dict(zip(self.names, conditioning, strict=True)), **marks)
        return {"loss": F.mse_loss(output.float(), target.float())}


def train_video(
    base: VideoBase,
    latents: Float[Tensor, "clips channels frames height width"],
    conditioning: Conditioning,
    config: OptimConfig = DEFAULT_OPTIM,
    *,
    num_frames: int,
    temporal: TemporalConfig | None = None,
    train: Trained = "temporal",
    label_drop: float = 0.1,
    noise_correlation: float = 0.0,
    image_share: float = 0.0,
    seed: int = 0,
    on_checkpoint: Callable[[TemporalAdapter, int], None] | None = None,
    **engine: Any,
) -> tuple[TemporalAdapter, list[float]]:
    """Train temporal layers in ``base.unet``, which are injected unless they are there, with the image model frozen.

    Args:
        base: The image model.
        latents: Clips of at least ``num_frames`` frames.
        conditioning: One row a clip.
        config: Steps, learning rate and so on.
        num_frames: Frames of a training window.
        temporal: What to inject; the paper's layout if None.
        train: ``temporal`` layers alone, as the paper does, or ``all`` parameters of the UNet.
        label_drop: Share of clips trained without conditioning.
        noise_correlation: Correlation between the noise of a clip's frames; sample with the same.
        image_share: Share of samples that are single images to the UNet, to keep its image quality with
            ``train="all"``; see `ClipSamples`.
        seed: Seed of the initial weights and the batches.
        on_checkpoint: Called every ``config.checkpoint_every`` steps with the adapter, averaged weights in place, and
            the number of finished steps.
        **engine: Further arguments of `fit`: accelerator, run, engine, progress, validate.

    Returns:
        The adapter, image model included, and the loss of each step.

    Raises:
        ValueError: If there are no clips, they are shorter than ``num_frames``, ``temporal`` is given for a UNet that
            has temporal layers, or images are to be trained on with the image model frozen.
    """
    if latents.ndim != 5 or len(latents) == 0 or latents.shape[2] < num_frames:
        raise ValueError(
            f"train_video: latents: expected (clips, channels, frames, height, width) with at least one clip of at "
            f"least num_frames={num_frames} frames, got {tuple(latents.shape)}"
        )
    if image_share and train == "temporal":
        raise ValueError(
            f"train_video: image_share: expected 0 with train='temporal', got {image_share}; images bypass the "
            "temporal layers and train nothing there: set train='all'"
        )
    adapter = trainable_adapter(base.unet, temporal, train, seed=seed)
    samples = ClipSamples(
        latents,
        conditioning,
        base.no_conditioning(1),
        num_frames=num_frames,
        num_timesteps=base.scheduler.config.num_train_timesteps,
        drop=label_drop,
        correlation=noise_correlation,
        image_share=image_share,
        seed=seed,
    )
    history = fit(
        VideoObjective(base, list(conditioning), marks_images=image_share > 0),
        SampleStream(samples),
        config,
        name="temporal layers",
        seed=seed,
        groups=adapter.parameter_groups(
            lr=config.lr, spatial_lr=config.lr if train == "all" else None, weight_decay=config.weight_decay
        ),
        on_checkpoint=None if on_checkpoint is None else functools.partial(on_checkpoint, adapter),
        **engine,
    )
    base.unet.eval()
    return adapter, history


def trainable_adapter(
    unet: nn.Module, temporal: TemporalConfig | None, train: Trained, *, seed: int = 0
) -> TemporalAdapter:
    """The temporal layers of a UNet, injected if there are none, with the UNet in training mode.

    Args:
        unet: Gets the layers, and their gradients or all.
        temporal: What to inject; the paper's layout if None.
        train: ``temporal`` freezes the image model, ``all`` makes it trainable as well.
        seed: Of the initial weights.

    Raises:
        ValueError: If ``temporal`` is given for a UNet that has temporal layers already.
    """
    if getattr(unet, "_temporal_state", None) is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = inject(unet, temporal)
    elif temporal is None:
        adapter = adapter_of(unet)
    else:
        raise ValueError(
            "trainable_adapter: temporal: expected None for a UNet that has temporal layers, which say what they are; "
            "got a configuration: remove() them first, or leave it out to go on with them"
        )
    unet.train()
    if train == "temporal":
        return adapter.freeze()
    unet.requires_grad_(True)
    return adapter


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
        seed=config.seed,
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
    run_video_stage(parse(VideoConfig, arguments, prog="temporal-layers train video", description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
