"""What a tuning did, in motion: clips of the subject and of its class before and after, and how near the look came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from temporal_layers import fold_frames
from temporal_layers.adapters import TemporalAdapter
from temporal_layers.recipes.bases import VideoBase
from temporal_layers.recipes.metrics import frame_difference
from temporal_layers.recipes.sampling.clips import sample_clips
from temporal_layers.recipes.sheets import contact_sheet
from temporal_layers.recipes.stages.personal import Prompt, TwoTexts, frozen_text
from temporal_layers.recipes.stages.video import SHIPPED_ADAPTER


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Clips that are sampled before and after the tuning, from the same noise, with temporal layers that do not change.

    Attributes:
        adapter: Folder or repository of temporal layers; empty for those that come with the package with the image
            model that does, and for no clips with others.
        clips: Number of clips; 0 for none.
        num_frames: Frames of each.
        sampling_steps: Denoising steps.
        guidance_scale: Of the prompt.
        eta: Fresh noise in each step; see `sample_clips`.
        seed: Of the noise.
    """

    adapter: str = ""
    clips: int = 2
    num_frames: int = 8
    sampling_steps: int = 20
    guidance_scale: float = 1.5
    eta: float = 0.99
    seed: int = 0

    def source(self, model: str) -> str | Path | None:
        """Where the temporal layers of an image model are; None for no preview."""
        if not self.clips:
            return None
        return self.adapter or (None if model else SHIPPED_ADAPTER)


def look_distance(images: Float[Tensor, "n 3 height width"], others: Float[Tensor, "m 3 height2 width2"]) -> float:
    """How far two sets of images are apart in their colours: of the mean image in 4 x 6 cells, root mean square."""
    cells = [F.adaptive_avg_pool2d(images.float(), (4, 6)).mean(0) for images in (images, others)]
    return (cells[0] - cells[1]).square().mean().sqrt().item()


class Preview:
    """Samples the same clips before and after, and compares them with the subject.

    Args:
        base: The image model before the tuning, which gets temporal layers.
        adapter: Where they are.
        prompts: How to ask for the subject and for its class.
        frames: The subject.
        config: What to sample.
    """

    def __init__(
        self,
        base: VideoBase,
        adapter: str | Path,
        prompts: Sequence[Prompt],
        frames: Float[Tensor, "images 3 height width"],
        config: PreviewConfig,
    ) -> None:
        TemporalAdapter.from_pretrained(base.unet, adapter)
        self.base, self.prompts, self.config = TwoTexts(base, frozen_text(base)), list(prompts), config
        # As near as the autoencoder lets any image model come.
        self.frames = torch.cat([base.decode(base.encode(part)).cpu() for part in frames.split(16)])
        self.before = self.sample()

    def sample(self) -> list[Float[Tensor, "clips 3 frames height width"]]:
        """Clips of the subject and of its class; the temporal layers read the text encoder from before."""
        config = self.config
        channels, height, width = self.base.latent_shape
        noise = torch.randn(
            (config.clips, channels, config.num_frames, height, width),
            generator=torch.Generator().manual_seed(config.seed),
        )
        sampled = []
        for prompt in self.prompts:
            labels, captions = ([prompt], [""]) if isinstance(prompt, int) else ([0], [prompt])
            sampled.append(
                sample_clips(
                    self.base,
                    self.base.conditioning(labels * config.clips, captions * config.clips),
                    noise,
                    num_inference_steps=config.sampling_steps,
                    guidance_scale=config.guidance_scale,
                    eta=config.eta,
                    seed=config.seed,
                )
            )
        return sampled

    def compare(self, path: Path) -> dict[str, float]:
        """Sample again, write all clips to a picture, and say in numbers what changed.

        Returns:
            The distance of the look of the sampled subject to the subject before and after, that of the class after to
            the class before, and the mean change from frame to frame of the subject's clips before and after.
        """
        after = self.sample()
        titles = ("subject before", "class before", "subject after", "class after")
        clips = dict(zip(titles, (*self.before, *after), strict=True))
        rows = {f"{title} {i}": clip for title, some in clips.items() for i, clip in enumerate(some)}
        contact_sheet(rows, path, num_columns=min(8, self.config.num_frames))
        images = {title: fold_frames(some) for title, some in clips.items()}
        return {
            "subject_distance_before": look_distance(images["subject before"], self.frames),
            "subject_distance_after": look_distance(images["subject after"], self.frames),
            "class_distance": look_distance(images["class after"], images["class before"]),
            "frame_difference_before": frame_difference(clips["subject before"]),
            "frame_difference_after": frame_difference(clips["subject after"]),
        }
