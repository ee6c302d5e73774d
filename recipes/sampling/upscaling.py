"""Upscaling of clips: whole frames, in windows, with temporal layers or without."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from jaxtyping import Float
from torch import Tensor

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.recipes.bases import Conditioning, on_device
from temporal_layers.recipes.conditioning import joint_guidance
from temporal_layers.recipes.sampling.loop import denoise
from temporal_layers.recipes.sampling.noise import clip_generators, clips_of_noise
from temporal_layers.recipes.sampling.regions import Region, in_parts
from temporal_layers.recipes.sampling.sampler import Sampler
from temporal_layers.recipes.upscaler import Upscaler


@torch.no_grad()
def upscale_clips(
    upscaler: Upscaler,
    low_res: Float[Tensor, "clips 3 frames h w"],
    conditioning: Conditioning | None = None,
    *,
    frame_by_frame: bool = False,
    noise_level: int = 20,
    num_inference_steps: int = 10,
    guidance_scale: float = 1.0,
    eta: float = 0.0,
    window: int = 8,
    overlap: int = 0,
    tile: tuple[int, int] | None = None,
    tile_overlap: int = 0,
    seed: int = 0,
    batch_size: int = 2,
) -> Float[Tensor, "clips 3 frames height width"]:
    """Make clips larger, whole frames at a time whatever the patches were that the UNet was trained on.

    Args:
        upscaler: With temporal layers unless ``frame_by_frame``.
        low_res: In [0, 1].
        conditioning: One row a clip, of ``upscaler.conditioning``; what says nothing if None.
        frame_by_frame: Leave the temporal layers out; the noise is the same.
        noise_level: Of the noise added to the low-resolution clips: more makes up for worse ones, and invents more.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of classifier-free guidance; 1 turns it off and halves the cost.
        eta: Fresh noise in each step, from 0 (none: DDIM) to below 1.
        window: Frames that the UNet sees at a time: those of its training.
        overlap: Frames that a window shares with the one before. There the predictions of both are averaged in every
            step, which takes the seams away and costs ``window / (window - overlap)`` times as much. If the windows
            do not come out even, the last one is moved back, and shares more.
        tile: Height and width, on the grid, of what the UNet sees at a time; None for whole frames.
        tile_overlap: Rows, and columns, that a tile shares with the one before, where they fade into each other; see
            `in_parts`.
        seed: Of the noise, which depends on it and on the clip's place alone.
        batch_size: Clips at a time, which bounds the memory.

    Returns:
        Frames in [0, 1], ``upscaler.factor`` times as high and wide.

    Raises:
        ValueError: If an argument is out of range, or windows or tiles do not move on.
    """
    check_upscaling("upscale_clips", upscaler, low_res, noise_level, tile)
    sampler = Sampler(upscaler.scheduler, num_inference_steps, eta)
    in_pieces = {"window": window, "overlap": overlap, "tile": tile, "tile_overlap": tile_overlap}
    conditioning = upscaler.conditioning([""] * len(low_res)) if conditioning is None else conditioning
    parts = []
    for first in range(0, len(low_res), batch_size):
        rows = range(first, min(first + batch_size, len(low_res)))
        some = {name: value[rows.start : rows.stop] for name, value in conditioning.items()}
        generators = clip_generators(seed, rows, "upscaling")
        given = on_grid(upscaler, low_res[rows.start : rows.stop]).to(upscaler.device)
        noise = clips_of_noise(given.shape[1:], generators).to(given)
        model = UpscalerModel(
            upscaler,
            given,
            noise,
            noise_level,
            on_device(some, given.device),
            guidance_scale=guidance_scale,
            frame_by_frame=frame_by_frame,
        )
        shape = (upscaler.channels, *given.shape[2:])
        start = sampler.start(clips_of_noise(shape, generators).to(given))
        result = denoise(in_parts(model, shape[1:], **in_pieces), sampler, start, generators)
        parts.append(upscaler.decode(result).cpu())
    return torch.cat(parts)


def check_upscaling(
    who: str, upscaler: Upscaler, low_res: Tensor, noise_level: int, tile: tuple[int, int] | None
) -> None:
    """Raise a ``ValueError`` unless these are clips, of sizes that the UNet takes, and there is such a noise level."""
    if low_res.ndim != 5 or low_res.shape[1] != 3 or 0 in low_res.shape:
        raise ValueError(
            f"{who}: low_res: expected (clips, 3, frames, height, width), got {tuple(low_res.shape)}; "
            "add a batch axis to a single clip by low_res[None]"
        )
    last = upscaler.low_res_scheduler.config.num_train_timesteps - 1
    if not 0 <= noise_level <= last:
        raise ValueError(f"{who}: noise_level: expected 0 to {last}, got {noise_level}")
    if isinstance(upscaler.unet, UNet2DModel):  # others pad what does not come out even
        times = upscaler.factor // upscaler.cell
        step = 2 ** (len(upscaler.unet.config.block_out_channels) - 1)
        whole = tuple(times * side for side in low_res.shape[-2:])
        for name, sides in (("low_res", whole), ("tile", tile or (step, step))):
            if any(side % step for side in sides):
                raise ValueError(
                    f"{who}: {name}: expected a height and width on the grid in multiples of {step}, which the UNet "
                    f"shrinks them by, got {' x '.join(map(str, sides))}; choose others, or crop the clips"
                )


def on_grid(upscaler: Upscaler, low_res: Float[Tensor, "b 3 f h w"]) -> Float[Tensor, "b 3 f grid_h grid_w"]:
    """Low-resolution clips in [0, 1] as the UNet takes them: in [-1, 1], enlarged to the grid."""
    return unfold_frames(upscaler.enlarged(fold_frames(2 * low_res.float() - 1)), low_res.shape[2])


class UpscalerModel:
    """An upscaler, as a `Denoiser` of what is on its grid.

    Args:
        upscaler: With temporal layers unless ``frame_by_frame``.
        given: Low-resolution clips on the grid, on the device that the UNet runs on.
        noise: Standard normal, which is added to them.
        noise_level: How much of it; the same for all frames, as in training.
        conditioning: One row a clip.
        without: What guidance leads away from; what says nothing if None.
        guidance_scale: Weight of classifier-free guidance.
        frame_by_frame: Leave the temporal layers out.
    """

    def __init__(
        self,
        upscaler: Upscaler,
        given: Float[Tensor, "b 3 f h w"],
        noise: Float[Tensor, "b 3 f h w"],
        noise_level: int,
        conditioning: Conditioning,
        *,
        without: Conditioning | None = None,
        guidance_scale: float = 1.0,
        frame_by_frame: bool = False,
    ) -> None:
        self.upscaler, self.guidance_scale, self.frame_by_frame = upscaler, guidance_scale, frame_by_frame
        self.levels = torch.full((len(given),), noise_level, device=given.device)
        self.given = upscaler.augmented(given, noise, self.levels)
        self.guided = guidance_scale != 1 and bool(conditioning)
        if self.guided:
            without = upscaler.conditioning([""] * len(given)) if without is None else without
            conditioning = {name: torch.cat([value, without[name].to(value)]) for name, value in conditioning.items()}
        self.conditioning = conditioning

    def __call__(self, noisy: Float[Tensor, "b c f h w"], timestep: Tensor, region: Region) -> Tensor:
        """As in `Denoiser`."""
        given, levels = region.cut(self.given), self.levels
        if self.guided:
            noisy, given, levels = (torch.cat([value, value]) for value in (noisy, given, levels))
        dtype = next(self.upscaler.unet.parameters()).dtype
        output = self.upscaler.predict(
            noisy.to(dtype), timestep, given.to(dtype), levels, self.conditioning, frame_by_frame=self.frame_by_frame
        )
        if not self.guided:
            return output
        told, free = output.chunk(2)
        return joint_guidance(told, without_text=free, text_scale=self.guidance_scale)
