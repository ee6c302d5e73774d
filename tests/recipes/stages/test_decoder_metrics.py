"""Measures of a reconstruction: known errors, and decoding with and without temporal layers."""

import math

import pytest
import torch
from diffusers import AutoencoderKL

from temporal_layers import TemporalResBlockConfig
from temporal_layers.adapters import TemporalConfig, inject
from temporal_layers.recipes.metrics import clip_frechet
from temporal_layers.recipes.stages.decoder_metrics import decode_clips, measure_decoder, measure_reconstruction


def make_vae(**changes):
    options = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**{**options, **changes}).eval()


def still_clips(count=2, frames=8):
    return (0.2 + 0.6 * torch.rand(count, 3, 1, 16, 24)).repeat(1, 1, frames, 1, 1)


def test_a_constant_error_costs_quality_but_does_not_flicker():
    target = still_clips()
    values = measure_reconstruction(target + 0.1, target)
    assert values["psnr"] == pytest.approx(20, abs=1e-3)
    assert values["flicker"] == pytest.approx(0, abs=1e-7)
    assert values["frame_difference_error"] == pytest.approx(0, abs=1e-7)


def test_an_error_that_changes_its_sign_flickers_by_twice_its_size():
    target = still_clips()
    signs = torch.tensor([1.0, -1.0]).repeat(4).view(1, 1, 8, 1, 1)
    values = measure_reconstruction(target + 0.1 * signs, target)
    assert values["psnr"] == pytest.approx(20, abs=1e-3)
    assert values["flicker"] == pytest.approx(0.2, abs=1e-6)
    assert values["frame_difference_error"] == pytest.approx(0.2, abs=1e-6)


def test_a_frozen_output_of_a_moving_clip_has_a_negative_frame_difference_error():
    target = torch.rand(1, 3, 6, 16, 16)
    values = measure_reconstruction(target[:, :, :1].expand_as(target), target)
    change = target.diff(dim=2).abs().mean().item()
    assert values["frame_difference_error"] == pytest.approx(-change, rel=1e-5)
    assert values["flicker"] == pytest.approx(change, rel=1e-5)


def test_psnr_is_the_mean_over_frames():
    target = still_clips(count=1, frames=2)
    output = target.clone()
    output[:, :, 0] += 0.1
    output[:, :, 1] += 0.01
    assert measure_reconstruction(output, target)["psnr"] == pytest.approx(30, abs=1e-3)


def test_the_frechet_distance_is_there_if_there_are_clips_enough():
    target = torch.rand(16, 3, 8, 16, 16)
    output = (target + 0.1 * torch.randn_like(target)).clamp(0, 1)
    assert "clip_frechet" not in measure_reconstruction(output[:15], target[:15])
    assert measure_reconstruction(output, target)["clip_frechet"] == clip_frechet(output, target)


def test_a_plain_autoencoder_and_fresh_layers_decode_frame_by_frame():
    vae = make_vae()
    clips = torch.rand(2, 3, 3, 16, 16)
    frames = []
    with torch.no_grad():
        for clip in clips:
            latents = vae.encode(2 * clip.transpose(0, 1) - 1).latent_dist.mode()
            frames.append((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).transpose(0, 1))
    plain = decode_clips(vae, clips)
    torch.testing.assert_close(plain, torch.stack(frames))
    assert measure_decoder(vae, clips) == measure_reconstruction(plain, clips)
    mixing = TemporalResBlockConfig(timestep_embedding=False, zero_init=False)
    adapter = inject(vae, TemporalConfig(resblock=mixing, transformer=None))
    assert not torch.allclose(decode_clips(vae, clips), plain, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(decode_clips(vae, clips), plain)


def test_bytes_are_the_same_clips():
    vae = make_vae()
    clips = torch.randint(256, (1, 3, 2, 16, 16), dtype=torch.uint8)
    assert measure_decoder(vae, clips) == measure_decoder(vae, clips.float() / 255)


def test_latent_noise_is_in_units_of_the_latents_repeats_with_its_seed_and_differs_between_frames():
    vae = make_vae()
    seen = []
    decode = vae.decode
    vae.decode = lambda latents: seen.append(latents) or decode(latents)
    clips = still_clips(count=3, frames=50)
    for noise, seed in ((0.0, 0), (0.3, 0), (0.3, 0), (0.3, 1)):
        decode_clips(vae, clips, latent_noise=noise, seed=seed)
    clean, first, again, other = (torch.stack(seen[start : start + 3]) for start in (0, 3, 6, 9))
    assert (first - clean).std().item() == pytest.approx(0.3 / 0.5, rel=0.02)  # scaling_factor=0.5: latents of std 2
    assert torch.equal(first, again) and not torch.equal(first, other)
    noise = (first - clean).flatten(2)
    assert math.isclose(torch.corrcoef(noise[0])[0, 1].item(), 0, abs_tol=0.15)
    assert not torch.equal(noise[0], noise[1])


def test_clips_that_cannot_be_compared_are_refused():
    for output, target in (
        (torch.rand(1, 3, 2, 16, 16), torch.rand(1, 3, 3, 16, 16)),
        [torch.rand(1, 3, 1, 16, 16)] * 2,
    ):
        with pytest.raises(
            ValueError, match=r"measure_reconstruction: expected output and target .* two frames or more"
        ):
            measure_reconstruction(output, target)
