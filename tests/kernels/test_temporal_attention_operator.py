"""The fused attention over frames as a PyTorch operator: compiled, exported, mapped, under autocast; and its limits."""

import pytest
import torch
from torch import nn

from temporal_layers.kernels.temporal_attention import temporal_attention, tiles
from temporal_layers.kernels.testing import random_normal, random_tokens


def attend(query, key, value, bias=None, num_frames=3, **options):
    return temporal_attention(query, key, value, num_frames=num_frames, num_heads=2, bias=bias, impl="fused", **options)


def operands(device, num_frames=3, positions=5):
    tokens = [random_tokens(2 * num_frames, positions, 16, seed=seed, device=device) for seed in range(3)]
    return [x.requires_grad_() for x in tokens]


@pytest.mark.parametrize("options", [False, True])
def test_opcheck(options, device):
    from temporal_layers.kernels.temporal_attention import fused

    bias = random_normal((2, 3, 3), 3).float().to(device).requires_grad_() if options else None
    mask = torch.tensor([[True, False, True], [True, True, True]], device=device) if options else None
    arguments = (*operands(device), bias, mask, 3, 3, 2, options, 1 if options else None, 0.3)
    torch.library.opcheck(fused.temporal_attention, arguments)
    with torch.no_grad():
        grad = torch.randn_like(arguments[0])
        torch.library.opcheck(fused.temporal_attention_backward, (grad, *arguments, options))


def test_compiles_to_one_graph_for_all_clip_lengths(device):
    def loss(query, key, value, num_frames):
        return attend(query, key, value, num_frames=num_frames, window=1).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_frames in (4, 3, 7):
        tokens = operands(device, num_frames, positions=num_frames + 1)
        with torch._dynamo.config.patch(error_on_recompile=num_frames != 4):
            actual = torch.autograd.grad(compiled(*tokens, num_frames), tokens)
        expected = torch.autograd.grad(loss(*tokens, num_frames), tokens)
        torch.testing.assert_close(actual, expected)


class Attention(nn.Module):
    def forward(self, query, key, value):
        return attend(query, key, value, causal=True)


def test_exports(device):
    dynamic = [{1: torch.export.Dim.AUTO}] * 3
    with torch.no_grad():
        program = torch.export.export(Attention(), tuple(operands(device)), dynamic_shapes=dynamic)
        tokens = operands(device, positions=8)
        assert torch.equal(program.module()(*tokens), Attention()(*tokens))


def test_vmap(device):
    tokens = [random_normal((4, 6, 5, 16), seed).float().to(device) for seed in range(3)]
    bias = random_normal((4, 2, 3, 3), 3).float().to(device)

    together = torch.func.vmap(attend, in_dims=(0, 0, None, 0))(*tokens[:2], tokens[2][0], bias)
    for index in range(4):
        expected = attend(tokens[0][index], tokens[1][index], tokens[2][0], bias[index])
        torch.testing.assert_close(together[index], expected)


def test_batched_upstream_gradients(device):
    """vmap of the backward pass. ``torch.func.grad`` itself does not take custom operators with gradients."""
    inputs = [*operands(device), random_normal((2, 3, 3), 3).float().to(device).requires_grad_()]
    out = attend(*inputs)
    grads = random_normal((4, *out.shape), 5).to(out)
    together = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    for index in range(4):
        expected = torch.autograd.grad(out, inputs, grads[index], retain_graph=True)
        torch.testing.assert_close([x[index] for x in together], list(expected))


def test_autocast_keeps_the_dtype_of_the_query(device):
    query, key, value = operands(device)
    with torch.autocast(device.type, torch.bfloat16):
        out = attend(query.bfloat16(), key, value)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), (query, key, value))
    assert [x.dtype for x in gradients] == [torch.float32] * 3
    torch.testing.assert_close(out.float(), attend(query, key, value), rtol=0.02, atol=0.02)


def test_gradient_of_gradients_raises(device):
    tokens = operands(device)
    [gradient] = torch.autograd.grad(attend(*tokens).square().sum(), tokens[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="temporal_attention_backward"):
        torch.autograd.grad(gradient.sum(), tokens[:1])


@pytest.mark.parametrize(
    ("num_frames", "channels", "dtype", "text"),
    [
        (65, 16, torch.float32, "at most 64 frames for 'fused', got 65 frames and 65 key frames"),
        (2, 24, torch.float32, "a head_dim of 8, 16, ..., 160 for 'fused', got head_dim 12"),
        (2, 336, torch.float32, "a head_dim of 8, 16, ..., 160 for 'fused', got head_dim 168"),
        (2, 16, torch.float64, "float16, bfloat16 or float32 for 'fused', got float64"),
    ],
)
def test_limits(num_frames, channels, dtype, text):
    x = random_tokens(num_frames, 1, channels, dtype=dtype)
    with pytest.raises(ValueError) as error:
        temporal_attention(x, x, x, num_frames=num_frames, num_heads=2, impl="fused")
    assert str(error.value) == (f"temporal_attention: impl: expected {text}; pass impl='auto' or impl='reference'")
    reference = temporal_attention(x, x, x, num_frames=num_frames, num_heads=2, impl="reference")
    assert torch.equal(temporal_attention(x, x, x, num_frames=num_frames, num_heads=2), reference)


def test_limit_of_the_key_frames():
    query, key = random_tokens(1, 1, 16), random_tokens(65, 1, 16)
    with pytest.raises(ValueError, match="at most 64 frames for 'fused', got 1 frames and 65 key frames"):
        temporal_attention(query, key, key, num_frames=1, num_key_frames=65, num_heads=2, impl="fused")


@pytest.mark.parametrize("dtype", tiles.DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_tiles(dtype, backward):
    for num_frames in range(1, 65):
        for key_frames in (1, num_frames, 64):
            for head_dim in range(8, 161, 8):
                tile = tiles.tile_for(num_frames, key_frames, head_dim, dtype, backward=backward)
                sizes = (tile.blocks, tile.group, tile.frames, tile.key_frames, tile.chunk, tile.warps)
                assert all(size & (size - 1) == 0 for size in sizes)
                assert tile.frames >= num_frames and tile.key_frames >= key_frames
                assert tile.group * tile.frames >= 16 and tile.group * tile.key_frames >= 16 and tile.chunk >= 16
                assert -head_dim % tile.chunk <= 16 or head_dim < tile.chunk
