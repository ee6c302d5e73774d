"""The model card of an adapter: a page for people, under a header for the hub."""

import json
import re

import diffusers
import torch
from huggingface_hub import ModelCardData

from temporal_layers.adapters.files import Content, is_alpha
from temporal_layers.adapters.registry import MODELS

__all__ = ["model_card"]

# Those the hub knows by these names; any other licence is given as a text.
LICENCES = frozenset(
    {
        "afl-3.0", "agpl-3.0", "apache-2.0", "bigcode-openrail-m", "bigscience-openrail-m", "bsd-2-clause",
        "bsd-3-clause", "cc", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m", "gpl-3.0",
        "lgpl-3.0", "mit", "mpl-2.0", "openrail", "openrail++", "unlicense",
    }
)  # fmt: skip


def model_card(adapter: Content, dtype: torch.dtype | None = None, repo_id: str | None = None) -> str:
    """Text of ``README.md`` for an adapter.

    Of the metadata, ``title``, ``notes``, ``base_model`` (a repository of the hub) and ``licence`` have a place of
    their own; what else there is follows in a table.

    Args:
        adapter: what the card is about.
        dtype: that it is stored in, if not its own.
        repo_id: the repository it will be in; the example names a folder if not given.
    """
    metadata = dict(adapter.metadata)
    title = metadata.pop("title", "") or f"Temporal layers for {adapter.base_class}"
    notes, base, licence = (metadata.pop(key, "") for key in ("notes", "base_model", "licence"))
    own = {value.dtype for key, value in adapter.weights.items() if not is_alpha(key)}
    dtypes = sorted(str(stored).removeprefix("torch.") for stored in (own if dtype is None else {dtype}))
    rows = {
        "made for": f"{adapter.base_class}" + (f" of {base}" if base else ""),
        "sites": str(len(adapter.sites)),
        "parameters": f"{sum(value.numel() for value in adapter.weights.values()):,}",
        "stored as": ", ".join(dtypes),
        "licence": licence or "not stated",
        **metadata,
    }
    table = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())
    parts = [
        f"---\n{_header(adapter, dtypes, base, licence).to_yaml()}\n---",
        f"# {' '.join(title.split())}",
        notes.strip(),
        "Temporal attention and temporal convolution for an image model: with them it makes video. Inject them with "
        "`temporal_layers`:",
        f"```python\n{_example(adapter, base, repo_id)}\n```",
        f"| | |\n|---|---|\n{table}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(adapter: Content, dtypes: list[str], base: str, licence: str) -> ModelCardData:
    known = licence.lower() in LICENCES
    has_text = any(site.context_dim is not None for site in adapter.sites)
    return ModelCardData(
        library_name="temporal-layers",
        pipeline_tag="text-to-video" if has_text else None,
        base_model=base if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) else None,
        license=(licence.lower() if known else "other") if licence else None,
        license_name=re.sub(r"[^a-z0-9.+]+", "-", licence.lower()).strip("-")[:60] if licence and not known else None,
        tags=["temporal-layers", "video", "safetensors", *dtypes],
    )


def _example(adapter: Content, base: str, repo_id: str | None) -> str:
    name = adapter.base_class
    family = getattr(MODELS.get(name), "family", "unet")
    folder = "vae" if family == "autoencoder" else "unet"
    source = json.dumps(base or "...")  # in double quotes, whatever is in it
    lines = ["from temporal_layers.adapters import TemporalAdapter", ""]
    if hasattr(diffusers, name):
        lines.insert(0, f"from diffusers import {name}")
        lines.append(f'{folder} = {name}.from_pretrained({source}, subfolder="{folder}")')
    else:
        lines.append(f"{folder} = ...  # the {name}")
    lines.append(f'adapter = TemporalAdapter.from_pretrained({folder}, "{repo_id or "path/to/this/folder"}")')
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
