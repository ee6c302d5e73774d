"""Frames that are far apart stop attending to each other, as if the layers had been made so; and do again."""

import copy

import pytest
import torch

from temporal_layers import TemporalConvConfig, TemporalTransformerConfig
from temporal_layers.adapters import SiteRule, TemporalConfig, adapter_of, inject

FRAMES = 12
TRANSFORMERS = TemporalConfig(resblock=None)


def made_with(window, **options):
    return TemporalConfig(resblock=None, transformer=TemporalTransformerConfig(window=window, **options))


def call(unet, clips):
    with torch.no_grad():
        return unet(clips, 10, torch.ones(len(clips), 3, unet.config.cross_attention_dim)).sample


@pytest.fixture
def clips():
    return torch.randn(1, 4, FRAMES, 8, 8)


@pytest.mark.parametrize("position", ["sinusoidal_mlp", "relative", "rotary"])
def test_a_limit_is_what_layers_made_with_it_do(make_unet, randomise, clips, position):
    free, close = make_unet(), make_unet()
    adapter = randomise(inject(free, made_with(None, position=position)))
    inject(close, made_with(2, position=position))
    close.load_state_dict(free.state_dict())
    whole = call(free, clips)
    assert adapter.attention_window is None
    adapter.attention_window = 2
    assert adapter.attention_window == 2
    assert torch.equal(call(free, clips), call(close, clips))
    assert not torch.allclose(call(free, clips), whole, atol=1e-3)
    adapter.attention_window = FRAMES
    torch.testing.assert_close(call(free, clips), whole)
    adapter.attention_window = None
    assert torch.equal(call(free, clips), whole)


def test_frames_beyond_the_limit_are_not_seen(make_unet, randomise, clips):
    """At one site, so that no frame is reached by way of another."""
    unet = make_unet()
    name = next(name for name in inject(unet, TRANSFORMERS).layers if "mid" in name)
    adapter_of(unet).remove()
    adapter = randomise(inject(unet, TemporalConfig(resblock=None, include=(f"^{name}$",))))
    adapter.attention_window = 3
    other = clips.clone()
    other[:, :, 4] += 1
    changed = (call(unet, clips) - call(unet, other)).abs().amax((0, 1, 3, 4)) > 0
    assert changed.tolist() == [abs(frame - 4) <= 3 for frame in range(FRAMES)]


def test_a_smaller_window_of_a_layer_stays(make_unet):
    rule = SiteRule(pattern="mid_block", transformer=TemporalTransformerConfig(window=4))
    adapter = inject(make_unet(), TemporalConfig(resblock=None, rules=(rule,)))
    assert set(adapter.attention_window.values()) == {None, 4}
    adapter.attention_window = 8
    assert {window for name, window in adapter.attention_window.items() if "mid_block" in name} == {4}
    assert {window for name, window in adapter.attention_window.items() if "mid_block" not in name} == {8}
    adapter.attention_window = 3
    assert adapter.attention_window == 3
    adapter.attention_window = None
    assert set(adapter.attention_window.values()) == {None, 4}


def test_the_limit_goes_with_copies_and_not_into_files(make_unet, tmp_path):
    unet = make_unet()
    adapter = inject(unet, TRANSFORMERS)
    adapter.attention_window = 5
    assert adapter_of(copy.deepcopy(unet)).attention_window == 5
    assert adapter.config == TRANSFORMERS
    adapter.save_pretrained(tmp_path)
    assert type(adapter).from_pretrained(make_unet(), tmp_path).attention_window is None


def test_what_cannot_be_a_limit_is_refused(make_unet):
    adapter = inject(make_unet(), TRANSFORMERS)
    for value in (-1, 2.0, True):
        with pytest.raises(ValueError, match=r"attention_window: expected a whole number of at least 0, got "):
            adapter.attention_window = value
    convs = inject(make_unet(), TemporalConfig(transformer=None, conv_out=TemporalConvConfig()))
    assert convs.attention_window is None
    convs.attention_window = None
    with pytest.raises(ValueError, match=r"attention_window: expected a layer that attends to frames, got none among"):
        convs.attention_window = 8
