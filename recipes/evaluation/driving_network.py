"""A small video network that comes with the package, so that every distance between sets of clips runs offline.

It was trained on the generated driving corpus (`features_stage`) to tell what a clip shows, how it moves and how clean
it is, so its features change with all three. It knows that corpus and nothing else: on other footage its numbers still
order corruptions of one set, but say little about how real a clip looks.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn

SHIPPED_FEATURES = Path(__file__).parents[1] / "weights" / "driving_features"

ORDERS = ("forward", "backward", "shuffled", "still")
"""In which order the frames of a clip stand: what the network was trained to tell, beside the labels."""

MOTIONS = ("speed", "curvature", "nearness")
"""Signed speed in units of 10 metres a second, curvature in units of 1/100 metre to the right, and the nearness of the
car ahead, 10 metres divided by its distance, 0 without one: means over the clip."""

FAULTS = ("noise", "blur")
"""Standard deviation of noise in units of 0.1, and the binary logarithm of how many times smaller frames were made
before they were enlarged again: 0 and 0 for clean clips."""

_FIELDS = (2, 3)
_CHANGES = 8.0


class _Block(nn.Module):
    """Convolution over space, then over time, norm and activation; halves space, and time if asked to."""

    def __init__(self, channels_in: int, channels: int, *, stride: int, time_stride: int) -> None:
        super().__init__()
        self.space = nn.Conv3d(
            channels_in, channels, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False
        )
        # With repeated frames at the ends, a still clip has the same features at any length, down to a single frame.
        self.time = nn.Conv3d(
            channels,
            channels,
            (3, 1, 1),
            stride=(time_stride, 1, 1),
            padding=(1, 0, 0),
            padding_mode="replicate",
            bias=False,
        )
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, maps: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c2 t2 h2 w2"]:
        return F.silu(self.norm(self.time(self.space(maps))))


class DrivingNetwork(ModelMixin, ConfigMixin):
    """Features of clips, and what can be read off them.

    A pyramid of separable 3-D convolutions on frames and their differences. Its last maps are averaged over time, and
    over each of six fields of the frame, since a road has a left and a right. They are projected to the features
    together with the means of the stem's maps, which no norm has robbed of contrast; each head is one linear layer on
    those.

    Args:
        num_labels: Classes of the label head.
        frame_size: Height and width of the frames that it is trained on.
        num_features: Of a clip.
        channels: Of the stem and of the blocks. Each block but the last halves height and width; from the second on,
            these blocks halve the number of frames as well.
    """

    @register_to_config
    def __init__(
        self,
        *,
        num_labels: int,
        frame_size: tuple[int, int] = (64, 96),
        num_features: int = 64,
        channels: tuple[int, ...] = (16, 32, 64, 96, 64),
    ) -> None:
        super().__init__()
        self.stem = nn.Conv3d(6, channels[0], (1, 5, 5), stride=(1, 2, 2), padding=(0, 2, 2))
        pairs = list(pairwise(channels))
        last = len(pairs) - 1
        self.blocks = nn.ModuleList(
            _Block(wide, channel, stride=1 if i == last else 2, time_stride=2 if 0 < i < last else 1)
            for i, (wide, channel) in enumerate(pairs)
        )
        self.features = nn.Linear(channels[-1] * _FIELDS[0] * _FIELDS[1] + channels[0], num_features)
        self.labels = nn.Linear(num_features, num_labels)
        self.orders = nn.Linear(num_features, len(ORDERS))
        self.motions = nn.Linear(num_features, len(MOTIONS))
        self.faults = nn.Linear(num_features, len(FAULTS))

    def forward(self, clips: Float[Tensor, "batch 3 frames height width"]) -> Float[Tensor, "batch features"]:
        """Features of clips in [0, 1], of any length."""
        # Differences of neighbouring frames are small; the factor brings them to the scale of the frames.
        changes = clips.diff(dim=2, append=clips[:, :, -1:])
        maps = stem = F.silu(self.stem(torch.cat([2 * clips - 1, _CHANGES * changes], dim=1)))
        for block in self.blocks:
            maps = block(maps)
        fields = F.adaptive_avg_pool2d(maps.mean(2), _FIELDS).flatten(1)
        return self.features(torch.cat([fields, stem.mean((2, 3, 4))], dim=1))


def build_driving_network(num_labels: int, frame_size: tuple[int, int], *, seed: int = 0) -> DrivingNetwork:
    """An untrained network.

    Args:
        num_labels: Classes of the label head.
        frame_size: Height and width of the frames that it is trained on.
        seed: Of the initial weights; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DrivingNetwork(num_labels=num_labels, frame_size=frame_size)


def load_driving_network() -> DrivingNetwork:
    """The network that comes with the package, in single precision and in evaluation mode."""
    network = DrivingNetwork.from_pretrained(SHIPPED_FEATURES, torch_dtype=torch.float32)
    return network.eval().requires_grad_(False)
