"""The operators under one name: plain functions of tensors, without parameters or state.

Every operator takes maps or tokens with the frames folded innermost into the batch, plus ``num_frames``, and an
``impl``: ``"auto"``, ``"fused"`` or ``"reference"`` (see :class:`Impl`). The reference runs wherever PyTorch
does, differentiates, compiles as one graph and exports; the modules of this package are thin layers over these
functions.

==========================  =================================================================================
:func:`alpha_blend`         ``alpha * spatial + (1 - alpha) * temporal`` in fp32
:func:`alpha_residual`      ``hidden + (1 - alpha) * update`` in fp32: the blend of a residual branch, folded
:func:`geglu`               ``value * gelu(gate)`` of one projection: the way into a gated feed-forward
:func:`group_norm`          group norm per frame or over a clip, with an optional SiLU
:func:`linear`              a linear layer with a layer norm in front and a residual and its blend behind
:func:`temporal_attention`  attention over frames at every spatial position
:func:`temporal_conv`       convolution over frames, or frames and space, with what a residual block adds to it
==========================  =================================================================================
"""

from temporal_layers.kernels.alpha_blend import alpha_blend, alpha_residual
from temporal_layers.kernels.dispatch import Impl
from temporal_layers.kernels.geglu import geglu
from temporal_layers.kernels.group_norm import group_norm
from temporal_layers.kernels.linear import linear
from temporal_layers.kernels.temporal_attention import temporal_attention
from temporal_layers.kernels.temporal_conv import temporal_conv

__all__ = [
    "Impl",
    "alpha_blend",
    "alpha_residual",
    "geglu",
    "group_norm",
    "linear",
    "temporal_attention",
    "temporal_conv",
]
