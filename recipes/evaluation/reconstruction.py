"""Decoded clips beside the true ones: PSNR, SSIM, flicker and LPIPS, a number for each pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers import fold_frames
from temporal_layers.recipes.evaluation.collecting import RATE, numbers_of
from temporal_layers.recipes.evaluation.moments import SetStatistics
from temporal_layers.recipes.evaluation.sets import EvaluationBatch
from temporal_layers.recipes.stages.decoder_metrics import measure_reconstruction
from temporal_layers.recipes.stages.image_objectives import as_float
from temporal_layers.recipes.stages.perceptual import apply_to_clips, perceptual_loss

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def ssim(
    output: Float[Tensor, "frames 3 height width"], target: Float[Tensor, "frames 3 height width"]
) -> Float[Tensor, " frames"]:
    """Structural similarity of frames in [0, 1] (Wang et al. 2004): 1 for equal ones.

    Gaussian window of 11 x 11 pixels with a standard deviation of 1.5, where it lies inside of the frame, mean over
    colours; computed in float64.

    Raises:
        ValueError: If the shapes differ, or frames are smaller than the window.
    """
    if output.shape != target.shape or min(output.shape[2:]) < _WINDOW:
        raise ValueError(
            f"ssim: expected output and target of one shape with frames of at least {_WINDOW} x {_WINDOW} pixels, got "
            f"{tuple(output.shape)} and {tuple(target.shape)}"
        )
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=output.device) - _WINDOW // 2
    window = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    window = window / window.sum()

    def local(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1).unsqueeze(1)
        flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return flat.unflatten(0, values.shape[:2]).squeeze(2)

    x, y = output.double(), target.double()
    mean_x, mean_y = local(x), local(y)
    variance_x, variance_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2))
    return similarity.mean((1, 2, 3))


def compare_pairs(
    output: Iterable[EvaluationBatch], target: Iterable[EvaluationBatch], kinds: Sequence[str], *, lpips: str = "lpips"
) -> SetStatistics:
    """Numbers of pairs of clips, under the names of their kinds.

    Args:
        output: Decoded clips.
        target: True clips, in the same order.
        kinds: Of ``psnr``, ``flicker`` (see ``measure_reconstruction``), ``ssim``, ``lpips``.
        lpips: Package or file of the last; see ``perceptual_loss``.
    """
    learned = perceptual_loss(lpips, nn.Identity()) if "lpips" in kinds else None
    kept = SetStatistics({}, {})
    for made, true in zip(output, target, strict=True):
        pairs = zip(as_float(made.frames), as_float(true.frames), strict=True)
        rows = [_of_pair(x[None], y[None], kinds, learned) for x, y in pairs]
        numbers = {kind: [row[kind] for row in rows] for kind in kinds} | {RATE: made.rates}
        found = {name: numbers_of(values) for name, values in numbers.items()}
        kept = kept.merged(SetStatistics(found, {}))
    return kept


def _of_pair(output: Tensor, target: Tensor, kinds: Sequence[str], learned: nn.Module | None) -> dict[str, float]:
    makers: dict[str, Callable[[], float]] = {
        "ssim": lambda: ssim(fold_frames(output), fold_frames(target)).mean().item(),
        "lpips": lambda: apply_to_clips(learned, 2 * output - 1, 2 * target - 1).item(),
    }
    plain = measure_reconstruction(output, target) if {"psnr", "flicker"} & set(kinds) else {}
    with torch.no_grad():
        return {kind: plain[kind] if kind in plain else makers[kind]() for kind in kinds}
