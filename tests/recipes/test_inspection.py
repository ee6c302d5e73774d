"""Looking into temporal layers: recorded attention is what the layers computed; plots show what they were given."""

import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from temporal_layers import TemporalAttention
from temporal_layers.adapters import TemporalConfig, inject
from temporal_layers.config import TemporalTransformerConfig
from temporal_layers.recipes.inspection import (
    AttentionRecord,
    alphas_over_training,
    frame_weights,
    level_size,
    plot_alphas,
    plot_attention,
    plot_gradients,
    record_attention,
)


def by_hand(layer, hidden, frames):
    """Softmax of the scores in float64, from the definition."""
    q, k = layer.to_q(hidden), layer.to_k(hidden)
    if layer.rotary is not None:
        q, k = layer.rotary(q, num_frames=frames), layer.rotary(k, num_frames=frames)
    q, k = (x.unflatten(0, (-1, frames)).unflatten(-1, (layer.num_heads, layer.head_dim)) for x in (q, k))
    scores = torch.einsum("bfphd,bgphd->bfhpg", q, k) * layer.head_dim**-0.5
    if layer.relative is not None:
        scores = scores + layer.relative(frames, frames).transpose(0, 1)[None, :, :, None]
    lag = torch.arange(frames)[:, None] - torch.arange(frames)
    allowed = torch.ones(frames, frames, dtype=torch.bool)
    if layer.causal:
        allowed &= lag >= 0
    if layer.window is not None:
        allowed &= lag.abs() <= layer.window
    return scores.masked_fill(~allowed[None, :, None, None], -torch.inf).softmax(-1)


@settings(max_examples=20)
@given(st.sampled_from(["none", "rotary", "relative"]), st.booleans(), st.sampled_from([None, 2]), st.integers(1, 11))
def test_weights_are_those_of_the_layer(position, causal, window, frames):
    layer = TemporalAttention(16, num_heads=2, position=position, causal=causal, window=window).double()
    hidden = torch.randn(2 * frames, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        found = frame_weights(layer, hidden, num_frames=frames)
        torch.testing.assert_close(found, by_hand(layer, hidden, frames))
        values = layer.to_v(hidden).unflatten(0, (-1, frames)).unflatten(-1, (2, 8))
        mixed = torch.einsum("bfhpg,bgphd->bfphd", found, values).flatten(3).flatten(0, 1)
        torch.testing.assert_close(layer.to_out(mixed), layer(hidden, num_frames=frames))


def make_unet(**options):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=8,
    ).eval()
    return unet, inject(unet, TemporalConfig(transformer=TemporalTransformerConfig(**options)))


def test_every_layer_is_recorded_at_the_pixels_asked_for_and_nothing_stays():
    unet, adapter = make_unet(causal=True)
    clips, text = torch.randn(2, 4, 5, 7, 10), torch.randn(2, 3, 8)
    with torch.no_grad():
        plain = unet(clips, 10, text).sample
        with record_attention(adapter, [(0.0, 0.0), (0.99, 0.5)]) as record:
            assert torch.equal(unet(clips, 10, text).sample, plain)
    attentions = [site for site in adapter.sites if site.kind == "transformer_block"]
    assert len(record.weights) == len(attentions)
    assert all(any(name.startswith(site.name) for site in attentions) for name in record.weights)
    for weights in record.weights.values():
        assert weights.shape == (2, 2, 5, 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))
        assert (weights.triu(1) == 0).all() and (weights[..., 0, 0] == 1).all()
    before = dict(record.weights)
    unet(clips + 1, 10, text)
    assert all(record.weights[name] is before[name] for name in before)


def test_the_pixel_is_the_right_one():
    """In one place the frames are equal, so that there every frame attends to all alike, and nowhere else."""
    _, adapter = make_unet(position="none")

    def spot(module, args, kwargs):
        hidden = args[0].unflatten(0, (-1, 4))
        height, width = level_size(8, 8, hidden.shape[2])
        hidden[:, :, int(0.3 * height) * width + int(0.8 * width)] = 1.0

    with torch.no_grad(), record_attention(adapter, [(0.3, 0.8), (0.8, 0.3)]) as record:
        layers = [m for layer in adapter.layers.values() for m in layer.modules() if isinstance(m, TemporalAttention)]
        for layer in layers:
            if layer.context_dim is None:
                layer.register_forward_pre_hook(spot, with_kwargs=True, prepend=True)
        adapter.model(torch.randn(1, 4, 4, 8, 8), 10, torch.randn(1, 3, 8))
    for weights in record.weights.values():
        torch.testing.assert_close(weights[0, 0], torch.full((4, 4), 0.25))
        assert (weights[0, 1] - 0.25).abs().max() > 1e-3


@given(st.integers(1, 65), st.integers(1, 65), st.integers(0, 5))
def test_the_size_of_a_level(height, width, halvings):
    h, w = height, width
    for _ in range(halvings):
        h, w = -(-h // 2), -(-w // 2)
    assert level_size(height, width, h * w) == (h, w)


def test_plots_show_what_they_were_given():
    record = AttentionRecord(((0.5, 0.5), (0.1, 0.2)), {"a": torch.rand(1, 2, 4, 4), "b": torch.rand(1, 2, 4, 4)})
    figure = plot_attention(record)
    assert len(figure.axes) == 4
    torch.testing.assert_close(torch.tensor(figure.axes[3].images[0].get_array().data), record.weights["b"][0, 1])
    bars = plot_alphas({"mid": 0.25, "up": 0.75}).axes[0]
    assert [patch.get_width() for patch in bars.patches] == [0.25, 0.75]
    records = [
        {"step": 0, "loss": 1.0, "alpha/mid": 0.5, "grad_norm/temporal": 1.0},
        {"step": 1, "loss": 1.0, "grad_norm/temporal": 2.0},
        {"step": 2, "loss": 1.0, "alpha/mid": 0.4, "grad_norm/temporal": 4.0, "grad_norm/alpha": 0.1},
    ]
    curves = alphas_over_training(records)
    assert curves == {"mid": [(0, 0.5), (2, 0.4)]}
    assert plot_alphas(curves).axes[0].lines[0].get_xydata().tolist() == [[0, 0.5], [2, 0.4]]
    lines = plot_gradients(records).axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == [[0.1], [1.0, 2.0, 4.0]]


def test_refusals(monkeypatch):
    _, adapter = make_unet()
    for pixels in ([], [(1.0, 0.5)], [(0.5, -0.1)]):
        with pytest.raises(ValueError, match="record_attention: pixels: expected rows and columns as shares"):
            record_attention(adapter, pixels).__enter__()
    with pytest.raises(ValueError, match="plot_attention: record: expected recorded layers, got none"):
        plot_attention(AttentionRecord(((0.5, 0.5),)))
    with pytest.raises(ValueError, match=r"level_size: expected 8 x 8, .* got 5 positions"):
        level_size(8, 8, 5)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="plots: expected the package matplotlib"):
        plot_alphas({"a": 0.5})
