"""The part of the handle that has to do with files."""

from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn

from temporal_layers import ContextConfig
from temporal_layers.adapters import hub, named
from temporal_layers.adapters.attach import build_layers
from temporal_layers.adapters.weights import AdapterWeights, full_state_dict

__all__ = ["Saving"]

Handle = TypeVar("Handle", bound="Saving")  # not typing.Self, which a run-time check of one function cannot resolve


class Saving:
    """Base of :class:`~temporal_layers.adapters.TemporalAdapter`: saving and loading."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The temporal weights under their full names in the model."""
        return full_state_dict(self.layers)

    def snapshot(self, name: str | None = None) -> AdapterWeights:
        """The adapter apart from the model, to be merged, saved or put into another model; the weights are shared.

        Weights that FSDP2 shards are gathered, so that all processes have to call this.

        Args:
            name: of an adapter that is kept aside; the one in the model if not given.

        Raises:
            ValueError: if there is no adapter of that name, or its layers have other tensors than injection made (LoRA
                on them).
        """
        name = self._state.name if name is None else name
        adapter = named.find(self.model, self._state, name)
        made = build_layers(self.model, adapter.config, adapter.sites, meta=True)
        weights = {key: _whole(value) for key, value in full_state_dict(adapter.layers).items()}
        changed = sorted(weights.keys() ^ full_state_dict(made).keys())
        if changed:
            raise ValueError(
                f"TemporalAdapter.snapshot: expected the tensors that injection made, got others: {len(changed)} "
                f"differ {changed[:3]}; unload what was added to the temporal layers (LoRA) and save it by itself"
            )
        # Not the name of the class as it is now, which fully_shard changes.
        base_class, metadata = type(self.model).spatial_class.__name__, dict(adapter.metadata)
        return AdapterWeights(base_class, adapter.config, adapter.sites, weights, metadata, f"adapter {name!r}")

    def save_pretrained(
        self,
        folder: str | PathLike,
        *,
        dtype: torch.dtype | None = None,
        metadata: dict[str, str] | None = None,
        card: bool = False,
    ) -> None:
        """Write ``config.json`` and ``diffusion_pytorch_model.safetensors`` with the temporal layers to ``folder``.

        The image model is not saved. Existing files are replaced only when the new ones are complete. Under FSDP2 all
        processes have to call this, and the first one writes.

        Args:
            folder: where to; made if needed.
            dtype: stores the weights in it (``torch.float16`` halves the file), alpha excepted; as they are if not
                given. Loading gives the layers the dtype of their hosts in any case.
            metadata: notes to be added to :attr:`metadata`.
            card: write ``README.md`` as well, a model card made of the metadata: ``title``, ``notes``, ``base_model``,
                ``licence`` and whatever else is in it.

        Raises:
            ValueError: if the temporal layers have other tensors than injection made (LoRA on them), no values or none
                in ``dtype``, ``dtype`` is not floating, or the metadata is something else than strings.
        """
        snapshot = self.snapshot()
        sharded = any(hasattr(value, "full_tensor") for value in self.state_dict().values())
        if not sharded or torch.distributed.get_rank() == 0:
            snapshot.save_pretrained(folder, dtype=dtype, metadata=metadata, card=card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | None = None,
        metadata: dict[str, str] | None = None,
        card: bool = True,
        **options: Any,
    ) -> str:
        """Put what :meth:`save_pretrained` writes into a repository of the Hugging Face Hub. Returns its address.

        Args:
            repo_id: ``"user/name"``; made if needed.
            dtype: as for :meth:`save_pretrained`.
            metadata: likewise.
            card: whether to write the model card, in place of one that is there.
            **options: ``private``, ``token``, ``revision``, ``commit_message`` and ``create_pr``, as in
                ``huggingface_hub``.

        Raises:
            ValueError: as :meth:`save_pretrained`.
        """
        return self.snapshot().push_to_hub(repo_id, dtype=dtype, metadata=metadata, card=card, **options)

    @classmethod
    def from_pretrained(
        cls: type[Handle],
        model: nn.Module,
        source: str | PathLike | AdapterWeights,
        *,
        name: str = "default",
        context: ContextConfig | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Handle:
        """Inject temporal layers with saved weights into ``model``.

        Args:
            model: an image model with the same sites as the one that was saved.
            source: a folder that :meth:`save_pretrained` wrote, a repository of the Hugging Face Hub (``"user/name"``),
                or what :meth:`snapshot` or :func:`~temporal_layers.adapters.merge` returned.
            name: of the adapter; with a new one the model may have other adapters, which are kept aside.
            context: frame context to be taken in addition, by an adapter that takes none: what lets it in starts at
                zero, so that the model computes what it did.
            revision: branch, tag or commit of the repository.
            token: for private repositories; the one that is logged in if not given.
            local_files_only: take from the hub what was downloaded before and ask nobody.

        Raises:
            ValueError: if a file is missing, truncated, altered, of an unknown format or made for another model, the
                repository cannot be had, the model has an adapter of that name, or ``context`` comes with an adapter
                that takes a frame context already. The model is then as it was.
        """
        shared = isinstance(source, AdapterWeights)
        if isinstance(source, nn.Module):
            raise ValueError(
                "from_pretrained: source: expected a folder, a repository of the hub or a snapshot, got a "
                f"{type(source).__name__}; the model comes first: TemporalAdapter.from_pretrained(model, folder)"
            )
        if not shared:
            folder = hub.local_folder(source, revision=revision, token=token, local_files_only=local_files_only)
            source = AdapterWeights.load(folder)
        with named.beside("from_pretrained", model, name) as state:
            if context is not None:
                source = source.with_context(model, context)
            layers = source.build(model, copy=shared)
            named.put_in(model, name, named.Aside(source.config, source.sites, layers, dict(source.metadata)), state)
        return cls(model)


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
