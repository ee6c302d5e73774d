"""What a run shows: the numbers of the last step, and nothing where nothing should be shown."""

import pytest
import torch
from torch import nn

from temporal_layers import AlphaBlend, AlphaConfig
from temporal_layers.recipes.training.live import LiveBar, learned_blends, mean_alphas


def test_the_bar_shows_loss_rate_alpha_norms_and_speed(capsys):
    values = {"loss": 2.0, "size": 1.0, "alpha": 0.75, "grad_norm/temporal": 0.123, "grad_norm/alpha": 4.0}
    with LiveBar("a stage", 5, first=3) as bar:
        bar.step(values, rate=1e-3, speed=2.5)
        bar.step({**values, "loss": 1.0}, rate=1e-3, speed=2.5)
    text = capsys.readouterr().out
    assert "a stage" in text and "5/5" in text
    assert "loss 1.9500  lr 1.0e-03  alpha 0.750  grad temporal 0.12 alpha 4  2.50 it/s" in text


def test_a_hidden_bar_shows_nothing_and_an_error_passes(capsys):
    with pytest.raises(KeyError), LiveBar("a stage", 2, shown=False) as bar:
        bar.step({"loss": 1.0}, rate=0.1, speed=1.0)
        raise KeyError
    assert capsys.readouterr().out == ""


def test_alphas_are_those_of_the_layers_that_learn_theirs():
    fixed = AlphaBlend(AlphaConfig(learned=False, init=0.1))
    one, channels = AlphaBlend(AlphaConfig(init=0.5)), AlphaBlend(AlphaConfig(shape="channel", init=0.9), channels=3)
    with torch.no_grad():
        channels.logit[0, 0] = 0.0
    module = nn.ModuleDict({"fixed": fixed, "deep": nn.ModuleDict({"temporal": nn.ModuleDict({"blend": one})})})
    module["wide"] = channels
    assert learned_blends(module) == {"deep": one, "wide": channels}
    assert mean_alphas(learned_blends(module)) == pytest.approx({"deep": 0.5, "wide": (0.5 + 0.9 + 0.9) / 3})
    assert mean_alphas({}) == {}
