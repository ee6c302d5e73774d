"""A clip fed block by block gives what the causal pass over the whole clip gives, from a cache that stays small."""

import copy
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

from temporal_layers import (
    AlphaConfig,
    ContextConfig,
    ContextTransformer,
    FrameCache,
    RelativePositionBias,
    TemporalAttention,
    TemporalConv,
    TemporalConvConfig,
    TemporalResBlock,
    TemporalResBlockConfig,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
    fold_frames,
    unfold_frames,
)

BATCH, FRAMES, CHANNELS, HEIGHT, WIDTH = 2, 7, 8, 2, 3
DOUBLE = {"dtype": torch.float64}


def resblock(context=None, **options):
    config = TemporalResBlockConfig(**{"norm": "frame", "causal": True} | options)
    return TemporalResBlock(CHANNELS, num_groups=4, temb_channels=6, config=config, context=context)


def conv(**options):
    return TemporalConv(CHANNELS, config=TemporalConvConfig(**{"causal": True} | options))


def transformer(**options):
    config = TemporalTransformerConfig(**{"causal": True} | options)
    return TemporalTransformerBlock(CHANNELS, num_heads=2, num_groups=4, context_dim=5, config=config)


def with_context():
    config = TemporalTransformerConfig(causal=True, position="relative")
    return ContextTransformer(
        CHANNELS, num_heads=2, context_dim=5, config=config, frame_context=ContextConfig(channels=3)
    )


class Attention(TemporalAttention):
    """A bare attention, on the maps of the other layers."""

    def __init__(self, **options):
        super().__init__(CHANNELS, num_heads=2, **{"causal": True} | options)

    def forward(self, maps, *args, **options):
        tokens = super().forward(maps.permute(0, 2, 3, 1).flatten(1, 2), **options)
        return tokens.unflatten(1, maps.shape[-2:]).permute(0, 3, 1, 2)


PROJECTED = {"projection": True, "in_norm": "frame", "attentions": ("self", "self"), "ff_in": False}
LAYERS = {
    "resblock": resblock,
    "resblock_wide": partial(resblock, kernel_size=5, num_convs=1),
    "resblock_modelscope": partial(resblock, num_convs=4, timestep_embedding=False),
    "resblock_pointwise": partial(resblock, kernel_size=1),
    "resblock_space": partial(resblock, spatial_kernel_size=3),
    "resblock_space_pointwise": partial(resblock, kernel_size=1, spatial_kernel_size=5),
    "resblock_context": partial(resblock, context=ContextConfig(channels=3)),
    "conv": conv,
    "conv_space": partial(conv, kernel_size=5, spatial_kernel_size=3),
    "conv_wide": partial(conv, kernel_size=5),
    "attention": Attention,
    "attention_window": partial(Attention, window=2),
    "attention_window_zero": partial(Attention, window=0),
    "attention_sinusoidal": partial(Attention, position="sinusoidal"),
    "attention_rotary": partial(Attention, position="rotary", window=3),
    "attention_relative": partial(Attention, position="relative"),
    "transformer": transformer,
    "transformer_window": partial(transformer, window=2, position="rotary"),
    "transformer_animatediff": partial(transformer, position="sinusoidal", **PROJECTED),
    "transformer_relative": partial(transformer, position="relative", window=4),
    "context_transformer": with_context,
}


def clip(layer, seed=0):
    """A random clip batch, and the other inputs of a layer: a function from a range of frames to keyword arguments."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, **DOUBLE)

    temb, text = draw(BATCH, FRAMES, 6), draw(BATCH, 3, 5)
    planes = draw(BATCH, 3, FRAMES, 2 * HEIGHT, 2 * WIDTH)
    image_only = torch.rand(BATCH, FRAMES, generator=generator) < 0.3

    def others(start, stop):
        options = {}
        if not isinstance(layer, Attention):
            options["image_only"] = image_only[:, start:stop]
        if isinstance(layer, TemporalResBlock):
            options["temb"] = temb[:, start:stop].flatten(0, 1)
        if isinstance(layer, TemporalTransformerBlock):
            options["context"] = text
        if getattr(layer, "context_in", None) is not None:
            options["frame_context"] = fold_frames(planes[:, :, start:stop])
        return options

    return draw(BATCH, CHANNELS, FRAMES, HEIGHT, WIDTH), others


def whole(layer, clips, others):
    with torch.no_grad():
        return unfold_frames(layer(fold_frames(clips), num_frames=FRAMES, **others(0, FRAMES)), FRAMES)


def run_block(layer, clips, others, start, stop, cache, **options):
    with torch.no_grad(), cache.block(**options):
        frames = fold_frames(clips[:, :, start:stop])
        return unfold_frames(layer(frames, num_frames=stop - start, cache=cache, **others(start, stop)), stop - start)


def streamed(layer, clips, others, lengths, cache=None):
    cache = FrameCache() if cache is None else cache
    blocks, start = [], 0
    for length in lengths:
        blocks.append(run_block(layer, clips, others, start, start + length, cache))
        start += length
    assert start == FRAMES == cache.num_frames
    return torch.cat(blocks, dim=2)


@pytest.mark.parametrize("lengths", [(7,), (1,) * 7, (3, 3, 1), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_blocks_give_the_pass_over_the_whole_clip(name, lengths, randomised, relative_error):
    layer = randomised(LAYERS[name]())
    clips, others = clip(layer)
    assert relative_error(streamed(layer, clips, others, lengths), whole(layer, clips, others)) < 1e-10


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.sets(st.integers(1, FRAMES - 1)), window=st.none() | st.integers(0, FRAMES),
    position=st.sampled_from(["none", "sinusoidal", "sinusoidal_mlp", "rotary", "relative"]),
    kernel=st.sampled_from([1, 3, 5, 9]), space=st.sampled_from([1, 3]),
)  # fmt: skip
def test_any_blocks_do(cuts, window, position, kernel, space):
    torch.manual_seed(0)
    ends = [0, *sorted(cuts), FRAMES]
    lengths = [stop - start for start, stop in pairwise(ends)]
    convolution = resblock(kernel_size=kernel, spatial_kernel_size=space)
    for layer in (transformer(window=window, position=position), convolution):
        layer = layer.double().eval()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        clips, others = clip(layer)
        torch.testing.assert_close(
            streamed(layer, clips, others, lengths), whole(layer, clips, others), rtol=1e-10, atol=1e-10
        )


def test_one_pass_of_the_same_layer_twice_in_a_block(randomised):
    layer = randomised(resblock(timestep_embedding=False))
    clips, _ = clip(layer)

    def none(start, stop):
        return {}

    expected = whole(layer, whole(layer, clips, none), none)
    cache, blocks = FrameCache(), []
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 7)):
            with cache.block():
                once = layer(fold_frames(clips[:, :, start:stop]), num_frames=stop - start, cache=cache)
                blocks.append(unfold_frames(layer(once, num_frames=stop - start, cache=cache), stop - start))
    torch.testing.assert_close(torch.cat(blocks, dim=2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (resblock, ["convs.0", "convs.1"]),
        (partial(resblock, spatial_kernel_size=3), ["convs.0", "convs.1"]),
        (partial(transformer, position="rotary", window=2), ["to_q", "to_k", "to_v", "to_out"]),
    ],
)
def test_low_rank_factors_stream_too(build, targets, randomised, relative_error):
    layer = randomised(build())
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(config, layer)
    layer.double()
    clips, others = clip(layer)
    assert relative_error(streamed(layer, clips, others, (2, 1, 4)), whole(layer, clips, others)) < 1e-10


def test_streams_do_not_meet_and_start_again_after_reset(randomised, relative_error):
    layer = randomised(transformer())
    (first, others), (second, _) = clip(layer), clip(layer, seed=1)
    caches, blocks = (FrameCache(), FrameCache()), ([], [])
    for start, stop in ((0, 2), (2, 7)):
        for clips, cache, kept in zip((first, second), caches, blocks, strict=True):
            kept.append(run_block(layer, clips, others, start, stop, cache))
    for clips, kept in zip((first, second), blocks, strict=True):
        assert relative_error(torch.cat(kept, dim=2), whole(layer, clips, others)) < 1e-10
    caches[0].reset()
    assert (caches[0].num_frames, caches[0].nbytes) == (0, 0)
    narrow = first[:, :, :, :1]
    assert relative_error(streamed(layer, narrow, others, (4, 3), caches[0]), whole(layer, narrow, others)) < 1e-10


def test_a_block_that_is_not_remembered_sees_the_past_and_leaves_no_trace(randomised):
    layer = randomised(transformer())
    clips, others = clip(layer)
    expected, cache = whole(layer, clips, others), FrameCache()
    run_block(layer, clips, others, 0, 3, cache)
    kept = cache.nbytes
    for _ in range(2):
        again = run_block(layer, clips, others, 3, 5, cache, update=False)
        torch.testing.assert_close(again, expected[:, :, 3:5], rtol=1e-10, atol=1e-10)
        assert (cache.num_frames, cache.nbytes) == (3, kept)


def test_a_block_that_fails_leaves_no_trace(randomised):
    layer = randomised(torch.nn.ModuleList([transformer(), resblock(timestep_embedding=False)]))
    clips, others = clip(layer[0])
    cache = FrameCache()
    run_block(layer[0], clips, others, 0, 3, cache)
    kept = cache.nbytes
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), cache.block():
        layer[0](fold_frames(clips[:, :, 3:]), num_frames=4, cache=cache, context=others(3, 7)["context"])
        raise KeyboardInterrupt
    assert (cache.num_frames, cache.nbytes) == (3, kept)
    rest = run_block(layer[0], clips, others, 3, 7, cache)
    torch.testing.assert_close(rest, whole(layer[0], clips, others)[:, :, 3:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("space", [1, 3])
@pytest.mark.parametrize("length", [1, 3])
def test_memory_is_that_of_the_windows(length, space, randomised):
    convolutions = [resblock(kernel_size=5, spatial_kernel_size=space), conv(spatial_kernel_size=space)]
    layers = randomised(torch.nn.ModuleList([transformer(window=2), *convolutions])).eval()
    cache, sizes = FrameCache(), []
    text, temb = torch.randn(BATCH, 3, 5, **DOUBLE), torch.randn(BATCH * length, 6, **DOUBLE)
    for _ in range(6):
        maps = torch.randn(BATCH * length, CHANNELS, HEIGHT, WIDTH, **DOUBLE)
        with torch.no_grad(), cache.block():
            maps = layers[0](maps, text, num_frames=length, cache=cache)
            maps = layers[1](maps, temb, num_frames=length, cache=cache)
            layers[2](maps, num_frames=length, cache=cache)
        sizes.append(cache.nbytes)
    a_frame = BATCH * CHANNELS * HEIGHT * WIDTH * 8
    # Keys and values of 2 frames; 4 frames in front of each of two convolutions; 2 in front of the last.
    assert sizes[-1] == sizes[-2] == (2 * 2 + 2 * 4 + 2) * a_frame
    assert all(size <= sizes[-1] for size in sizes)


def test_without_a_window_all_keys_and_values_are_kept(randomised):
    layer = randomised(Attention())
    clips, others = clip(layer)
    cache = FrameCache()
    streamed(layer, clips, others, (3, 2, 2), cache)
    assert cache.nbytes == 2 * clips.nbytes
    assert repr(cache) == f"FrameCache(7 frames, {2 * clips.nbytes:,} bytes)"


def test_the_cache_owns_its_memory(randomised, relative_error):
    """What the host writes into its maps behind a layer does not reach the next block."""
    layer = randomised(conv())
    clips, others = clip(layer)
    expected = whole(layer, clips, others)
    cache, blocks = FrameCache(), []
    for start, stop in ((0, 2), (2, 7)):
        frames = fold_frames(clips[:, :, start:stop]).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), cache.block():
            mixed = layer(frames, num_frames=stop - start, cache=cache, **others(start, stop))
        blocks.append(unfold_frames(mixed, stop - start))
        frames.zero_()
    assert relative_error(torch.cat(blocks, dim=2), expected) < 1e-10


def test_bias_of_fewer_queries_is_the_end_of_the_whole_bias():
    bias = RelativePositionBias(2, max_distance=3).double()
    torch.nn.init.normal_(bias.table)
    torch.testing.assert_close(bias(2, 6), bias(6)[:, 4:], rtol=0, atol=0)


def test_a_copy_of_a_layer_is_another_layer(randomised):
    layer = randomised(conv())
    clips, others = clip(layer)
    cache = FrameCache()
    run_block(layer, clips, others, 0, 2, cache)
    with pytest.raises(ValueError, match="use one cache for each model"):
        run_block(copy.deepcopy(layer), clips, others, 2, 4, cache)


def feed(layer=None, *, before=None, frames=2, channels=CHANNELS, height=HEIGHT, **options):
    """Run a block of a layer, behind one block of two clips of 2 frames if `before` is set."""
    layer = (layer or conv)()
    cache = FrameCache()
    kept = torch.zeros(2 * BATCH, CHANNELS, HEIGHT, WIDTH)
    with torch.no_grad():
        if before:
            with cache.block():
                layer(kept, num_frames=2, cache=cache)
        with cache.block():
            layer(torch.zeros(BATCH * frames, channels, height, WIDTH), num_frames=frames, cache=cache, **options)


def outside():
    with torch.no_grad():
        conv()(torch.zeros(2, CHANNELS, 1, 1), num_frames=2, cache=FrameCache())


def nested(name):
    cache = FrameCache()
    with torch.no_grad(), cache.block():
        if name == "reset":
            cache.reset()
        with cache.block():
            pass


def unequal():
    cache, layer, maps = FrameCache(), conv(), torch.zeros(6, CHANNELS, 1, 1)
    with torch.no_grad(), cache.block():
        layer(maps, num_frames=2, cache=cache)
        conv()(maps, num_frames=3, cache=cache)


def late():
    cache, first, maps = FrameCache(), conv(), torch.zeros(2, CHANNELS, 1, 1)
    with torch.no_grad():
        with cache.block():
            first(maps, num_frames=2, cache=cache)
        with cache.block():
            conv()(maps, num_frames=2, cache=cache)


def recording():
    with FrameCache().block():
        pass


def larger_batch():
    cache, layer = FrameCache(), conv()
    with torch.no_grad():
        for clips in (1, 2):
            with cache.block():
                layer(torch.zeros(2 * clips, CHANNELS, 1, 3), num_frames=2, cache=cache)


MISTAKES = [
    (
        outside,
        "CausalFrameConv: cache: expected a call inside of `with cache.block():`, got one outside; one block is one "
        "run of the same frames through all layers",
    ),
    (lambda: nested("block"), "FrameCache.block: expected no block under way, got a call inside of one; end it first"),
    (lambda: nested("reset"), "FrameCache.reset: expected no block under way"),
    (recording, "FrameCache.block: expected no gradients, got torch.is_grad_enabled()"),
    (
        unequal,
        "CausalFrameConv: num_frames: expected 2, as in the other layers of this block, got 3; open a block for every "
        "block of frames",
    ),
    (
        late,
        "CausalFrameConv: cache: expected a layer that all 2 frames of the stream went through, got one with 0; run "
        "the same layers in every block, use one cache for each model, or reset() it",
    ),
    (
        larger_batch,
        "CausalFrameConv: cache: expected clips like those of the first block, (batch, ...) = "
        "((1, 3, 8), torch.float32, 'cpu'), got ((2, 3, 8), torch.float32, 'cpu'); use another cache for another "
        "stream, or reset() this one",
    ),
    (lambda: feed(before=True, height=1), "expected clips like those of the first block"),
    (
        lambda: feed(partial(conv, causal=False)),
        "TemporalConv: cache: expected a causal layer, got causal=False, in which a frame sees later ones; train with "
        "causal=True, or run whole clips",
    ),
    (lambda: feed(partial(resblock, causal=False, timestep_embedding=False)), "TemporalResBlock: cache: expected a"),
    (lambda: feed(partial(transformer, causal=False)), "TemporalTransformerBlock: cache: expected a causal layer"),
    (lambda: feed(partial(Attention, causal=False)), "TemporalAttention: cache: expected a causal layer"),
    (
        lambda: feed(partial(resblock, timestep_embedding=False, alpha=AlphaConfig(shape="frame", num_frames=2))),
        "TemporalResBlock: cache: expected an alpha for clips of any length, got one per frame of 2 frames; use "
        "shape='scalar', or run whole clips",
    ),
    (
        lambda: feed(Attention, frame_mask=torch.ones(BATCH, 2, dtype=torch.bool)),
        "TemporalAttention: frame_mask: expected None with a cache, got (2, 2); all clips of a stream have the same "
        "frames",
    ),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_mistakes(mistake, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mistake()
