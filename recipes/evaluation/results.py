"""What an evaluation returns: numbers, each with everything that it depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from temporal_layers import __version__
from temporal_layers.recipes.evaluation.networks import FeatureNetwork

_NAMES = {
    ("frechet", "clips"): "FVD",
    ("frechet", "frames"): "FID",
    ("kernel", "clips"): "KVD",
    ("kernel", "frames"): "KID",
    ("inception", "clips"): "video IS",
    ("inception", "frames"): "IS",
    ("consistency", "frames"): "frame consistency",
    ("text", "frames"): "CLIPSIM",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
}


def shown_name(kind: str, network: FeatureNetwork | None) -> str:
    """What to call a number: with the network in brackets, without which it means nothing."""
    if network is None:
        return _NAMES.get(kind, kind.replace("_", " "))
    return f"{_NAMES[kind, network.reads]}[{network.name}]"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number and what it was measured with.

    Attributes:
        name: With the network in brackets, as in ``FVD[i3d]``.
        value: Of the generated set.
        spread: See `Value`.
        real: The same of the real set, for what looks at one set at a time; None without one, and for distances.
        samples: Rows that it was computed from: clips, or frames if the network reads those one by one.
        real_samples: Rows of the real set.
        network: Identity of the network, with the digest of its weights and the preprocessing; None for none.
    """

    name: str
    value: float
    spread: float | None = None
    real: float | None = None
    samples: int
    real_samples: int | None = None
    network: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Numbers of a generated set, and what they depend on.

    Attributes:
        measures: The numbers.
        sampling: Which clips were taken: how many, of which length, rate and size.
        fps: Mean rate of the clips of each set, as their files have it.
        digests: Hashes of the contents of each set.
        version: Of this library.
    """

    measures: tuple[Measured, ...]
    sampling: dict[str, Any]
    fps: dict[str, float]
    digests: dict[str, str]
    version: str = __version__

    def __getitem__(self, name: str) -> Measured:
        """The number of a name."""
        for measured in self.measures:
            if measured.name == name:
                return measured
        raise KeyError(f"expected one of {', '.join(one.name for one in self.measures)}, got {name!r}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
