"""A roll-out and its interpolation on a real, tiny, injected UNet, for a test that kills the process it runs in.

python roll_out_worker.py FOLDER PAUSE
"""

import sys
import time
from pathlib import Path

import torch

from temporal_layers.recipes.bases import LabelBase
from temporal_layers.recipes.conditioning import ContextPlanes
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm
from temporal_layers.recipes.sampling.context import ContextSampling
from temporal_layers.recipes.sampling.interpolation import interpolate_windows
from temporal_layers.recipes.sampling.prediction import predict_windows
from temporal_layers.recipes.stages.context import with_context

PLANES = ContextPlanes(max_noise_level=250, rate=True)


def make_base():
    """An untrained label model whose temporal layers, and what lets given frames in, are not zero."""
    sizes = ImageLDMConfig(height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 16), num_heads=2, context_dim=8)
    base = LabelBase(build_image_ldm(sizes, ("day", "night")))
    adapter = with_context(base, PLANES, None, "both")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapter.layers.values():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return base


def run(folder, pause=0.0):
    """Latents of 29 frames between 8 key frames that begin with nothing; ``pause`` seconds more for each step."""
    base = make_base()

    def on_step(number, timestep, latents):
        time.sleep(pause)
        return latents

    options = ContextSampling(num_inference_steps=2, context_scale=1.5, guidance_scale=2.0, noise_level=50, eta=0.5)
    told, nothing = base.conditioning([0, 1], ["", ""]), torch.empty(2, 4, 0, 8, 12)
    folders = [None, None] if folder is None else [Path(folder) / "keys", Path(folder) / "level-0"]
    keys = predict_windows(
        base, PLANES, told, nothing, 8, options, window=4, overlap=2, folder=folders[0], on_step=on_step
    )
    between = interpolate_windows(base, PLANES, told, keys, options, rate=1.0, folder=folders[1], on_step=on_step)
    return torch.cat(list(between), dim=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], float(sys.argv[2]))
