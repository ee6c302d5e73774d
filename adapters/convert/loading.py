"""Loading published video weights into an image model."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from temporal_layers.adapters import named
from temporal_layers.adapters.adapter import TemporalAdapter, adapter_of
from temporal_layers.adapters.attach import build_layers, place_of
from temporal_layers.adapters.convert.detection import detect
from temporal_layers.adapters.convert.layouts import num_groups, read_layout
from temporal_layers.adapters.convert.names import from_foreign, to_foreign
from temporal_layers.adapters.convert.reading import Foreign, Weights, read_foreign
from temporal_layers.adapters.convert.report import ConversionReport
from temporal_layers.adapters.convert.source import Source
from temporal_layers.adapters.convert.table import Table, make_table, position_table, spatial_part
from temporal_layers.adapters.sites import InjectionSite, check_root, plan
from temporal_layers.config import check_choice

__all__ = ["load_foreign", "source_of"]


def load_foreign(
    model: nn.Module,
    weights: Weights,
    *,
    spatial: Literal["check", "skip"] = "check",
    in_norm: Literal["clip", "frame"] | None = None,
    num_heads: int | None = None,
    licence: str | None = None,
    allow_unknown: bool = False,
    name: str = "default",
) -> tuple[TemporalAdapter, ConversionReport]:
    """Inject the temporal layers of published video weights into an image model, in place.

    Known are AnimateDiff (v1, v2, v3, SDXL beta), Stable Video Diffusion (the UNet, and the decoder of the
    autoencoder) and ModelScope's text-to-video, under their authors' names or diffusers'. Which it is, is read off the
    names. Either every tensor finds its place or the model is as before.

    Args:
        model: the image model that the layers are for. Files of Stable Video Diffusion and ModelScope have the image
            model in them: :func:`image_model_of` makes it.
        weights: a ``.safetensors``, ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` file, diffusers' folder of one model, or
            tensors by name. Pickles are read for their tensors only, and refused if there is more in them.
        spatial: what becomes of image model weights in the file: ``"check"`` that they are those of ``model``, or
            ``"skip"`` them.
        in_norm: AnimateDiff's group norm runs over each ``"frame"`` in its authors' code and over the ``"clip"`` in
            diffusers, with the same weights. The default goes by the names in the file.
        num_heads: AnimateDiff's attention heads, which only ``config.json`` tells; 8 if neither does.
        licence: note to keep with the weights; what the file or the model card states if not given.
        allow_unknown: leave tensors with unknown names out instead of refusing them.
        name: of the adapter; with a new one the model may have other adapters, which are kept aside.

    Returns:
        The adapter, and the report of what went where.

    Raises:
        ValueError: if the file cannot be read, is of an unknown format or for another model, lacks a tensor, or has an
            unknown one; or if the model cannot be injected.
    """
    check_choice("load_foreign: spatial", spatial, ("check", "skip"))
    check_choice("load_foreign: in_norm", in_norm, (None, "clip", "frame"))
    with named.beside("load_foreign", model, name) as state:
        part = check_root(model).family
        foreign = read_foreign(weights)
        source = detect(foreign.tensors, part)
        config = read_layout(source, foreign, num_heads=num_heads, in_norm=in_norm, has_mid_block=_has_mid_block(model))
        sites = plan(model, config)
        _check_groups(foreign, sites, num_groups(source, foreign))
        layers = build_layers(model, config, sites, meta=True)
        host = spatial_part(model)
        table = make_table(source, sites, layers, host)
        licence = licence or foreign.licence or NOT_STATED.format(source.family, LICENCES[source.family])
        report = _compared(foreign, table, source, licence, skip=spatial == "skip", allow_unknown=allow_unknown)
        if source.whole and spatial == "check":
            _check_spatial(foreign, table, host)
        notes = _check_positions(foreign, table, source.max_frames) + _fill(model, foreign, table, layers)
        metadata = {ORIGIN: source.to_json(), "licence": licence}
        named.put_in(model, name, named.Aside(config, sites, layers, metadata), state)
    return adapter_of(model), dataclasses.replace(report, notes=notes)


ORIGIN = "origin"
NOT_STATED = "not stated in the file; the published {} weights came under {}"
LICENCES = {
    "animatediff": "Apache-2.0",
    "svd": "Stability AI's licence for Stable Video Diffusion",
    "svd-decoder": "Stability AI's licence for Stable Video Diffusion",
    "modelscope": "CC-BY-NC-4.0",
}


def source_of(adapter: TemporalAdapter) -> Source | None:
    """The format an adapter was converted from, which is saved with it; ``None`` if it was not converted."""
    text = adapter.metadata.get(ORIGIN)
    return None if text is None else Source.from_json(text)


def _has_mid_block(model: nn.Module) -> bool:
    return getattr(model, "mid_block", None) is not None


def _check_groups(foreign: Foreign, sites: tuple[InjectionSite, ...], groups: int | None) -> None:
    for site in sites:
        if site.kind in ("resnet", "attention", "conv_in") and groups not in (None, site.num_groups):
            raise ValueError(
                f"load_foreign: {site.name}: expected a norm with {groups} groups, as in {foreign.where}, got "
                f"{site.num_groups}; the weights are for another model"
            )


def _compared(
    foreign: Foreign, table: Table, source: Source, licence: str, *, skip: bool, allow_unknown: bool
) -> ConversionReport:
    """Sort all names of the file, or raise a ``ValueError`` that lists what is missing, unknown or of another shape."""
    temporal, spatial = table.by_name(spatial=False), table.by_name(spatial=True)
    positions = table.positions if source.max_frames is not None else {}
    expected = temporal.keys() | positions.keys() | (spatial.keys() if source.whole and not skip else set())
    missing = sorted(expected - foreign.tensors.keys())
    ignored, unknown = dict(foreign.others), []
    for name in foreign.tensors:
        if name in temporal:
            continue
        if not name.startswith(source.prefix):
            ignored[name] = f"another part of the file, not below {source.prefix!r}"
        elif name in positions:
            ignored[name] = "position table: computed, not stored"
        elif name in spatial and source.whole:
            ignored[name] = "image model: left out (spatial='skip')" if skip else "image model: equal to the model's"
        else:
            unknown.append(name)
    if missing or (unknown and not allow_unknown):
        raise ValueError(
            f"load_foreign: {foreign.where}: expected the {len(expected)} tensors that {source} has for this model, "
            f"got others: {len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}; the file is for "
            "another model, or incomplete; allow_unknown=True leaves unknown ones out"
        )
    loaded = {name: tuple(entry.target for entry in entries) for name, entries in temporal.items()}
    return ConversionReport(source, licence, loaded, ignored, tuple(unknown))


def _check_spatial(foreign: Foreign, table: Table, host: dict[str, Tensor]) -> None:
    for name, entries in table.by_name(spatial=True).items():
        for entry in entries:
            ours, found = host[entry.target], foreign.tensors[name]
            same = tuple(to_foreign(ours.to("meta"), entry.change).shape) == tuple(found.shape)
            if not same or not torch.equal(from_foreign(found, entry.change).to(ours), ours):
                raise ValueError(
                    f"load_foreign: {entry.target}: expected the value of {name!r} in {foreign.where}, got another; "
                    "the layers were trained with other image model weights: make that model with image_model_of, or "
                    "pass spatial='skip'"
                )


def _check_positions(foreign: Foreign, table: Table, max_frames: int | None) -> tuple[str, ...]:
    """Raise a ``ValueError`` unless the position tables are the sinusoid that is computed here."""
    rounded = 0
    for name in foreign.tensors.keys() & table.positions.keys():
        value, computed = foreign.tensors[name], position_table(max_frames, table.positions[name])
        # The sines of two machines differ a little, those in half precision more.
        bound = max(1e-5, torch.finfo(value.dtype).eps)
        if value.shape != computed.shape or not torch.allclose(value.to(computed), computed, rtol=0.0, atol=bound):
            raise ValueError(
                f"load_foreign: {name}: expected the sinusoid of AnimateDiff, {tuple(computed.shape)}, got another "
                f"table, {tuple(value.shape)}; learned positions are not supported"
            )
        rounded += not torch.equal(value, computed.to(value.dtype))
    return (f"{rounded} position tables differ from the computed ones by rounding",) if rounded else ()


def _fill(model: nn.Module, foreign: Foreign, table: Table, layers: dict[str, nn.Module]) -> tuple[str, ...]:
    """Give the layers, on the meta device, their values; return notes about what a cast has changed."""
    sources = {entry.target: entry for entry in table.entries if not entry.spatial}
    changed = 0
    for name, layer in layers.items():
        device, dtype = place_of(model.get_submodule(name))
        # A host on the meta device is still to get its weights; the layer has its own already.
        device = torch.device("cpu") if device.type == "meta" else device
        values = {}
        for key, parameter in layer.state_dict().items():
            entry = sources[f"{name}.temporal.{key}"]
            found, shape = foreign.tensors[entry.name], tuple(to_foreign(parameter, entry.change).shape)
            if tuple(found.shape) != shape:
                raise ValueError(
                    f"load_foreign: {entry.target}: expected {entry.name!r} of shape {shape}, got "
                    f"{tuple(found.shape)} in {foreign.where}; the weights are for another model"
                )
            # Alpha is never narrower than fp32, and as wide as a wider model.
            wide = torch.promote_types(parameter.dtype, dtype) if entry.change in ("scalar", "negated") else dtype
            value = from_foreign(found, entry.change).to(device=device, dtype=wide, copy=True)
            changed += not torch.equal(value.to(found.dtype).cpu(), from_foreign(found, entry.change).cpu())
            values[key] = value.contiguous()
        layer.load_state_dict(values, assign=True)
    note = f"{changed} tensors were rounded to the model's dtype; export_foreign gives the rounded values"
    return (note,) if changed else ()
