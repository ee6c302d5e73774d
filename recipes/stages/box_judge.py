"""Who judges whether things are where they should be: a small network that has learned to find them in real images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.recipes.boxes import box_coverage
from temporal_layers.recipes.stages.image_objectives import as_float
from temporal_layers.recipes.training.optim import OptimConfig, build_optimizer, learning_rate
from temporal_layers.recipes.training.streams import Shuffled, positions

JUDGE_OPTIM = OptimConfig(steps=600, batch_size=16, lr=4e-3, weight_decay=0.0)


class BoxJudge(nn.Module):
    """Says of each place of an image, at a quarter of its resolution, which share of it lies in a box.

    Args:
        width: Channels.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, stride=2, padding=1)
        )
        self.rest = nn.ModuleList(nn.Conv2d(width, width, 3, padding=reach, dilation=reach) for reach in (1, 2, 4, 1))
        self.last = nn.Conv2d(width, 1, 1)

    def logits(self, frames: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images h w"]:
        """Of the shares, for frames in [0, 1]."""
        features = self.first(2 * frames - 1)
        for convolution in self.rest:
            features = features + convolution(F.silu(features))
        return self.last(F.silu(features)).squeeze(1)

    def forward(
        self, frames: Float[Tensor, "images 3 height width"], coverage: Float[Tensor, "images h w"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy against the true shares."""
        return F.binary_cross_entropy_with_logits(self.logits(frames), coverage)


def train_judge(
    frames: Tensor, boxes: Float[Tensor, "images boxes 4"], config: OptimConfig = JUDGE_OPTIM, *, seed: int = 0
) -> BoxJudge:
    """A judge that has learned from images with boxes, on the CPU and in this process alone.

    Args:
        frames: (images, 3, height, width), uint8 or float in [0, 1].
        boxes: Of each; without area where there is none.
        config: Steps, learning rate and so on.
        seed: Of weights and order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = BoxJudge()
    with torch.no_grad():
        size = judge.logits(as_float(frames[:1])).shape[1:]
    order = Shuffled(len(frames), seed)
    optimizer = build_optimizer([{"params": list(judge.parameters())}], config)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        rows = [order[position] for position in positions(step, config.batch_size)]
        judge(as_float(frames[rows]), box_coverage(boxes[rows], *size)).backward()
        nn.utils.clip_grad_norm_(judge.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return judge.eval().requires_grad_(False)


def found(
    judge: BoxJudge, frames: Float[Tensor, "images 3 height width"], boxes: Float[Tensor, "images boxes 4"]
) -> float:
    """How well what a judge finds agrees with boxes: the intersection of both over their union, mean over images.

    Shares of places are compared, so the intersection is the sum of the smaller ones, the union that of the larger.

    Args:
        judge: Of `train_judge`.
        frames: In [0, 1].
        boxes: Of each image, one at least.
    """
    seen = torch.cat([judge.logits(part).sigmoid() for part in frames.split(64)])
    wanted = box_coverage(boxes, *seen.shape[1:])
    together, either = torch.minimum(seen, wanted).sum((1, 2)), torch.maximum(seen, wanted).sum((1, 2))
    return (together / either).mean().item()
