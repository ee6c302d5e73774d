"""Every mistake a user can make raises a ValueError that says who, what was expected, what came and what to do."""

import re

import pytest
import torch

from temporal_layers import (
    AlphaBlend,
    AlphaConfig,
    RelativePositionBias,
    RotaryPosition,
    SinusoidalMLPPosition,
    SinusoidalPosition,
    TemporalAttention,
    TemporalResBlock,
    TemporalResBlockConfig,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
    fold_frames,
    sinusoidal_embedding,
    unfold_frames,
)

Conv, Transformer = TemporalResBlockConfig, TemporalTransformerConfig


def tokens(*shape):
    return torch.zeros(shape or (4, 3, 8))


def resblock(*args, **options):
    return TemporalResBlock(8, num_groups=4, temb_channels=6)(*args, **{"num_frames": 2} | options)


def attention(*args, context_dim=None, **options):
    return TemporalAttention(8, num_heads=2, context_dim=context_dim)(*args, **{"num_frames": 2} | options)


def transformer(*args, config=None, **options):
    layer = TemporalTransformerBlock(8, num_heads=2, num_groups=4, context_dim=5, config=config)
    return layer(*args, **{"num_frames": 2} | options)


CONFIGS = [
    (
        lambda: AlphaConfig(shape="pixel"),
        "AlphaConfig.shape: expected one of 'scalar', 'frame', 'channel', got 'pixel'",
    ),
    (
        lambda: AlphaConfig(init=1.0),
        "AlphaConfig.init: expected a value strictly between 0 and 1 for a learned alpha, got 1.0; at 0 or 1 the "
        "sigmoid has no gradient: use learned=False to keep it there",
    ),
    (lambda: AlphaConfig(init=0.0), "expected a value strictly between 0 and 1 for a learned alpha, got 0.0"),
    (
        lambda: AlphaConfig(init=1.5, learned=False),
        "AlphaConfig.init: expected a value from 0 to 1, got 1.5",
    ),
    (lambda: AlphaConfig(init=float("nan"), learned=False), "expected a value from 0 to 1, got nan"),
    (
        lambda: AlphaConfig(shape="frame"),
        "AlphaConfig.num_frames: expected a clip length with shape='frame' and None otherwise, got shape='frame' and "
        "num_frames=None",
    ),
    (lambda: AlphaConfig(num_frames=8), "got shape='scalar' and num_frames=8"),
    (
        lambda: AlphaConfig(shape="frame", num_frames=0),
        "AlphaConfig.num_frames: expected a whole number of at least 1, got 0",
    ),
    (
        lambda: Conv(num_convs=0),
        "TemporalResBlockConfig.num_convs: expected a whole number of at least 1, got 0",
    ),
    (lambda: Conv(num_convs=True), "num_convs: expected a whole number of at least 1, got True"),
    (lambda: Conv(kernel_size=2.0), "kernel_size: expected a whole number of at least 1, got 2.0"),
    (lambda: Conv(kernel_size=4), "TemporalResBlockConfig.kernel_size: expected an odd number, got 4"),
    (lambda: Conv(norm="batch"), "TemporalResBlockConfig.norm: expected one of 'clip', 'frame', got 'batch'"),
    (lambda: Conv(dropout=1.0), "TemporalResBlockConfig.dropout: expected a value from 0 to below 1, got 1.0"),
    (lambda: Conv(eps=0.0), "TemporalResBlockConfig.eps: expected a value between 0 and 1 or None, got 0.0"),
    (
        lambda: Conv(causal=True),
        "TemporalResBlockConfig.norm: expected 'frame' with causal=True, got 'clip'; statistics over the clip would "
        "let a frame see later ones",
    ),
    (
        lambda: Transformer(attentions=("self", "text")),
        "TemporalTransformerConfig.attentions: expected one of 'self', 'cross', got 'text'",
    ),
    (
        lambda: Transformer(attentions=["cross"]),
        "TemporalTransformerConfig.attentions: expected at least one 'self' (attention over frames), got ('cross',); "
        "without it frames never mix",
    ),
    (
        lambda: Transformer(position="learned"),
        "TemporalTransformerConfig.position: expected one of 'none', 'sinusoidal', 'sinusoidal_mlp', 'rotary', "
        "'relative', got 'learned'",
    ),
    (
        lambda: Transformer(in_norm="batch"),
        "TemporalTransformerConfig.in_norm: expected one of 'none', 'clip', 'frame', got 'batch'",
    ),
    (
        lambda: Transformer(in_norm="clip"),
        "TemporalTransformerConfig.in_norm: expected 'none' without projection, got 'clip'; set projection=True, or "
        "the normalised input itself would be blended into the output",
    ),
    (
        lambda: Transformer(in_norm="clip", projection=True, causal=True),
        "TemporalTransformerConfig.in_norm: expected 'none' or 'frame' with causal=True, got 'clip'; statistics over "
        "the clip would let a frame see later ones",
    ),
    (
        lambda: Transformer(window=-1),
        "TemporalTransformerConfig.window: expected a whole number of at least 0, got -1",
    ),
]

CONSTRUCTORS = [
    (
        lambda: AlphaBlend(AlphaConfig(shape="channel")),
        "AlphaBlend: channels: expected the layer's channels with shape='channel', got None",
    ),
    (
        lambda: TemporalResBlock(12, num_groups=8),
        "TemporalResBlock: num_groups: expected a divisor of channels=12, got 8",
    ),
    (lambda: TemporalResBlock(12, num_groups=0), "num_groups: expected a divisor of channels=12, got 0"),
    (
        lambda: TemporalAttention(10, num_heads=4),
        "TemporalAttention: num_heads: expected a divisor of dim=10, got 4; or pass head_dim",
    ),
    (
        lambda: TemporalAttention(10, num_heads=0),
        "TemporalAttention: num_heads: expected a whole number of at least 1, got 0",
    ),
    (
        lambda: TemporalAttention(10, num_heads=2, head_dim=0),
        "TemporalAttention: head_dim: expected a whole number of at least 1, got 0",
    ),
    (
        lambda: TemporalAttention(8, num_heads=2, position="sinusoidal_mlp"),
        "TemporalAttention: position: expected one of 'none', 'sinusoidal', 'rotary', 'relative', got 'sinusoidal_mlp'",
    ),
    (
        lambda: TemporalAttention(8, num_heads=2, context_dim=5, causal=True),
        "TemporalAttention: expected no position, causal or window with context_dim (cross-attention), got "
        "position='none', causal=True, window=None",
    ),
    (
        lambda: TemporalAttention(8, num_heads=2, context_dim=5, position="rotary", window=3),
        "got position='rotary', causal=False, window=3",
    ),
    (
        lambda: TemporalTransformerBlock(10, num_heads=4),
        "TemporalTransformerBlock: num_heads: expected a divisor of dim=10, got 4; or pass head_dim",
    ),
    (
        lambda: TemporalTransformerBlock(
            8, num_heads=2, num_groups=3, config=Transformer(projection=True, in_norm="frame")
        ),
        "TemporalTransformerBlock: num_groups: expected a divisor of dim=8, got 3",
    ),
    (
        lambda: SinusoidalPosition(5),
        "SinusoidalPosition: dim: expected a positive even number, got 5; channels are taken in pairs",
    ),
    (lambda: SinusoidalMLPPosition(0), "SinusoidalMLPPosition: dim: expected a positive even number, got 0"),
    (lambda: RotaryPosition(3), "RotaryPosition: head_dim: expected a positive even number, got 3"),
    (
        lambda: RelativePositionBias(2, max_distance=-1),
        "RelativePositionBias: max_distance: expected a whole number of at least 0, got -1",
    ),
]

CALLS = [
    (
        lambda: fold_frames(torch.zeros(2, 3, 4, 4)),
        "fold_frames: clips: expected 5 axes (batch, channels, frames, height, width), got shape (2, 3, 4, 4); add the "
        "missing axis or pass images to the image model directly",
    ),
    (
        lambda: unfold_frames(torch.zeros(2, 3, 4), 2),
        "unfold_frames: images: expected 4 axes (batch * frames, channels, height, width), got shape (2, 3, 4)",
    ),
    (
        lambda: unfold_frames(torch.zeros(4, 3, 2, 2), 3),
        "unfold_frames: expected a batch that is a multiple of num_frames=3 (frames folded into the batch, frames "
        "innermost), got 4 images; set num_frames to the clip length or fix the batch",
    ),
    (lambda: unfold_frames(torch.zeros(4, 3, 2, 2), 0), "unfold_frames: num_frames: expected at least 1, got 0"),
    (
        lambda: sinusoidal_embedding(torch.arange(3), 5, interleaved=True),
        "sinusoidal_embedding: dim: expected a positive even number, got 5",
    ),
    (
        lambda: RotaryPosition(4)(torch.zeros(4, 1, 8), num_frames=3),
        "RotaryPosition: expected a batch that is a multiple of num_frames=3",
    ),
    (
        lambda: AlphaBlend(AlphaConfig(shape="frame", num_frames=4))(tokens(), tokens(), num_frames=2),
        "AlphaBlend: num_frames: expected 4 (alpha is per frame), got 2; use shape='scalar' for clips of any length",
    ),
    (
        lambda: resblock(tokens()),
        "TemporalResBlock: hidden_states: expected (batch * num_frames, 8, height, width), got (4, 3, 8); fold the "
        "frames into the batch with fold_frames",
    ),
    (lambda: resblock(tokens(4, 6, 2, 2)), "expected (batch * num_frames, 8, height, width), got (4, 6, 2, 2)"),
    (
        lambda: resblock(tokens(4, 8, 2, 2), num_frames=3),
        "TemporalResBlock: expected a batch that is a multiple of num_frames=3",
    ),
    (
        lambda: resblock(tokens(4, 8, 2, 2)),
        "TemporalResBlock: temb: expected (4, 6), one embedding a frame, got None; repeat it for the frames of a clip, "
        "or build the block without temb_channels",
    ),
    # One embedding a clip has a batch that the number of frames divides: it would be spread over the wrong frames.
    (lambda: resblock(tokens(4, 8, 2, 2), tokens(2, 6)), "temb: expected (4, 6), one embedding a frame, got (2, 6)"),
    (
        lambda: attention(tokens(), num_frames=3),
        "TemporalAttention: expected a batch that is a multiple of num_frames=3",
    ),
    (
        lambda: attention(tokens(), tokens(2, 7, 5)),
        "TemporalAttention: context: expected None for attention over frames, got (2, 7, 5); build the layer with "
        "context_dim for cross-attention",
    ),
    (
        lambda: attention(tokens(), tokens(2, 7, 5), context_dim=5, frame_mask=torch.ones(2, 2, dtype=torch.bool)),
        "TemporalAttention: frame_mask: expected None for cross-attention, got (2, 2); it masks frames, and the keys "
        "are the context's tokens",
    ),
    (
        lambda: attention(tokens(), context_dim=5),
        "TemporalAttention: context: expected (2, tokens, 5), one a clip, got None; pass the text of each clip once, "
        "not once a frame",
    ),
    (lambda: attention(tokens(), tokens(4, 7, 5), context_dim=5), "expected (2, tokens, 5), one a clip, got (4, 7, 5)"),
    (lambda: attention(tokens(), tokens(2, 7, 6), context_dim=5), "expected (2, tokens, 5), one a clip, got (2, 7, 6)"),
    (lambda: attention(tokens(), tokens(2, 5), context_dim=5), "expected (2, tokens, 5), one a clip, got (2, 5)"),
    (
        lambda: transformer(tokens(4, 3, 6)),
        "TemporalTransformerBlock: hidden_states: expected tokens (n, positions, 8) or feature maps (n, 8, height, "
        "width), got shape (4, 3, 6); fold the frames into the batch with fold_frames",
    ),
    (lambda: transformer(tokens(2, 8, 2, 3, 3)), "got shape (2, 8, 2, 3, 3); fold the frames into the batch"),
    (lambda: transformer(tokens(4, 6, 2, 2)), "or feature maps (n, 8, height, width), got shape (4, 6, 2, 2)"),
    (
        lambda: transformer(tokens(), config=Transformer(projection=True, in_norm="frame")),
        "TemporalTransformerBlock: hidden_states: expected feature maps (n, dim, height, width) because the block has "
        "an input GroupNorm, got shape (4, 3, 8); use in_norm='none' for tokens",
    ),
    (
        lambda: transformer(tokens(), num_frames=3),
        "TemporalTransformerBlock: expected a batch that is a multiple of num_frames=3",
    ),
    (lambda: transformer(tokens()), "TemporalAttention: context: expected (2, tokens, 5), one a clip, got None"),
]


@pytest.mark.parametrize(
    ("act", "text"), CONFIGS + CONSTRUCTORS + CALLS, ids=lambda value: value[:60] if isinstance(value, str) else ""
)
def test_the_error_says_what_to_do(act, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        act()
