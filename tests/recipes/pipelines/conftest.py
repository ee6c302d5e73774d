"""Tiny image models with temporal layers that do something."""

import pytest
import torch

from temporal_layers.adapters import TemporalConfig, inject
from temporal_layers.recipes.conditioning import ContextPlanes
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm


def _randomise(adapter):
    for layer in adapter.layers.values():
        for parameter in layer.parameters():
            if not parameter.abs().sum():
                torch.nn.init.normal_(parameter, std=0.1)
    return adapter


@pytest.fixture
def randomise():
    """Gives layers that start at zero some weights; returns the adapter."""
    return _randomise


@pytest.fixture
def label_model():
    config = ImageLDMConfig(height=32, width=48, vae_channels=(8, 8), unet_channels=(16, 32), num_heads=2)
    return build_image_ldm(config, ("day", "night"))


@pytest.fixture
def predicting(label_model):
    """A label model whose temporal layers take given frames, with noise on them or without."""
    planes = ContextPlanes(max_noise_level=250)
    planes.note(_randomise(inject(label_model.unet, TemporalConfig(context=planes.config()))))
    return label_model
