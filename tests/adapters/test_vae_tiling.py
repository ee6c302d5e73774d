"""Tiles over height and width: diffusers' own, frame by frame, through the temporal layers and together with chunks."""

import importlib.util
from pathlib import Path

import diffusers
import pytest
import torch

from temporal_layers import TemporalResBlockConfig
from temporal_layers.adapters import TemporalConfig, inject

spec = importlib.util.spec_from_file_location("census", Path(__file__).parent / "census.py")
census = importlib.util.module_from_spec(spec)
spec.loader.exec_module(census)

WITH_TILES = ("kl", "kl without attention", "flux2", "tiny", "dc", "hunyuan image", "kvae")
CONFIG = TemporalConfig(
    resblock=TemporalResBlockConfig(timestep_embedding=False, norm="frame", num_convs=1), transformer=None
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tiny():
    return diffusers.AutoencoderTiny(  # its tiling takes a magnification of 8 for granted
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4, latent_channels=4,
    )  # fmt: skip


def with_tiles_of_four(name):
    """An autoencoder that decodes latents in tiles of 4 by 4, which overlap."""
    model = (tiny if name == "tiny" else census.AUTOENCODERS[name].make)().eval()
    if name == "dc":
        model.enable_tiling(8, 8, 6, 6)
        return model
    model.enable_tiling()
    magnification = 8 if name == "tiny" else 2
    model.tile_latent_min_size, model.tile_sample_min_size, model.tile_overlap_factor = 4, 4 * magnification, 0.25
    return model


@pytest.mark.parametrize("name", WITH_TILES)
def test_tiles_are_those_of_the_image_model(name, fold, randomise):
    model = with_tiles_of_four(name)
    latents = torch.randn(2, census.AUTOENCODERS[name].sample[0], 4, 8, 7)
    tiled = model.decode(fold(latents)).sample
    calls = []
    model.decoder.register_forward_hook(lambda module, args, output: calls.append(tuple(args[0].shape)))
    model.decode(fold(latents))
    plain_calls = list(calls)
    assert len(plain_calls) >= 4
    adapter = inject(model, CONFIG)
    calls.clear()
    assert torch.equal(fold(model.decode(latents).sample), tiled)
    assert calls == plain_calls, "the same tiles, of all frames"
    # Chunks are cut inside of tiles.
    randomise(adapter)
    expected = model.decode(latents).sample
    calls.clear()
    adapter.enable_temporal_chunking(1)
    torch.testing.assert_close(model.decode(latents).sample, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 8 * len(plain_calls) and {shape[-2:] for shape in calls} == {s[-2:] for s in plain_calls}
    model.enable_slicing()
    torch.testing.assert_close(model.decode(latents).sample, expected, rtol=1e-4, atol=1e-5)


def test_the_layers_add_little_to_the_error_of_tiling(make_vae, randomise):
    # It comes from the spatial norms and attentions of the image model, which see a tile and not the map.
    model = make_vae()
    latents = torch.randn(1, 4, 4, 16, 16)

    def error():
        model.enable_tiling()
        tiled = model.decode(latents).sample
        model.disable_tiling()
        whole = model.decode(latents).sample
        return ((tiled - whole).norm() / whole.norm()).item()

    adapter = inject(model, TemporalConfig.for_decoder())
    assert model.tile_latent_min_size == 8
    plain = error()
    randomise(adapter)
    assert plain > 0.05
    assert error() < 1.25 * plain


@pytest.mark.parametrize("name", ["vq", "movq", "asymmetric"])
def test_models_without_tiles_say_so(name):
    model = census.AUTOENCODERS[name].make()
    inject(model, CONFIG)
    with pytest.raises(NotImplementedError, match=f"Tiling doesn't seem to be implemented for {type(model).__name__}"):
        model.enable_tiling()
    with pytest.raises(NotImplementedError, match=f"Slicing doesn't seem to be implemented for {type(model).__name__}"):
        model.enable_slicing()
