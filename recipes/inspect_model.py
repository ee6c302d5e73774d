"""What an injection would put where, from a configuration alone: no weights are loaded and nothing is written.

temporal-layers inspect PATH                     # a pipeline folder, a model folder or a config.json
temporal-layers inspect PATH --policy after_pair --no-resblock --num-heads 8
temporal-layers inspect PATH --adapter my-motion  # the layers of a saved adapter
temporal-layers inspect PATH --json              # for machines
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import tyro
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from rich.console import Console
from rich.tree import Tree
from torch import nn

from temporal_layers import TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalAdapter, TemporalConfig, inject
from temporal_layers.adapters.config import TransformerPolicy
from temporal_layers.adapters.files import load as load_adapter
from temporal_layers.adapters.registry import MODELS, find
from temporal_layers.recipes.training.configs import from_words

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What to look at, and what to put there.

    Attributes:
        path: A pipeline folder (every UNet and autoencoder in it), a model folder, or a ``config.json``.
        adapter: Folder of a saved adapter, whose layers are meant; the options below are not read then.
        policy: Where the transformer layers go.
        resblock: Residual blocks behind the spatial ones.
        transformer: Transformer layers; off for autoencoders unless ``decoder_attention``.
        num_heads: Heads of the transformer layers, where the place suggests none or another number.
        resamplers: Also behind the residual blocks that change the resolution.
        decoder_attention: Transformer layers in autoencoders too.
        include: Only sites whose name one of these regular expressions is found in.
        exclude: No sites whose name one of these regular expressions is found in.
        json: Print JSON instead of tables.
    """

    path: Annotated[Path, tyro.conf.Positional]
    adapter: Path | None = None
    policy: TransformerPolicy = "after_transformer_block"
    resblock: bool = True
    transformer: bool = True
    num_heads: int | None = None
    resamplers: bool = False
    decoder_attention: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    json: bool = False

    def temporal(self, family: str) -> TemporalConfig:
        """The layers for a model of a family."""
        if self.adapter is not None:
            return load_adapter(self.adapter).config
        attention = self.transformer and (family == "unet" or self.decoder_attention)
        return TemporalConfig(
            resblock=TemporalResBlockConfig(timestep_embedding=family == "unet") if self.resblock else None,
            transformer=TemporalTransformerConfig(num_heads=self.num_heads) if attention else None,
            transformer_policy=self.policy,
            resamplers=self.resamplers,
            include=self.include,
            exclude=self.exclude,
        )


def find_configs(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Configurations of the models in a pipeline folder, a model folder or a file, each with the name of its part.

    Raises:
        ValueError: If there is no configuration of a model.
    """
    if (path / "model_index.json").is_file():
        parts = sorted(part for part in path.iterdir() if (part / "config.json").is_file())
        configs = [(part.name, json.loads((part / "config.json").read_text())) for part in parts]
        known = [(name, config) for name, config in configs if _model_class(config) is not None]
        if known:
            yield from known
            return
        raise ValueError(
            f"inspect: {path}: expected a pipeline with an image UNet or autoencoder of diffusers, got "
            f"{', '.join(name for name, _ in configs) or 'no models'}"
        )
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"inspect: {path}: expected a config.json, a folder with one, or a pipeline folder, got "
            f"{'a folder without' if path.is_dir() else 'nothing there'}"
        )
    try:
        config = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"inspect: {file}: expected JSON, got: {error}") from error
    if _model_class(config) is None:
        found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"inspect: {file}: expected _class_name to be a model of diffusers, got {found!r}")
    yield file.parent.name, config


def _model_class(config: Any) -> type[nn.Module] | None:
    name = config.get("_class_name") if isinstance(config, dict) else None
    own = {"AudioLDM2UNet2DConditionModel": AudioLDM2UNet2DConditionModel}  # diffusers does not export it
    found = own.get(name) or getattr(diffusers, str(name), None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The model of a configuration on the meta device: all shapes, no values, no memory."""
    with torch.device("meta"):
        return _model_class(config).from_config(config)


def memory(adapter: TemporalAdapter) -> dict[str, dict[str, int]]:
    """Bytes of weights, and of training the temporal layers: weights, gradients and the two moments of AdamW in fp32.

    Activations, which depend on the clip, are not in it.
    """
    temporal = sum(p.numel() for group in ("temporal", "alpha") for _, p in adapter.named_parameters(group))
    spatial = sum(parameter.numel() for _, parameter in adapter.named_parameters("spatial"))
    return {
        "spatial weights": {name: spatial * size for name, size in BYTES.items()},
        "temporal weights": {name: temporal * size for name, size in BYTES.items()},
        "training, beside activations": {name: spatial * size + temporal * 16 for name, size in BYTES.items()},
    }


def describe(adapter: TemporalAdapter) -> dict[str, Any]:
    """Everything ``inspect`` says of a model, as JSON values."""
    sites = [
        {
            **dataclasses.asdict(site),
            "layer": type(layer).__name__,
            "parameters": sum(parameter.numel() for parameter in layer.parameters()),
        }
        for site, layer in zip(adapter.sites, adapter.layers.values(), strict=True)
    ]
    return {
        "model": type(adapter.model).__name__,
        "config": adapter.config.to_dict(),
        "sites": sites,
        "temporal_parameters": sum(site["parameters"] for site in sites),
        "spatial_parameters": sum(parameter.numel() for _, parameter in adapter.named_parameters("spatial")),
        "bytes": memory(adapter),
    }


def tree(name: str, adapter: TemporalAdapter) -> Tree:
    """The model as a tree: the modules on the way to its sites, with the temporal layer at each.

    Args:
        name: Of the model.
        adapter: Its temporal layers.
    """
    root = Tree(f"{name}: {type(adapter.model).__name__}")
    branches = {"": root}
    for site, layer in adapter.layers.items():
        parts, above = site.split("."), ""
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            module = adapter.model.get_submodule(path)
            if isinstance(module, nn.ModuleList):  # a part of the name of what is in it
                continue
            if path not in branches:
                name = path.removeprefix(f"{above}.") if above else path
                branches[path] = branches[above].add(f"{name} [dim]{type(module).__name__}[/]")
            above = path
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        branches[site].add(f"[bold]+ {type(layer).__name__}[/] {parameters:,}")
    return root


def _show(name: str, adapter: TemporalAdapter) -> None:
    Console().print(tree(name, adapter))
    adapter.summary()
    for what, sizes in memory(adapter).items():
        print(f"{what}: " + ", ".join(f"{size / 1e9:.2f} GB with {dtype} weights" for dtype, size in sizes.items()))
    print()


def run_inspect(config: InspectConfig) -> int:
    """Print what would be injected into every model at ``config.path``; returns the exit code."""
    described, refused = {}, 0
    for name, model_config in find_configs(config.path):
        model = skeleton(model_config)
        registered = find(MODELS, type(model))
        try:
            adapter = inject(model, config.temporal("unet" if registered is None else registered.family))
        except ValueError as error:
            refused += 1
            described[name] = {"model": type(model).__name__, "refused": str(error)}
            if not config.json:
                print(f"{name}: {error}\n", file=sys.stderr)
            continue
        described[name] = describe(adapter)
        if not config.json:
            _show(name, adapter)
    if config.json:
        print(json.dumps(described, indent=2))
    return 1 if refused == len(described) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = from_words(InspectConfig, arguments, prog="temporal-layers inspect", description=__doc__)
    return run_inspect(config)


if __name__ == "__main__":
    sys.exit(main())
