"""The formats of published video weights, as plain values that are saved with a converted adapter."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from temporal_layers.config import check_choice

__all__ = ["Source"]

STYLES = {
    "animatediff": ("original", "diffusers"),
    "svd": ("sgm", "diffusers"),
    "svd-decoder": ("sgm", "diffusers"),
    "modelscope": ("original", "diffusers"),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A format of published video weights; :func:`~temporal_layers.adapters.convert.detect` finds it.

    Args:
        family: whose layers they are: ``"animatediff"``, ``"svd"`` (the UNet), ``"svd-decoder"`` (the decoder of its
            autoencoder) or ``"modelscope"``.
        style: how the tensors are named: as by the authors (``"original"``; ``"sgm"`` for Stable Video Diffusion) or
            as by ``"diffusers"``.
        version: release within the family, as far as names and shapes tell: ``"v1"``, ``"v2"``, ``"v3"`` or
            ``"sdxl"`` for AnimateDiff, else ``""``.
        prefix: what stands in front of every name (``"model.diffusion_model."``).
        whole: the image model's weights are in the file as well.
        max_frames: length of the position tables in an AnimateDiff file; ``None`` if it has none.
        dtype: of the tensors.
        exceptions: ``"name dtype"`` of tensors with another one.

    Raises:
        ValueError: if the family is unknown, or has no such style.
    """

    family: Literal["animatediff", "svd", "svd-decoder", "modelscope"]
    style: Literal["original", "sgm", "diffusers"] = "diffusers"
    version: str = ""
    prefix: str = ""
    whole: bool = False
    max_frames: int | None = None
    dtype: str = "float32"
    exceptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("Source.family", self.family, tuple(STYLES))
        check_choice("Source.style", self.style, STYLES[self.family])
        object.__setattr__(self, "exceptions", tuple(self.exceptions))  # JSON has lists only

    def to_json(self) -> str:
        """The format as text; :meth:`from_json` undoes it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Source":
        """Undo :meth:`to_json`.

        Raises:
            ValueError: if the text is of another kind.
        """
        try:
            return cls(**json.loads(text))
        except TypeError as error:
            raise ValueError(f"Source.from_json: expected what to_json wrote, got {text!r}: {error}") from error

    def dtype_of(self, name: str) -> str:
        """The dtype of the tensor of that name, prefix included."""
        return dict(entry.rsplit(" ", 1) for entry in self.exceptions).get(name, self.dtype)

    def __str__(self) -> str:
        parts = [self.family, self.version, f"({self.style} names" + (", whole model)" if self.whole else ")")]
        return " ".join(part for part in parts if part)
