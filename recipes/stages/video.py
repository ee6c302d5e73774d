"""Stage "video": temporal alignment. Trains the injected temporal layers and nothing else (Video LDM, section 3.1).

Each clip gets one noise level and independent noise per frame; the loss is the image model's own, so its noise
schedule and its kind of prediction stay as they are. Latents are computed once.

    temporal-layers train video --out runs/video
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.adapters import TemporalAdapter, TemporalConfig
from temporal_layers.recipes.bases import LabelBase, VideoBase, load_base
from temporal_layers.recipes.denoising import noised
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.stages.clip_samples import ClipSamples
from temporal_layers.recipes.stages.clips import (
    Clips,
    ClipsConfig,
    check_clips,
    open_clips,
    open_pixels,
)
from temporal_layers.recipes.stages.temporal import (
    Trained,
    alphas,
    fit_adapter,
    layers_in_file,
    save_trained,
    trainable_adapter,
)
from temporal_layers.recipes.stages.validation import ClipValidation, ValidationConfig
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, make_accelerator
from temporal_layers.recipes.training.streams import SampleStream

SHIPPED_ADAPTER = Path(__file__).parents[1] / "weights" / "driving_video"

DEFAULT_OPTIM = OptimConfig(steps=400, batch_size=2, lr=3e-3, warmup=0.1, weight_decay=0.0, ema_decay=0.98)


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Stage "video".

    Attributes:
        out: Folder of the run; ``adapter/`` in it is what ``TemporalAdapter.from_pretrained`` loads.
        seed: Seed of the initial weights, the batches and the noise.
        clips: The image model and the videos.
        temporal: File of a ``TemporalConfig`` (.yaml, .toml or .json) that says what to inject; the paper's layout if
            None.
        start_from: Folder of an adapter to go on from, in place of fresh layers.
        train: ``temporal`` layers alone, as the paper does, or ``all`` parameters of the UNet, which is then saved too.
        num_frames: Frames of a training window.
        optim: Training of the temporal layers.
        engine: How the run is carried out.
        label_drop: Share of clips trained without conditioning, for classifier-free guidance.
        noise_correlation: Correlation between the noise of a clip's frames; 0 as in the paper.
        image_share: Share of samples that are single images to the UNet; needs ``train="all"``.
        validation: What is sampled every ``engine.validate_every`` steps.
    """

    out: Path = Path("runs/video")
    seed: int = 0
    clips: ClipsConfig = ClipsConfig()
    temporal: Path | None = None
    start_from: Path | None = None
    train: Trained = "temporal"
    num_frames: int = 16
    optim: OptimConfig = DEFAULT_OPTIM
    engine: EngineConfig = EngineConfig()
    label_drop: float = 0.1
    noise_correlation: float = 0.0
    image_share: float = 0.0
    validation: ValidationConfig = ValidationConfig()

    def __post_init__(self) -> None:
        for name in ("label_drop", "noise_correlation", "image_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"VideoConfig: {name}: expected a value from 0 to 1, got {getattr(self, name)}")
        if self.num_frames < 1:
            raise ValueError(f"VideoConfig: num_frames: expected at least 1, got {self.num_frames}")
        if self.image_share and self.train == "temporal":
            raise ValueError(
                f"VideoConfig: image_share: expected 0 with train='temporal', got {self.image_share}; images bypass "
                "the temporal layers and train nothing there: set train='all'"
            )
        if self.image_share and self.clips.latents == "streamed":
            raise ValueError("VideoConfig: image_share: expected 0 with streamed clips; set clips.latents='cached'")
        if self.temporal is not None and self.start_from is not None:
            raise ValueError("VideoConfig: expected temporal or start_from, whose layers say what they are, got both")


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
    clips: Clips | ClipsConfig,
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
        clips: Latents and conditioning, in memory (`TensorClips`) or in a cache (`CachedClips`); or which videos to
            decode and encode as they are needed, with the base on the device of the training.
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
        ValueError: If there are no clips, one is shorter than ``num_frames``, ``temporal`` is given for a UNet that
            has temporal layers, or images are to be trained on with the image model frozen.
    """
    streamed = isinstance(clips, ClipsConfig)
    if not streamed:
        check_clips("train_video", clips, num_frames)
    if image_share and (train == "temporal" or streamed):
        raise ValueError(
            f"train_video: image_share: expected 0 with train='temporal', where images train nothing as they bypass "
            f"the temporal layers, and with streamed clips; got {image_share}"
        )
    samples = ClipSamples(
        None if streamed else clips,
        base.no_conditioning(1),
        num_frames=num_frames,
        num_timesteps=base.scheduler.config.num_train_timesteps,
        drop=label_drop,
        correlation=noise_correlation,
        image_share=image_share,
        seed=seed,
    )
    stream: Stream = SampleStream(samples)
    if streamed:
        stream = open_pixels(base, clips, samples.complete_batch, num_frames=num_frames, seed=seed)
    adapter = trainable_adapter(base.unet, temporal, train, seed=seed)
    objective = VideoObjective(base, list(samples.dropped), marks_images=image_share > 0)
    return fit_adapter(
        adapter, objective, stream, config, train=train, seed=seed, on_checkpoint=on_checkpoint, **engine
    )


def load_shipped_adapter(device: str = "cpu") -> tuple[LabelBase, int]:
    """The shipped image model with the shipped temporal layers in it, and for how many steps these were trained."""
    base = LabelBase(load_shipped())
    TemporalAdapter.from_pretrained(base.unet, SHIPPED_ADAPTER)
    base.ldm.to(device)
    training = json.loads((SHIPPED_ADAPTER / "training.json").read_text())
    return base, training["config"]["optim"]["steps"]


def run_video_stage(config: VideoConfig) -> TemporalAdapter:
    """Run the whole stage and write adapter, losses and configuration to ``config.out``."""
    accelerator = make_accelerator(config.engine, config.out)
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    started = time.perf_counter()
    base = load_base(config.clips.model).to(accelerator.device)
    temporal = layers_in_file(config.temporal, base.unet)
    if config.start_from is not None:
        TemporalAdapter.from_pretrained(base.unet, config.start_from)
    clips: Clips | ClipsConfig = config.clips
    if config.clips.latents == "cached":
        clips = open_clips(base, config.clips, out=config.out, min_frames=config.num_frames, accelerator=accelerator)
    adapter, history = train_video(
        base,
        clips,
        config.optim,
        num_frames=config.num_frames,
        temporal=temporal,
        train=config.train,
        label_drop=config.label_drop,
        noise_correlation=config.noise_correlation,
        image_share=config.image_share,
        seed=config.seed,
        accelerator=accelerator,
        engine=config.engine,
        run=run,
        on_checkpoint=lambda made, step: made.save_pretrained(config.out / f"adapter-{step}") if run else None,
        validate=ClipValidation(base, config.validation, config.num_frames, run),
    )
    if run is not None:
        adapter = save_trained(adapter, config.out, train=config.train)
        run.write("alphas.json", alphas(adapter))
        run.finish(history, started=started)
    return adapter


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    run_video_stage(parse(VideoConfig, arguments, prog="temporal-layers train video", description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
