"""Temporal layers for image diffusion models.

``temporal_layers`` holds the layers; ``temporal_layers.functional`` the operators under them;
``temporal_layers.adapters`` injects the layers into diffusers' models; ``temporal_layers.recipes`` trains and runs
them.
Importing this package loads nothing else: PyTorch comes with the first name that is taken from it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors read; at run time `__getattr__` finds the same names in `_HOMES`
    from temporal_layers.attention import TemporalAttention
    from temporal_layers.blend import AlphaBlend
    from temporal_layers.config import (
        AlphaConfig,
        ContextConfig,
        TemporalConvConfig,
        TemporalResBlockConfig,
        TemporalTransformerConfig,
    )
    from temporal_layers.context import ContextInput, ContextTransformer
    from temporal_layers.conv import TemporalConv
    from temporal_layers.frames import fold_frames, unfold_frames
    from temporal_layers.positions import (
        RelativePositionBias,
        RotaryPosition,
        SinusoidalMLPPosition,
        SinusoidalPosition,
        sinusoidal_embedding,
    )
    from temporal_layers.resnet import TemporalResBlock
    from temporal_layers.streaming import FrameCache
    from temporal_layers.transformer import TemporalTransformerBlock

__version__ = "0.1.0"

__all__ = [
    "AlphaBlend",
    "AlphaConfig",
    "ContextConfig",
    "ContextInput",
    "ContextTransformer",
    "FrameCache",
    "RelativePositionBias",
    "RotaryPosition",
    "SinusoidalMLPPosition",
    "SinusoidalPosition",
    "TemporalAttention",
    "TemporalConv",
    "TemporalConvConfig",
    "TemporalResBlock",
    "TemporalResBlockConfig",
    "TemporalTransformerBlock",
    "TemporalTransformerConfig",
    "fold_frames",
    "sinusoidal_embedding",
    "unfold_frames",
]

_HOMES = {
    "AlphaBlend": "blend",
    "AlphaConfig": "config",
    "ContextConfig": "config",
    "ContextInput": "context",
    "ContextTransformer": "context",
    "FrameCache": "streaming",
    "RelativePositionBias": "positions",
    "RotaryPosition": "positions",
    "SinusoidalMLPPosition": "positions",
    "SinusoidalPosition": "positions",
    "TemporalAttention": "attention",
    "TemporalConv": "conv",
    "TemporalConvConfig": "config",
    "TemporalResBlock": "resnet",
    "TemporalResBlockConfig": "config",
    "TemporalTransformerBlock": "transformer",
    "TemporalTransformerConfig": "config",
    "fold_frames": "frames",
    "sinusoidal_embedding": "positions",
    "unfold_frames": "frames",
}


def __getattr__(name: str) -> Any:
    """A public name, from the module it stands in, which is loaded now."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
