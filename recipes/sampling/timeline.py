"""Conditioning that changes in the course of clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from temporal_layers.recipes.bases import Conditioning


@dataclass(frozen=True)
class Timeline:
    """What clips are told, from which frame on.

    A window of frames is one pass of the model, which is told one thing: what holds at the first frame that it makes.

    Attributes:
        parts: Conditioning with one row a clip, by the frame from which it holds; frame 0 among them.

    Raises:
        ValueError: If nothing is said of frame 0, a frame is negative, or the parts are not alike.

    Example:
        >>> Timeline({0: base.conditioning([0], [""]), 24: base.conditioning([4], [""])})  # doctest: +SKIP
    """

    parts: Mapping[int, Conditioning]

    def __post_init__(self) -> None:
        if min(self.parts, default=-1) != 0:
            raise ValueError(
                f"Timeline: expected a part that holds from frame 0 on, and none before, got parts from frames "
                f"{sorted(self.parts)}"
            )
        shapes = {
            frame: {name: tuple(value.shape) for name, value in part.items()} for frame, part in self.parts.items()
        }
        for frame, shape in shapes.items():
            if shape != shapes[0]:
                raise ValueError(
                    f"Timeline: expected parts of the names and shapes of that from frame 0, {shapes[0]}, got {shape} "
                    f"from frame {frame}"
                )

    @classmethod
    def of(cls, conditioning: Conditioning | Timeline) -> Timeline:
        """Conditioning that stays the same, as a timeline; a timeline is returned as it is."""
        return conditioning if isinstance(conditioning, Timeline) else cls({0: conditioning})

    def at(self, frame: int) -> Conditioning:
        """What holds at a frame."""
        return self.parts[max(start for start in self.parts if start <= frame)]

    def stretched(self, factor: int) -> Timeline:
        """The same for clips with ``factor`` times as many frames in the same time."""
        return Timeline({factor * frame: part for frame, part in self.parts.items()})
