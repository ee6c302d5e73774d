"""Chunks over time: the decoding of the whole clip where layers see few frames, a blend where they see many."""

import copy
import importlib.util
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from hypothesis import given, settings
from hypothesis import strategies as st

from temporal_layers import AlphaConfig, TemporalConvConfig, TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalConfig, inject, register_model
from temporal_layers.adapters.registry import MODELS

spec = importlib.util.spec_from_file_location("census", Path(__file__).parent / "census.py")
census = importlib.util.module_from_spec(spec)
spec.loader.exec_module(census)

LOCAL = TemporalConfig(
    resblock=TemporalResBlockConfig(timestep_embedding=False, norm="frame", num_convs=1),
    transformer=TemporalTransformerConfig(window=1, position="rotary", ff_in=False, ff=False),
    transformer_policy="after_attention",
)


def with_norm(norm="frame", **options):
    options = {"num_convs": 1, **options}
    return TemporalConfig(
        resblock=TemporalResBlockConfig(timestep_embedding=False, norm=norm, **options), transformer=None
    )


def decoder_of(model):
    for name in ("decoder", "decoder_unet", "up_blocks"):
        if hasattr(model, name):
            return getattr(model, name)
    raise AssertionError("a new kind of autoencoder")


@pytest.fixture
def lengths():
    """The frames of every call of a decoder."""

    def lengths(model):
        calls = []
        decoder_of(model).register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
        return calls

    return lengths


@pytest.fixture
def local(make_vae, randomise):
    model = make_vae()
    return model, randomise(inject(model, LOCAL))


def decode(model, latents, **options):
    if isinstance(model, diffusers.ConsistencyDecoderVAE):
        options["generator"] = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model.decode(latents, **options)


def assert_close(result, expected):
    # The same sums over other batches: equal up to rounding.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def assert_same(result, expected):
    """In double precision, in which frames that are missing at the far end of the overlap show."""
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", census.AUTOENCODERS)
def test_all_autoencoders_decode_chunks_and_clips_exactly(name, randomise, lengths):
    entry = census.AUTOENCODERS[name]
    model = entry.make().eval().double()
    adapter = randomise(inject(model, LOCAL))
    past, future = adapter.receptive_field
    latents = torch.randn(2, entry.sample[0], past + 4, *entry.sample[1:], dtype=torch.float64)
    expected = decode(model, latents)
    if hasattr(model, "use_slicing"):
        model.enable_slicing()
        assert_same(decode(model, latents).sample, expected.sample)
        model.disable_slicing()
    adapter.enable_temporal_chunking(3)
    calls = lengths(model)
    result = decode(model, latents)
    assert len(calls) >= 4 and max(calls) <= 3 + past + future and calls[0] == min(past + 4, 3 + future)
    assert_same(result.sample, expected.sample)
    if "commit_loss" in expected:
        assert torch.equal(result.commit_loss, expected.commit_loss)
    if not isinstance(model, diffusers.ConsistencyDecoderVAE):
        assert_same(decode(model, latents, return_dict=False)[0], expected.sample)


@settings(max_examples=20, deadline=None)
@given(
    frames=st.integers(1, 12), chunk=st.integers(1, 13), convs=st.integers(1, 2), kernel=st.sampled_from([1, 3, 5]),
    causal=st.booleans(), wider=st.integers(0, 2),
)  # fmt: skip
def test_chunks_are_exact(frames, chunk, convs, kernel, causal, wider):
    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4,), decoder_block_out_channels=(4,), num_encoder_blocks=(1,),
        num_decoder_blocks=(2,), latent_channels=2, upsampling_scaling_factor=1,
    ).double()  # fmt: skip
    adapter = inject(model, with_norm(num_convs=convs, kernel_size=kernel, causal=causal))
    with torch.no_grad():
        for layer in adapter.layers.values():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn_like(parameter))
    latents = torch.randn(2, 2, frames, 2, 2, dtype=torch.float64)
    expected = decode(model, latents).sample
    adapter.enable_temporal_chunking(chunk, overlap=max(adapter.receptive_field) + wider)
    assert_same(decode(model, latents).sample, expected)
    adapter.enable_temporal_chunking(chunk)
    assert_same(decode(model, latents).sample, expected)
    adapter.num_frames = frames
    images = latents.transpose(1, 2).flatten(0, 1)
    folded = decode(model, images).sample
    assert_same(folded, expected.transpose(1, 2).flatten(0, 1))


def test_a_convolution_behind_the_decoder_belongs_to_the_chunk(make_vae, randomise):
    # SVD's time_conv_out.
    model = make_vae()
    resblock = TemporalResBlockConfig(timestep_embedding=False, norm="frame", num_convs=1)
    config = TemporalConfig(resblock=resblock, transformer=None, conv_out=TemporalConvConfig(), include=("conv_out",))
    adapter = randomise(inject(model, config))
    assert adapter.receptive_field == (1, 1)
    latents = torch.randn(1, 4, 7, 4, 4)
    expected = decode(model, latents).sample
    assert_close(decode_with(adapter, latents, 2), expected)


def decode_with(adapter, latents, *chunking):
    adapter.enable_temporal_chunking(*chunking)
    return decode(adapter.model, latents).sample


def test_the_overlap_is_needed(local):
    # One frame less than the receptive field on each side shows, if only in double precision: influence fades fast.
    model, adapter = local
    model.double()
    latents = torch.randn(1, 4, 24, 4, 4, dtype=torch.float64)
    expected, (past, future) = decode(model, latents).sample[:, :, 8:16], adapter.receptive_field
    assert (past, future) == (7, 7)
    enough = decode(model, latents[:, :, 8 - past : 16 + future]).sample[:, :, past : past + 8]
    torch.testing.assert_close(enough, expected, rtol=0, atol=1e-13)
    less = decode(model, latents[:, :, 8 - past + 1 : 16 + future - 1]).sample[:, :, past - 1 : past + 7]
    assert (less - expected).abs().max() > 1e-10


def test_chunks_with_a_mask_and_an_image(randomise):
    model = census.AUTOENCODERS["asymmetric"].make().eval()
    adapter = randomise(inject(model, LOCAL), std=0.05)
    latents, conditions = torch.randn(2, 4, 9, 4, 4), {
        "image": torch.randn(2, 3, 9, 8, 8), "mask": torch.rand(2, 1, 9, 8, 8)
    }  # fmt: skip
    expected = decode(model, latents, **conditions).sample
    adapter.enable_temporal_chunking(2)
    assert_close(decode(model, latents, **conditions).sample, expected)
    conditions["mask"] = 1 - conditions["mask"]
    assert (decode(model, latents, **conditions).sample - expected).abs().max() > 1e-3


def test_the_noise_of_a_consistency_decoder_is_that_of_the_whole_batch(randomise):
    model = census.AUTOENCODERS["consistency decoder"].make().eval()
    adapter = randomise(inject(model, with_norm()), std=0.05)
    latents = torch.randn(2, 4, 6, 4, 4)

    def draw(seed):
        with torch.no_grad():
            return model.decode(latents, generator=torch.Generator().manual_seed(seed), num_inference_steps=2).sample

    expected, other = draw(0), draw(1)
    assert (expected - other).abs().max() > 1e-3
    adapter.enable_temporal_chunking(2)
    assert_close(draw(0), expected)
    assert_close(draw(1), other)
    adapter.disable_temporal_chunking()
    model.enable_slicing()
    assert_close(draw(0), expected)


def test_gradients_are_those_of_the_whole_clip(local):
    model, adapter = local
    latents = torch.randn(1, 4, 6, 4, 4)

    def gradients():
        model.zero_grad()
        inputs = latents.clone().requires_grad_()
        model.decode(inputs).sample.square().sum().backward()
        found = {name: parameter.grad.clone() for name, parameter in model.decoder.named_parameters()}
        return found | {"latents": inputs.grad}

    model.double()
    latents = latents.double()
    expected = gradients()
    adapter.enable_temporal_chunking(2)
    chunked = gradients()
    model.enable_gradient_checkpointing()
    model.train()
    recomputed = gradients()
    assert expected["mid_block.resnets.0.temporal.convs.0.weight"].abs().max() > 0
    for found in (chunked, recomputed):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("overlap", [0, 1, 2, 4])
def test_small_overlaps_blend_linearly(make_vae, randomise, overlap):
    model = make_vae()
    adapter = randomise(inject(model, TemporalConfig.for_decoder()))
    latents, chunk, frames = torch.randn(1, 4, 18, 4, 4), 8, 18
    # By hand: each chunk alone, with the overlap on both sides, weighed by a ramp over the frames around a cut.
    expected, total = 0, torch.zeros(frames)
    for start in range(0, frames, chunk):
        low, high = max(0, start - overlap), min(frames, start + chunk + overlap)
        weight = torch.ones(high - low)
        for at, frame in enumerate(range(low, high)):
            if start > 0 and frame < start + overlap:
                weight[at] = (frame - low + 1) / (2 * overlap + 1)
            if start + chunk < frames and frame >= start + chunk - overlap:
                weight[at] = 1 - (frame - (start + chunk - overlap) + 1) / (2 * overlap + 1)
        piece = torch.zeros(1, 3, frames, 8, 8)
        piece[:, :, low:high] = decode(model, latents[:, :, low:high]).sample * weight[:, None, None]
        expected, total[low:high] = expected + piece, total[low:high] + weight
    torch.testing.assert_close(total, torch.ones(frames))
    whole = decode(model, latents).sample
    result = decode_with(adapter, latents, chunk, overlap)
    assert_close(result, expected)
    assert (result - whole).abs().max() > 1e-3, "the norms over the clip should show"


def test_a_fresh_injection_is_the_image_model_in_any_chunks(make_vae, fold):
    model, latents = make_vae(), torch.randn(1, 4, 7, 4, 4)
    expected = decode(model, fold(latents)).sample
    adapter = inject(model)
    for chunking in ((3, 1), (1, 0), (4, 2)):
        assert_close(fold(decode_with(adapter, latents, *chunking)), expected)


def test_switched_off_there_is_no_overlap(local, fold, lengths):
    model, adapter = local
    images = torch.randn(6, 4, 4, 4)
    expected = decode(model, images).sample
    latents = images.unflatten(0, (1, 6)).transpose(1, 2)
    adapter.enable_temporal_chunking(4)
    calls = lengths(model)
    assert torch.equal(decode(model, images).sample, expected)  # images are not chunked
    with adapter.disabled():
        assert_close(fold(decode(model, latents).sample), expected)
    assert calls == [6, 4, 2]
    adapter.disable_temporal_chunking()
    decode(model, latents)
    assert calls[3:] == [6]


def test_clips_of_one_chunk_are_decoded_as_without(local):
    model, adapter = local
    latents = torch.randn(1, 4, 4, 4, 4)
    expected = decode(model, latents).sample
    assert torch.equal(decode_with(adapter, latents, 4), expected)


def test_copies_remember_the_chunks_and_nothing_is_left_in_place_of_the_decoder(local, lengths):
    model, adapter = local
    names = [name for name, _ in model.named_modules()]
    adapter.enable_temporal_chunking(2)
    twin = copy.deepcopy(model)
    calls = lengths(twin)
    latents = torch.randn(1, 4, 4, 4, 4)
    assert torch.equal(decode(twin, latents).sample, decode(model, latents).sample)
    assert calls == [4, 4]
    with pytest.raises(RuntimeError):
        decode(model, torch.randn(1, 5, 6, 4, 4))  # a wrong number of channels fails in the middle of it
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("kind", ["sequential", "model", "leaf_level", "compiled decoder"])
def test_chunks_under_offloading_and_compilation(make_vae, randomise, kind):
    model, cpu = make_vae(), torch.device("cpu")
    adapter = randomise(inject(model, with_norm()))
    latents = torch.randn(1, 4, 7, 4, 4)
    expected = decode(model, latents).sample
    if kind == "sequential":
        accelerate.cpu_offload(model, execution_device=cpu)
    elif kind == "model":
        accelerate.cpu_offload_with_hook(model, execution_device=cpu)
    elif kind == "leaf_level":
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=kind)
    else:
        model.decoder = torch.compile(model.decoder, backend="eager")
    decoder = model.decoder
    assert_close(decode_with(adapter, latents, 5), expected)
    assert model.decoder is decoder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TemporalConfig.for_decoder(),
            r"overlap: expected a number of frames, got None.*because of decoder\.up_blocks\.0\.resnets\.0: a norm "
            r"over the whole clip \(norm='clip'.*pass an overlap",
        ),
        (
            TemporalConfig(resblock=None, transformer=TemporalTransformerConfig(window=2)),
            r"because of decoder\.mid_block\.attentions\.0: positions counted from the start of what it is given "
            r"\(position='sinusoidal_mlp'\)",
        ),
        (
            TemporalConfig(resblock=None, transformer=TemporalTransformerConfig(position="rotary")),
            r"because of decoder\.mid_block\.attentions\.0: attention to all frames \(window=None",
        ),
    ],
)
def test_chunks_that_cannot_be_exact_are_refused_without_an_overlap(make_vae, config, message):
    adapter = inject(make_vae(), config)
    with pytest.raises(ValueError, match=message):
        adapter.enable_temporal_chunking(4)
    assert adapter.enable_temporal_chunking(4, overlap=2) is adapter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_frames: expected a whole number of at least 1, got 0"),
        ((2.5,), "num_frames: expected a whole number of at least 1, got 2.5"),
        ((4, -1), "overlap: expected a whole number of at least 0, got -1"),
        ((4, 3), "overlap: expected at most half of num_frames=4.*got 3; take longer chunks"),
    ],
)
def test_wrong_numbers_are_refused(local, lengths, arguments, message):
    model, adapter = local
    with pytest.raises(ValueError, match=f"TemporalAdapter.enable_temporal_chunking: {message}"):
        adapter.enable_temporal_chunking(*arguments)
    calls = lengths(model)
    decode(model, torch.randn(1, 4, 5, 4, 4))
    assert calls == [5], "a refusal changed something"


def test_an_alpha_per_frame_is_refused(make_vae):
    adapter = inject(make_vae(), with_norm(alpha=AlphaConfig(shape="frame", num_frames=8)))
    with pytest.raises(
        ValueError, match=r"resnets\.0: expected an alpha for clips of any length, got one per frame of 8"
    ):
        adapter.enable_temporal_chunking(4)


def test_models_without_a_decoder_are_refused(make_unet, make_vae):
    with pytest.raises(ValueError, match=r"expected an autoencoder whose .* got UNet2DConditionModel; UNets"):
        inject(make_unet()).enable_temporal_chunking(4)

    class Whole(diffusers.AutoencoderKL):
        pass

    register_model(Whole, family="autoencoder")
    try:
        model = Whole(**dict(make_vae().config)).eval()
        adapter = inject(model, with_norm())
        with pytest.raises(ValueError, match=r"expected an autoencoder whose registration names the part .* got Whole"):
            adapter.enable_temporal_chunking(4)
        model.enable_slicing()
        with pytest.raises(ValueError, match=r"Whole: expected a registration that names the part .* disable_slicing"):
            decode(model, torch.randn(2, 4, 3, 4, 4))
        assert model.use_slicing
    finally:
        del MODELS[Whole]
