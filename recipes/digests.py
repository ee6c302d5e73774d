"""Digests of tensors: whether two runs, or two files, are about the same values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the names, types, shapes and bytes of tensors; of a module, pass its ``state_dict()``."""
    found = hashlib.blake2b(digest_size=12)
    for name, value in sorted(tensors.items()):
        value = value.detach().cpu().contiguous()
        found.update(f"{name}/{value.dtype}/{tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
