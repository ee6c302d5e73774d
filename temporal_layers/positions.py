"""Frame positions: sinusoidal, sinusoidal through an MLP, rotary, relative bias.

All are computed from the number of frames at hand and never read from a table of fixed length, so that a clip may be
longer than those of training, and no buffer is rounded when the model is cast. Trigonometry runs in fp32 or wider.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.config import check_at_least
from temporal_layers.frames import check_divisible

__all__ = [
    "RelativePositionBias",
    "RotaryPosition",
    "SinusoidalMLPPosition",
    "SinusoidalPosition",
    "sinusoidal_embedding",
]


def sinusoidal_embedding(
    positions: Float[Tensor, "frames"], dim: int, *, interleaved: bool, max_period: float = 10000.0
) -> Float[Tensor, "frames dim"]:
    """Sinusoidal embedding of ``positions`` (Vaswani et al. 2017, section 3.5), in fp32, or in fp64 for fp64 positions.

    Args:
        positions: ``(frames,)`` frame indices, whole or fractional.
        dim: width of the embedding, even.
        interleaved: ``[sin, cos, sin, cos, ...]`` (AnimateDiff) if true, else ``[cos..., sin...]`` (SVD). The two are
            permutations of each other, so weights trained with one do not fit the other.
        max_period: wavelength, in frames, that the slowest frequency approaches, divided by 2 pi.

    Returns:
        ``(frames, dim)`` in fp32 or fp64.

    Raises:
        ValueError: if ``dim`` is not positive and even.
    """
    check_even("sinusoidal_embedding: dim", dim)
    wide = torch.promote_types(positions.dtype, torch.float32)
    index = torch.arange(dim // 2, device=positions.device, dtype=wide)
    log_period, half = math.log(max_period), dim // 2
    # Rounded in the order of AnimateDiff and of SVD, so that their weights meet the very values they were trained on.
    exponents = index * (-log_period / half) if interleaved else -log_period * index / half
    angles = positions.to(wide)[:, None] * exponents.exp()[None, :]
    if interleaved:
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def frame_indices(
    num_frames: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32, *, first_frame: int = 0
) -> Float[Tensor, "frames"]:
    """``num_frames`` frame indices from ``first_frame`` on, in ``dtype``."""
    return torch.arange(first_frame, first_frame + num_frames, device=device, dtype=dtype)


def check_even(who: str, width: int) -> None:
    """Raise a ``ValueError`` unless ``width`` is a positive even number."""
    if width < 2 or width % 2 != 0:
        raise ValueError(f"{who}: expected a positive even number, got {width}; channels are taken in pairs")


class SinusoidalPosition(nn.Module):
    """Plain sinusoidal frame positions, interleaved as in AnimateDiff; no parameters.

    Args:
        dim: width, even.

    Raises:
        ValueError: if ``dim`` is not positive and even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_even("SinusoidalPosition: dim", dim)
        self.dim = dim

    def forward(
        self, num_frames: int, *, device: torch.device, dtype: torch.dtype, first_frame: int = 0
    ) -> Float[Tensor, "frames dim"]:
        """Return ``(num_frames, dim)`` in ``dtype``, for frames from ``first_frame`` on."""
        indices = frame_indices(num_frames, device, first_frame=first_frame)
        return sinusoidal_embedding(indices, self.dim, interleaved=True).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}"


class SinusoidalMLPPosition(nn.Module):
    """Sinusoidal frame positions through ``dim -> 4 dim -> dim`` with SiLU, as in SVD.

    The Video LDM's parameter count (656M for SD 2.1) is met exactly with one such MLP a transformer.

    Args:
        dim: width, even.
        zero_init: start the second linear at zero, so that the embedding starts as nothing.

    Raises:
        ValueError: if ``dim`` is not positive and even.
    """

    def __init__(
        self,
        dim: int,
        *,
        zero_init: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_even("SinusoidalMLPPosition: dim", dim)
        self.dim = dim
        self.linear_1 = nn.Linear(dim, 4 * dim, device=device, dtype=dtype)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(4 * dim, dim, device=device, dtype=dtype)
        if zero_init:
            zero_(self.linear_2)

    def forward(
        self, num_frames: int, *, device: torch.device, dtype: torch.dtype, first_frame: int = 0
    ) -> Float[Tensor, "frames dim"]:
        """Return ``(num_frames, dim)`` in ``dtype``, that of the weights, for frames from ``first_frame`` on."""
        indices = frame_indices(num_frames, device, first_frame=first_frame)
        sinusoid = sinusoidal_embedding(indices, self.dim, interleaved=False).to(dtype)
        return self.linear_2(self.act(self.linear_1(sinusoid)))


class RotaryPosition(nn.Module):
    """Rotary frame positions (RoFormer) on queries and keys: attention then depends on frame distances only.

    Args:
        head_dim: width of a head, even; neighbouring pairs of channels are rotated.

    Raises:
        ValueError: if ``head_dim`` is not positive and even.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        check_even("RotaryPosition: head_dim", head_dim)
        self.head_dim = head_dim

    def forward(
        self, hidden_states: Float[Tensor, "n positions inner"], *, num_frames: int, first_frame: int = 0
    ) -> Float[Tensor, "n positions inner"]:
        """Rotate queries or keys by their frame index.

        Args:
            hidden_states: ``(batch * num_frames, positions, heads * head_dim)``, any floating dtype; rotated in fp32 or
                wider.
            num_frames: frames of a clip.
            first_frame: index of the first of them.

        Returns:
            The shape and dtype of ``hidden_states``.

        Raises:
            ValueError: if the batch is no multiple of ``num_frames``.
        """
        check_divisible("RotaryPosition", hidden_states.shape[0], num_frames)
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        indices = frame_indices(num_frames, hidden_states.device, wide, first_frame=first_frame)
        embedding = sinusoidal_embedding(indices, self.head_dim, interleaved=False)
        cos, sin = embedding[:, None, None, :].chunk(2, dim=-1)  # (f, 1, 1, d/2)
        x = hidden_states.unflatten(0, (-1, num_frames)).unflatten(-1, (-1, self.head_dim))
        even, odd = x.to(cos.dtype)[..., 0::2], x.to(cos.dtype)[..., 1::2]
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return rotated.to(hidden_states.dtype).flatten(-3).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{self.head_dim}"


class RelativePositionBias(nn.Module):
    """A learned attention bias per head and frame distance; distances beyond ``max_distance`` share the last entry.

    Because only distances enter, a model may run on more frames than it was trained on (Video LDM, section 3.2).

    Args:
        num_heads: heads of the attention.
        max_distance: largest distance, in frames, with an entry of its own.

    Raises:
        ValueError: if ``max_distance`` is negative.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        max_distance: int = 32,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("RelativePositionBias: max_distance", max_distance, 0)
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1, device=device, dtype=dtype))

    def forward(self, num_frames: int, num_key_frames: int | None = None) -> Float[Tensor, "heads frames key_frames"]:
        """Return the bias ``(heads, num_frames, num_key_frames)``, rows are queries.

        Args:
            num_frames: frames that attend.
            num_key_frames: frames attended to, of which the last ``num_frames`` are those that attend; as many if not
                given.
        """
        index = torch.arange(num_frames if num_key_frames is None else num_key_frames, device=self.table.device)
        query = index[len(index) - num_frames :]
        distance = (index[None, :] - query[:, None]).clamp(-self.max_distance, self.max_distance)
        return self.table[:, distance + self.max_distance]

    def extra_repr(self) -> str:
        return f"num_heads={self.table.shape[0]}, max_distance={self.max_distance}"


def zero_(module: nn.Linear | nn.Conv2d) -> None:
    """Set weight and bias of ``module`` to zero in place."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
