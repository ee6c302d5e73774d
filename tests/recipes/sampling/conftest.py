"""Models in place of a UNet: one whose answer is known, so that results have a closed form; one that is unsure."""

from types import SimpleNamespace

import pytest
import torch

from temporal_layers.recipes.image_ldm import make_scheduler


class KnownBase:
    """A base whose UNet is sure of the clean latents: `clean(context, conditioning)`, whatever the noise."""

    def __init__(self, clean):
        self.clean, self.scheduler = clean, make_scheduler()
        self.unet = SimpleNamespace(
            device=torch.device("cpu"), dtype=torch.float32, state_dict=lambda: {"weight": self.weight}
        )
        self.weight = torch.ones(1)
        self.calls = []

    def no_conditioning(self, count):
        return {"labels": torch.zeros(count)}

    def predict(self, noisy, timestep, conditioning, frame_context):
        self.calls.append(frame_context)
        bar = self.scheduler.alphas_cumprod[timestep]
        clean = self.clean(frame_context, conditioning)
        if bar == 0:
            return -clean
        noise = (noisy - bar.sqrt() * clean) / (1 - bar).sqrt()
        return bar.sqrt() * noise - (1 - bar).sqrt() * clean

    def decode(self, latents):
        return latents[:, :3]


@pytest.fixture
def known_base():
    """The class of such models."""
    return KnownBase


@pytest.fixture
def unsure_base():
    """A model whose answer depends on the noise of all frames, on the given frames and on the label."""
    base = KnownBase(None)

    def predict(noisy, timestep, conditioning, frame_context):
        said = frame_context[:, :4].sum(2, keepdim=True) + conditioning["labels"][:, None, None, None, None]
        return 0.5 * noisy + 0.2 * noisy.mean(2, keepdim=True) + 0.1 * said

    base.predict = predict
    return base
