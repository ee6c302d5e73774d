"""Temporal layers for image diffusion models.

``temporal_layers`` holds the layers; ``temporal_layers.functional`` the operators under them;
``temporal_layers.adapters`` injects the layers into diffusers' models; ``temporal_layers.recipes`` trains and runs
them.
Importing this package loads PyTorch only.
"""

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
