"""Named protocols: what is measured, with which network, on how many clips of which length and rate.

Those with a reference are the paper's (Video LDM, section 4 and appendix G); a published number can be compared with
only under its own protocol, network file and resizing included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from temporal_layers.recipes.evaluation.networks import NetworkConfig

SetKind = Literal["frechet", "kernel"]
NetworkKind = Literal["inception", "consistency", "text"]
PlainKind = Literal["warp_error", "frame_difference", "motion_agreement"]
PairKind = Literal["psnr", "ssim", "flicker", "lpips"]

KINDS: tuple[str, ...] = sum(map(get_args, (SetKind, NetworkKind, PlainKind, PairKind)), ())
NEED_REAL = frozenset(get_args(SetKind) + get_args(PairKind))
NEED_NETWORK = frozenset(get_args(SetKind) + get_args(NetworkKind))


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number.

    Attributes:
        kind: One of `KINDS`. ``frechet`` and ``kernel`` are distances between both sets; ``inception``, ``consistency``
            and ``text`` (CLIPSIM) are scores of the generated one, by a network; the next three need none; the last
            four compare pairs of clips.
        network: For the first five.
    """

    kind: str
    network: NetworkConfig | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Measure: kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if (self.network is not None) != (self.kind in NEED_NETWORK):
            wanted = "a network" if self.kind in NEED_NETWORK else "no network"
            raise ValueError(f"Measure: {self.kind}: expected {wanted}, got {self.network}")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A protocol.

    Attributes:
        about: What it is for, in a line.
        measures: What is measured.
        samples: Clips of each set.
        num_frames: Of a clip.
        fps: Rate; that of the videos if None.
        per_video: Most clips of one video.
    """

    about: str
    measures: tuple[Measure, ...]
    samples: int
    num_frames: int
    fps: float | None = None
    per_video: int = 1

    def __post_init__(self) -> None:
        pairs = [measure.kind in get_args(PairKind) for measure in self.measures]
        if not self.measures or any(pairs) != all(pairs):
            raise ValueError(
                "Preset: measures: expected at least one, and either all of them or none to compare pairs, got "
                f"{[measure.kind for measure in self.measures]}"
            )
        if min(self.samples, self.num_frames, self.per_video) < 1 or (self.fps is not None and self.fps <= 0):
            raise ValueError(
                "Preset: expected samples, num_frames and per_video of at least 1 and fps above 0, got "
                f"samples={self.samples}, num_frames={self.num_frames}, per_video={self.per_video}, fps={self.fps}"
            )

    @property
    def needs_real(self) -> bool:
        """Whether there has to be a real set."""
        return any(measure.kind in NEED_REAL for measure in self.measures)

    @property
    def paired(self) -> bool:
        """Whether clips of both sets belong together in pairs."""
        return any(measure.kind in get_args(PairKind) for measure in self.measures)


DRIVING = NetworkConfig(kind="driving")
DRIVING_LABELS = NetworkConfig(kind="driving", output="logits")
DRIVING_FRAMES = NetworkConfig(kind="driving", reads="frames")

I3D = NetworkConfig(
    kind="torchscript",
    name="i3d",
    size=(224, 224),
    value_range=(-1.0, 1.0),
    keywords=(("rescale", False), ("resize", False), ("return_features", True)),
)
"""The I3D of StyleGAN-V, 400 Kinetics logits, which gives the numbers of the original FVD (Unterthiner et al. 2018)."""

C3D = NetworkConfig(
    kind="torchscript", name="c3d", output="logits", size=(112, 112), value_range=(0.0, 255.0), num_frames=16
)
"""C3D fine-tuned on UCF-101, the mean of its training data subtracted inside (Saito et al. 2020)."""

INCEPTION = NetworkConfig(
    kind="torchscript", name="inception", reads="frames", size=(299, 299), fit="squash", value_range=(-1.0, 1.0)
)
"""Inception-v3 with the weights of the original FID, 2048 features."""

CLIP = NetworkConfig(kind="clip", name="clip-vit-b-32", path="openai/clip-vit-base-patch32", reads="frames")

VIDEOMAE = NetworkConfig(kind="videomae", path="MCG-NJU/videomae-base", fit="squash")

_PLAIN = tuple(Measure(kind=kind) for kind in get_args(PlainKind))


def _distances(network: NetworkConfig) -> tuple[Measure, ...]:
    return Measure(kind="frechet", network=network), Measure(kind="kernel", network=network)


PRESETS: dict[str, Preset] = {
    "driving": Preset(
        about="offline: everything that the network of the package can measure, on driving clips",
        measures=(
            *_distances(DRIVING),
            Measure(kind="frechet", network=DRIVING_FRAMES),
            Measure(kind="inception", network=DRIVING_LABELS),
            Measure(kind="consistency", network=DRIVING_FRAMES),
            *_PLAIN,
        ),
        samples=128,
        num_frames=16,
        fps=10.0,
    ),
    "reconstruction": Preset(
        about="offline: decoded clips beside the true ones, by pairs",
        measures=(Measure(kind="psnr"), Measure(kind="ssim"), Measure(kind="flicker")),
        samples=128,
        num_frames=16,
    ),
    "reconstruction-lpips": Preset(
        about="the same with LPIPS, of the package lpips or a file",
        measures=(Measure(kind="psnr"), Measure(kind="ssim"), Measure(kind="flicker"), Measure(kind="lpips")),
        samples=128,
        num_frames=16,
    ),
    "rds-fvd": Preset(
        about="the paper's FVD of driving and mountain-bike videos",
        measures=_distances(I3D),
        samples=2048,
        num_frames=16,
        fps=30.0,
    ),
    "ucf101-fvd": Preset(
        about="the paper's FVD of text-to-video on UCF-101, with the class names as prompts",
        measures=_distances(I3D),
        samples=10_000,
        num_frames=16,
    ),
    "ucf101-is": Preset(
        about="the paper's inception score of text-to-video on UCF-101",
        measures=(Measure(kind="inception", network=C3D),),
        samples=10_000,
        num_frames=16,
    ),
    "fid-10k": Preset(
        about="the paper's FID, of single frames",
        measures=_distances(INCEPTION),
        samples=10_000,
        num_frames=1,
        per_video=16,
    ),
    "fid-50k": Preset(
        about="the same, as for mountain-bike videos",
        measures=(Measure(kind="frechet", network=INCEPTION),),  # kept rows would take 0.8 GB a set
        samples=50_000,
        num_frames=1,
        per_video=16,
    ),
    "msrvtt-clipsim": Preset(
        about="the paper's CLIPSIM, one video a prompt of MSR-VTT's test set",
        measures=(Measure(kind="text", network=CLIP), Measure(kind="consistency", network=CLIP)),
        samples=2990,
        num_frames=16,
    ),
    "videomae-fvd": Preset(
        about="Frechet distance of VideoMAE features, which weigh motion more than I3D's (Ge et al. 2024)",
        measures=_distances(VIDEOMAE),
        samples=2048,
        num_frames=16,
    ),
}
"""By name."""
