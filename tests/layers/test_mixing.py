"""Which frames see which: frames of a clip mix as far as the options allow, frames of different clips never do."""

from functools import partial

import pytest
import torch

from temporal_layers import (
    AlphaConfig,
    TemporalResBlock,
    TemporalResBlockConfig,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
)

FRAMES, CHANNELS, GROUPS, HEIGHT, WIDTH = 7, 8, 4, 2, 3
DISTANCE = torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)  # [seen by, source]
EVERYWHERE = torch.ones(FRAMES, FRAMES, dtype=torch.bool)


def resblock(**options):
    return TemporalResBlock(CHANNELS, num_groups=GROUPS, config=TemporalResBlockConfig(**options)).double()


def transformer(**options):
    config = TemporalTransformerConfig(**{"attentions": ("self",)} | options)
    return TemporalTransformerBlock(CHANNELS, num_heads=2, num_groups=GROUPS, config=config).double()


def trained(layer, steps=3):
    """The layer after a few steps of AdamW towards a random target, in evaluation mode."""
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.05)
    maps = torch.randn(FRAMES, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    for _ in range(steps):
        optimiser.zero_grad()
        (layer(maps, num_frames=FRAMES) - maps.flip(0)).square().sum().backward()
        optimiser.step()
    return layer.eval()


def influence(layer):
    """`[i, j]`: whether output frame i changes when input frame j does."""
    maps = torch.randn(FRAMES, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    changes = []
    with torch.no_grad():
        before = layer(maps, num_frames=FRAMES)
        for source in range(FRAMES):
            other = maps.clone()
            other[source] += torch.randn_like(other[source])
            changes.append((layer(other, num_frames=FRAMES) - before).abs().amax(dim=(1, 2, 3)))
    changes = torch.stack(changes, dim=1)
    assert ((changes == 0) | (changes > 1e-9)).all()  # nothing in between: a frame is seen or it is not
    return changes > 0


CASES = {
    "conv": (partial(resblock, norm="frame"), DISTANCE.abs() <= 2),
    "conv_one": (partial(resblock, norm="frame", num_convs=1), DISTANCE.abs() <= 1),
    "conv_wide": (partial(resblock, norm="frame", num_convs=1, kernel_size=5), DISTANCE.abs() <= 2),
    "conv_pointwise": (partial(resblock, norm="frame", kernel_size=1), DISTANCE == 0),
    "conv_causal": (partial(resblock, norm="frame", causal=True), (DISTANCE >= 0) & (DISTANCE <= 4)),
    "conv_space": (partial(resblock, norm="frame", spatial_kernel_size=3), DISTANCE.abs() <= 2),
    "conv_space_causal": (
        partial(resblock, norm="frame", spatial_kernel_size=3, causal=True),
        (DISTANCE >= 0) & (DISTANCE <= 4),
    ),
    "conv_space_pointwise": (partial(resblock, norm="frame", kernel_size=1, spatial_kernel_size=3), DISTANCE == 0),
    "conv_clip_norm": (resblock, EVERYWHERE),
    "attention": (transformer, EVERYWHERE),
    "attention_rotary": (partial(transformer, position="rotary"), EVERYWHERE),
    "attention_relative": (partial(transformer, position="relative"), EVERYWHERE),
    "attention_causal": (partial(transformer, causal=True), DISTANCE >= 0),
    "attention_window": (partial(transformer, window=2), DISTANCE.abs() <= 2),
    "attention_window_zero": (partial(transformer, window=0), DISTANCE == 0),
    "attention_causal_window": (partial(transformer, causal=True, window=1), (DISTANCE >= 0) & (DISTANCE <= 1)),
    "attention_twice": (partial(transformer, attentions=("self", "self"), window=1), DISTANCE.abs() <= 2),
    "projected_causal": (
        partial(transformer, projection=True, in_norm="frame", position="sinusoidal", causal=True),
        DISTANCE >= 0,
    ),
    "projected_clip_norm": (partial(transformer, projection=True, in_norm="clip", window=0), EVERYWHERE),
}


@pytest.mark.parametrize("name", CASES)
def test_frames_see_what_the_options_allow_and_nothing_else(name):
    build, expected = CASES[name]
    assert torch.equal(influence(trained(build())), expected)


@pytest.mark.parametrize("build", [resblock, transformer])
def test_clips_of_a_batch_never_mix(build, randomised):
    layer = randomised(build())
    maps = torch.randn(3 * 4, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    whole = layer(maps, num_frames=4)
    other = maps.clone()
    other[4:8] = torch.randn_like(other[4:8])
    changed = layer(other, num_frames=4)
    assert torch.equal(changed[:4], whole[:4]) and torch.equal(changed[8:], whole[8:])
    for clip in range(3):
        alone = layer(maps[4 * clip : 4 * clip + 4], num_frames=4)
        torch.testing.assert_close(alone, whole[4 * clip : 4 * clip + 4], rtol=0, atol=1e-12)


def test_texts_of_clips_never_mix(randomised):
    layer = randomised(TemporalTransformerBlock(CHANNELS, num_heads=2, context_dim=5))
    maps = torch.randn(2 * 3, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    text = torch.randn(2, 4, 5, dtype=torch.float64)
    before = layer(maps, text, num_frames=3)
    text[1] = torch.randn_like(text[1])
    after = layer(maps, text, num_frames=3)
    assert torch.equal(after[:3], before[:3])
    assert ((after[3:] - before[3:]).abs().amax(dim=(1, 2, 3)) > 1e-6).all()  # every frame of the clip reads its text


def test_positions_never_mix(randomised):
    layer = randomised(transformer())
    maps = torch.randn(FRAMES, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    before = layer(maps, num_frames=FRAMES)
    other = maps.clone()
    other[:, :, 0, 1] += 1.0
    changed = (layer(other, num_frames=FRAMES) - before).abs().amax(dim=(0, 1)) > 0
    assert changed.nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("projection", [False, True])
def test_without_positions_permuted_frames_give_permuted_outputs(projection, randomised):
    options = {"projection": True, "in_norm": "clip"} if projection else {}
    layer = randomised(transformer(position="none", **options))
    maps = torch.randn(FRAMES, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    order = torch.randperm(FRAMES)
    expected = layer(maps, num_frames=FRAMES)[order]
    torch.testing.assert_close(layer(maps[order], num_frames=FRAMES), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", ["sinusoidal", "sinusoidal_mlp", "rotary", "relative"])
def test_positions_tell_frames_apart(position, randomised):
    layer = randomised(transformer(position=position))
    maps = torch.randn(FRAMES, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    order = torch.arange(FRAMES).flip(0)
    forward, backward = layer(maps, num_frames=FRAMES), layer(maps[order], num_frames=FRAMES)[order]
    assert (forward - backward).abs().max() > 1e-4


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_relative_positions_do_not_depend_on_where_a_clip_starts(position, randomised):
    layer = randomised(transformer(position=position, window=1, ff_in=False))
    maps = torch.randn(FRAMES, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    whole = layer(maps, num_frames=FRAMES)
    shifted = layer(maps[2:], num_frames=FRAMES - 2)
    torch.testing.assert_close(shifted[1:], whole[3:], rtol=0, atol=1e-12)  # the first has lost its neighbour


@pytest.mark.parametrize("build", [resblock, transformer, partial(transformer, position="relative")])
def test_the_clip_length_may_change_from_call_to_call(build, randomised):
    layer = randomised(build())
    maps = torch.randn(12, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    first = {frames: layer(maps, num_frames=frames) for frames in (4, 1, 12, 3)}
    for frames, expected in first.items():
        assert torch.isfinite(expected).all()
        assert torch.equal(layer(maps, num_frames=frames), expected)  # no call leaves anything behind
    assert not torch.allclose(first[4], first[3], atol=1e-6)


def test_one_frame_is_a_clip(randomised):
    for layer in (randomised(resblock(causal=True, norm="frame")), randomised(transformer(position="rotary"))):
        maps = torch.randn(2, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
        got = layer(maps, num_frames=1)
        torch.testing.assert_close(got[:1], layer(maps[:1], num_frames=1), rtol=0, atol=1e-12)
        assert (got - maps).abs().max() > 1e-3  # the layer does work on images: image_only is what turns it off


def test_an_alpha_per_frame_fixes_the_clip_length():
    layer = resblock(alpha=AlphaConfig(shape="frame", num_frames=4))
    maps = torch.randn(12, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    layer(maps, num_frames=4)
    with pytest.raises(ValueError, match=r"AlphaBlend: num_frames: expected 4 \(alpha is per frame\), got 3"):
        layer(maps, num_frames=3)
