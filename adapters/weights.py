"""An adapter apart from any model: between live layers, files and merging."""

import tempfile
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from temporal_layers import ContextConfig
from temporal_layers.adapters import files, hub
from temporal_layers.adapters.attach import build_layers, place_of
from temporal_layers.adapters.card import model_card
from temporal_layers.adapters.files import Content
from temporal_layers.adapters.sites import InjectionSite, plan

__all__ = ["AdapterWeights", "full_state_dict"]


@dataclass(frozen=True)
class AdapterWeights(Content):
    """What an adapter is, where its layers go, and their weights.

    :meth:`TemporalAdapter.snapshot` makes one from live layers, :func:`~temporal_layers.adapters.merge` from several
    adapters; :meth:`TemporalAdapter.from_pretrained` takes it in place of a folder.

    Attributes:
        where: what it is from, for error texts.
    """

    where: str

    @classmethod
    def load(cls, folder: str | PathLike) -> "AdapterWeights":
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            ValueError: if a file is missing, truncated, altered or of an unknown format.
        """
        content = files.load(folder)
        return cls(**vars(content), where=str(folder))

    def build(self, model: nn.Module, *, copy: bool) -> dict[str, nn.Module]:
        """Make layers with these weights for ``model``, by the name of their site, as the hosts in dtype and device.

        Args:
            model: an image model.
            copy: copy the weights even if they are in the right dtype on the right device.

        Raises:
            ValueError: if ``model`` has other sites, or the weights are not those of the configuration.
        """
        sites = plan(model, self.config)
        self._check_sites(sites)
        layers = build_layers(model, self.config, sites, meta=True)
        self._check_weights(layers)
        for name, layer in layers.items():
            device, _ = place_of(model.get_submodule(name))
            # A host on the meta device is still to get its weights; the layer has its own already.
            self._fill(name, layer, torch.device("cpu") if device.type == "meta" else device, copy)
        return layers

    def with_context(self, model: nn.Module, context: ContextConfig) -> "AdapterWeights":
        """The same adapter, made to take a frame context; what lets it in starts at zero.

        Args:
            model: an image model that the adapter fits.
            context: what to take, and where.

        Raises:
            ValueError: if the adapter takes a frame context already, or does not fit the model.
        """
        if self.config.context is not None:
            raise ValueError(
                f"{self.where}: expected an adapter without a frame context, got one with {self.config.context}; "
                "leave context at None to use that"
            )
        self._check_sites(plan(model, self.config))
        config = replace(self.config, context=context)
        sites = plan(model, config)
        layers = build_layers(model, config, sites, meta=True)
        dtype = next(iter(self.weights.values())).dtype
        added = {
            key: torch.zeros(value.shape, dtype=dtype)
            for key, value in full_state_dict(layers).items()
            if key.endswith(".temporal.context_in.weight")
        }
        return replace(self, config=config, sites=sites, weights=self.weights | added)

    def save_pretrained(
        self,
        folder: str | PathLike,
        *,
        dtype: torch.dtype | None = None,
        metadata: dict[str, str] | None = None,
        card: bool = False,
    ) -> None:
        """As :meth:`TemporalAdapter.save_pretrained`."""
        noted = self._with(metadata)
        files.save(folder, noted, dtype=dtype, card=noted._card(dtype) if card else None)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | None = None,
        metadata: dict[str, str] | None = None,
        card: bool = True,
        **options: Any,
    ) -> str:
        """As :meth:`TemporalAdapter.push_to_hub`."""
        noted = self._with(metadata)
        with tempfile.TemporaryDirectory() as folder:
            files.save(folder, noted, dtype=dtype, card=noted._card(dtype, repo_id) if card else None)
            return hub.upload(folder, repo_id, **options)

    def _with(self, metadata: dict[str, str] | None) -> "AdapterWeights":
        if metadata is None:
            return self
        files.check_metadata(metadata)
        return replace(self, metadata={**self.metadata, **metadata})

    def _card(self, dtype: torch.dtype | None, repo_id: str | None = None) -> str:
        files.check_metadata(self.metadata)
        return model_card(self, dtype, repo_id)

    def _check_sites(self, sites: tuple[InjectionSite, ...]) -> None:
        """Raise a ``ValueError`` that names the first difference between the saved sites and those of a model."""
        other = f"the adapter was made for another model (a {self.base_class})"
        for saved, found in zip(self.sites, sites, strict=False):
            if saved != found:
                raise ValueError(f"{self.where}: expected a model with the site {saved}, got {found}; {other}")
        if len(self.sites) != len(sites):
            raise ValueError(
                f"{self.where}: expected a model with {len(self.sites)} sites, got one with {len(sites)}; {other}"
            )

    def _check_weights(self, layers: dict[str, nn.Module]) -> None:
        """Raise a ``ValueError`` unless the weights are exactly those of ``layers``, with the same shapes."""
        expected = {key: tuple(value.shape) for key, value in full_state_dict(layers).items()}
        found = {key: tuple(value.shape) for key, value in self.weights.items()}
        missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        if missing or unknown:
            raise ValueError(
                f"{self.where}: expected {len(expected)} tensors, got {len(found)}: {len(missing)} missing "
                f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}; the configuration does not belong to the weights"
            )
        for key, shape in expected.items():
            if found[key] != shape:
                raise ValueError(
                    f"{self.where}: {key}: expected shape {shape}, got {found[key]}; "
                    "the configuration does not belong to the weights"
                )

    def _fill(self, name: str, layer: nn.Module, device: torch.device, copy: bool) -> None:
        """Give ``layer``, on the meta device, the weights of site ``name`` on ``device``, in its own dtype."""
        prefix = f"{name}.temporal."
        values = {
            key: self.weights[prefix + key].detach().to(device=device, dtype=parameter.dtype, copy=copy)
            for key, parameter in layer.state_dict().items()
        }
        layer.load_state_dict(values, assign=True)


def full_state_dict(layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The weights of temporal layers under their full names in the model."""
    return {
        f"{name}.temporal.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()
    }
