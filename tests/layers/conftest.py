"""Functions that several tests of the layers share, as fixtures because test folders are no packages."""

import pytest
import torch
from torch import nn


def _randomised(module, dtype=torch.float64):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.to(dtype).eval()


def _relative_error(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _copy_weights(layer, source, keys, ignored=()):
    theirs = {key: value for key, value in source.state_dict().items() if not key.startswith(tuple(ignored))}
    ours = {}
    for key, weight in layer.state_dict().items():
        prefix = next((prefix for prefix in keys if key.startswith(prefix)), None)
        if prefix is not None:
            ours[key] = theirs.pop(keys[prefix] + key.removeprefix(prefix)).reshape(weight.shape)
    assert not theirs
    missing, unexpected = layer.load_state_dict(ours, strict=False)
    assert not unexpected and set(missing) <= {"blend.logit"}


@pytest.fixture
def randomised():
    """Draws every weight of a module anew, so that none is zero or one by its initialisation; returns the module."""
    return _randomised


@pytest.fixture
def relative_error():
    """Largest difference of two tensors of one shape and dtype, relative to the largest entry of the second."""
    return _relative_error


@pytest.fixture
def copy_weights():
    """Fills a layer from another, by a map of key prefixes, and checks that every weight of both takes part.

    Only the logit of the blend may be left out of the map, and only keys that start with one of `ignored` may be left
    over in the source.
    """
    return _copy_weights
