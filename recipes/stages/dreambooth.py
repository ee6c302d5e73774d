"""Stage "dreambooth": teaches the image model a subject from a few frames; the temporal layers stay as they are.

Prior-preservation tuning (Ruiz et al. 2023) as the Video LDM does it (appendix): each step denoises an image of the
subject, asked for by a rare word, beside an image of its class that the model itself made before. The UNet and, if
wanted, the text encoder are trained, whole or by LoRA; images bypass the temporal layers, which move the subject
afterwards without having seen it. They go on reading the text encoder that they know: see `personal.TwoTexts`.

    temporal-layers train dreambooth --out runs/dreambooth
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from temporal_layers.recipes.bases import Conditioning, LabelBase, VideoBase, load_base
from temporal_layers.recipes.denoising import noised
from temporal_layers.recipes.driving import LABELS, DrivingConfig, DrivingCorpus
from temporal_layers.recipes.stages.dreambooth_preview import Preview, PreviewConfig
from temporal_layers.recipes.stages.loras import add_lora, lora_parameters
from temporal_layers.recipes.stages.personal import (
    Prompt,
    as_image_model,
    ask,
    spatial_parameters,
    text_parts,
)
from temporal_layers.recipes.stages.personal_files import load_images, save_personal
from temporal_layers.recipes.stages.prior import prior_images
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, fit, make_accelerator
from temporal_layers.recipes.training.streams import SampleStream, Shuffled, generator_at

LORA = "dreambooth"
"""Name of the low-rank weights in the UNet and the text encoders."""

UNET_TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0")
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]

PAPER_OPTIM = OptimConfig(steps=800, batch_size=1, lr=1e-6, schedule="constant", warmup=0.0)
"""Steps and learning rate of the paper, for Stable Diffusion; the size of its batch is not known."""

SHIPPED_OPTIM = OptimConfig(steps=200, batch_size=4, lr=4e-4, schedule="cosine", warmup=0.1, weight_decay=0.0)
"""For the small image model that comes with this library."""

TOKENS_LR = 50.0
"""Learning rate of a label's tokens as a multiple of the UNet's: they are looked up, not computed by a network."""


@dataclass(frozen=True, kw_only=True)
class DreamBoothConfig:
    """Stage "dreambooth".

    Attributes:
        out: Folder of the run; ``model/`` in it is the tuned image model, or ``lora/`` its low-rank change.
        seed: Seed of the prior images, the batches and the noise.
        model: Folder or repository of an image model, see `load_base`; empty for the one that comes with the package.
        images: Folder with images of the subject; None for driving frames in other colours.
        prompt: How to ask for the subject: a caption with a rare word in it, or the name of a new label.
        class_prompt: How to ask for what the subject is one of: a caption, or the name of a label.
        num_prior: Images of the class, made by the model before training; 0 trains without prior preservation.
        prior_weight: Weight of their loss.
        prior_steps: Sampling steps of an image of the class.
        prior_guidance: Guidance of the same.
        train_text: Whether to train the text encoders as well.
        text_lr: Learning rate of the text encoders; None for that of the UNet, as in the paper, and for 50 times as
            much with the tokens of labels.
        lora_rank: Rank of the change; 0 trains the weights themselves.
        optim: Training. The defaults are for the shipped model; the paper has ``steps`` 800 and ``lr`` 1e-6.
        engine: How the run is carried out.
        preview: Clips to look at.
    """

    out: Path = Path("runs/dreambooth")
    seed: int = 0
    model: str = ""
    images: Path | None = None
    prompt: str = "orange"
    class_prompt: str = LABELS[0]
    num_prior: int = 256
    prior_weight: float = 1.0
    prior_steps: int = 25
    prior_guidance: float = 2.0
    train_text: bool = True
    text_lr: float | None = None
    lora_rank: int = 0
    optim: OptimConfig = SHIPPED_OPTIM
    engine: EngineConfig = EngineConfig()
    preview: PreviewConfig = PreviewConfig()

    def __post_init__(self) -> None:
        if self.num_prior < 0 or self.prior_weight < 0 or self.lora_rank < 0:
            raise ValueError(
                f"DreamBoothConfig: expected num_prior, prior_weight and lora_rank of at least 0, got "
                f"{self.num_prior}, {self.prior_weight} and {self.lora_rank}; 0 turns each off"
            )
        if self.prompt == self.class_prompt:
            raise ValueError(
                f"DreamBoothConfig: expected two prompts, got {self.prompt!r} for both; put a rare word in front of "
                "the class, such as 'a sks dog' beside 'a dog'"
            )
        if self.model and self.images is None:
            raise ValueError(
                f"DreamBoothConfig: expected images, a folder with the subject, for model={self.model!r}, got None; "
                "the built-in frames are for the shipped model"
            )
        if self.model and self.optim.lr == SHIPPED_OPTIM.lr:
            raise ValueError(
                f"DreamBoothConfig: optim.lr: expected one for model={self.model!r}, got {self.optim.lr}, the default "
                "for the shipped model, which would ruin a large one; the paper has 1e-6 for Stable Diffusion"
            )


class DreamBoothObjective(nn.Module):
    """The image model's denoising loss on the subject, plus that on its class.

    Args:
        base: The image model.
        prompts: How to ask for the subject and, with prior preservation, for its class.
        prior_weight: Weight of the second loss.
        texts: Text encoders that are trained.
    """

    def __init__(
        self, base: VideoBase, prompts: Sequence[Prompt], *, prior_weight: float, texts: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        self.unet, self.texts = base.unet, nn.ModuleDict(texts)  # registered, so that their parameters are found
        self.base = [base]  # not registered
        self.prompts, self.prior_weight = list(prompts), prior_weight
        self._told: Conditioning | None = None

    def forward(
        self,
        latents: Float[Tensor, "batch prompts channels height width"],
        noise: Float[Tensor, "batch prompts channels height width"],
        timesteps: Int[Tensor, "batch prompts"],
    ) -> dict[str, Tensor]:
        """Squared errors; images of all prompts go through the UNet as one batch."""
        base, batch = self.base[0], len(latents)
        clean, added, times = (value.transpose(0, 1).flatten(0, 1) for value in (latents, noise, timesteps))
        noisy, told, target = noised(base.scheduler, clean.unsqueeze(2), added.unsqueeze(2), times)
        rows = {
            name: value.to(clean.device).repeat_interleave(batch, 0) for name, value in self._conditioning().items()
        }
        output = base.predict(noisy.squeeze(2), told, rows)
        errors = (output.float() - target.squeeze(2).float()).square().flatten(1).mean(1).unflatten(0, (-1, batch))
        subject, *prior = errors.mean(1)
        if not prior:
            return {"loss": subject}
        return {"loss": subject + self.prior_weight * prior[0], "subject": subject, "prior": prior[0]}

    def _conditioning(self) -> Conditioning:
        if self.texts:
            return ask(self.base[0], self.prompts)
        if self._told is None:
            with torch.no_grad():
                self._told = ask(self.base[0], self.prompts)
        return self._told


class DreamBoothSamples:
    """Draws an image of the subject and, with prior preservation, one of its class, each with a noise level of its own.

    Args:
        sets: Latents of the subject and of the class, each ``(images, channels, height, width)``.
        num_timesteps: Timesteps of the noise schedule, drawn uniformly.
        seed: Of the orders and of everything drawn.
    """

    def __init__(self, sets: Sequence[Tensor], *, num_timesteps: int, seed: int = 0) -> None:
        self.sets, self.num_timesteps, self.seed = list(sets), num_timesteps, seed
        self.orders = [Shuffled(len(images), seed + index) for index, images in enumerate(sets)]

    def __call__(self, position: int) -> tuple[Tensor, ...]:
        """Latents, noise and timesteps at a position of the run, each with one row a set."""
        generator = generator_at(self.seed, position)
        images = [images[order[position]] for images, order in zip(self.sets, self.orders, strict=True)]
        latents = torch.stack(images)
        noise = torch.randn(latents.shape, generator=generator)
        return latents, noise, torch.randint(self.num_timesteps, (len(images),), generator=generator)


def train_dreambooth(
    base: VideoBase,
    frames: Float[Tensor, "images 3 height width"],
    prompt: Prompt,
    prior_frames: Float[Tensor, "priors 3 height width"] | None = None,
    class_prompt: Prompt | None = None,
    config: OptimConfig = PAPER_OPTIM,
    *,
    prior_weight: float = 1.0,
    train_text: bool = True,
    text_lr: float | None = None,
    lora_rank: int = 0,
    seed: int = 0,
    **engine: Any,
) -> list[float]:
    """Tune the image model of ``base`` in place; temporal layers in its UNet are bypassed and left bit for bit.

    To let the temporal layers read the text encoder that they know, keep ``frozen_text(base)`` from before and sample
    with ``TwoTexts(base, frozen)``.

    Args:
        base: The image model, with or without temporal layers.
        frames: The subject, in [0, 1].
        prompt: How to ask for it. For the label model a label that ``ImageLDM.add_label`` made.
        prior_frames: Images of its class, usually made by `prior_images`; None trains without prior preservation.
        class_prompt: How to ask for those.
        config: Steps, learning rate and so on.
        prior_weight: Weight of the loss on the class.
        train_text: Whether to train the text encoders, or the label's tokens, as well.
        text_lr: Learning rate of those; None for that of ``config``, and 50 times as much for a label's tokens.
        lora_rank: Rank of a LoRA named ``dreambooth`` on the attention of UNet and text encoders, which stays in them;
            0 trains the weights themselves. What turns labels into tokens is always trained itself.
        seed: Seed of the batches, and of a LoRA's weights.
        **engine: Further arguments of `fit`: accelerator, run, engine, progress, validate, on_checkpoint.

    Returns:
        The loss of each step.

    Raises:
        ValueError: If one of ``prior_frames`` and ``class_prompt`` comes without the other, or the frames are none.
    """
    if (prior_frames is None) != (class_prompt is None):
        raise ValueError(
            "train_dreambooth: expected prior_frames and class_prompt together, got only one of them; give both, or "
            "neither to train without prior preservation"
        )
    sets = [frames] if prior_frames is None else [frames, prior_frames]
    if any(images.ndim != 4 or len(images) == 0 for images in sets):
        raise ValueError(
            "train_dreambooth: expected frames and prior_frames (images, 3, height, width), at least one each, got "
            f"{' and '.join(str(tuple(images.shape)) for images in sets)}"
        )
    prompts = [prompt] if class_prompt is None else [prompt, class_prompt]
    latents = [torch.cat([base.encode(part).float().cpu() for part in images.split(16)]) for images in sets]
    samples = DreamBoothSamples(latents, num_timesteps=base.scheduler.config.num_train_timesteps, seed=seed)
    texts = text_parts(base) if train_text else {}
    ask(base, prompts)  # what it has to say against the prompts comes before anything is changed
    with as_image_model(base.unet), _trainable(base, texts, lora_rank, seed) as (unet, words):
        groups = [{"name": "unet", "params": unet, "lr": config.lr, "weight_decay": config.weight_decay}]
        if words:  # without decay, which would shrink the words that no batch has
            rate = text_lr or config.lr * (TOKENS_LR if isinstance(base, LabelBase) else 1)
            groups.append({"name": "text", "params": words, "lr": rate, "weight_decay": 0.0})
        objective = DreamBoothObjective(base, prompts, prior_weight=prior_weight, texts=texts)
        return fit(objective, SampleStream(samples), config, name="dreambooth", seed=seed, groups=groups, **engine)


@contextmanager
def _trainable(
    base: VideoBase, texts: dict[str, nn.Module], rank: int, seed: int
) -> Iterator[tuple[list[nn.Parameter], list[nn.Parameter]]]:
    """Make what is to be trained trainable, and nothing else, for the duration of a ``with`` block."""
    everything = [base.unet, *texts.values()]
    before = [(parameter, parameter.requires_grad) for part in everything for parameter in part.parameters()]
    modes = [(part, part.training) for part in everything]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    with ExitStack() as stack:
        stack.callback(_restore, before, modes)
        chosen: tuple[list[nn.Parameter], list[nn.Parameter]] = (spatial_parameters(base.unet), [])
        for part in texts.values():
            chosen[1].extend(part.parameters())
        if rank:
            chosen = _with_lora(base, texts, rank, seed)
            for parameter in (p for part in everything for p in part.parameters()):
                parameter.requires_grad_(False)
        for parameter in (*chosen[0], *chosen[1]):
            parameter.requires_grad_(True)
        for part in everything:
            part.train()
        yield chosen
        for parameter in (*chosen[0], *chosen[1]):
            parameter.requires_grad_(False)


def _restore(before: list[tuple[nn.Parameter, bool]], modes: list[tuple[nn.Module, bool]]) -> None:
    for parameter, flag in before:
        parameter.requires_grad_(flag)
    for part, training in modes:
        part.train(training)


def _with_lora(
    base: VideoBase, texts: dict[str, nn.Module], rank: int, seed: int
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, _ in base.unet.named_modules() if name.endswith(UNET_TARGETS) and ".temporal." not in name]
    unet, words = add_lora(base.unet, LORA, names, rank=rank, seed=seed), []
    for part in texts.values():
        if isinstance(base, LabelBase):
            words.extend(part.parameters())
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            options = {"r": rank, "lora_alpha": rank, "init_lora_weights": "gaussian"}
            inject_adapter_in_model(LoraConfig(target_modules=TEXT_TARGETS, **options), part, LORA)
        words.extend(lora_parameters(part, LORA))
    return unet, words


def subject_frames(count: int = 8, *, seed: int = 0) -> Float[Tensor, "count 3 height width"]:
    """The built-in subject: driving frames of a clear day with red and blue exchanged, so that the sky is orange."""
    corpus = DrivingCorpus(DrivingConfig(), seed=seed)
    chosen = (index for index in range(1 << 20) if corpus.label(index) == 0)
    frames, _ = corpus.stills([next(chosen) for _ in range(count)])
    return frames[:, [2, 1, 0]]


def run_dreambooth_stage(config: DreamBoothConfig) -> VideoBase:
    """Run the whole stage and write the tuned model, losses and configuration to ``config.out``."""
    started = time.perf_counter()
    accelerator = make_accelerator(config.engine, config.out)
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    base = load_base(config.model)
    frames = subject_frames() if config.images is None else load_images(config.images, base.frame_size)
    prompt, class_prompt = _prompts(base, config)
    base.to(accelerator.device)
    adapter, preview = config.preview.source(config.model), None
    if adapter is not None:
        accelerator.print("sampling clips before the tuning")
        preview = Preview(base, adapter, (prompt, class_prompt), frames, config.preview)
    prior = None
    if config.num_prior:
        accelerator.print(f"{config.num_prior} images of the class {config.class_prompt!r} in {config.out / 'prior'}")
        prior = _made_once(accelerator, base, class_prompt, config)
    history = train_dreambooth(
        base,
        frames,
        prompt,
        prior,
        class_prompt if config.num_prior else None,
        config.optim,
        prior_weight=config.prior_weight,
        train_text=config.train_text,
        text_lr=config.text_lr,
        lora_rank=config.lora_rank,
        seed=config.seed,
        accelerator=accelerator,
        run=run,
        engine=config.engine,
    )
    if run is not None:
        save_personal(base, config.out, lora=LORA if config.lora_rank else None)
        run.finish(history, started=started, **({} if preview is None else preview.compare(config.out / "preview.png")))
    return base


def _prompts(base: VideoBase, config: DreamBoothConfig) -> tuple[Prompt, Prompt]:
    if not isinstance(base, LabelBase):
        return config.prompt, config.class_prompt
    label = base.ldm.add_label(config.prompt, like=config.class_prompt)
    return label, base.ldm.labels.index(config.class_prompt)


def _made_once(accelerator: Accelerator, base: VideoBase, prompt: Prompt, config: DreamBoothConfig) -> Tensor:
    with accelerator.main_process_first():
        return prior_images(
            base,
            prompt,
            config.num_prior,
            config.out / "prior",
            num_inference_steps=config.prior_steps,
            guidance_scale=config.prior_guidance,
            seed=config.seed,
            origin=f"{config.model or 'shipped'}: {config.class_prompt}",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    run_dreambooth_stage(
        parse(DreamBoothConfig, arguments, prog="temporal-layers train dreambooth", description=__doc__)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
