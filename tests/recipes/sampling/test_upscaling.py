"""Upscaling in tiles and windows, and what comes of the decoder: against whole frames and clips."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from torch import nn

from temporal_layers.adapters import TemporalConfig, inject
from temporal_layers.recipes.image_ldm import make_scheduler
from temporal_layers.recipes.sampling.upscaling import upscale_clips
from temporal_layers.recipes.upscaler import Upscaler, UpscalerConfig, build_upscaler

REACH = 2


class Local(nn.Module):
    """In place of a UNet: two convolutions, so that a pixel depends on those at most ``REACH`` away."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (
            nn.Parameter(0.3 * torch.randn(shape, generator=generator)) for shape in ((5, 6, 3, 3), (3, 5, 3, 3))
        )
        self.sizes = set()

    def forward(self, sample, timestep, class_labels):
        self.sizes.add(tuple(sample.shape))
        hidden = F.conv2d(sample, self.first, padding=1) + class_labels[:, None, None, None] / 100
        return SimpleNamespace(sample=F.conv2d(hidden.tanh(), self.second, padding=1) + timestep / 1000)


@pytest.fixture
def local():
    return Upscaler(unet=Local(), scheduler=make_scheduler(), low_res_scheduler=DDPMScheduler(), factor=2)


@pytest.fixture
def upscaler():
    return build_upscaler(UpscalerConfig(channels=(8, 16), norm_groups=4, head_dim=8, factor=2), seed=0)


def make_low_res(clips=1, frames=3, height=15, width=19):
    return torch.rand(clips, 3, frames, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("tile", "overlap"), [((16, 20), 8), ((9, 38), 8), ((12, 13), 11)])
def test_tiles_are_the_whole_where_the_model_sees_no_farther_than_their_overlap(local, tile, overlap):
    low_res, options = make_low_res(), {"num_inference_steps": 5, "eta": 0.5}
    whole = upscale_clips(local, low_res, **options)
    assert whole.std() > 0.05 and (whole > 0).float().mean() > 0.3 and (whole < 1).float().mean() > 0.3
    tiled = upscale_clips(local, low_res, tile=tile, tile_overlap=overlap, **options)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=2e-5)
    close = upscale_clips(local, low_res, tile=tile, tile_overlap=2, **options)
    assert (close - whole).abs().max() > 1e-3


def test_no_part_is_larger_than_asked_for(local):
    upscale_clips(local, make_low_res(frames=9), tile=(16, 12), tile_overlap=4, window=4, num_inference_steps=1)
    assert local.unet.sizes == {(4, 6, 16, 12)}


def test_one_tile_is_the_same_as_none(upscaler):
    low_res = make_low_res(height=8, width=12)
    options = {"num_inference_steps": 2, "window": 2, "overlap": 1}
    whole = upscale_clips(upscaler, low_res, **options)
    for tile in ((16, 24), (32, 24)):
        assert torch.equal(upscale_clips(upscaler, low_res, tile=tile, tile_overlap=4, **options), whole)
    assert not torch.equal(upscale_clips(upscaler, low_res, tile=(8, 24), **options), whole)


def test_memory_is_that_of_a_tile_and_a_window(upscaler, peak):
    """Of the whole there is the noise, the low-resolution clips, what is fused of the predictions and the like."""
    options = {"num_inference_steps": 1, "batch_size": 1}
    small, large = make_low_res(frames=2, height=8, width=8), make_low_res(frames=6, height=24, width=24)
    clip = large.numel() * large.element_size() * 4
    one = peak(lambda: upscale_clips(upscaler, small, **options))
    tiled = peak(lambda: upscale_clips(upscaler, large, window=2, tile=(16, 16), tile_overlap=4, **options))
    whole = peak(lambda: upscale_clips(upscaler, large, **options))
    assert tiled < one + 9 * clip < whole


@pytest.fixture
def latent_upscaler():
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).eval()
    return build_upscaler(UpscalerConfig(channels=(8, 16), norm_groups=4, head_dim=8, factor=2), vae)


def test_temporal_layers_of_the_decoder_see_whole_clips(latent_upscaler, monkeypatch):
    low_res, vae = make_low_res(clips=2, frames=4, height=8, width=12), latent_upscaler.vae
    plain = upscale_clips(latent_upscaler, low_res, num_inference_steps=2)
    adapter = inject(vae, TemporalConfig.for_decoder())
    torch.testing.assert_close(upscale_clips(latent_upscaler, low_res, num_inference_steps=2), plain)
    with torch.no_grad():
        for layer in adapter.layers.values():
            for parameter in layer.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    made = upscale_clips(latent_upscaler, low_res, num_inference_steps=2)
    assert (made - plain).abs().max() > 1e-2
    monkeypatch.setattr(latent_upscaler, "decode", lambda latents: latents)
    latents = upscale_clips(latent_upscaler, low_res, num_inference_steps=2)
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(made, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_every_frame_of_a_clip_has_one_noise_level(local):
    seen = []
    forward = local.unet.forward
    local.unet.forward = lambda *args, class_labels: seen.append(class_labels) or forward(*args, class_labels)
    upscale_clips(local, make_low_res(clips=2), noise_level=7, num_inference_steps=1)
    assert torch.equal(seen[0], torch.full((6,), 7))


def test_sizes_that_the_unet_cannot_halve_are_refused(upscaler):
    with pytest.raises(
        ValueError, match=r"upscale_clips: tile: expected a height and .* multiples of 2, .* got 9 x 8;"
    ):
        upscale_clips(upscaler, make_low_res(height=8, width=8), tile=(9, 8))
    three = build_upscaler(UpscalerConfig(channels=(8, 8, 16), norm_groups=4, head_dim=8, factor=2))
    with pytest.raises(ValueError, match=r"upscale_clips: low_res: expected .* on the grid .* of 4, .* got 18 x 16;"):
        upscale_clips(three, make_low_res(height=9, width=8))
