"""Clips sampled during a training: files to look at, numbers to follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from temporal_layers.recipes.bases import VideoBase
from temporal_layers.recipes.data.video_io import write_video
from temporal_layers.recipes.denoising import matches_flows
from temporal_layers.recipes.metrics import frame_difference, motion_agreement
from temporal_layers.recipes.sampling.clips import sample_clips
from temporal_layers.recipes.sheets import contact_sheet
from temporal_layers.recipes.training.engine import RunFolder


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is sampled.

    Attributes:
        prompts: A clip for each; of a model that is conditioned on labels, for as many labels from the first on.
        sampling_steps: Denoising steps.
        guidance_scale: Of the prompt or label; 1 turns guidance off.
        fps: Rate of the files.
        seed: Of the noise, the same every time.
    """

    prompts: tuple[str, ...] = ("a video", "a video")
    sampling_steps: int = 20
    guidance_scale: float = 1.0
    fps: float = 10.0
    seed: int = 0


class ClipValidation:
    """The ``validate`` of `fit`: samples clips, writes them to ``validation/`` of the run, returns numbers about them.

    Args:
        base: The model under training.
        config: What to sample.
        num_frames: Of a clip.
        run: Where to write; nothing is written if None.
    """

    def __init__(self, base: VideoBase, config: ValidationConfig, num_frames: int, run: RunFolder | None) -> None:
        self.base, self.config, self.run = base, config, run
        generator = torch.Generator().manual_seed(config.seed)
        channels, height, width = base.latent_shape
        self.noise = torch.randn(len(config.prompts), channels, num_frames, height, width, generator=generator)

    def __call__(self, step: int) -> dict[str, float]:
        """Sample with the weights as they are."""
        config, unet = self.config, self.base.unet
        training = unet.training
        unet.eval()
        try:
            clips = sample_clips(
                self.base,
                self.base.conditioning(range(len(config.prompts)), config.prompts),
                self.noise,
                num_inference_steps=config.sampling_steps,
                guidance_scale=config.guidance_scale,
                eta=0.0 if matches_flows(self.base.scheduler) else 0.99,
                seed=config.seed,
            )
        finally:
            unet.train(training)
        if self.run is not None:
            folder = self.run.path / "validation"
            for number, clip in enumerate(clips):
                write_video(folder / f"step-{step:08d}-{number}.mp4", clip, config.fps)
            names = [f"{number}: {prompt}"[:40] for number, prompt in enumerate(config.prompts)]
            sheet = folder / f"step-{step:08d}.png"
            contact_sheet(dict(zip(names, clips, strict=True)), sheet, num_columns=min(8, clips.shape[2]))
        numbers = {"frame_difference": frame_difference(clips)} if clips.shape[2] > 1 else {}
        return {**numbers, "motion_agreement": motion_agreement(clips)} if clips.shape[2] > 2 else numbers
