"""Low-rank adapters in a UNet, several at a time: adding and loading one leaves the others as strong as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LORA_FILE = "pytorch_lora_weights.safetensors"


def lora_strengths(unet: nn.Module) -> dict[str, float]:
    """How strong each LoRA of a UNet is, by name; 0 for those that are switched off."""
    found: dict[str, float] = {}
    for module in unet.modules():
        for name, rank in getattr(module, "r", {}).items() if hasattr(module, "lora_A") else ():
            strength = module.scaling[name] * rank / module.lora_alpha[name]
            found[name] = strength if name in module.active_adapters and not module.disable_adapters else 0.0
    return found


def set_lora_strengths(unet: nn.Module, strengths: Mapping[str, float]) -> None:
    """Set how strong each LoRA of a UNet is: 1 as trained, 0 off; those that are not named are switched off.

    As ``unet.set_adapters``, which does the same for one UNet and for a pipeline.

    Raises:
        ValueError: If there is no LoRA of a name.
    """
    unknown = sorted(strengths.keys() - lora_strengths(unet).keys())
    if unknown:
        raise ValueError(
            f"set_lora_strengths: expected names among {sorted(lora_strengths(unet))}, got {unknown}; load them first"
        )
    kept = {name: strength for name, strength in strengths.items() if strength}
    flags = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    if kept:
        unet.enable_lora()
        unet.set_adapters(list(kept), list(kept.values()))
    elif lora_strengths(unet):
        unet.disable_lora()
    for parameter, flag in flags:  # what is switched on would become trainable
        parameter.requires_grad_(flag)


def add_lora(unet: nn.Module, name: str, targets: Sequence[str], *, rank: int, seed: int = 0) -> list[nn.Parameter]:
    """Add an untrained LoRA, which changes nothing yet, and return its parameters.

    Args:
        unet: The model.
        name: Of the LoRA.
        targets: Full names of the linear layers or convolutions that get one.
        rank: Of their change.
        seed: Of the initial weights; the global generator is left as it was.

    Raises:
        ValueError: If there is a LoRA of that name, or there are no targets.
    """
    from peft import LoraConfig

    _check_new(unet, name)
    if not targets:
        raise ValueError(
            f"add_lora: targets: expected names of layers in the {type(unet).__name__}, got none; inject or load "
            "temporal layers first, or name others"
        )
    before = lora_strengths(unet)
    with _among_others(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # PEFT's "gaussian" has a spread of 1/rank. The second matrix starts at zero in any case.
        options = {"r": rank, "lora_alpha": rank, "init_lora_weights": "gaussian"}
        unet.add_adapter(LoraConfig(target_modules=list(targets), **options), name)
    set_lora_strengths(unet, {**before, name: 1.0})
    return lora_parameters(unet, name)


def load_lora(
    unet: nn.Module,
    source: Path | str | dict[str, Tensor],
    name: str,
    *,
    strength: float = 1.0,
    **options: Any,
) -> None:
    """Load a LoRA beside those that are there.

    Args:
        unet: The model.
        source: Folder with a file of diffusers, or what was in it.
        name: For the LoRA.
        strength: 1 as trained.
        **options: Of the UNet's ``load_lora_adapter``.

    Raises:
        ValueError: If there is a LoRA of that name, or none of the file's layers is in the UNet.
    """
    _check_new(unet, name)
    before = lora_strengths(unet)
    files = {} if isinstance(source, dict) else {"weight_name": LORA_FILE}
    with _among_others():
        unet.load_lora_adapter(source, adapter_name=name, **files, **options)
    for parameter in lora_parameters(unet, name):
        parameter.requires_grad_(False)
    set_lora_strengths(unet, {**before, name: strength})


def lora_parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """Parameters of a LoRA."""
    marks = tuple(f".{part}.{name}." for part in ("lora_A", "lora_B"))
    return [parameter for key, parameter in module.named_parameters() if any(mark in f"{key}." for mark in marks)]


def _check_new(unet: nn.Module, name: str) -> None:
    if name in lora_strengths(unet):
        raise ValueError(
            f"LoRA: expected a new name, got {name!r}, which is there; choose another, or take that one out with "
            f"unet.delete_adapters({name!r})"
        )


@contextmanager
def _among_others() -> Iterator[None]:
    with warnings.catch_warnings():  # several at a time are what is wanted here
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        yield
