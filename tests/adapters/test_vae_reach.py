"""How far a decoded frame sees: the sum over the layers, against what a change of one latent frame moves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temporal_layers import TemporalConvConfig, TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalConfig, inject

FRAMES, MIDDLE = 45, 22


def resblocks(**options):
    return TemporalResBlockConfig(timestep_embedding=False, **{"norm": "frame", **options})


def transformer(**options):
    return TemporalTransformerConfig(**{"ff_in": False, "ff": False, "position": "none", "window": 1, **options})


@pytest.fixture(scope="module")
def make_double():
    """Injected decoders in double precision, in which even a faint dependence shows."""
    from diffusers import AutoencoderKL

    def make(config):
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, latent_channels=1,
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), sample_size=4,
        ).double().eval()  # fmt: skip
        adapter = inject(model, config)
        with torch.no_grad():
            for layer in adapter.layers.values():
                for parameter in layer.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.5)
        return model, adapter

    return make


def moved_frames(model, frame):
    """Offsets of the decoded frames that a change of one latent frame changes."""
    latents = torch.randn(1, 1, FRAMES, 2, 2, dtype=torch.float64)
    changed = latents.clone()
    changed[:, :, frame] += 1
    with torch.no_grad():
        moved = (model.decode(changed).sample != model.decode(latents).sample).any(dim=-1).any(dim=-1).flatten(0, 1)
    return (moved.any(dim=0).nonzero().flatten() - frame).tolist()


def assert_reach(make_double, config):
    model, adapter = make_double(config)
    past, future = adapter.receptive_field
    assert max(past, future) < MIDDLE, "the test needs a longer clip"
    # A frame is seen by those that follow it, as far as they look back, and by those before it.
    assert moved_frames(model, MIDDLE) == list(range(-future, past + 1))
    assert adapter.unbounded_layers == {}
    return past, future


@settings(max_examples=15, deadline=None)
@given(
    num_convs=st.integers(1, 2), kernel=st.sampled_from([1, 3]), causal=st.booleans(),
    conv_out=st.sampled_from([None, TemporalConvConfig(), TemporalConvConfig(kernel_size=5, causal=True)]),
)  # fmt: skip
def test_residual_blocks(make_double, num_convs, kernel, causal, conv_out):
    blocks = resblocks(num_convs=num_convs, kernel_size=kernel, causal=causal)
    config = TemporalConfig(resblock=blocks, transformer=None, conv_out=conv_out)
    one_side = 4 * num_convs * (kernel // 2)  # four residual blocks
    expected = (2 * one_side, 0) if causal else (one_side, one_side)
    behind = {None: (0, 0), TemporalConvConfig(): (1, 1)}.get(conv_out, (4, 0))
    assert assert_reach(make_double, config) == (expected[0] + behind[0], expected[1] + behind[1])


@settings(max_examples=12, deadline=None)
@given(window=st.integers(0, 3), layers=st.integers(1, 2), causal=st.booleans(),
       position=st.sampled_from(["none", "rotary", "relative"]))  # fmt: skip
def test_attention_in_a_window(make_double, window, layers, causal, position):
    attentions = ("self", "cross") * layers
    options = transformer(window=window, attentions=attentions, causal=causal, position=position, num_heads=2)
    expected = layers * window
    assert assert_reach(make_double, TemporalConfig(resblock=None, transformer=options)) == (
        expected,
        0 if causal else expected,
    )


def test_at_the_ends_of_a_clip_and_by_gradient(make_double):
    model, adapter = make_double(TemporalConfig(resblock=resblocks(num_convs=1), transformer=None))
    assert adapter.receptive_field == (4, 4)
    assert moved_frames(model, 0) == [0, 1, 2, 3, 4]
    assert moved_frames(model, FRAMES - 1) == [-4, -3, -2, -1, 0]
    latents = torch.randn(1, 1, FRAMES, 2, 2, dtype=torch.float64, requires_grad=True)
    model.decode(latents).sample[:, :, MIDDLE].sum().backward()
    seen = latents.grad.abs().amax(dim=(0, 1, 3, 4)).nonzero().flatten() - MIDDLE
    assert seen.tolist() == list(range(-4, 5))


@pytest.mark.parametrize(
    ("config", "host", "reason"),
    [
        (TemporalConfig.for_decoder(), "resnets", "a norm over the whole clip (norm='clip'; 'frame' is local)"),
        (
            TemporalConfig(resblock=None, transformer=transformer(window=None)),
            "attentions",
            "attention to all frames (window=None; a window is local)",
        ),
        (
            TemporalConfig(
                resblock=None,
                transformer=transformer(in_norm="clip", projection=True),
                transformer_policy="after_attention",
            ),
            "attentions",
            "a norm over the whole clip (in_norm='clip'; 'frame' is local)",
        ),
    ],
)
def test_layers_that_see_the_whole_clip_are_named(make_double, config, host, reason):
    model, adapter = make_double(config)
    assert adapter.receptive_field is None
    assert set(adapter.unbounded_layers.values()) == {reason}
    assert f"decoder.mid_block.{host}.0" in adapter.unbounded_layers
    assert moved_frames(model, MIDDLE) == list(range(-MIDDLE, FRAMES - MIDDLE))


def test_a_module_that_stands_twice_counts_twice(make_double):
    config = TemporalConfig(resblock=resblocks(num_convs=1), transformer=None)
    model, adapter = make_double(config)
    adapter.remove()
    blocks = model.decoder.mid_block.resnets
    blocks[1] = blocks[0]
    adapter = inject(model, config)
    assert len(adapter.sites) == 3 and adapter.receptive_field == (4, 4)


def test_unets_have_none(make_unet):
    adapter = inject(make_unet())
    with pytest.raises(ValueError, match="receptive_field: expected an autoencoder, got UNet2DConditionModel"):
        _ = adapter.receptive_field
