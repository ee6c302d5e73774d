"""Autoencoders: clips through encode, decode and forward; slicing, tiling; images as before."""

import pytest
import torch

from temporal_layers import TemporalResBlockConfig
from temporal_layers.adapters import TemporalConfig, adapter_of, inject

LATENTS = (2, 4, 3, 4, 4)


@pytest.fixture(params=["decoder layout", "default layout"])
def injected(request, make_vae, randomise):
    model = make_vae()
    randomise(inject(model, TemporalConfig.for_decoder() if request.param == "decoder layout" else None))
    return model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_fresh_injection_decodes_every_frame_alone(make_vae, fold):
    model, latents = make_vae(), torch.randn(LATENTS)
    expected = model.decode(fold(latents)).sample
    inject(model)
    result = model.decode(latents).sample
    assert result.shape == (2, 3, 3, 8, 8)
    assert torch.equal(fold(result), expected)
    assert torch.equal(model.decode(latents, return_dict=False)[0], result)


def test_frames_mix_and_clips_do_not(injected):
    latents = torch.randn(LATENTS)
    changed = latents.clone()
    changed[0, :, 2] += 1
    moved = (injected.decode(changed).sample - injected.decode(latents).sample).abs().amax(dim=(1, 3, 4))
    assert (moved[0, 1:] > 1e-4).all()
    assert moved[1].max() < 2e-5


def test_switched_off(injected, fold):
    latents, adapter = torch.randn(LATENTS), adapter_of(injected)
    images = fold(latents)
    video = injected.decode(latents).sample
    with adapter.disabled():
        off = injected.decode(latents).sample
        adapter.num_frames = 3
        off_folded = injected.decode(images).sample
    assert torch.equal(injected.decode(images).sample, fold(video))
    adapter.remove()
    expected = injected.decode(images).sample
    assert torch.equal(fold(off), expected) and torch.equal(off_folded, expected)
    assert not torch.allclose(fold(video), expected, atol=1e-3)


def test_images_are_unchanged_and_keep_diffusers_slicing(make_vae, randomise):
    model, images = make_vae(), torch.randn(3, 4, 4, 4)
    expected = model.decode(images).sample, model.encode(images[:, :3]).latent_dist.mean
    randomise(inject(model))
    assert torch.equal(model.decode(images).sample, expected[0])
    assert torch.equal(model.encode(images[:, :3]).latent_dist.mean, expected[1])
    calls = []
    model.decoder.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    model.enable_slicing()
    torch.testing.assert_close(model.decode(images).sample, expected[0], rtol=1e-5, atol=1e-5)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("folded", [False, True])
def test_slicing_is_by_clip_and_exact(injected, fold, folded):
    latents = torch.randn(LATENTS)
    expected = injected.decode(latents).sample
    if folded:
        adapter_of(injected).num_frames = 3
        latents, expected = fold(latents), fold(expected)
    calls = []
    injected.decoder.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    injected.enable_slicing()
    torch.testing.assert_close(injected.decode(latents).sample, expected, rtol=1e-5, atol=1e-5)
    assert calls == [3, 3]


def test_tiling_goes_through_the_layers_tile_by_tile(make_vae, randomise):
    # Per-frame norms in the layers and tiles without overlap: a tile is then exactly the decoding of its part.
    model = make_vae()
    config = TemporalConfig(resblock=TemporalResBlockConfig(timestep_embedding=False, norm="frame"), transformer=None)
    randomise(inject(model, config))
    model.tile_overlap_factor = 0.0
    latents = torch.randn(1, 4, 3, 8, 8)
    assert model.tile_latent_min_size == 8
    model.tile_latent_min_size, model.tile_sample_min_size = 4, 8
    parts = [[model.decode(latents[..., y : y + 4, x : x + 4]).sample for x in (0, 4)] for y in (0, 4)]
    model.enable_tiling()
    result = model.decode(latents).sample
    expected = torch.cat([torch.cat(row, dim=-1) for row in parts], dim=-2)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "channels"), [("encode", 3), ("decode", 4)])
def test_clips_with_the_frames_first_are_refused(injected, method, channels):
    clips = torch.randn(1, 5, channels, 8, 8)
    with pytest.raises(
        ValueError, match=rf"AutoencoderKL: expected clips .* with {channels} channels, got .*transpose"
    ):
        getattr(injected, method)(clips)
    getattr(injected, method)(clips.transpose(1, 2))


def test_encode_is_frame_by_frame(make_vae, fold):
    model, clips = make_vae(), torch.randn(2, 3, 3, 8, 8)
    expected = model.encode(fold(clips)).latent_dist
    inject(model)
    posterior = model.encode(clips).latent_dist
    assert posterior.mean.shape == (2, 4, 3, 4, 4)
    assert torch.equal(fold(posterior.mean), expected.mean) and torch.equal(fold(posterior.std), expected.std)
    assert torch.equal(model.encode(clips, return_dict=False)[0].mode(), posterior.mean)
    model.enable_slicing()
    torch.testing.assert_close(model.encode(clips).latent_dist.mean, posterior.mean, rtol=1e-5, atol=1e-5)


def test_divergence_and_likelihood_sum_over_the_clip(make_vae):
    model = make_vae()
    inject(model)
    first, second = (model.encode(torch.randn(2, 3, 3, 8, 8)).latent_dist for _ in range(2))
    own, other = (torch.distributions.Normal(entry.mean.double(), entry.std.double()) for entry in (first, second))
    standard = torch.distributions.Normal(torch.zeros(()).double(), 1)
    sample = torch.randn_like(first.mean)
    for result, elements in [
        (first.kl(), torch.distributions.kl_divergence(own, standard)),
        (first.kl(second), torch.distributions.kl_divergence(own, other)),
        (first.nll(sample), -own.log_prob(sample.double())),
    ]:
        torch.testing.assert_close(result.double(), elements.sum(dim=(1, 2, 3, 4)), rtol=1e-4, atol=1e-3)


def test_forward_reconstructs_clips(injected):
    clips = torch.randn(2, 3, 3, 8, 8)
    expected = injected.decode(injected.encode(clips).latent_dist.mode()).sample
    assert torch.equal(injected(clips).sample, expected)
    generator = torch.Generator().manual_seed(3)
    drawn = injected(clips, sample_posterior=True, generator=generator).sample
    assert drawn.shape == clips.shape and not torch.equal(drawn, expected)


def test_only_the_decoder_is_touched(make_vae):
    model = make_vae()
    classes = {name: type(module) for name, module in model.named_modules()}
    inject(model)
    changed = {name for name, module in model.named_modules() if name in classes and type(module) is not classes[name]}
    assert "" in changed and all(name.startswith("decoder.") for name in changed - {""})
