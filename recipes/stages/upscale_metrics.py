"""What temporal layers change in upscaled clips: beside the real ones, frame by frame, and bilinear."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from temporal_layers.recipes.metrics import clip_frechet, frame_difference
from temporal_layers.recipes.sampling.upscaling import upscale_clips
from temporal_layers.recipes.stages.image import psnr
from temporal_layers.recipes.upscaler import Upscaler, shrunk


def measure_upscaler(
    upscaler: Upscaler, clips: Float[Tensor, "clips 3 frames height width"], **sampling: Any
) -> dict[str, dict[str, float]]:
    """Compare upscaled clips with what they were made from, frame by frame, with temporal layers, and bilinear.

    Args:
        upscaler: With temporal layers; without, there is no row ``video``.
        clips: In [0, 1], at least six of 16 frames.
        **sampling: Further arguments of `upscale_clips`.

    Returns:
        By name of the upscaling (``bilinear``, ``frame-wise``, ``video``): ``clip_frechet`` against the real clips, the
        ``flicker`` (mean absolute error of the changes from frame to frame), the ``frame_difference`` and the ``psnr``.
    """
    low_res, (height, width) = shrunk(clips, upscaler.factor), clips.shape[-2:]
    bilinear = F.interpolate(low_res.flatten(0, 1), (height, width), mode="bilinear")
    upscaled = {
        "bilinear": bilinear.unflatten(0, clips.shape[:2]),
        "frame-wise": upscale_clips(upscaler, low_res, frame_by_frame=True, **sampling),
    }
    if getattr(upscaler.unet, "_temporal_state", None) is not None:
        upscaled["video"] = upscale_clips(upscaler, low_res, **sampling)
    return {
        name: {
            "clip_frechet": clip_frechet(made, clips),
            "flicker": (made.diff(dim=2) - clips.diff(dim=2)).abs().mean().item(),
            "frame_difference": frame_difference(made),
            "psnr": psnr(made, clips),
        }
        for name, made in upscaled.items()
    }
