"""Several adapters on one model: one is in it, the others are kept aside, and nothing is copied or lost."""

import copy
import io
import pickle

import accelerate
import pytest
import torch
from torch.nn.utils import parametrize

from temporal_layers import AlphaConfig, TemporalConvConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalAdapter, TemporalConfig, adapter_of, inject

OTHER = TemporalConfig(
    resblock=None,
    transformer=TemporalTransformerConfig(alpha=AlphaConfig(shape="channel"), ff_in=False),
    conv_out=TemporalConvConfig(),
)


@pytest.fixture
def call():
    clips, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 3, 12)

    def call(model):
        with torch.no_grad():
            return model(clips, 7, text).sample

    return call


@pytest.fixture
def two(make_unet, randomise):
    """A model with two adapters of different layouts, ``zoom`` in it and ``motion`` aside."""
    model = make_unet()
    randomise(inject(model, name="motion"))
    return randomise(inject(model, OTHER, name="zoom"))


def pointers(adapter):
    return {name: parameter.data_ptr() for name, parameter in adapter.model.named_parameters()}


def test_each_gives_what_it_gives_alone(make_unet, randomise, call):
    model = make_unet()
    plain = copy.deepcopy(model)
    adapter = randomise(inject(model, name="motion"))
    motion = copy.deepcopy(model)
    randomise(inject(model, OTHER, name="zoom"))
    assert (adapter.name, adapter.names, adapter.config) == ("zoom", ("motion", "zoom"), OTHER)
    zoom = copy.deepcopy(plain)
    alone = inject(zoom, OTHER)
    for name, layer in adapter.layers.items():
        alone.layers[name].load_state_dict(layer.state_dict())
    assert not torch.allclose(call(zoom), call(motion), atol=1e-3)
    for _ in range(2):
        assert torch.equal(call(model), call(zoom))
        assert adapter.set_active("motion") is adapter and adapter.name == "motion"
        assert torch.equal(call(model), call(motion))
        assert adapter.sites == adapter_of(motion).sites and adapter.config == TemporalConfig()
        adapter.set_active("zoom")
    adapter.remove()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not hasattr(model, "_temporal_state") and type(model) is type(plain)


def test_the_name_if_none_is_given(make_unet):
    adapter = inject(make_unet())
    assert (adapter.name, adapter.names) == ("default", ("default",))


def test_switching_copies_nothing_and_comes_back_exactly(two, fingerprint):
    before, weights = fingerprint(two.model), pointers(two)
    two.set_active("motion")
    assert fingerprint(two.model) != before
    motion = pointers(two)
    two.set_active("zoom")
    assert fingerprint(two.model) == before and pointers(two) == weights
    two.set_active("zoom")
    assert fingerprint(two.model) == before
    assert pointers(two.set_active("motion")) == motion
    assert two.names == ("motion", "zoom")  # in the order they came, whichever is in


def test_what_is_aside_is_no_part_of_the_model(two):
    zoom = set(two.state_dict())
    two.set_active("motion")
    motion = set(two.state_dict())
    assert {name for name, _ in two.model.named_parameters() if ".temporal." in name} == motion
    assert {key for key in two.model.state_dict() if ".temporal." in key} == motion != zoom


def test_what_belongs_to_an_adapter_and_what_to_the_model(two):
    two.metadata["licence"] = "CC0"
    two.scale = 0.5
    two.num_frames = 3
    two.model.conv_in.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in two.named_parameters("spatial")}
    two.freeze()
    two.set_active("motion")
    assert (two.metadata, two.scale, two.num_frames) == ({}, 1.0, 3)
    assert not any(parameter.requires_grad for _, parameter in two.named_parameters("spatial"))
    assert all(parameter.requires_grad for _, parameter in two.named_parameters("temporal"))
    two.set_active("zoom")
    assert (two.metadata, two.scale) == ({"licence": "CC0"}, 0.5)
    two.set_active("motion").remove()
    assert {name: parameter.requires_grad for name, parameter in two.model.named_parameters()} == before


def test_switching_while_switched_off(two, call):
    with two.disabled():
        image = call(two.model)
        two.set_active("motion")
        assert torch.equal(call(two.model), image)
    assert not torch.allclose(call(two.model), image, atol=1e-3)


def test_layers_follow_their_hosts(two):
    two.model.to(torch.bfloat16)
    two.set_active("motion")
    assert {parameter.dtype for _, parameter in two.named_parameters("temporal")} == {torch.bfloat16}
    assert {parameter.dtype for _, parameter in two.named_parameters("alpha")} == {torch.float32}
    assert {parameter.dtype for _, parameter in two.set_active("zoom").named_parameters("temporal")} == {torch.bfloat16}
    two.model.train()
    two.set_active("motion")
    assert all(layer.training for layer in two.layers.values())


def test_layers_that_are_wider_on_purpose_stay_so(two):
    two.model.to(torch.bfloat16)
    for layer in two.layers.values():
        layer.float()
    two.set_active("motion").set_active("zoom")
    assert {parameter.dtype for _, parameter in two.named_parameters("temporal")} == {torch.float32}
    two.set_active("motion")
    two.model.double()
    assert {value.dtype for value in two.set_active("zoom").state_dict().values()} == {torch.float64}


def test_layers_follow_to_another_device(make_unet):
    model = make_unet()
    adapter = inject(model, name="motion")
    inject(model, OTHER, name="zoom")
    weights = adapter.set_active("motion").state_dict()
    adapter.set_active("zoom")
    model.to("meta")  # where nothing can be moved to without losing it
    assert {key: value.data_ptr() for key, value in adapter.set_active("motion").state_dict().items()} == {
        key: value.data_ptr() for key, value in weights.items()
    }


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_all_of_them(two, call, make_copy):
    expected = {name: call(two.set_active(name).model) for name in ("motion", "zoom")}
    twin = adapter_of(make_copy(two.model))
    assert (twin.name, twin.names) == ("zoom", ("motion", "zoom"))
    for name in ("motion", "zoom"):
        assert torch.equal(call(twin.set_active(name).model), expected[name])
        with torch.no_grad():
            for value in twin.state_dict().values():
                value.zero_()
    assert torch.equal(call(two.set_active("motion").model), expected["motion"])


def test_from_files_under_a_name(two, call, make_unet, tmp_path):
    expected = call(two.model)
    two.save_pretrained(tmp_path)
    two.delete("motion")
    two.remove()
    inject(two.model)
    adapter = TemporalAdapter.from_pretrained(two.model, tmp_path, name="loaded")
    assert adapter.names == ("default", "loaded")
    assert torch.equal(call(two.model), expected)


def test_saving_what_is_aside(two, tmp_path):
    two.snapshot("motion").save_pretrained(tmp_path / "aside")
    two.set_active("motion").save_pretrained(tmp_path / "inside")
    for path in (tmp_path / "aside").iterdir():
        assert path.read_bytes() == (tmp_path / "inside" / path.name).read_bytes()


def test_a_snapshot_goes_into_another_model_by_value(two, make_unet, call):
    other = make_unet()
    other.load_state_dict({key: value for key, value in two.model.state_dict().items() if ".temporal." not in key})
    TemporalAdapter.from_pretrained(other, two.snapshot())
    expected = call(two.model)
    assert torch.equal(call(other), expected)
    with torch.no_grad():
        for value in adapter_of(other).state_dict().values():
            value.zero_()
    assert torch.equal(call(two.model), expected)


def test_deleting(two):
    two.delete("motion")
    assert two.names == ("zoom",)
    assert "motion" not in repr(two)
    with pytest.raises(ValueError, match=r"delete: expected the name of an adapter of this model \('zoom'\), got 'mo"):
        two.delete("motion")
    with pytest.raises(ValueError, match=r"delete: expected an adapter that is kept aside, got 'zoom', whose .*remove"):
        two.delete("zoom")
    assert two.names == ("zoom",)


def refuse(adapter, fingerprint, match, act):
    before, names, name = fingerprint(adapter.model), adapter.names, adapter.name
    with pytest.raises(ValueError, match=match):
        act()
    assert (fingerprint(adapter.model), adapter.names, adapter.name) == (before, names, name)


def test_names_that_are_taken_or_unknown(two, fingerprint, tmp_path):
    match = r"inject: UNet2DConditionModel: expected a plain .* already, named 'motion'; .* another name to have both"
    refuse(two, fingerprint, match, lambda: inject(two.model, name="motion"))
    two.save_pretrained(tmp_path)
    match = "from_pretrained: UNet2DConditionModel: .* named 'zoom'"
    refuse(two, fingerprint, match, lambda: TemporalAdapter.from_pretrained(two.model, tmp_path, name="zoom"))
    match = r"set_active: expected the name of an adapter of this model \('motion', 'zoom'\), got 'pan'"
    refuse(two, fingerprint, match, lambda: two.set_active("pan"))
    refuse(two, fingerprint, r"snapshot: expected the name .*, got 'pan'", lambda: two.snapshot("pan"))


def test_a_plan_that_fails_puts_everything_back(two, fingerprint, call, tmp_path):
    expected = call(two.model)
    config = TemporalConfig(include=("nowhere",))
    refuse(two, fingerprint, "got 'nowhere', which is in none", lambda: inject(two.model, config, name="pan"))
    (tmp_path / "config.json").write_text("{")
    match = "expected a file diffusion_pytorch_model.safetensors"
    refuse(two, fingerprint, match, lambda: TemporalAdapter.from_pretrained(two.model, tmp_path, name="pan"))
    assert torch.equal(call(two.model), expected)


def test_a_switch_that_fails_puts_everything_back(two, fingerprint, call):
    expected = call(two.model)
    host = two.model.down_blocks[0].resnets[0]  # a site of `motion` only
    host.forward = lambda *args: None
    refuse(two, fingerprint, "got a 'forward' patched on the instance by something", lambda: two.set_active("motion"))
    del host.forward
    assert torch.equal(call(two.model), expected)
    assert two.set_active("motion").name == "motion"


def test_a_site_that_something_else_changed(two, fingerprint):
    parametrize.register_parametrization(two.model.conv_out, "weight", torch.nn.Identity())
    match = "conv_out: expected the class that injection gave it, got ParametrizedConv2d"
    refuse(two, fingerprint, match, lambda: two.set_active("motion"))
    refuse(two, fingerprint, match, lambda: inject(two.model, name="pan"))


def test_checkpointing_goes_on_after_a_switch(two):
    two.model.train()
    clips, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 3, 12)

    def gradients():
        two.model.zero_grad()
        two.model(clips, 7, text).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in two.named_parameters("temporal")}

    two.set_active("motion")
    expected = gradients()
    two.set_active("zoom")
    two.model.enable_gradient_checkpointing()
    two.set_active("motion")
    found = gradients()
    assert expected and all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in diffusers
def test_a_compiled_model_follows(make_unet, randomise, call):
    torch._dynamo.reset()
    small = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    model = make_unet(**small, mid_block_type=None)
    adapter = randomise(inject(model, name="motion"))
    expected = {"motion": call(model)}
    randomise(inject(model, TemporalConfig(transformer=None, include=("down",)), name="zoom"))
    randomise(inject(model, name="same layout"))
    model.compile(backend="eager", fullgraph=True)
    results = {}
    for name in ("motion", "zoom", "same layout", "motion"):
        results[name] = call(adapter.set_active(name).model)
        with torch.no_grad():
            model._compiled_call_impl, compiled = None, model._compiled_call_impl
            torch.testing.assert_close(results[name], call(model), rtol=2e-5, atol=2e-5)
            model._compiled_call_impl = compiled
    torch.testing.assert_close(results["motion"], expected["motion"], rtol=2e-5, atol=2e-5)
    assert not torch.allclose(results["motion"], results["same layout"], atol=1e-3)
    torch._dynamo.reset()


def test_summary_is_about_the_one_in_the_model(two):
    stream = io.StringIO()
    two.summary(stream)
    assert "TemporalConv " in stream.getvalue() and "TemporalResBlock" not in stream.getvalue()


def test_offloading_that_layers_cannot_join(two, fingerprint):
    accelerate.hooks.attach_align_device_hook(
        two.model, execution_device="cpu", offload=True, weights_map=two.model.state_dict(),
        preload_module_classes=["ResnetBlock2D"],
    )  # fmt: skip
    match = "set_active: plan: .*: expected weights that stay in place, .*; switch before that as well"
    refuse(two, fingerprint, match, lambda: two.set_active("motion"))


def by_accelerate(model):
    accelerate.cpu_offload(model, execution_device="cpu")


def by_leaf_groups(model):
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def by_block_groups(model):
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [by_accelerate, by_leaf_groups, by_block_groups])
def test_switching_under_offloading(two, call, offload):
    expected = {name: call(two.set_active(name).model) for name in ("motion", "zoom")}
    offload(two.model)
    for name in ("zoom", "motion", "zoom", "motion"):
        assert torch.equal(call(two.set_active(name).model), expected[name])
