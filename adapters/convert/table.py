"""The complete list of the tensors that a file of a source has for a model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from temporal_layers.adapters.convert.names import Change, spatial_name, temporal_name
from temporal_layers.adapters.convert.original import original_names
from temporal_layers.adapters.convert.source import Source
from temporal_layers.adapters.sites import InjectionSite
from temporal_layers.positions import frame_indices, sinusoidal_embedding

__all__ = ["Entry", "Table", "make_table", "position_table", "spatial_part"]


@dataclass(frozen=True)
class Entry:
    """One of our tensors and its place in a file.

    Attributes:
        name: in the file.
        target: full name in the model with temporal layers.
        change: how the two differ.
        spatial: it belongs to the image model.
    """

    name: str
    target: str
    change: Change = "none"
    spatial: bool = False


@dataclass(frozen=True)
class Table:
    """All entries, and the names of AnimateDiff's position tables with their widths.

    Several entries may have one name: SVD shares tensors among the blocks of a transformer.
    """

    entries: tuple[Entry, ...]
    positions: dict[str, int]

    def by_name(self, *, spatial: bool) -> dict[str, list[Entry]]:
        """The entries of the image model or of the temporal layers, by name."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.spatial == spatial:
                found.setdefault(entry.name, []).append(entry)
        return found


def make_table(
    source: Source, sites: tuple[InjectionSite, ...], layers: Mapping[str, nn.Module], spatial: Mapping[str, Tensor]
) -> Table:
    """List what a file of ``source`` holds for a model.

    Args:
        source: the format.
        sites: of the temporal layers.
        layers: the temporal layers by the name of their site; only their names are looked at.
        spatial: the image model's state dict; likewise.

    Raises:
        ValueError: if a layer has a tensor that the source has no place for.
    """
    found: list[tuple[str, str, Change, bool]] = []
    positions: dict[str, int] = {}
    for site in sites:
        for key, value in layers[site.name].state_dict().items():
            name, change = temporal_name(source.family, site, key)
            if source.family == "modelscope" and source.style == "original" and key in PROJECTIONS:
                change = "conv1d"
            found.append((name, f"{site.name}.temporal.{key}", change, False))
            if source.family == "animatediff" and key.startswith("norms.") and key.endswith(".weight"):
                positions[name.removesuffix(".weight")] = value.shape[0]
    for key, value in spatial.items():
        conv = source.style == "sgm" and source.family == "svd-decoder" and ".attentions." in key and value.ndim == 2
        found.append((spatial_name(source.family, key), key, "conv2d" if conv else "none", True))
    renamed = {name: name for name, *_ in found}
    if source.style != "diffusers":
        renamed = original_names(source.family, renamed)
    entries = tuple(Entry(source.prefix + renamed[name], target, *rest) for name, target, *rest in found)
    return Table(entries, _position_names(source, positions))


PROJECTIONS = frozenset({"proj_in.weight", "proj_out.weight"})


def _position_names(source: Source, norms: dict[str, int]) -> dict[str, int]:
    """From the names of the norms in front of attentions to those of the position tables: one a block, or one each."""
    names = {}
    for norm, width in norms.items():
        block, _, index = norm.rpartition(".norm")
        name = f"{block}.pos_embed.pe"
        if source.style == "original":
            module, _, depth = block.partition(".transformer_blocks.")
            block = f"{module}.temporal_transformer.transformer_blocks.{depth}"
            name = f"{block}.attention_blocks.{int(index) - 1}.pos_encoder.pe"
        names[source.prefix + name] = width
    return names


def position_table(max_frames: int, width: int) -> Tensor:
    """AnimateDiff's table of positions, ``(1, max_frames, width)`` in fp32."""
    return sinusoidal_embedding(frame_indices(max_frames), width, interleaved=True)[None]


def spatial_part(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the image model, whether it has temporal layers or not."""
    state = getattr(model, "_temporal_state", None)
    inside = () if state is None else tuple(f"{site.name}.temporal." for site in state.sites)
    with torch.no_grad():
        return {key: value for key, value in model.state_dict().items() if not key.startswith(inside)}
