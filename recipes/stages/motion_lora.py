"""Stage "motion-lora": teaches temporal layers a motion from one clip or a few, as a small file beside the adapter.

A LoRA on the temporal attentions alone: image model and adapter stay as they are, several motions can be kept, mixed
and made weaker or stronger, and they go together with LoRAs on the image model. `debias` takes what all frames have
in common out of a second loss, so that the look of the clip is learnt less than its motion (MotionDirector, Zhao et
al. 2023, section 4.2; its LoRA on the spatial layers is not part of this stage).

    temporal-layers train motion-lora --out runs/motion --reverse
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from temporal_layers.adapters import TemporalAdapter, adapter_of
from temporal_layers.recipes.bases import Conditioning, VideoBase, load_base
from temporal_layers.recipes.denoising import noised
from temporal_layers.recipes.stages.clip_samples import ClipSamples
from temporal_layers.recipes.stages.clips import DRIVING, Clips, ClipsConfig, check_clips, open_clips
from temporal_layers.recipes.stages.loras import LORA_FILE, add_lora, load_lora
from temporal_layers.recipes.stages.personal import is_injected
from temporal_layers.recipes.stages.video import SHIPPED_ADAPTER
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, fit, make_accelerator
from temporal_layers.recipes.training.streams import SampleStream, generator_at

Targets = Literal["attention", "all"]

DEFAULT_OPTIM = OptimConfig(steps=300, batch_size=1, lr=1e-3, schedule="cosine", warmup=0.1, weight_decay=0.0)

FEW = dataclasses.replace(DRIVING, clips=4)


@dataclass(frozen=True, kw_only=True)
class MotionLoraConfig:
    """Stage "motion-lora".

    Attributes:
        out: Folder of the run; ``lora/`` in it is what `load_motion_lora` loads.
        seed: Seed of the weights, the batches and the noise.
        clips: The image model and the clips, one or a few.
        adapter: Folder or repository of the temporal layers; empty for those that come with the package.
        num_frames: Frames of a training window.
        rank: Of the change.
        targets: ``attention`` for the projections of the temporal attentions, ``all`` for every linear layer and
            convolution of the temporal layers.
        debias: Weight of the anchor frame in the second loss; 1 in MotionDirector, 0 for no second loss.
        reverse: Whether to play the clips backwards: a motion that the temporal layers have not seen, to try things.
        label_drop: Share of clips trained without conditioning.
        optim: Training.
        engine: How the run is carried out.
    """

    out: Path = Path("runs/motion-lora")
    seed: int = 0
    clips: ClipsConfig = ClipsConfig(data=FEW)
    adapter: str = ""
    num_frames: int = 16
    rank: int = 16
    targets: Targets = "attention"
    debias: float = 0.0
    reverse: bool = False
    label_drop: float = 0.0
    optim: OptimConfig = DEFAULT_OPTIM
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if self.rank < 1 or self.num_frames < 2:
            raise ValueError(
                f"MotionLoraConfig: expected rank of at least 1 and num_frames of at least 2, got rank={self.rank} and "
                f"num_frames={self.num_frames}"
            )
        if self.debias < 0 or not 0 <= self.label_drop <= 1:
            raise ValueError(
                f"MotionLoraConfig: expected debias of at least 0 and label_drop from 0 to 1, got debias={self.debias} "
                f"and label_drop={self.label_drop}"
            )
        if self.clips.model and not self.adapter:
            raise ValueError(
                f"MotionLoraConfig: expected adapter, the temporal layers for clips.model={self.clips.model!r}, got "
                "none; train some with 'temporal-layers train video', or convert published ones"
            )
        if self.clips.latents == "streamed":
            raise ValueError("MotionLoraConfig: clips.latents: expected 'cached' for a few clips, got 'streamed'")


class ReversedClips:
    """Clips played backwards.

    Args:
        clips: Encoded frame by frame.
    """

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def num_frames(self, index: int) -> int:
        """As in `Clips`."""
        return self.clips.num_frames(index)

    def latents(self, index: int, start: int = 0, stop: int | None = None) -> Float[Tensor, "c frames h w"]:
        """As in `Clips`."""
        length = self.num_frames(index)
        stop = length if stop is None else min(stop, length)
        return self.clips.latents(index, length - stop, length - start).flip(1)

    def conditioning(self, index: int) -> Conditioning:
        """As in `Clips`."""
        return self.clips.conditioning(index)


class MotionObjective(nn.Module):
    """The image model's denoising loss on clips and, if wanted, that of what is left without an anchor frame.

    Args:
        base: The image model, temporal layers injected.
        names: Names of the conditioning tensors, in the order in which ``forward`` gets them.
        debias: Weight of the anchor.
    """

    def __init__(self, base: VideoBase, names: Sequence[str], *, debias: float = 0.0) -> None:
        super().__init__()
        self.unet = base.unet  # registered, so that its trainable parameters are found
        self.base = [base]  # not registered
        self.names, self.debias = tuple(names), debias

    def forward(
        self,
        anchors: Int[Tensor, " batch"],
        latents: Float[Tensor, "batch channels frames height width"],
        noise: Float[Tensor, "batch channels frames height width"],
        timesteps: Tensor,
        *conditioning: Tensor,
    ) -> dict[str, Tensor]:
        """Squared error of the prediction, and of the prediction without the anchor frame."""
        base = self.base[0]
        noisy, told, target = noised(base.scheduler, latents, noise, timesteps)
        output = base.predict(noisy, told, dict(zip(self.names, conditioning, strict=True)))
        error = output.float() - target.float()
        loss = error.square().mean()
        if not self.debias:
            return {"loss": loss}
        motion = without_anchor(error, anchors, self.debias).square().mean()  # linear: of both at once
        return {"loss": loss + motion, "denoising": loss, "motion": motion}


def without_anchor(
    clips: Float[Tensor, "batch channels frames height width"], anchors: Int[Tensor, " batch"], weight: float
) -> Float[Tensor, "batch channels frames height width"]:
    """``sqrt(weight ** 2 + 1) * clips - weight * anchor frame``, by which what all frames share counts less.

    Args:
        clips: What to take the common part out of.
        anchors: Number of a frame of each clip.
        weight: Of that frame.
    """
    anchor = clips[torch.arange(len(clips), device=clips.device), :, anchors].unsqueeze(2)
    return (weight**2 + 1) ** 0.5 * clips - weight * anchor


def train_motion_lora(
    base: VideoBase,
    clips: Clips,
    config: OptimConfig = DEFAULT_OPTIM,
    *,
    num_frames: int,
    name: str = "motion",
    rank: int = 16,
    targets: Targets = "attention",
    debias: float = 0.0,
    label_drop: float = 0.0,
    seed: int = 0,
    **engine: Any,
) -> list[float]:
    """Train a LoRA on the temporal layers of ``base.unet`` alone; everything else stays bit for bit.

    The LoRA stays in the UNet: `save_motion_lora` writes it, ``set_lora_strengths`` makes it weaker or stronger, and
    ``unet.delete_adapters(name)`` takes it out. Other LoRAs stay as strong as they are.

    Args:
        base: The image model with temporal layers.
        clips: One or a few, as latents: `TensorClips` or `CachedClips`.
        config: Steps, learning rate and so on.
        num_frames: Frames of a training window.
        name: Of the LoRA.
        rank: Of the change.
        targets: Which layers; see `motion_targets`.
        debias: Weight of the anchor frame in the second loss, 0 for none.
        label_drop: Share of clips trained without conditioning.
        seed: Seed of the initial weights and the batches.
        **engine: Further arguments of `fit`: accelerator, run, engine, progress, validate, on_checkpoint.

    Returns:
        The loss of each step.

    Raises:
        ValueError: If the UNet has no temporal layers or a LoRA of that name, or a clip is too short.
    """
    check_clips("train_motion_lora", clips, num_frames)
    layers = motion_targets(base.unet, targets)
    drawn = ClipSamples(
        clips,
        base.no_conditioning(1),
        num_frames=num_frames,
        num_timesteps=base.scheduler.config.num_train_timesteps,
        drop=label_drop,
        seed=seed,
    )

    def sample(position: int) -> tuple[Tensor, ...]:
        anchor = torch.randint(num_frames, (), generator=generator_at(seed, position, "anchor"))
        return anchor, *drawn(position)

    before = [(parameter, parameter.requires_grad) for parameter in base.unet.parameters()]
    parameters = add_lora(base.unet, name, layers, rank=rank, seed=seed)
    base.unet.requires_grad_(False).train()
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        objective = MotionObjective(base, list(drawn.dropped), debias=debias)
        return fit(objective, SampleStream(sample), config, name=f"motion LoRA {name}", seed=seed, **engine)
    finally:
        base.unet.eval()
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        for parameter in parameters:
            parameter.requires_grad_(False)


def motion_targets(unet: nn.Module, targets: Targets = "attention") -> list[str]:
    """Full names of the temporal layers' modules that a motion LoRA goes on.

    Args:
        unet: With temporal layers.
        targets: ``attention``: the projections to query, key, value and out of the temporal attentions, those to the
            text included; ``all``: every linear layer and convolution.

    Raises:
        ValueError: If the UNet has no temporal layers, or ``targets`` is neither.
    """
    if targets not in get_args(Targets):
        raise ValueError(f"motion_targets: targets: expected 'attention' or 'all', got {targets!r}")
    if not is_injected(unet):
        raise ValueError(
            f"motion LoRA: expected a {type(unet).__name__} with temporal layers, got one without; inject or load them "
            "first"
        )
    names = []
    for site, layer in adapter_of(unet).layers.items():
        for name, module in layer.named_modules():
            module = getattr(module, "base_layer", module)  # with a LoRA on it already
            wanted = targets == "all" or (".attentions." in f".{name}" and name.rpartition(".")[2].startswith("to_"))
            if wanted and isinstance(module, nn.Linear | nn.Conv2d) and "lora_" not in name:
                names.append(f"{site}.temporal.{name}".removesuffix(".base_layer"))
    return list(dict.fromkeys(names))


def save_motion_lora(unet: nn.Module, folder: Path | str, *, name: str = "motion") -> None:
    """Write a motion LoRA, a file of diffusers for ``unet.load_lora_adapter``, to a folder."""
    unet.save_lora_adapter(folder, adapter_name=name, weight_name=LORA_FILE)


def load_motion_lora(unet: nn.Module, folder: Path | str, *, name: str = "motion", strength: float = 1.0) -> None:
    """Put a motion LoRA on the temporal layers of a UNet, beside the LoRAs that are there.

    Args:
        unet: With the temporal layers that the LoRA was trained on, or others of the same kind.
        folder: That `save_motion_lora` wrote.
        name: For the LoRA.
        strength: 1 as trained.

    Raises:
        ValueError: If the UNet has no temporal layers, or a LoRA of that name.
    """
    motion_targets(unet)
    load_lora(unet, folder, name, strength=strength, prefix=None)


def run_motion_lora_stage(config: MotionLoraConfig) -> VideoBase:
    """Run the whole stage and write LoRA, losses and configuration to ``config.out``."""
    started = time.perf_counter()
    accelerator = make_accelerator(config.engine, config.out)
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    base = load_base(config.clips.model)
    TemporalAdapter.from_pretrained(base.unet, config.adapter or SHIPPED_ADAPTER)
    base.to(accelerator.device)
    clips: Clips = open_clips(base, config.clips, out=config.out, min_frames=config.num_frames, accelerator=accelerator)
    history = train_motion_lora(
        base,
        ReversedClips(clips) if config.reverse else clips,
        config.optim,
        num_frames=config.num_frames,
        rank=config.rank,
        targets=config.targets,
        debias=config.debias,
        label_drop=config.label_drop,
        seed=config.seed,
        accelerator=accelerator,
        run=run,
        engine=config.engine,
    )
    if run is not None:
        save_motion_lora(base.unet, config.out / "lora")
        run.finish(history, started=started)
    return base


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    run_motion_lora_stage(
        parse(MotionLoraConfig, arguments, prog="temporal-layers train motion-lora", description=__doc__)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
