"""A memory budget: the same result, from as little memory as the budget says beside what goes in and comes out."""

import pytest
import torch

from temporal_layers import ContextConfig, ContextTransformer, TemporalTransformerBlock, TemporalTransformerConfig
from temporal_layers.memory import rows_within

FRAMES, DIM = 4, 32
ANIMATEDIFF = {
    "projection": True, "in_norm": "clip", "attentions": ("self", "self"), "ff_in": False, "position": "sinusoidal",
}  # fmt: skip
CONFIGS = {"video_ldm": {}, "animatediff": ANIMATEDIFF, "wide_heads": {"num_heads": 2, "head_dim": 48}}


def block(name="video_ldm", **options):
    config = TemporalTransformerConfig(**CONFIGS[name], **options)
    return TemporalTransformerBlock(DIM, num_heads=4, context_dim=5, config=config)


def maps(height, width, clips=1, dtype=torch.float32):
    return torch.randn(clips * FRAMES, DIM, height, width, dtype=dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("budget", [1, 40_000, 10**12])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_result_is_the_same(name, budget, randomised, relative_error):
    layer = randomised(block(name))
    x, text = maps(5, 7, clips=2, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    options = {"num_frames": FRAMES, "frame_mask": torch.rand(2, FRAMES) < 0.8}
    with torch.no_grad():
        expected = layer(x, text, **options)
        result = layer(x, text, **options, memory_budget=budget)
    assert relative_error(result, expected) < 1e-12
    assert result.stride() == expected.stride()


def test_of_a_context_transformer_too(randomised, relative_error):
    layer = randomised(ContextTransformer(DIM, num_heads=4, context_dim=5, frame_context=ContextConfig(channels=2)))
    x, text = maps(5, 7, dtype=torch.float64), torch.randn(1, 3, 5, dtype=torch.float64)
    planes = torch.randn(FRAMES, 2, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x, text, planes, num_frames=FRAMES)
        assert relative_error(layer(x, text, planes, num_frames=FRAMES, memory_budget=40_000), expected) < 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_beside_the_maps_is_within_the_budget_whatever_the_resolution(name, peak):
    layer, text = block(name).eval(), torch.randn(1, 3, 5)
    budget = 20 * FRAMES * 96 * 4 * 64  # 64 positions of the widest, at 20 tensors
    for height in (8, 32, 128):
        x = maps(height, 32)
        used = peak(lambda x=x: layer(x, text, num_frames=FRAMES, memory_budget=budget))
        # The branch and the blend of the two come out; a norm over maps is between them and the input.
        beside = used - (2 + (layer.in_norm is not None)) * x.nbytes
        assert beside <= budget + 100_000  # positions, text, parameters of the blend
        if height == 128:
            unlimited = peak(lambda x=x: layer(x, text, num_frames=FRAMES))
            assert unlimited - 2 * x.nbytes > 2 * budget


def test_streams_cut_every_block_as_the_first(randomised, relative_error):
    """Blocks of other lengths would be cut elsewhere by the budget, and pieces would meet the past of others."""
    from temporal_layers import FrameCache

    layer = randomised(block(causal=True, window=2))
    x, text = maps(5, 7, dtype=torch.float64), torch.randn(1, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x, text, num_frames=FRAMES)
        cache, blocks = FrameCache(), []
        for frames in x.split([1, 3]):
            with cache.block():
                blocks.append(layer(frames, text, num_frames=len(frames), cache=cache, memory_budget=60_000))
    assert relative_error(torch.cat(blocks), expected) < 1e-10
    runs = {}
    for attention, run in cache._past:
        runs.setdefault(attention, []).append(run)
    assert all(len(numbers) > 1 for numbers in runs.values())


def test_without_effect_while_gradients_are_recorded(randomised):
    layer, x = randomised(block(), dtype=torch.float32), maps(3, 4)
    text = torch.randn(1, 3, 5)
    assert torch.equal(layer(x, text, num_frames=FRAMES), layer(x, text, num_frames=FRAMES, memory_budget=1))


@pytest.mark.parametrize(
    ("budget", "row", "rows", "expected"),
    [(None, 10, 7, 7), (1, 10, 7, 1), (20 * 10 * 3, 10, 7, 3), (20 * 10 * 3 - 1, 10, 7, 2), (10**9, 10, 7, 7),
     (5, 0, 0, 1), (None, 0, 0, 1)],
)  # fmt: skip
def test_rows_within_a_budget(budget, row, rows, expected):
    with torch.no_grad():
        assert rows_within(budget, row, rows) == expected
    assert rows_within(budget, row, rows) == max(1, rows)
