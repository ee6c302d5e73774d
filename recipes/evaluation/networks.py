"""Feature networks behind one interface, with a digest of their weights and all that is done to clips before them.

`FeatureNetwork` wraps any module; `load_network` makes one from a description: the network that comes with the
package, a TorchScript file (I3D, C3D, Inception), or VideoMAE and CLIP of transformers.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers import fold_frames
from temporal_layers.recipes.data.decoding import covering
from temporal_layers.recipes.evaluation.driving_network import load_driving_network

Kind = Literal["driving", "torchscript", "videomae", "clip"]
Reads = Literal["clips", "frames"]
Output = Literal["features", "logits", "probabilities"]
Fit = Literal["crop", "squash"]

_TINY = 1e-12
"""Least probability of a class, whose logarithm is taken."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Which network, and how it wants its input.

    Attributes:
        kind: ``driving`` comes with the package; ``torchscript`` is a file; ``videomae`` and ``clip`` are of
            transformers.
        path: The file, or the folder or repository of a model of transformers.
        name: What to call it in results; made of the kind if empty.
        reads: Whole clips, or every frame by itself.
        output: What it returns: features, or logits or probabilities of classes.
        size: Of a TorchScript file: height and width of its input; None takes clips as they are.
        fit: ``crop`` scales frames until they cover the size and cuts out the centre, ``squash`` scales both sides.
        value_range: Of a TorchScript file: what black and white are mapped to.
        num_frames: How many frames it needs; None for any number.
        keywords: Of a TorchScript file: further arguments of its ``forward``, name and value.
    """

    kind: Kind = "driving"
    path: str = ""
    name: str = ""
    reads: Reads = "clips"
    output: Output = "features"
    size: tuple[int, int] | None = None
    fit: Fit = "crop"
    value_range: tuple[float, float] = (0.0, 1.0)
    num_frames: int | None = None
    keywords: tuple[tuple[str, bool], ...] = ()

    def __post_init__(self) -> None:
        for name, options in (("kind", Kind), ("reads", Reads), ("output", Output), ("fit", Fit)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(
                    f"NetworkConfig: {name}: expected one of {', '.join(get_args(options))}, got "
                    f"{getattr(self, name)!r}"
                )
        if not self.value_range[0] < self.value_range[1]:
            raise ValueError(
                f"NetworkConfig: value_range: expected (black, white), the first smaller, got {self.value_range}"
            )


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A network with everything that its numbers depend on.

    Attributes:
        name: What to call it in results.
        digest: Of the weights; see `weights_digest`.
        module: Called with clips ``(batch, 3, frames, height, width)``, or frames ``(n, 3, height, width)`` if it reads
            those, of the size and values below; returns one row for each.
        reads: Whole clips, or every frame by itself.
        output: What a row holds.
        size: Height and width of the input; None takes clips as they are.
        fit: How frames are brought to it.
        mean: Of each colour, subtracted from values in [0, 1].
        std: Of each colour, by which the rest is divided.
        num_frames: How many frames it needs; None for any number.
        device: Where the module is, and where its input is prepared.
        embed_text: Rows for texts, in the space of those for frames; None if it cannot.
    """

    name: str
    digest: str
    module: Callable[[Tensor], Tensor] = field(repr=False, compare=False)
    reads: Reads = "clips"
    output: Output = "features"
    size: tuple[int, int] | None = None
    fit: Fit = "crop"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    num_frames: int | None = None
    device: torch.device = field(default=torch.device("cpu"), compare=False)
    embed_text: Callable[[Sequence[str]], Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that its numbers depend on, as plain values."""
        names = ("name", "digest", "reads", "output", "size", "fit", "mean", "std", "num_frames")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def __call__(self, clips: Float[Tensor, "batch 3 frames height width"]) -> Float[Tensor, "rows features"]:
        """Rows for clips in [0, 1], or for their frames in turn, in float64 on the CPU; probabilities as logarithms.

        Raises:
            ValueError: Too few or too many frames, or an output that is not one finite row for each.
        """
        frames = clips.shape[2]
        if self.reads == "clips" and self.num_frames not in (None, frames):
            raise ValueError(
                f"FeatureNetwork: {self.name}: expected clips of {self.num_frames} frames, got {frames}; set num_frames"
            )
        pixels = self.prepared(clips)
        count = len(clips) if self.reads == "clips" else len(clips) * frames
        output = self.module(pixels)
        rows = output.flatten(1) if isinstance(output, Tensor) and output.ndim > 1 else output
        if not (isinstance(rows, Tensor) and rows.ndim == 2 and len(rows) == count):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"FeatureNetwork: {self.name}: expected one row for each of {count} {self.reads}, got {got}; wrap the "
                "network so that it returns a tensor (batch, features)"
            )
        rows = rows.to("cpu", torch.float64)
        if not rows.isfinite().all():
            raise ValueError(
                f"FeatureNetwork: {self.name}: expected finite output, got NaN or infinity; check its input"
            )
        return rows.clamp_min(_TINY).log() if self.output == "probabilities" else rows

    def prepared(self, clips: Float[Tensor, "batch 3 frames height width"]) -> Tensor:
        """What the module is called with: frames resized (bilinear, antialiased) and scaled."""
        folded = fold_frames(clips.to(self.device))
        if self.size is not None and tuple(folded.shape[2:]) != tuple(self.size):
            folded = _resized(folded, self.size, self.fit)
        mean, std = (folded.new_tensor(value).view(1, 3, 1, 1) for value in (self.mean, self.std))
        folded = (folded - mean) / std
        if self.reads == "frames":
            return folded
        return folded.unflatten(0, (len(clips), clips.shape[2])).transpose(1, 2)


def _resized(frames: Float[Tensor, "n 3 h w"], size: tuple[int, int], fit: Fit) -> Float[Tensor, "n 3 height width"]:
    target = covering(tuple(frames.shape[2:]), size) if fit == "crop" else tuple(size)
    frames = F.interpolate(frames, size=target, mode="bilinear", antialias=True).clamp(0, 1)
    top, left = ((have - want) // 2 for have, want in zip(target, size, strict=True))
    return frames[:, :, top : top + size[0], left : left + size[1]]


def weights_digest(module: nn.Module) -> str:
    """Hash of the names, types, shapes and bytes of all parameters and buffers."""
    found = hashlib.blake2b(digest_size=12)
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        found.update(f"{name}/{value.dtype}/{tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def file_digest(path: str | Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=12)).hexdigest()


def load_network(config: NetworkConfig, device: str | torch.device = "cpu") -> FeatureNetwork:
    """The network of a description.

    Args:
        config: Which network.
        device: Where it runs.

    Raises:
        ValueError: There is no such file or model, or it cannot do what is asked of it.
    """
    makers = {"driving": _driving, "torchscript": _torchscript, "videomae": _videomae, "clip": _clip}
    return makers[config.kind](config, torch.device(device))


def _driving(config: NetworkConfig, device: torch.device) -> FeatureNetwork:
    if config.output == "probabilities":
        raise ValueError("load_network: driving: expected the output features or logits, got 'probabilities'")
    network = load_driving_network().to(device)

    def rows(pixels: Tensor) -> Tensor:
        # One frame is as good as any number of equal ones.
        features = network(pixels.unsqueeze(2) if config.reads == "frames" else pixels)
        return network.labels(features) if config.output == "logits" else features

    return FeatureNetwork(
        name=config.name or "driving",
        digest=weights_digest(network),
        module=rows,
        reads=config.reads,
        output=config.output,
        size=tuple(network.config.frame_size),
        num_frames=config.num_frames,
        device=device,
    )


def _torchscript(config: NetworkConfig, device: torch.device) -> FeatureNetwork:
    if not Path(config.path).is_file():
        raise ValueError(
            f"load_network: {config.name or 'torchscript'}: expected a TorchScript file, got {config.path!r}; pass the "
            "path of one (--network FILE)"
        )
    try:
        with warnings.catch_warnings():
            # Deprecated in favour of torch.export, yet what published files are.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(config.path, map_location=device)
    except RuntimeError as error:
        raise ValueError(
            f"load_network: expected {config.path} to be a TorchScript archive, got: {str(error).splitlines()[0]}; a "
            "state dict alone is not enough: save the scripted module"
        ) from error
    module.eval()
    black, white = config.value_range
    return FeatureNetwork(
        name=config.name or Path(config.path).stem,
        digest=file_digest(config.path),
        module=lambda pixels: module(pixels, **dict(config.keywords)),
        reads=config.reads,
        output=config.output,
        size=config.size,
        fit=config.fit,
        mean=(-black / (white - black),) * 3,
        std=(1 / (white - black),) * 3,
        num_frames=config.num_frames,
        device=device,
    )


def _videomae(config: NetworkConfig, device: torch.device) -> FeatureNetwork:
    """Mean of the tokens of VideoMAE's last layer (Tong et al. 2022)."""
    from transformers import VideoMAEModel
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    model = _of_transformers(VideoMAEModel, config, device)
    side = model.config.image_size
    return FeatureNetwork(
        name=config.name or "videomae",
        digest=weights_digest(model),
        module=lambda pixels: model(pixels.transpose(1, 2)).last_hidden_state.mean(1),
        size=(side, side),
        fit=config.fit,
        mean=tuple(IMAGENET_DEFAULT_MEAN),
        std=tuple(IMAGENET_DEFAULT_STD),
        num_frames=model.config.num_frames,
        device=device,
    )


def _clip(config: NetworkConfig, device: torch.device) -> FeatureNetwork:
    """Image and text embeddings of CLIP (Radford et al. 2021)."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    model = _of_transformers(CLIPModel, config, device)
    tokenizer = AutoTokenizer.from_pretrained(config.path)
    side = model.config.vision_config.image_size
    return FeatureNetwork(
        name=config.name or "clip",
        digest=weights_digest(model),
        module=lambda pixels: _embedding(model.get_image_features(pixel_values=pixels)),
        reads="frames",
        size=(side, side),
        fit=config.fit,
        mean=tuple(OPENAI_CLIP_MEAN),
        std=tuple(OPENAI_CLIP_STD),
        device=device,
        embed_text=partial(_clip_texts, model, tokenizer, device),
    )


@torch.no_grad()
def _clip_texts(model: nn.Module, tokenizer: Any, device: torch.device, texts: Sequence[str]) -> Tensor:
    words = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device)
    return _embedding(model.get_text_features(**words)).to("cpu", torch.float64)


def _embedding(output: Any) -> Tensor:
    """transformers 5 returns a bundle where 4 returned the embedding."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _of_transformers(model: Any, config: NetworkConfig, device: torch.device) -> nn.Module:
    try:
        return model.from_pretrained(config.path).to(device, torch.float32).eval().requires_grad_(False)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(
            f"load_network: {config.kind}: expected a folder or repository of a {model.__name__}, got {config.path!r} "
            f"({str(error).splitlines()[0]}); pass one (--network FOLDER_OR_ID)"
        ) from error
