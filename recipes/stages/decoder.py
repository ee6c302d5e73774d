"""Stage "decoder": fine-tunes the autoencoder's decoder on clips, with temporal layers (Video LDM, section 3.1.1).

Decoding frame by frame flickers. The decoder gets temporal layers and is trained on short clips against a discriminator
that sees patches of clips; the encoder stays as it is, and with it the latents and every model trained on them.

    temporal-layers train decoder --out runs/decoder
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
from diffusers import AutoModel
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers import TemporalConvConfig, TemporalResBlockConfig
from temporal_layers.adapters import TemporalAdapter, TemporalConfig, adapter_of
from temporal_layers.recipes.data.loader import LoaderConfig, open_stream
from temporal_layers.recipes.data.sampling import Bucket, SamplingConfig
from temporal_layers.recipes.data.sources import DataConfig
from temporal_layers.recipes.data.video_io import write_video
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.sheets import contact_sheet, side_by_side
from temporal_layers.recipes.stages.clips import DRIVING
from temporal_layers.recipes.stages.decoder_batches import DecoderOptions, DecoderStream, check_frame_size, clip_stream
from temporal_layers.recipes.stages.decoder_loss import DecoderObjective
from temporal_layers.recipes.stages.decoder_metrics import as_unit, decode_clips, measure_reconstruction
from temporal_layers.recipes.stages.discriminator import DiscriminatorConfig, PatchDiscriminator3D
from temporal_layers.recipes.stages.image import HELD_OUT
from temporal_layers.recipes.stages.perceptual import perceptual_loss
from temporal_layers.recipes.stages.temporal import layers_in_file, trainable_adapter
from temporal_layers.recipes.stages.upscale import read_clips
from temporal_layers.recipes.training.configs import parse
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, fit, make_accelerator
from temporal_layers.recipes.training.streams import Stream

DECODER_LAYERS = TemporalConfig(
    resblock=TemporalResBlockConfig(timestep_embedding=False, norm="frame"), transformer=None
)
"""The paper's layers, with norms over each frame: a decoder trained on short clips does the same in long ones, and
exactly the same in chunks."""

DEFAULT_OPTIM = OptimConfig(steps=300, batch_size=1, lr=2e-3, warmup=0.1, weight_decay=0.0, ema_decay=0.98)

DEFAULT_OPTIONS = DecoderOptions(
    latent_noise=0.3,
    perceptual="encoder",
    disc_weight=1.0,
    disc_start=100,
    disc_lr=3e-4,
    discriminator=DiscriminatorConfig(width=16, num_layers=2),
)
"""For the small frames of the generated corpus and a run of minutes. At this learning rate the discriminator begins to
tell decoded clips from true ones after about 200 steps; at 1e-3 it did not within 400."""

HELD_FRAMES = 16
"""Length of held-out clips."""

_DISCRIMINATOR_BETAS = (0.5, 0.9)
"""VQGAN's; long memory of old gradients lags behind a decoder that moves."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Stage "decoder"; by default on the autoencoder that comes with the package and the generated corpus.

    Attributes:
        out: Folder of the run; ``adapter/`` in it is what ``TemporalAdapter.from_pretrained`` loads, and ``model/``
            (with ``options.train="decoder"``) the autoencoder to load it into.
        seed: Seed of the initial weights, the patches and the noise.
        model: Autoencoder to start from: a folder or a repository; empty for the one that comes with the package.
        subfolder: Of ``model``, for instance ``vae`` in that of a pipeline.
        svd_layout: Whether to add Stable Video Diffusion's convolution over frames behind the last layer.
        temporal: File of a ``TemporalConfig`` (.yaml, .toml or .json) that says what to inject; `DECODER_LAYERS` if
            None.
        start_from: Folder of an adapter to go on from, in place of fresh layers.
        data: The videos.
        size: Height and width that they are brought to.
        fps: Rate of the clips; None keeps that of the videos.
        stride: Or: every ``stride``-th frame.
        spare_frames: Frames in memory beyond ``options.num_frames``, from which the window is drawn.
        streamed: Decode videos as they are needed, in place of holding a clip of each in memory.
        loader: How videos are decoded.
        options: Losses, patches, discriminator, what is trained.
        optim: Training of decoder and discriminator.
        engine: How the run is carried out.
        held_out: Clips of the generated corpus to measure on, before and after; 0 for none.
    """

    out: Path = Path("runs/decoder")
    seed: int = 0
    model: str = ""
    subfolder: str = ""
    svd_layout: bool = False
    temporal: Path | None = None
    start_from: Path | None = None
    data: DataConfig = replace(DRIVING, clips=64, clip_frames=HELD_FRAMES)
    size: tuple[int, int] = (64, 96)
    fps: float | None = None
    stride: int = 1
    spare_frames: int = 8
    streamed: bool = False
    loader: LoaderConfig = LoaderConfig()
    options: DecoderOptions = DEFAULT_OPTIONS
    optim: OptimConfig = DEFAULT_OPTIM
    engine: EngineConfig = EngineConfig()
    held_out: int = 16

    def __post_init__(self) -> None:
        if min(self.size) < 1 or self.spare_frames < 0 or self.held_out < 0:
            raise ValueError(
                "DecoderConfig: expected size of at least 1, spare_frames and held_out of at least 0, got size="
                f"{self.size}, spare_frames={self.spare_frames}, held_out={self.held_out}"
            )
        if (self.temporal is not None) + (self.start_from is not None) + self.svd_layout > 1:
            raise ValueError(
                "DecoderConfig: expected one of temporal, start_from and svd_layout, each of which says what the "
                f"layers are, got temporal={self.temporal}, start_from={self.start_from}, svd_layout={self.svd_layout}"
            )
        if self.held_out and self.data.path != "driving":
            raise ValueError(
                f"DecoderConfig: held_out: expected 0 with data.path={self.data.path!r}, got {self.held_out}: held-out "
                "clips are those of the generated corpus; measure other ones with measure_decoder"
            )
        if self.engine.validate_every and not self.held_out:
            raise ValueError(
                "DecoderConfig: engine.validate_every: expected 0 without held_out clips, got "
                f"{self.engine.validate_every}; say how many with held_out"
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


def load_autoencoder(model: str = "", subfolder: str = "") -> nn.Module:
    """An autoencoder in float32: the one that comes with the package, or any that diffusers can load.

    Args:
        model: Folder or repository; empty for that of the package.
        subfolder: Where it is in there.
    """
    if not model:
        return load_shipped().vae
    return AutoModel.from_pretrained(model, subfolder=subfolder or None, torch_dtype=torch.float32).eval()


def run_decoder_stage(config: DecoderConfig) -> dict[str, dict[str, float]]:
    """Run the whole stage and write weights, losses, configuration, measures and pictures to ``config.out``.

    Returns:
        Measures of the held-out clips, if any, decoded frame by frame (``before``) and by the trained decoder
        (``after``), from clean latents and, with ``options.latent_noise``, from noisy ones (``before_noisy``,
        ``after_noisy``).
    """
    accelerator = make_accelerator(config.engine, config.out)
    run = RunFolder(config.out, config) if accelerator.is_main_process else None
    started = time.perf_counter()
    vae = load_autoencoder(config.model, config.subfolder).to(accelerator.device)
    temporal = layers_in_file(config.temporal, vae)
    if config.svd_layout:
        temporal = replace(DECODER_LAYERS, conv_out=TemporalConvConfig())
    check_frame_size(vae, config.size)
    clips = _training_clips(config)
    held_out = _Measured(config, vae) if config.held_out else None
    if config.start_from is not None:
        TemporalAdapter.from_pretrained(vae, config.start_from)
    adapter, history = train_decoder(
        vae,
        clips,
        config.optim,
        config.options,
        temporal=temporal,
        seed=config.seed,
        accelerator=accelerator,
        run=run,
        engine=config.engine,
        validate=None if held_out is None else held_out.validate,
    )
    result = {} if held_out is None else held_out.compare()
    if run is not None:
        _save(adapter, config)
        if held_out is not None:
            held_out.show(config.out)
        run.finish(history, started=started, **result)
    return result


def _training_clips(config: DecoderConfig) -> Tensor | Stream:
    held = config.options.num_frames + (0 if config.streamed else config.spare_frames)
    sampling = SamplingConfig(buckets=(Bucket(held, *config.size),), fps=config.fps, stride=config.stride)
    if config.streamed:
        return open_stream(config.data, sampling, config.loader, seed=config.seed)
    return read_clips(config.data, sampling, config.loader, seed=config.seed)[0]


class _Measured:
    """Held-out clips, as they are, as decoded before the training, and as decoded now."""

    def __init__(self, config: DecoderConfig, vae: nn.Module) -> None:
        self.vae, self.rate = vae, config.data.driving.fps
        data = replace(config.data, first=HELD_OUT, clips=config.held_out, clip_frames=HELD_FRAMES)
        sampling = SamplingConfig(buckets=(Bucket(HELD_FRAMES, *config.size),), stride=1)
        self.true = as_unit(read_clips(data, sampling, config.loader)[0])
        noise = config.options.latent_noise
        self.levels = {"": 0.0} | ({"_noisy": noise} if noise else {})
        self.before = self._decoded()

    def _decoded(self) -> dict[str, Tensor]:
        return {name: decode_clips(self.vae, self.true, latent_noise=level) for name, level in self.levels.items()}

    def validate(self, step: int) -> dict[str, float]:
        """Measures of the decoder as it is."""
        training = self.vae.training
        self.vae.eval()
        found = {name: measure_reconstruction(output, self.true) for name, output in self._decoded().items()}
        self.vae.train(training)
        return {f"{key}{name}": value for name, values in found.items() for key, value in values.items()}

    def compare(self) -> dict[str, dict[str, float]]:
        """Measures before and after the training."""
        self.after = self._decoded()
        return {
            f"{when}{name}": measure_reconstruction(clips[name], self.true)
            for name in self.levels
            for when, clips in (("before", self.before), ("after", self.after))
        }

    def show(self, out: Path) -> None:
        """A contact sheet, and a video, of the first clip three times, enlarged twice."""
        name = list(self.levels)[-1]
        clips = {
            "true": self.true[0],
            "decoded frame by frame": self.before[name][0],
            "temporal decoder": self.after[name][0],
        }
        contact_sheet(clips, out / "before-after.png", num_columns=8, scale=2)
        write_video(out / "before-after.mp4", side_by_side(clips, scale=2), self.rate)


def _save(adapter: TemporalAdapter, config: DecoderConfig) -> None:
    adapter.save_pretrained(config.out / "adapter")
    if config.options.train == "decoder":
        plain = copy.deepcopy(adapter.model)
        adapter_of(plain).remove()
        plain.save_pretrained(config.out / "model")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the stage; returns the exit code."""
    config = parse(DecoderConfig, arguments, prog="temporal-layers train decoder", description=__doc__)
    for name, values in run_decoder_stage(config).items():
        print(f"{name:<13} " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
