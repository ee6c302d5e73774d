"""The runs behind the comparisons: each trains one model with one seed and measures one or two arms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from temporal_layers import TemporalTransformerConfig
from temporal_layers.adapters import TemporalConfig
from temporal_layers.recipes.bases import LabelBase
from temporal_layers.recipes.conditioning import FACTOR, ContextPlanes
from temporal_layers.recipes.driving import LABELS
from temporal_layers.recipes.evidence.comparisons import Comparison
from temporal_layers.recipes.evidence.corpus import Corpus
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm, load_shipped
from temporal_layers.recipes.metrics import clip_frechet, frame_difference, motion_agreement
from temporal_layers.recipes.sampling.clips import sample_clips
from temporal_layers.recipes.sampling.context import ContextSampling
from temporal_layers.recipes.sampling.interpolation import sample_interpolation
from temporal_layers.recipes.sampling.prediction import sample_prediction
from temporal_layers.recipes.stages.clips import TensorClips, encode_clips
from temporal_layers.recipes.stages.decoder import DEFAULT_OPTIM as DECODER_OPTIM
from temporal_layers.recipes.stages.decoder import DEFAULT_OPTIONS as DECODER_OPTIONS
from temporal_layers.recipes.stages.decoder import train_decoder
from temporal_layers.recipes.stages.decoder_metrics import measure_decoder
from temporal_layers.recipes.stages.image import psnr
from temporal_layers.recipes.stages.interpolate import train_interpolate
from temporal_layers.recipes.stages.predict import train_predict
from temporal_layers.recipes.stages.upscale import train_upscaler
from temporal_layers.recipes.stages.upscale_metrics import measure_upscaler
from temporal_layers.recipes.stages.video import load_shipped_adapter, train_video
from temporal_layers.recipes.training.engine import OptimConfig
from temporal_layers.recipes.upscaler import load_shipped_upscaler

Numbers = dict[str, float]
Arms = dict[str, Numbers]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much every run does.

    Attributes:
        steps: Optimiser steps of each training.
        batch_size: Clips of a step.
        num_frames: Frames of a clip.
        sampling_steps: Denoising steps.
        guidance_scale: Of the label.
    """

    steps: int = 200
    batch_size: int = 2
    num_frames: int = 8
    sampling_steps: int = 15
    guidance_scale: float = 1.0

    def optim(self, *, lr: float = 3e-3, share: float = 1.0) -> OptimConfig:
        """Training of a part, which takes a share of the steps."""
        steps = max(1, round(share * self.steps))
        return OptimConfig(steps=steps, batch_size=self.batch_size, lr=lr, weight_decay=0.0, ema_decay=0.98)


GIVEN = 2
CONTEXT_SCALE = 1.5
"""Of context guidance; the paper does not say what it used."""

LATENT_NOISE = 0.3
"""Standard deviation, in that of the latents, of the noise on latents that a decoder is measured on."""

ATTENTION_ONLY = TemporalConfig(
    resblock=None, transformer=TemporalTransformerConfig(attentions=("self", "cross", "self", "cross"))
)
"""Twice the attention layers and no convolution: 3.04 M temporal parameters on the shipped model against 3.22 M."""


def numbers(clips: Tensor, corpus: Corpus) -> Numbers:
    """What is measured of generated clips ``(clips, 3, frames, height, width)`` in [0, 1]."""
    return {
        "frechet": clip_frechet(clips, corpus.real[:, :, : clips.shape[2]]),
        "difference": frame_difference(clips),
        "motion": motion_agreement(clips),
    }


def noise_for(corpus: Corpus, latent_shape: tuple[int, int, int], num_frames: int, seed: int) -> Tensor:
    """Starting noise of as many clips as ``corpus.others`` has, the same for all arms of a seed."""
    channels, height, width = latent_shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(corpus.others), channels, num_frames, height, width, generator=generator)


def generated(base: LabelBase, corpus: Corpus, scale: Scale, seed: int, *, frame_by_frame: bool = False) -> Tensor:
    """Clips with the labels of ``corpus.others``."""
    return sample_clips(
        base,
        {"labels": corpus.other_labels},
        noise_for(corpus, base.latent_shape, scale.num_frames, seed),
        frame_by_frame=frame_by_frame,
        num_inference_steps=scale.sampling_steps,
        guidance_scale=scale.guidance_scale,
        eta=0.99,
        seed=seed,
        batch_size=4,
    )


def untrained(corpus: Corpus, scale: Scale, seed: int) -> Arms:
    """Nothing to train: other real clips, and the image model frame by frame."""
    base = LabelBase(load_shipped())
    return {
        "real": numbers(corpus.others[:, :, : scale.num_frames], corpus),
        "frame_by_frame": numbers(generated(base, corpus, scale, seed, frame_by_frame=True), corpus),
    }


def video(corpus: Corpus, scale: Scale, seed: int, temporal: TemporalConfig | None = None) -> Numbers:
    """Temporal alignment of the shipped image model."""
    base = LabelBase(load_shipped())
    train_video(
        base,
        TensorClips(corpus.latents, {"labels": corpus.labels}),
        scale.optim(),
        num_frames=scale.num_frames,
        temporal=temporal,
        seed=seed,
        progress=False,
    )
    return numbers(generated(base, corpus, scale, seed), corpus)


def end_to_end(corpus: Corpus, scale: Scale, seed: int) -> Numbers:
    """The same network with no image pretraining, all of it trained on the clips; the autoencoder is kept."""
    shipped = load_shipped()
    fresh = build_image_ldm(ImageLDMConfig(), LABELS, seed=seed)
    shipped.unet, shipped.conditioner = fresh.unet, fresh.conditioner
    base = LabelBase(shipped)
    train_video(
        base,
        TensorClips(corpus.latents, {"labels": corpus.labels}),
        scale.optim(lr=2e-3),
        num_frames=scale.num_frames,
        train="all",
        seed=seed,
        progress=False,
    )
    return numbers(generated(base, corpus, scale, seed), corpus)


def predict(corpus: Corpus, scale: Scale, seed: int) -> Arms:
    """Prediction from two given frames, with and without context guidance; and with the frames of another clip.

    It starts from the shipped temporal layers.
    """
    base, _ = load_shipped_adapter()
    clips = TensorClips(corpus.latents, {"labels": corpus.labels})
    adapter, _ = train_predict(
        base, clips, scale.optim(), num_frames=scale.num_frames, inject="both", seed=seed, progress=False
    )
    planes, truth = ContextPlanes.of(adapter), corpus.others[:, :, : scale.num_frames]
    latents = encode_clips(base, truth[:, :, :GIVEN])
    arms = {}
    for name, given, guidance in (
        ("predict", latents, 1.0),
        ("predict_guided", latents, CONTEXT_SCALE),
        ("predict_other_clip", latents.roll(1, 0), 1.0),
    ):
        options = ContextSampling(
            num_inference_steps=scale.sampling_steps, context_scale=guidance, eta=0.99, seed=seed, batch_size=4
        )
        made = sample_prediction(
            base, planes, {"labels": corpus.other_labels}, given, scale.num_frames, options, window=scale.num_frames
        )
        frames = base.decode(made).cpu()
        arms[name] = {**numbers(frames, corpus), "psnr": psnr(frames[:, :, GIVEN:], truth[:, :, GIVEN:])}
    return arms


def interpolate(corpus: Corpus, scale: Scale, seed: int) -> Arms:
    """Three frames between two at the finest rate, by the model and by linear blending of the frames."""
    base, _ = load_shipped_adapter()
    clips = TensorClips(corpus.latents, {"labels": corpus.labels})
    adapter, _ = train_interpolate(base, clips, scale.optim(), inject="both", seed=seed, progress=False)
    half = len(corpus.others) // 2
    truth, labels = corpus.others[:half], corpus.other_labels[:half]
    keys = encode_clips(base, truth[:, :, ::FACTOR])
    options = ContextSampling(num_inference_steps=scale.sampling_steps, eta=0.99, seed=seed, batch_size=4)
    planes = ContextPlanes.of(adapter)
    made = base.decode(sample_interpolation(base, planes, {"labels": labels}, keys, options, rate=1.0)).cpu()
    size = (truth.shape[2], *truth.shape[3:])
    blended = F.interpolate(truth[:, :, ::FACTOR], size, mode="trilinear", align_corners=True)
    between = [frame for frame in range(truth.shape[2]) if frame % FACTOR]
    return {
        name: {
            "frechet": clip_frechet(frames, corpus.real),
            "difference": frame_difference(frames),
            "motion": motion_agreement(frames),
            "psnr": psnr(frames[:, :, between], truth[:, :, between]),
        }
        for name, frames in (("linear_blending", blended), ("interpolate", made))
    }


def decoder(corpus: Corpus, scale: Scale, seed: int) -> Arms:
    """Reconstruction of held-out clips before and after the decoder got temporal layers.

    Once from their latents, and once from latents with noise of its own in each frame, as a sampler leaves it.
    """
    vae = load_shipped().vae
    truth = corpus.others[:, :, : scale.num_frames]
    optim = dataclasses.replace(DECODER_OPTIM, steps=scale.steps)
    adapter, _ = train_decoder(vae, corpus.frames, optim, DECODER_OPTIONS, seed=seed, progress=False)
    arms = {}
    for name, noise in (("decoder", 0.0), ("decoder_noisy", LATENT_NOISE)):
        for suffix, state in (("", nullcontext()), ("_before", adapter.disabled())):
            with state:
                found = measure_decoder(vae, truth, latent_noise=noise, seed=seed)
            arms[name + suffix] = {"frechet": found["clip_frechet"], "flicker": found["flicker"], "psnr": found["psnr"]}
    return arms


def upscale(corpus: Corpus, scale: Scale, seed: int) -> Arms:
    """The shipped upscaler frame by frame, and with temporal layers trained on patches."""
    upscaler = load_shipped_upscaler()
    optim = scale.optim()
    train_upscaler(
        upscaler, corpus.frames, None, optim, num_frames=scale.num_frames, patch=32, seed=seed, progress=False
    )
    truth = corpus.others[:, :, : scale.num_frames]
    found = measure_upscaler(upscaler, truth, seed=seed, window=scale.num_frames)
    names = {"bilinear": "bilinear", "frame-wise": "upscale_frame_by_frame", "video": "upscale"}
    return {
        names[name]: {
            "frechet": row["clip_frechet"],
            "difference": row["frame_difference"],
            "flicker": row["flicker"],
            "psnr": row["psnr"],
        }
        for name, row in found.items()
    }


JOBS: dict[str, Callable[[Corpus, Scale, int], Arms]] = {
    "untrained": untrained,
    "video": lambda *given: {"video": video(*given)},
    "attention_only": lambda *given: {"attention_only": video(*given, temporal=ATTENTION_ONLY)},
    "end_to_end": lambda *given: {"end_to_end": end_to_end(*given)},
    "predict": predict,
    "interpolate": interpolate,
    "decoder": decoder,
    "upscale": upscale,
}
"""By name: what gives numbers for one or more arms from the clips, the scale and a seed."""

COMPARISONS: tuple[Comparison, ...] = (
    Comparison(
        question="temporal layers, or every frame by itself",
        without="frame_by_frame",
        with_it="video",
        paper="frame-wise models flicker (figure 3)",
    ),
    Comparison(
        question="temporal attention and convolution, or attention alone, at equal size",
        without="attention_only",
        with_it="video",
        paper="FVD 704.41 → 534.17",
    ),
    Comparison(
        question="from a trained image model, or all from scratch on video",
        without="end_to_end",
        with_it="video",
        paper="FVD 1155.10 → 534.17",
    ),
    Comparison(
        question="prediction with context guidance, or without",
        without="predict",
        with_it="predict_guided",
        paper="FVD 534.17 → 508.82",
    ),
    Comparison(
        question="prediction from the clip's own frames, or another's",
        without="predict_other_clip",
        with_it="predict",
        metric="psnr",
        higher=True,
        paper="not measured",
    ),
    Comparison(
        question="interpolation by the model, or linear blending: likeness of the clips",
        without="linear_blending",
        with_it="interpolate",
        paper="not measured",
    ),
    Comparison(
        question="interpolation by the model, or linear blending: the frames between",
        without="linear_blending",
        with_it="interpolate",
        metric="psnr",
        higher=True,
        paper="not measured",
    ),
    Comparison(
        question="temporal decoder, or frame by frame: latents as the encoder makes them",
        without="decoder_before",
        with_it="decoder",
        paper="FVD 390.88 → 32.94 (driving), 35.82 → 18.66 (WebVid)",
    ),
    Comparison(
        question="the same: latents with noise in each frame",
        without="decoder_noisy_before",
        with_it="decoder_noisy",
        paper="not measured",
    ),
    Comparison(
        question="the same: flicker",
        without="decoder_noisy_before",
        with_it="decoder_noisy",
        metric="flicker",
        paper="not measured",
    ),
    Comparison(
        question="upscaler with temporal layers, or frame by frame",
        without="upscale_frame_by_frame",
        with_it="upscale",
        paper="FVD 165.98 → 45.39",
    ),
    Comparison(
        question="the same: flicker",
        without="upscale_frame_by_frame",
        with_it="upscale",
        metric="flicker",
        paper="not measured",
    ),
)
