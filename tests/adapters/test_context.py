"""Frame contexts through whole models: identity, meaning, and everything an adapter is used beside."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from temporal_layers import (
    ContextConfig,
    ContextInput,
    ContextTransformer,
    TemporalResBlockConfig,
    TemporalTransformerConfig,
)
from temporal_layers.adapters import SiteRule, TemporalAdapter, TemporalConfig, adapter_of, inject, merge, plan
from temporal_layers.adapters.convert import Source, export_foreign

PLANES, FRAMES = 6, 3
INJECTIONS = ["resblock", "input", "both"]
CONV_IN = TemporalTransformerConfig(attentions=("self",), num_heads=2)
TINY = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (8,),
    "mid_block_type": None,
}


def config_of(inject="resblock", **options):
    return TemporalConfig(context=ContextConfig(channels=PLANES, inject=inject), **options)


def clips(batch=2, frames=FRAMES, channels=4):
    return torch.randn(batch, channels, frames, 8, 8)


def contexts(batch=2, frames=FRAMES):
    return clips(batch, frames, PLANES)


@pytest.fixture(params=INJECTIONS)
def injected(request, make_unet, randomise):
    model = make_unet()
    adapter = randomise(inject(model, config_of(request.param)))
    return model, adapter


@pytest.mark.parametrize("where", INJECTIONS)
def test_a_fresh_injection_is_the_image_model_with_any_context(make_any_unet, fold, where):
    make, extra = make_any_unet
    model = make()
    sample, more = clips(), extra(2)
    repeated = [value.repeat_interleave(FRAMES, 0) for value in more]
    expected = model(fold(sample), 7, *repeated).sample
    inject(model, config_of(where))
    got = model(sample, 7, *more, frame_context=contexts()).sample
    assert torch.equal(fold(got), expected)


def test_zeros_are_the_same_as_no_context(injected):
    model, _ = injected
    sample, text = clips(), torch.randn(2, 3, 12)
    without = model(sample, 7, text).sample
    assert torch.equal(model(sample, 7, text, frame_context=torch.zeros(2, PLANES, FRAMES, 8, 8)).sample, without)
    assert not torch.allclose(model(sample, 7, text, frame_context=contexts()).sample, without, atol=1e-3)


def test_the_input_is_a_wider_first_convolution(make_unet, fold):
    """The image model with an input convolution of more channels gives the same, frame by frame."""
    model, wide = make_unet(), make_unet(in_channels=4 + PLANES)
    with torch.no_grad():
        model.conv_in.weight.copy_(wide.conv_in.weight[:, :4])
        model.conv_in.bias.copy_(wide.conv_in.bias)
    rest = {name: value for name, value in wide.state_dict().items() if not name.startswith("conv_in")}
    model.load_state_dict(rest, strict=False)
    adapter = inject(model, config_of("input"))
    with torch.no_grad():
        adapter.layers["conv_in"].context_in.weight.copy_(wide.conv_in.weight[:, 4:])
    sample, context, text = clips(), contexts(), torch.randn(2, 3, 12)
    expected = wide(fold(torch.cat([sample, context], 1)), 7, text.repeat_interleave(FRAMES, 0)).sample
    got = fold(model(sample, 7, text, frame_context=context).sample)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", INJECTIONS)
def test_which_layers_take_the_context(make_unet, where):
    model = make_unet()
    adapter = inject(model, config_of(where, exclude=("mid_block",)))
    taking = {name for name, layer in adapter.layers.items() if getattr(layer, "context_in", None) is not None}
    blocks = {site.name for site in adapter.sites if site.kind == "resnet"}
    assert taking == (blocks if where != "input" else set()) | ({"conv_in"} if where != "resblock" else set())
    assert len(blocks) > 3
    # Convolutions of 3x3 without bias, and nothing else.
    plain = plan_parameters(make_unet(), TemporalConfig(exclude=("mid_block",)))
    added = sum(9 * PLANES * site.channels for site in adapter.sites if site.name in taking)
    assert (
        sum(p.numel() for group in ("temporal", "alpha") for _, p in adapter.named_parameters(group)) == plain + added
    )


def plan_parameters(model, config):
    adapter = inject(model, config)
    return sum(p.numel() for group in ("temporal", "alpha") for _, p in adapter.named_parameters(group))


def test_a_transformer_at_the_input_and_the_context(make_unet, randomise):
    model = make_unet()
    adapter = randomise(inject(model, config_of("input", conv_in=CONV_IN)))
    assert isinstance(adapter.layers["conv_in"], ContextTransformer)
    sample, text = clips(), torch.randn(2, 3, 12)
    without = model(sample, 7, text).sample
    assert not torch.allclose(model(sample, 7, text, frame_context=contexts()).sample, without, atol=1e-3)
    assert isinstance(
        inject(make_unet(), config_of("both", conv_in=CONV_IN, exclude=("conv_in",))).layers["conv_in"], ContextInput
    )


def test_every_clip_gets_its_own_context(injected):
    model, _ = injected
    sample, text, context = clips(), torch.randn(2, 3, 12), contexts()
    both = model(sample, 7, text, frame_context=context).sample
    for row in range(2):
        alone = model(sample[row : row + 1], 7, text[row : row + 1], frame_context=context[row : row + 1]).sample
        torch.testing.assert_close(alone[0], both[row], rtol=1e-4, atol=1e-5)


def test_guidance_in_one_batch_is_two_calls(injected):
    model, _ = injected
    sample, text, context = clips(1), torch.randn(1, 3, 12), contexts(1)
    halves = model(
        torch.cat([sample, sample]), 7, torch.cat([text, text]), frame_context=torch.cat([context * 0, context])
    ).sample
    torch.testing.assert_close(halves[:1], model(sample, 7, text).sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(halves[1:], model(sample, 7, text, frame_context=context).sample, rtol=1e-4, atol=1e-5)


def test_folded_clips(injected, fold):
    model, adapter = injected
    sample, text, context = clips(), torch.randn(2, 3, 12), contexts()
    expected = fold(model(sample, 7, text, frame_context=context).sample)
    adapter.num_frames = FRAMES
    repeated = text.repeat_interleave(FRAMES, 0)
    for given in (context, fold(context)):
        torch.testing.assert_close(model(fold(sample), 7, repeated, frame_context=given).sample, expected)


def test_switched_off_it_is_the_image_model(injected, fold):
    model, adapter = injected
    sample, text, context = clips(), torch.randn(2, 3, 12), contexts()
    flags = torch.tensor([[True, False, True], [False, True, True]])
    with adapter.disabled():
        image = model(sample, 7, text, frame_context=context).sample
    assert torch.equal(image, model(sample, 7, text, frame_context=context, image_only=torch.ones(2, 3).bool()).sample)
    adapter.scale = 0
    assert torch.equal(image, model(sample, 7, text, frame_context=context).sample)
    adapter.scale = 1
    mixed = model(sample, 7, text, frame_context=context, image_only=flags).sample
    kept = fold(image)[flags.flatten()]
    assert torch.equal(fold(mixed)[flags.flatten()], kept)
    adapter.remove()
    assert torch.equal(fold(image), model(fold(sample), 7, text.repeat_interleave(FRAMES, 0)).sample)
    assert not hasattr(model.conv_in, "temporal")


def test_strength(injected):
    """At a strength of one half every site gives the mean of its input and its output: told from the layers."""
    _, adapter = injected
    name, layer = next((n, item) for n, item in adapter.layers.items() if getattr(item, "context_in", None) is not None)
    maps = torch.randn(2 * FRAMES, layer.channels, 8, 8)
    temb = torch.randn(2 * FRAMES, getattr(layer, "temb_channels", None) or 1)
    extra = (temb,) if hasattr(layer, "temb_channels") else ()
    context = torch.randn(2 * FRAMES, PLANES, 8, 8)
    whole = layer(maps, *extra, frame_context=context, num_frames=FRAMES)
    adapter.scale = {name: 0.5}
    half = layer(maps, *extra, frame_context=context, num_frames=FRAMES)
    torch.testing.assert_close(half, (maps + whole) / 2, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(injected, make_unet, tmp_path):
    model, adapter = injected
    sample, text, context = clips(), torch.randn(2, 3, 12), contexts()
    expected = model(sample, 7, text, frame_context=context).sample
    adapter.save_pretrained(tmp_path)
    other = make_unet()
    adapter.remove()
    other.load_state_dict(model.state_dict())
    loaded = TemporalAdapter.from_pretrained(other, tmp_path)
    assert loaded.config.context == ContextConfig(channels=PLANES, inject=loaded.config.context.inject)
    assert torch.equal(other(sample, 7, text, frame_context=context).sample, expected)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(twin(sample, 7, text, frame_context=context).sample, expected)
    merged = merge([loaded, tmp_path], [0.5, 0.5])
    torch.testing.assert_close(merged.weights, loaded.state_dict())


@pytest.mark.parametrize("where", INJECTIONS)
@pytest.mark.parametrize("conv_in", [None, CONV_IN], ids=["plain", "conv_in"])
def test_grafted_onto_a_video_adapter(make_unet, randomise, tmp_path, where, conv_in):
    model = make_unet()
    adapter = randomise(inject(model, TemporalConfig(conv_in=conv_in)))
    adapter.metadata["title"] = "motion"
    sample, text, context = clips(), torch.randn(2, 3, 12), contexts()
    expected = model(sample, 7, text).sample
    adapter.save_pretrained(tmp_path)
    snapshot = adapter.snapshot()
    adapter.remove()
    for source in (tmp_path, snapshot):
        wider = TemporalAdapter.from_pretrained(model, source, context=ContextConfig(channels=PLANES, inject=where))
        assert wider.metadata["title"] == "motion" and wider.config.context.inject == where
        assert torch.equal(model(sample, 7, text, frame_context=context).sample, expected)
        convs = [m for n, m in model.named_modules() if n.endswith("context_in")]
        assert len(convs) == {"resblock": 8, "input": 1, "both": 9}[where]
        for conv in convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.normal_(conv.weight)
        assert not torch.allclose(model(sample, 7, text, frame_context=context).sample, expected, atol=1e-3)
        wider.remove()


def test_grafting_refuses_what_does_not_fit(make_unet):
    model = make_unet()
    snapshot = inject(model, config_of()).snapshot()
    context = ContextConfig(channels=3)
    other = make_unet(layers_per_block=2)
    with pytest.raises(ValueError, match=r"adapter 'default': expected an adapter without a frame context, got one wi"):
        TemporalAdapter.from_pretrained(make_unet(), snapshot, context=context)
    plain = inject(make_unet()).snapshot()
    with pytest.raises(ValueError, match=r"adapter 'default': expected a model with the site .* another model"):
        TemporalAdapter.from_pretrained(other, plain, context=context)
    assert not hasattr(other, "_temporal_state")


def test_adapters_with_and_without_a_context_on_one_model(make_unet, randomise):
    model = make_unet()
    randomise(inject(model, name="video"))
    adapter = randomise(inject(model, config_of("both"), name="prediction"))
    sample, text, context = clips(), torch.randn(2, 3, 12), contexts()
    predicted = model(sample, 7, text, frame_context=context).sample
    adapter.set_active("video")
    assert not hasattr(model.conv_in, "temporal")
    with pytest.raises(ValueError, match=r"frame_context: expected None, since the adapter takes none, got shape"):
        model(sample, 7, text, frame_context=context)
    adapter.set_active("prediction")
    assert torch.equal(model(sample, 7, text, frame_context=context).sample, predicted)


def test_recomputation_has_the_context_of_its_call(injected):
    model, adapter = injected
    sample, text, context = clips(1), torch.randn(1, 3, 12), contexts(1)

    def gradients():
        model.zero_grad()
        with adapter.disabled():
            image = model(sample, 7, text).sample.square().mean()
        loss = image + model(sample, 7, text, frame_context=context).sample.square().mean()
        loss = loss + model(sample, 7, text).sample.square().mean()
        loss = loss + model(sample[:, :, :2], 7, text, frame_context=2 * context[:, :, :2]).sample.square().mean()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.enable_gradient_checkpointing()
    model.train()
    for name, value in gradients().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.timeout(300)
def test_compiled_in_one_graph(make_unet, randomise):
    torch._dynamo.reset()
    model = make_unet(**TINY)
    randomise(inject(model, config_of("both", transformer=None)))
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for frames in (2, 3):
            sample, text, context = clips(2, frames), torch.randn(2, 3, 12), contexts(2, frames)
            got = compiled(sample, 7, text, frame_context=context).sample
            torch.testing.assert_close(got, model(sample, 7, text, frame_context=context).sample, rtol=2e-5, atol=2e-5)
    assert backend.frame_count <= 2
    torch._dynamo.reset()


def test_the_dtype_of_the_model_and_channels_last(make_unet, randomise):
    model = make_unet()
    adapter = randomise(inject(model, config_of("both")))
    sample, text, context = clips(), torch.randn(2, 3, 12), contexts()
    expected = model(sample, 7, text, frame_context=context).sample
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(sample, 7, text, frame_context=context).sample, expected, rtol=1e-4, atol=1e-5)
    model.to(torch.bfloat16)
    got = model(sample.bfloat16(), 7, text.bfloat16(), frame_context=context).sample  # a context in fp32
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert adapter.layers["conv_in"].context_in.weight.dtype == torch.bfloat16


def test_lora_on_what_lets_the_context_in(make_unet, randomise):
    peft = pytest.importorskip("peft")
    model = make_unet()
    randomise(inject(model, config_of("both")))
    sample, text, context = clips(), torch.randn(2, 3, 12), contexts()
    expected = model(sample, 7, text, frame_context=context).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["context_in"], init_lora_weights=False))
    lora = model(sample, 7, text, frame_context=context).sample
    assert not torch.allclose(lora, expected, atol=1e-3)
    assert torch.equal(model(sample, 7, text).sample, model(sample, 7, text, frame_context=0 * context).sample)


def test_contexts_that_do_not_fit_the_call(injected, fold):
    model, adapter = injected
    sample, text = clips(), torch.randn(2, 3, 12)
    wrong = [clips(2, FRAMES, PLANES - 1), contexts(1), contexts(2, 2), contexts()[..., :4], fold(contexts())]
    for context in wrong:
        with pytest.raises(
            ValueError, match=r"UNet2DConditionModel: frame_context: expected shape \(2, 6, 3, 8, 8\), .*got"
        ):
            model(sample, 7, text, frame_context=context)
    with pytest.raises(ValueError, match=r"frame_context: expected None for images, which bypass .* num_frames"):
        model(fold(sample), 7, text.repeat_interleave(FRAMES, 0), frame_context=contexts())
    adapter.num_frames = FRAMES
    with pytest.raises(
        ValueError, match=r"expected shape \(2, 6, 3, 8, 8\) or \(6, 6, 8, 8\), .* got \(2, 6, 2, 8, 8\)"
    ):
        model(fold(sample), 7, text.repeat_interleave(FRAMES, 0), frame_context=contexts(2, 2))


def test_an_adapter_without_a_context(make_unet):
    model = make_unet()
    inject(model)
    with pytest.raises(
        ValueError, match=r"frame_context: expected None, since the adapter takes none, .*ContextConfig"
    ):
        model(clips(), 7, torch.randn(2, 3, 12), frame_context=contexts())


def test_configurations_that_let_no_context_in(make_unet, make_vae):
    with pytest.raises(
        ValueError, match=r"TemporalConfig\.context: expected inject='input' without temporal resi.* got"
    ):
        config_of("both", resblock=None)
    config = config_of("resblock", include=(r"transformer_blocks",))
    with pytest.raises(
        ValueError, match=r"plan: UNet2DConditionModel: TemporalConfig\.context: expected a temporal re"
    ):
        plan(make_unet(), config)
    with pytest.raises(ValueError, match=r"plan: AutoencoderKL: TemporalConfig\.context: expected None for an autoenc"):
        plan(make_vae(), config_of("resblock", transformer=None))
    model = make_unet()
    model.conv_in = nn.Identity()
    with pytest.raises(
        ValueError, match=r"plan: conv_in: expected a 2-D convolution for TemporalConfig\.context, got Id"
    ):
        plan(model, config_of("input"))


def test_the_configuration_goes_through_json():
    rules = (SiteRule(pattern="mid", resblock=TemporalResBlockConfig(num_convs=1)),)
    config = config_of("both", rules=rules)
    assert TemporalConfig.from_dict(config.to_dict()) == config
    before = config.to_dict()
    del before["context"]  # a file of before there was one
    assert TemporalConfig.from_dict(before).context is None
    with pytest.raises(ValueError, match=r"TemporalConfig\.context\.channels: expected a whole number, got 'six'"):
        TemporalConfig.from_dict({"context": {"channels": "six"}})


def test_shown_in_the_summary(make_unet, capsys):
    model = make_unet()
    inject(model, config_of("input")).summary()
    assert "ContextInput" in capsys.readouterr().out and adapter_of(model).sites[0].name == "conv_in"


def test_a_format_of_others_has_no_context(make_unet):
    adapter = inject(make_unet(), config_of())
    text = r"export_foreign: expected the layers of svd, got another configuration: TemporalConfig\.context"
    with pytest.raises(ValueError, match=text):
        export_foreign(adapter, Source(family="svd", style="diffusers"))


def test_copies_keep_no_context(injected):
    model, _ = injected
    context = contexts()
    model(clips(), 7, torch.randn(2, 3, 12), frame_context=context)
    assert copy.deepcopy(model)._temporal_state.frame_context is None
    model(clips(), 7, torch.randn(2, 3, 12))
    assert model._temporal_state.frame_context is None
