"""Stage "decoder": fine-tunes the autoencoder's decoder on clips, with temporal layers (Video LDM, section 3.1.1).

Decoding frame by frame flickers. The decoder gets temporal layers and is trained on short clips against a discriminator
that sees patches of clips; the encoder stays as it is, and with it the latents and every model trained on them.

    python -m temporal_layers.recipes.stages.decoder --out runs/decoder
"""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers import TemporalConvConfig, TemporalResBlockConfig
from temporal_layers.adapters import TemporalAdapter, TemporalConfig, adapter_of
from temporal_layers.recipes.data.video_io import write_video
from temporal_layers.recipes.image_ldm import ImageLDM, load_shipped
from temporal_layers.recipes.sheets import contact_sheet, side_by_side
from temporal_layers.recipes.stages.decoder_batches import DecoderOptions, DecoderStream, check_frame_size, clip_stream
from temporal_layers.recipes.stages.decoder_loss import DecoderObjective
from temporal_layers.recipes.stages.decoder_metrics import decode_clips, measure_reconstruction
from temporal_layers.recipes.stages.discriminator import DiscriminatorConfig, PatchDiscriminator3D
from temporal_layers.recipes.stages.image import HELD_OUT
from temporal_layers.recipes.stages.perceptual import perceptual_loss
from temporal_layers.recipes.stages.video import DRIVING_FPS, driving_clips, trainable_adapter
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, fit, make_accelerator

DECODER_LAYERS = TemporalConfig(
    resblock=TemporalResBlockConfig(timestep_embedding=False, norm="frame"), transformer=None
)
"""The paper's layers, with norms over each frame: a decoder trained on short clips does the same in long ones, and
exactly the same in chunks."""

DEFAULT_OPTIM = OptimConfig(steps=300, batch_size=2, lr=1e-3, warmup=0.1, weight_decay=0.0, ema_decay=0.98)

_DISCRIMINATOR_BETAS = (0.5, 0.9)
"""VQGAN's; long memory of old gradients lags behind a decoder that moves."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Stage "decoder" on the generated corpus and the shipped autoencoder.

    Attributes:
        out: Folder of the run; ``adapter/`` in it is what ``TemporalAdapter.from_pretrained`` loads, and ``model/``
            (with ``train="decoder"``) the autoencoder to load it into.
        seed: Seed of the data, the initial weights, the batches and the noise.
        num_clips: Clips to render and train on.
        clip_frames: Frames of each; windows of ``options.num_frames`` are drawn from them.
        num_held_out: Other clips, to measure on before and after.
        optim: Training of decoder and discriminator.
        engine: How the run is carried out.
        options: Losses, crops, discriminator, what is trained.
        svd_layout: Whether to add Stable Video Diffusion's convolution over frames behind the last layer.
        fps: Frames per second of the clips.
    """

    out: Path = Path("runs/decoder")
    seed: int = 0
    num_clips: int = 64
    clip_frames: int = 16
    num_held_out: int = 16
    optim: OptimConfig = DEFAULT_OPTIM
    engine: EngineConfig = EngineConfig()
    options: DecoderOptions = DecoderOptions(discriminator=DiscriminatorConfig(width=16, num_layers=2))
    svd_layout: bool = False
    fps: float = DRIVING_FPS

    def __post_init__(self) -> None:
        if self.clip_frames < self.options.num_frames:
            raise ValueError(
                f"DecoderConfig: expected clip_frames of at least options.num_frames={self.options.num_frames}, got "
                f"{self.clip_frames}"
            )
        if min(self.num_clips, self.num_held_out) < 1:
            raise ValueError(
                f"DecoderConfig: expected num_clips and num_held_out of at least 1, got num_clips={self.num_clips} and "
                f"num_held_out={self.num_held_out}"
            )


def train_decoder(
    vae: nn.Module,
    clips: Float[Tensor, "clips 3 frames height width"] | Stream,
    config: OptimConfig = DEFAULT_OPTIM,
    options: DecoderOptions | None = None,
    *,
    temporal: TemporalConfig | None = None,
    seed: int = 0,
    on_checkpoint: Callable[[TemporalAdapter, int], None] | None = None,
    **engine: Any,
) -> tuple[TemporalAdapter, list[float]]:
    """Give the decoder of an autoencoder temporal layers and train it on clips; the encoder is left alone.

    Args:
        vae: An autoencoder of diffusers with an image decoder, or one that has temporal layers already.
        clips: Values in [0, 1], floating or bytes; or a stream whose batches begin with such a tensor.
        config: Steps, learning rate and so on.
        options: Everything else.
        temporal: What to inject; `DECODER_LAYERS` if None. Leave it out to go on with layers that are there.
        seed: Seed of the initial weights, the patches and the noise.
        on_checkpoint: Called every ``config.checkpoint_every`` steps with the adapter and the number of steps.
        **engine: Further arguments of ``engine.fit``: ``accelerator``, ``run``, ``engine``, ``progress``, ``validate``.

    Returns:
        The adapter, and the loss of the decoder at each step.

    Raises:
        ValueError: If the model is no autoencoder with an image decoder, or clips or crops do not fit it.
    """
    if not (hasattr(vae, "encode") and isinstance(getattr(vae, "decoder", None), nn.Module)):
        raise ValueError(
            f"train_decoder: expected an autoencoder of diffusers with a decoder that runs once, got "
            f"{type(vae).__name__}; pass pipe.vae or pipe.vqvae"
        )
    options = options or DecoderOptions()
    source = clip_stream(clips, seed=seed) if isinstance(clips, Tensor) else clips
    if options.crop:
        check_frame_size(vae, (options.crop, options.crop))
    adapter = _prepared(vae, temporal, options.train, seed=seed)
    groups: Any = trainable_groups(adapter, config)
    discriminator = None
    if options.disc_weight > 0:
        discriminator = _discriminator(vae, options, seed=seed)
        groups = {"generator": groups, "discriminator": _discriminator_groups(discriminator, config, options)}
    objective = DecoderObjective(
        vae,
        discriminator,
        perceptual=perceptual_loss(options.perceptual, vae),
        perceptual_weight=options.perceptual_weight,
        disc_weight=options.disc_weight,
    )
    accumulation = (engine.get("engine") or EngineConfig()).accumulation
    history = fit(
        objective,
        DecoderStream(source, vae, options, seed=seed, accumulation=accumulation),
        config,
        name="decoder",
        seed=seed,
        groups=groups,
        on_checkpoint=None if on_checkpoint is None else functools.partial(on_checkpoint, adapter),
        **engine,
    )
    vae.eval()
    return adapter, history


def _prepared(vae: nn.Module, temporal: TemporalConfig | None, train: str, *, seed: int) -> TemporalAdapter:
    """Inject what is missing, and make trainable what is to be trained."""
    if temporal is None and getattr(vae, "_temporal_state", None) is None:
        temporal = DECODER_LAYERS
    adapter = trainable_adapter(vae, temporal, "temporal", seed=seed)
    if train == "decoder":
        vae.decoder.requires_grad_(True)
        if getattr(vae, "post_quant_conv", None) is not None:
            vae.post_quant_conv.requires_grad_(True)
    return adapter


def trainable_groups(adapter: TemporalAdapter, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups of what requires gradients, as ``TemporalAdapter.parameter_groups`` makes them."""
    groups = adapter.parameter_groups(lr=config.lr, spatial_lr=config.lr, weight_decay=config.weight_decay)
    kept = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    return [group for group in kept if group["params"]]


def _discriminator(vae: nn.Module, options: DecoderOptions, *, seed: int) -> PatchDiscriminator3D:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        made = PatchDiscriminator3D(config=options.discriminator)
    if options.crop and options.crop < made.smallest_frame:
        raise ValueError(
            f"train_decoder: expected a crop of at least {made.smallest_frame} pixels for a discriminator of "
            f"num_layers={options.discriminator.num_layers}, got {options.crop}; take larger crops or fewer layers"
        )
    place = next(vae.parameters())
    return made.to(place.device, torch.promote_types(place.dtype, torch.float32))


def _discriminator_groups(
    discriminator: nn.Module, config: OptimConfig, options: DecoderOptions
) -> list[dict[str, Any]]:
    rate = config.lr if options.disc_lr is None else options.disc_lr
    parameters = list(discriminator.parameters())
    group = {"params": parameters, "lr": rate, "weight_decay": 0.0, "betas": _DISCRIMINATOR_BETAS}
    return [{"name": "discriminator", **group}]


def run_decoder_stage(config: DecoderConfig) -> dict[str, dict[str, float]]:
    """Run the whole stage on the shipped image LDM and write weights, losses, measures and pictures to ``config.out``.

    Returns:
        What ``result.json`` holds: measures of the held-out clips, decoded frame by frame (``before``) and by the
        trained decoder (``after``), from clean latents and, with ``options.latent_noise``, from noisy ones
        (``before_noisy``, ``after_noisy``).
    """
    accelerator = make_accelerator(config.engine, config.out)
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    started = time.perf_counter()
    ldm = load_shipped()
    accelerator.print(f"rendering {config.num_clips + config.num_held_out} clips")
    clips = _rendered(ldm, config, config.num_clips, 0)
    held_out = _rendered(ldm, config, config.num_held_out, HELD_OUT)
    vae = ldm.vae.to(accelerator.device)
    levels = {"": 0.0} | ({"_noisy": config.options.latent_noise} if config.options.latent_noise else {})
    before = {name: decode_clips(vae, held_out, latent_noise=level) for name, level in levels.items()}
    adapter, _ = train_decoder(
        vae,
        clips,
        config.optim,
        config.options,
        temporal=replace(DECODER_LAYERS, conv_out=TemporalConvConfig() if config.svd_layout else None),
        seed=config.seed,
        accelerator=accelerator,
        run=run,
        engine=config.engine,
    )
    after = {name: decode_clips(vae, held_out, latent_noise=level) for name, level in levels.items()}
    result = {
        f"{when}{name}": measure_reconstruction(output, held_out)
        for name in levels
        for when, output in (("before", before[name]), ("after", after[name]))
    }
    if run is not None:
        _save(adapter, config)
        shown = "_noisy" if "_noisy" in levels else ""
        _show(config, held_out[0], before[shown][0], after[shown][0])
        run.write("result.json", {**result, "seconds": round(time.perf_counter() - started, 1)})
    return result


def _rendered(ldm: ImageLDM, config: DecoderConfig, count: int, first: int) -> Tensor:
    # Training clips of the image stage are fair game here, held-out ones are not.
    clips = driving_clips(ldm.frame_size, count, config.clip_frames, fps=config.fps, first=first, seed=config.seed)
    return torch.stack([clip.frames for clip in clips])


def _save(adapter: TemporalAdapter, config: DecoderConfig) -> None:
    adapter.save_pretrained(config.out / "adapter")
    if config.options.train == "decoder":
        plain = copy.deepcopy(adapter.model)
        adapter_of(plain).remove()
        plain.save_pretrained(config.out / "model")


def _show(config: DecoderConfig, true: Tensor, before: Tensor, after: Tensor) -> None:
    """A contact sheet, and a video of the three clips side by side, enlarged twice."""
    clips = {"true": true, "decoded frame by frame": before, "temporal decoder": after}
    contact_sheet(clips, config.out / "before-after.png", num_columns=min(8, true.shape[1]), scale=2)
    write_video(config.out / "before-after.mp4", side_by_side(clips, scale=2), config.fps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    config = parse(DecoderConfig, arguments, prog="temporal-layers train decoder", description=__doc__)
    for name, values in run_decoder_stage(config).items():
        print(f"{name:<13} " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
