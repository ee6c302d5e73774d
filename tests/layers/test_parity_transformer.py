"""The transformer block against diffusers' own classes, with their weights copied."""

import pytest
import torch
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel, TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn

from temporal_layers import AlphaConfig, TemporalAttention, TemporalTransformerBlock, TemporalTransformerConfig

PRECISIONS = [pytest.param(torch.float64, 1e-12, id="float64"), pytest.param(torch.float32, 1e-6, id="float32")]
DIM, HEADS, CONTEXT, HEIGHT, WIDTH = 32, 2, 12, 3, 5
UNWEIGHTED = AlphaConfig(init=0.0, learned=False)
MAPS = {
    "attentions": ("self", "self"),
    "projection": True,
    "ff_in": False,
    "in_norm": "clip",
    "alpha": UNWEIGHTED,
}

ATTENTION_KEYS = {name: name for name in ("to_q.", "to_k.", "to_v.")} | {"to_out.": "to_out.0."}
FEED_FORWARD_KEYS = {"proj_in.": "net.0.proj.", "proj_out.": "net.2."}


def below(ours, theirs, keys):
    return {ours + key: theirs + value for key, value in keys.items()}


BLOCK_KEYS = (
    {"norms.0.": "norm1.", "norms.1.": "norm2.", "norm_out.": "norm3."}
    | below("attentions.0.", "attn1.", ATTENTION_KEYS)
    | below("attentions.1.", "attn2.", ATTENTION_KEYS)
    | below("ff_out.", "ff.", FEED_FORWARD_KEYS)
)
SVD_KEYS = (
    below("", "temporal_transformer_blocks.0.", BLOCK_KEYS | {"norm_in.": "norm_in."})
    | below("ff_in.", "temporal_transformer_blocks.0.ff_in.", FEED_FORWARD_KEYS)
    | {"position.": "time_pos_embed.", "blend.logit": "time_mixer.mix_factor"}
)
MAP_KEYS = below("", "transformer_blocks.0.", BLOCK_KEYS)
MAP_KEYS |= {"in_norm.": "norm.", "proj_in.": "proj_in.", "proj_out.": "proj_out."}


def temporal_half(model, maps, text, flags):
    """Runs SVD's transformer and returns the tokens that enter its temporal half and those that leave it."""
    seen = {}
    hooks = [
        model.transformer_blocks[0].register_forward_hook(lambda module, args, output: seen.update(entered=output)),
        model.proj_out.register_forward_pre_hook(lambda module, args: seen.update(left=args[0])),
    ]
    model(maps, text, image_only_indicator=flags)
    for hook in hooks:
        hook.remove()
    return seen["entered"], seen["left"]


@pytest.fixture
def svd_pair(randomised, copy_weights):
    """Our block and diffusers' transformer with the same temporal weights, in the wanted dtype."""

    def make(dtype):
        theirs = TransformerSpatioTemporalModel(HEADS, DIM // HEADS, in_channels=DIM, cross_attention_dim=CONTEXT)
        theirs = randomised(theirs, dtype)
        ours = TemporalTransformerBlock(DIM, num_heads=HEADS, context_dim=CONTEXT).to(dtype)
        copy_weights(ours, theirs, SVD_KEYS, ignored=("norm.", "proj_in.", "proj_out.", "transformer_blocks."))
        return ours, theirs

    return make


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_svd_temporal_transformer(batch, frames, dtype, bound, relative_error, svd_pair):
    ours, theirs = svd_pair(dtype)
    maps = torch.randn(batch * frames, DIM, HEIGHT, WIDTH, dtype=dtype)
    text = torch.randn(batch * frames, 7, CONTEXT, dtype=dtype)
    flags = torch.zeros(batch, frames, dtype=torch.bool)
    flags[-1, 0] = frames > 1
    entered, expected = temporal_half(theirs, maps, text, flags)
    got = ours(entered, text[::frames], num_frames=frames, image_only=flags)
    assert relative_error(got, expected) <= bound

    as_maps = entered.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))
    got = ours(as_maps, text[::frames], num_frames=frames, image_only=flags)
    assert relative_error(got.flatten(2).transpose(1, 2), expected) <= bound


def test_svd_temporal_transformer_in_bf16_is_no_worse_than_theirs(copy_weights, relative_error, svd_pair):
    ours, theirs = svd_pair(torch.bfloat16)
    exact = TemporalTransformerBlock(DIM, num_heads=HEADS, context_dim=CONTEXT).double()
    copy_weights(exact, theirs, SVD_KEYS, ignored=("norm.", "proj_in.", "proj_out.", "transformer_blocks."))
    maps, text = torch.randn(10, DIM, HEIGHT, WIDTH).bfloat16(), torch.randn(10, 7, CONTEXT).bfloat16()
    entered, left = temporal_half(theirs, maps, text, torch.zeros(2, 5))
    oracle = exact(entered.double(), text[::5].double(), num_frames=5)
    mine = relative_error(ours(entered, text[::5], num_frames=5).double(), oracle)
    assert 0 < mine <= 2 * relative_error(left.double(), oracle)


class FrameByFrame(nn.Module):
    """Applies a GroupNorm to every frame of `(b, c, f, h, w)`, as the original AnimateDiff does."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, clips):
        return torch.stack([self.norm(frame) for frame in clips.unbind(2)], dim=2)


@pytest.mark.parametrize("over", ["clip", "frame"])
@pytest.mark.parametrize("head_dim", [DIM // HEADS, 12], ids=["inner=dim", "inner<dim"])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_animatediff_transformer(batch, frames, head_dim, over, dtype, bound, randomised, copy_weights, relative_error):
    theirs = AnimateDiffTransformer3D(
        HEADS, head_dim, in_channels=DIM, norm_num_groups=8, positional_embeddings="sinusoidal",
        num_positional_embeddings=24,
    )  # fmt: skip
    theirs = randomised(theirs, dtype)
    config = TemporalTransformerConfig(**MAPS | {"position": "sinusoidal", "in_norm": over})
    ours = TemporalTransformerBlock(DIM, num_heads=HEADS, head_dim=head_dim, num_groups=8, config=config).to(dtype)
    copy_weights(ours, theirs, MAP_KEYS, ignored=("transformer_blocks.0.pos_embed.",))
    if over == "frame":
        theirs.norm = FrameByFrame(theirs.norm)
    x = torch.randn(batch * frames, DIM, HEIGHT, WIDTH, dtype=dtype)
    assert relative_error(ours(x, num_frames=frames), theirs(x, num_frames=frames)) <= bound


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_modelscope_transformer(batch, frames, dtype, bound, randomised, copy_weights, relative_error):
    theirs = randomised(TransformerTemporalModel(HEADS, 12, in_channels=DIM, norm_num_groups=8), dtype)
    config = TemporalTransformerConfig(**MAPS | {"position": "none"})
    ours = TemporalTransformerBlock(DIM, num_heads=HEADS, head_dim=12, num_groups=8, config=config).to(dtype)
    copy_weights(ours, theirs, MAP_KEYS)
    x = torch.randn(batch * frames, DIM, HEIGHT, WIDTH, dtype=dtype)
    assert relative_error(ours(x, num_frames=frames), theirs(x, num_frames=frames, return_dict=False)[0]) <= bound


def as_multihead(layer, dim, context_dim=None):
    """PyTorch's own multi-head attention with the weights of `layer`."""
    peer = nn.MultiheadAttention(
        dim, layer.num_heads, bias=True, kdim=context_dim, vdim=context_dim, batch_first=True, dtype=torch.float64
    )
    with torch.no_grad():
        if context_dim is None:
            peer.in_proj_weight.copy_(torch.cat([layer.to_q.weight, layer.to_k.weight, layer.to_v.weight]))
        else:
            for name in ("q", "k", "v"):
                getattr(peer, f"{name}_proj_weight").copy_(getattr(layer, f"to_{name}").weight)
        peer.in_proj_bias.zero_()
        peer.out_proj.weight.copy_(layer.to_out.weight)
        peer.out_proj.bias.copy_(layer.to_out.bias)
    return peer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 0, 2])
@pytest.mark.parametrize("position", ["none", "relative"])
def test_attention_over_frames_is_multi_head_attention(causal, window, position, randomised, relative_error):
    batch, frames, positions, dim = 2, 5, 3, 8
    layer = TemporalAttention(dim, num_heads=2, position=position, causal=causal, window=window, dtype=torch.float64)
    randomised(layer, torch.float64)
    distance = torch.arange(frames)[:, None] - torch.arange(frames)
    forbidden = (distance < 0) & causal
    if window is not None:
        forbidden |= distance.abs() > window
    bias = torch.zeros(2, frames, frames, dtype=torch.float64)
    if position == "relative":
        bias = layer.relative.table.detach()[:, layer.relative.max_distance - distance]
    mask = bias.masked_fill(forbidden, -torch.inf).repeat(batch * positions, 1, 1)

    x = torch.randn(batch * frames, positions, dim, dtype=torch.float64)
    clips = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
    expected, _ = as_multihead(layer, dim)(clips, clips, clips, attn_mask=mask, need_weights=False)
    expected = expected.unflatten(0, (batch, positions)).transpose(1, 2).flatten(0, 1)
    assert relative_error(layer(x, num_frames=frames), expected) <= 1e-12


def test_padded_frames_are_as_good_as_absent(randomised, relative_error):
    layer = randomised(TemporalAttention(8, num_heads=2), torch.float64)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, False]])
    got = layer(x, num_frames=5, frame_mask=mask)[:3]
    assert relative_error(got, layer(x[:3], num_frames=3)) <= 1e-12


def test_cross_attention_is_multi_head_attention_to_the_text_of_the_clip(randomised, relative_error):
    batch, frames, positions, dim = 2, 3, 4, 8
    layer = randomised(TemporalAttention(dim, num_heads=2, context_dim=CONTEXT), torch.float64)
    x = torch.randn(batch * frames, positions, dim, dtype=torch.float64)
    text = torch.randn(batch, 7, CONTEXT, dtype=torch.float64)
    per_frame = text.repeat_interleave(frames, dim=0)
    expected, _ = as_multihead(layer, dim, CONTEXT)(x, per_frame, per_frame, need_weights=False)
    assert relative_error(layer(x, text, num_frames=frames), expected) <= 1e-12
