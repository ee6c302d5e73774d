"""Adapters whose convolutions have an extent in space: what a whole model does with them."""

import dataclasses
import io
import json
import re

import accelerate
import pytest
import torch
from peft import LoraConfig

from temporal_layers import ContextConfig, TemporalConvConfig, TemporalResBlockConfig
from temporal_layers.adapters import SiteRule, TemporalAdapter, TemporalConfig, adapter_of, inject, merge, plan
from temporal_layers.adapters.convert import Source, export_foreign

DOUBLE = {"dtype": torch.float64}
SPACE = TemporalResBlockConfig(spatial_kernel_size=3)
CAUSAL = dataclasses.replace(SPACE, norm="frame", causal=True)
UNET = TemporalConfig(resblock=SPACE, conv_out=TemporalConvConfig(spatial_kernel_size=3))
DECODER = TemporalConfig(
    resblock=dataclasses.replace(CAUSAL, timestep_embedding=False),
    transformer=None,
    conv_out=TemporalConvConfig(causal=True, spatial_kernel_size=5),
)


def inputs(batch=1, frames=3, **factory):
    return torch.randn(batch, 4, frames, 8, 8, **factory), 7, torch.randn(batch, 3, 12, **factory)


def assert_same(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_sites_are_those_of_any_residual_block_and_the_summary_counts_all_taps(make_unet):
    model = make_unet()
    assert plan(model, TemporalConfig(resblock=SPACE)) == plan(model, TemporalConfig())
    adapter, stream = inject(model, UNET), io.StringIO()
    adapter.summary(stream)
    rows = {line.split()[0]: line.split() for line in stream.getvalue().splitlines()[2:-1]}
    channels, temb = 16, 32
    count = 2 * (27 * channels**2 + channels) + 2 * 2 * channels + temb * channels + channels + 1
    assert rows["mid_block.resnets.0"][-1] == f"{count:,}"
    assert rows["conv_out"][-1] == str(27 * 4**2 + 4)


@torch.no_grad()
def test_a_model_saves_loads_and_merges_and_older_files_have_none(make_unet, randomise, fold, tmp_path):
    model, sample = make_unet(), inputs()
    image = model(fold(sample[0]), 7, sample[2].repeat(3, 1, 1)).sample
    adapter = inject(model, UNET)
    assert torch.equal(fold(model(*sample).sample), image)
    randomise(adapter).save_pretrained(tmp_path / "saved")
    expected = model(*sample).sample
    other = make_unet()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if ".temporal." not in key})
    adapter.remove()
    for source in (tmp_path / "saved", merge([tmp_path / "saved"] * 2, [0.5, 0.5])):
        loaded = TemporalAdapter.from_pretrained(other, source)
        assert loaded.config == UNET and torch.equal(other(*sample).sample, expected)
        loaded.remove()

    inject(model, TemporalConfig()).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"TemporalConfig.resblock.spatial_kernel_size: expected 3 as in the first"):
        merge([tmp_path / "saved", tmp_path / "plain"], [0.5, 0.5])
    before = json.loads((tmp_path / "plain" / "config.json").read_text())["temporal"]
    assert before["resblock"].pop("spatial_kernel_size") == 1
    assert TemporalConfig.from_dict(before) == TemporalConfig()


def test_a_rule_gives_it_to_some_sites(make_unet):
    adapter = inject(make_unet(), TemporalConfig(rules=(SiteRule(pattern="^mid_block", resblock=SPACE),)))
    sizes = {name: layer.convs[0].weight.shape[-1] for name, layer in adapter.layers.items() if "resnets" in name}
    assert {name for name, size in sizes.items() if size == 3} == {"mid_block.resnets.0", "mid_block.resnets.1"}


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1] * 5, [2, 3]], ids=str)
def test_streams(make_unet, make_vae, randomise, lengths):
    unet, vae = make_unet().double(), make_vae().double()
    context = ContextConfig(channels=2)
    randomise(inject(unet, TemporalConfig(resblock=CAUSAL, transformer=None, context=context)))
    randomise(inject(vae, DECODER))
    sample, _, text = inputs(2, 5, **DOUBLE)
    planes = torch.randn(2, 2, 5, 8, 8, **DOUBLE)
    expected = unet(sample, 7, text, frame_context=planes).sample, vae.decode(sample).sample
    for model, whole in zip((unet, vae), expected, strict=True):
        blocks = []
        with adapter_of(model).streaming():
            for block, given in zip(sample.split(lengths, dim=2), planes.split(lengths, dim=2), strict=True):
                run = vae.decode(block) if model is vae else unet(block, 7, text, frame_context=given)
                blocks.append(run.sample)
        assert_same(torch.cat(blocks, dim=2), whole)


@torch.no_grad()
def test_a_decoder_in_chunks_sees_as_far_over_frames_as_ever(make_vae, randomise):
    vae = make_vae().double()
    adapter = randomise(inject(vae, DECODER))
    receptive_field = adapter.receptive_field
    latents = torch.randn(1, 4, 30, 4, 4, **DOUBLE)
    expected = vae.decode(latents).sample
    adapter.enable_temporal_chunking(4)
    assert_same(vae.decode(latents).sample, expected)
    adapter.remove()
    narrow = dataclasses.replace(DECODER.resblock, spatial_kernel_size=1)
    assert inject(vae, dataclasses.replace(DECODER, resblock=narrow)).receptive_field == receptive_field


@torch.no_grad()
def test_a_memory_budget_offloading_and_the_formats_of_memory_change_nothing(make_unet, randomise):
    model, sample = make_unet().double(), inputs(2, **DOUBLE)
    adapter = randomise(inject(model, UNET))
    expected = model(*sample).sample
    adapter.memory_budget = 1
    assert_same(model(*sample).sample, expected)
    model.to(memory_format=torch.channels_last)
    assert_same(model(*sample).sample, expected)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert_same(model(*sample).sample, expected)


def test_gradient_checkpointing_changes_no_gradient(make_unet, randomise):
    model, sample = make_unet().double().train(), inputs(**DOUBLE)
    adapter, gradients = randomise(inject(model, UNET)), []
    for enable in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        enable()
        model.zero_grad()
        model(*sample).sample.square().sum().backward()
        gradients.append([p.grad for layer in adapter.layers.values() for p in layer.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert_same(one, other)


def test_a_low_rank_adapter_of_the_convolutions_trains_alone_and_leaves_again(make_unet, randomise):
    model, sample = make_unet(), inputs()
    randomise(inject(model, UNET))
    expected = model(*sample).sample
    model.add_adapter(LoraConfig(r=2, target_modules=r".*\.temporal\.convs\.\d", init_lora_weights=False))
    adapted = model(*sample).sample
    assert not torch.allclose(adapted, expected, atol=1e-3)
    adapted.square().sum().backward()
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(factors) == 2 * 2 * 8 and all(p.grad.abs().max() > 0 for p in factors)
    model.unload_lora()
    torch.testing.assert_close(model(*sample).sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in diffusers
@pytest.mark.timeout(300)
def test_compiles_to_one_graph(make_unet, randomise):
    tiny = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    model = make_unet(**tiny, mid_block_type=None)
    randomise(inject(model, dataclasses.replace(UNET, transformer=None)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for frames in (2, 5):
            sample = inputs(frames=frames)
            torch.testing.assert_close(compiled(*sample).sample, model(*sample).sample, rtol=2e-5, atol=2e-5)
    torch._dynamo.reset()


def test_published_formats_have_no_such_kernels(make_unet):
    adapter = inject(make_unet(norm_num_groups=4), TemporalConfig(resblock=SPACE))
    with pytest.raises(ValueError, match=re.escape("resblock.spatial_kernel_size: expected 1, got 3")):
        export_foreign(adapter, Source(family="svd", style="diffusers"))
