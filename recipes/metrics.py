"""Small numbers about clips that need no pretrained network: do frames change, does motion go on, do clips look real.

Clips are ``(batch, 3, frames, height, width)`` in [0, 1]. No one of these numbers is enough: a frozen clip has the best
frame difference, a moving blur a fair motion agreement. Read them together, and beside those of real clips.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Clips = Float[Tensor, "batch 3 frames height width"]

_WORKING_SIDE = 64
"""Motion is judged on frames halved until their shorter side is at most this, so at about the same scale for all."""

_LEVELS = 3
_UPDATES_PER_LEVEL = 2
_WINDOW = 2.0
"""Standard deviation, in pixels of each level, of the window in which motion is taken to be uniform."""

_LONGEST_UPDATE = 2.0
_FLATNESS = 1e-4
"""Added to the squared gradients: where a window is flatter than 0.01 per pixel, its motion is taken as zero."""

WINDOW_FRAMES = 8
WINDOW_STEP = 4
LAGS = (1, 2, 4)
NUM_BANDS = 3
NUM_FEATURES = 3 + NUM_BANDS * (1 + len(LAGS))
_FAINT = 1e-5
"""Mean square below which a band counts as empty: the rounding of 8-bit frames is a tenth of it."""


def _check_clips(who: str, clips: Tensor, least_frames: int) -> Clips:
    if clips.ndim != 5 or clips.shape[1] != 3 or 0 in clips.shape:
        raise ValueError(
            f"{who}: clips: expected shape (batch, 3, frames, height, width), got {tuple(clips.shape)}; "
            "add a batch axis to a single clip by clip[None]"
        )
    if clips.shape[2] < least_frames:
        raise ValueError(f"{who}: clips: expected at least {least_frames} frames, got {clips.shape[2]}")
    if min(clips.shape[3:]) < 16:
        raise ValueError(f"{who}: clips: expected frames of at least 16 x 16 pixels, got {tuple(clips.shape[3:])}")
    if not clips.is_floating_point():
        raise ValueError(f"{who}: clips: expected a floating dtype, got {clips.dtype}; divide 8-bit values by 255")
    low, high = clips.min().item(), clips.max().item()
    if not (low >= -0.01 and high <= 1.01):
        raise ValueError(f"{who}: clips: expected values in [0, 1], got [{low:.4g}, {high:.4g}]; scale or clamp them")
    return clips.detach().float()


def frame_difference(clips: Clips) -> float:
    """Mean of ``|x[t + 1] - x[t]|``: 0 for a frozen clip, near that of real clips for good ones, high for flicker.

    Args:
        clips: floating, ``(batch, 3, frames, height, width)`` in [0, 1], two frames or more.

    Raises:
        ValueError: another shape or dtype, values out of range, or too few frames.
    """
    clips = _check_clips("frame_difference", clips, least_frames=2)
    return clips.diff(dim=2).abs().mean().item()


def _blur(images: Float[Tensor, "n c h w"], sigma: float) -> Float[Tensor, "n c h w"]:
    """Separable Gaussian, edges repeated."""
    radius = round(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    images = F.pad(images, (radius,) * 4, mode="replicate").flatten(0, 1).unsqueeze(1)
    images = F.conv2d(F.conv2d(images, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return rearrange(images, "(n c) 1 h w -> n c h w", c=channels)


def _halve(images: Float[Tensor, "n c h w"], sigma: float = 1.0) -> Float[Tensor, "n c h2 w2"]:
    return F.avg_pool2d(_blur(images, sigma), 2, ceil_mode=True)


def _double(images: Float[Tensor, "n c h2 w2"], like: Tensor) -> Float[Tensor, "n c h w"]:
    return F.interpolate(images, size=like.shape[2:], mode="bilinear", align_corners=False)


def _moved(images: Float[Tensor, "n c h w"], flow: Float[Tensor, "n 2 h w"]) -> Float[Tensor, "n c h w"]:
    """``images`` read at ``position - flow``: content carried along by a flow of (columns, rows) in pixels."""
    height, width = images.shape[2:]
    columns = torch.arange(width, dtype=flow.dtype, device=flow.device)
    rows = torch.arange(height, dtype=flow.dtype, device=flow.device)[:, None]
    x = (2 * (columns - flow[:, 0]) + 1) / width - 1
    y = (2 * (rows - flow[:, 1]) + 1) / height - 1
    return F.grid_sample(images, torch.stack((x, y), dim=-1), padding_mode="border", align_corners=False)


def _gradients(images: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    along_x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    along_y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return along_x, along_y


def _flow_update(moved: Float[Tensor, "n c h w"], later: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 2 h w"]:
    """Least-squares shift within a Gaussian window around each pixel that takes ``moved`` to ``later``."""
    gx, gy = _gradients((moved + later) / 2)
    rest = moved - later
    products = torch.stack([(a * b).sum(1) for a, b in ((gx, gx), (gx, gy), (gy, gy), (gx, rest), (gy, rest))], dim=1)
    xx, xy, yy, xr, yr = _blur(products, _WINDOW).unbind(1)
    xx, yy = xx + _FLATNESS, yy + _FLATNESS
    update = torch.stack((yy * xr - xy * yr, xx * yr - xy * xr), dim=1) / (xx * yy - xy * xy)[:, None]
    return update.clamp(-_LONGEST_UPDATE, _LONGEST_UPDATE)


def _flow(earlier: Float[Tensor, "n c h w"], later: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 2 h w"]:
    """Dense motion such that ``later(p) = earlier(p - flow(p))``: Lucas and Kanade's iteration, coarse to fine."""
    pyramid = [(earlier, later)]
    while len(pyramid) < _LEVELS and min(pyramid[-1][0].shape[2:]) >= 16:
        pyramid.append((_halve(pyramid[-1][0]), _halve(pyramid[-1][1])))
    flow = torch.zeros_like(pyramid[-1][0][:, :2])
    for before, after in reversed(pyramid):
        if flow.shape[2:] != before.shape[2:]:
            flow = 2 * _double(flow, before)
        for _ in range(_UPDATES_PER_LEVEL):
            flow = flow + _flow_update(_moved(before, flow), after)
    return flow


def motion_agreement(clips: Clips) -> float:
    """How well the motion from frame t - 1 to t predicts frame t + 1, compared with no motion at all.

    A dense flow is estimated between frames t - 1 and t (Lucas-Kanade on a Gaussian pyramid) and kept where it explains
    at least half of their local difference. Frame t carried on along the same flow is the prediction ``p``, and a clip
    scores ``1 - sum |x[t + 1] - p| / sum |x[t + 1] - x[t]|`` over its pixels and frames; the result is the mean
    over clips. It is at most 1 and is not cut off at 0: 0 says that the past motion tells nothing about the next frame
    (white noise around a still scene), below 0 that it misleads. Frozen clips score 0 by definition. Unrelated or
    shuffled frames score slightly below 0, frames that jump back and forth far below. Real footage stays below 1 by
    what comes into view, by acceleration, and by motion of more than about an eighth of the shorter side a frame,
    which the pyramid cannot follow: compare with real clips of the same kind.

    Args:
        clips: floating, ``(batch, 3, frames, height, width)`` in [0, 1], three frames or more, 16 x 16 pixels or more.

    Raises:
        ValueError: another shape or dtype, values out of range, or too few frames or pixels.
    """
    clips = _check_clips("motion_agreement", clips, least_frames=3)
    return sum(_motion_agreement(_working_size(clip)) for clip in clips.transpose(1, 2)) / len(clips)


def _working_size(frames: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames 3 h w"]:
    while min(frames.shape[2:]) > _WORKING_SIDE:
        # More blur than halving needs: it takes the reward out of an interpolation that smoothes noise away.
        frames = _halve(frames, sigma=1.5)
    return frames


def _motion_agreement(frames: Float[Tensor, "frames 3 height width"]) -> float:
    past, present, future = frames[:-2], frames[1:-1], frames[2:]
    flow = _flow(past, present)
    unexplained = _blur((_moved(past, flow) - present).abs().mean(1, keepdim=True), _WINDOW)
    change = _blur((past - present).abs().mean(1, keepdim=True), _WINDOW)
    flow = flow * (unexplained < change / 2)
    still = (future - present).abs().sum().item()
    return 1 - (future - _moved(present, flow)).abs().sum().item() / still if still > 0 else 0.0


def warp_error(clips: Clips) -> float:
    """Mean of ``|x[t + 1] - w(x[t])|``, where ``w`` carries a frame along its motion to the next (Lai et al. 2018).

    The flicker that motion does not explain: 0 for a frozen clip, low for a moving picture, high where frames change
    without moving. The motion is estimated from the two frames themselves, as for `motion_agreement`, and on frames of
    the same size; what comes into view counts as well, so compare with real clips of the same kind.

    Args:
        clips: floating, ``(batch, 3, frames, height, width)`` in [0, 1], two frames or more, 16 x 16 pixels or more.

    Raises:
        ValueError: another shape or dtype, values out of range, or too few frames or pixels.
    """
    clips = _check_clips("warp_error", clips, least_frames=2)
    return sum(_warp_error(_working_size(clip)) for clip in clips.transpose(1, 2)) / len(clips)


def _warp_error(frames: Float[Tensor, "frames 3 height width"]) -> float:
    earlier, later = frames[:-1], frames[1:]
    return (later - _moved(earlier, _flow(earlier, later))).abs().mean().item()


def frechet_distance(
    mean_a: Float[Tensor, " d"], cov_a: Float[Tensor, "d d"], mean_b: Float[Tensor, " d"], cov_b: Float[Tensor, "d d"]
) -> float:
    """Squared Frechet distance of two Gaussians, in float64.

    ``|mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a^1/2 cov_b cov_a^1/2)^1/2)`` (Dowson and Landau, 1982).
    The last trace is taken from eigenvalues of symmetric matrices, so singular covariances are no special case.

    Args:
        mean_a, mean_b: means, ``(d,)``.
        cov_a, cov_b: covariances, ``(d, d)``, symmetric and positive semi-definite.

    Raises:
        ValueError: shapes that do not fit together.
    """
    shapes = [tuple(value.shape) for value in (mean_a, cov_a, mean_b, cov_b)]
    d = mean_a.numel()
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise ValueError(f"frechet_distance: expected shapes (d,), (d, d), (d,), (d, d), got {shapes}")
    mean_a, cov_a, mean_b, cov_b = (value.double() for value in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).clamp_min(0).item()


def clip_features(clips: Clips) -> Float[Tensor, "n 15"]:
    """Fifteen statistics of each window of eight frames, a step of four frames apart.

    Three means (red, green, blue), then for each band of a Laplacian pyramid of three levels (fine, middle, rest; the
    frames are halved first) its log contrast and its autocorrelation over time at lags 1, 2 and 4 frames:
    ``1 - mean |k[t + lag] - k[t]|^2 / (2 mean |k|^2)``, which is 1 for a still picture, 0 for unrelated ones, and lies
    between -1 and 1 but for short-window effects. The correlations carry what motion does to a picture at each scale:
    frozen, shuffled, flickering and jumping clips all change them. They do not know the direction of time.

    Args:
        clips: floating, ``(batch, 3, frames, height, width)`` in [0, 1], eight frames or more, 16 x 16 pixels or more.

    Returns:
        float32 ``(batch * windows, 15)``, the windows of a clip next to each other.

    Raises:
        ValueError: another shape or dtype, values out of range, or too few frames or pixels.
    """
    clips = _check_clips("clip_features", clips, least_frames=WINDOW_FRAMES)
    return torch.cat([_window_features(clip) for clip in clips.transpose(1, 2)])


def _window_features(frames: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "windows 15"]:
    bands = [_halve(frames)]
    while len(bands) < NUM_BANDS:
        coarser = _halve(bands[-1])
        bands[-1:] = [bands[-1] - _double(coarser, bands[-1]), coarser]
    rows = []
    for start in range(0, len(frames) - WINDOW_FRAMES + 1, WINDOW_STEP):
        row = [bands[-1][start : start + WINDOW_FRAMES].mean((0, 2, 3))]
        for band in bands:
            window = band[start : start + WINDOW_FRAMES]
            window = window - window.mean((0, 2, 3), keepdim=True)
            power = window.square().mean() + _FAINT
            change = torch.stack([(window[lag:] - window[:-lag]).square().mean() for lag in LAGS])
            row += [power.log()[None] / 2, 1 - change / (2 * power)]
        rows.append(torch.cat(row))
    return torch.stack(rows)


def clip_frechet(generated: Clips, real: Clips) -> float:
    """Frechet distance between generated and real clips over `clip_features`: small, offline, and not FVD.

    The features of both sets are divided by their standard deviation over the real clips before the distance is taken.
    The number depends on how many clips there are (fewer, higher, for real clips too) and on their size and rate:
    compare only values of one set of real clips and one number of generated ones, and quote the value of other real
    clips beside them.

    Args:
        generated: floating, ``(batch, 3, frames, height, width)`` in [0, 1].
        real: the same; the batch may differ, the other axes may not.

    Raises:
        ValueError: clips that `clip_features` refuses, of different size or length, or too few for a covariance of full
            rank: a set needs more windows than the fifteen features, six clips of 16 frames.
    """
    if generated.shape[1:] != real.shape[1:]:
        raise ValueError(
            "clip_frechet: expected generated and real clips of one length and size, got "
            f"{tuple(generated.shape[1:])} and {tuple(real.shape[1:])}; cut or resize the longer or larger ones"
        )
    features = {"generated": clip_features(generated).double(), "real": clip_features(real).double()}
    for name, rows in features.items():
        if len(rows) <= NUM_FEATURES:
            raise ValueError(
                f"clip_frechet: {name}: expected more than {NUM_FEATURES} windows of {WINDOW_FRAMES} frames for a "
                f"covariance of {NUM_FEATURES} features, got {len(rows)}; pass more or longer clips"
            )
    scale = features["real"].std(0).clamp_min(1e-6)
    (mean_a, cov_a), (mean_b, cov_b) = (
        (rows.mean(0), torch.cov(rows.T)) for rows in (f / scale for f in features.values())
    )
    return frechet_distance(mean_a, cov_a, mean_b, cov_b)
