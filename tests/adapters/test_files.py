"""Adapter files: what is written is what is read, and nothing altered, cut or foreign is accepted."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from temporal_layers import AlphaConfig, TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalAdapter, TemporalConfig, inject

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved adapter; tests that alter it copy it first."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    adapter = inject(model)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters("temporal"):
            parameter.normal_()
    adapter.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def make_host(make_unet):
    return lambda **changes: make_unet(
        **{
            "block_out_channels": (8,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "mid_block_type": None,
            **changes,
        }
    )


def refuse(model, folder, fingerprint, match):
    before = fingerprint(model)
    with pytest.raises(ValueError, match=match):
        TemporalAdapter.from_pretrained(model, folder)
    assert fingerprint(model) == before


def rewrite(folder, change):
    """Edit the configuration in both places that hold it, with a new checksum: a forgery, or a file of another age."""
    header = json.loads((folder / CONFIG).read_text())
    change(header)
    header.pop("weights_sha256", None)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"temporal_layers": json.dumps(header, sort_keys=True)})
    header["weights_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(header))


@pytest.mark.parametrize("kind", ["conditional", "unconditional", "decoder"])
def test_round_trip(make_unet, make_unconditional, make_vae, randomise, tmp_path, kind):
    make = {"conditional": make_unet, "unconditional": make_unconditional, "decoder": make_vae}[kind]
    config = TemporalConfig.for_decoder() if kind == "decoder" else TemporalConfig()
    torch.manual_seed(1)
    model = make()
    adapter = randomise(inject(model, config))
    adapter.save_pretrained(tmp_path / "deep" / "folder")
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == [CONFIG, WEIGHTS]
    torch.manual_seed(1)
    other = make()
    state = torch.get_rng_state()
    loaded = TemporalAdapter.from_pretrained(other, tmp_path / "deep" / "folder")
    assert torch.equal(torch.get_rng_state(), state)  # no random weights are drawn only to be overwritten
    assert (loaded.config, loaded.sites) == (adapter.config, adapter.sites)
    clips = torch.randn(1, 4, 3, 8, 8)
    with torch.no_grad():
        if kind == "decoder":
            assert torch.equal(other.decode(clips).sample, model.decode(clips).sample)
        else:
            arguments = (torch.randn(1, 3, 12),) if kind == "conditional" else ()
            assert torch.equal(other(clips, 7, *arguments).sample, model(clips, 7, *arguments).sample)
    assert all(parameter.requires_grad for _, parameter in loaded.named_parameters("temporal"))


def test_saving_twice_replaces_and_is_reproducible(make_host, saved, folder):
    adapter = TemporalAdapter.from_pretrained(make_host(), saved)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    adapter.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_dtype_follows_the_host_and_alpha_stays_wide(make_host, saved):
    adapter = TemporalAdapter.from_pretrained(make_host().to(torch.bfloat16), saved)
    assert {parameter.dtype for _, parameter in adapter.named_parameters("temporal")} == {torch.bfloat16}
    assert {parameter.dtype for _, parameter in adapter.named_parameters("alpha")} == {torch.float32}
    weights = load_file(saved / WEIGHTS)
    for key, value in adapter.state_dict().items():
        assert torch.equal(value, weights[key].to(value.dtype))


def test_loading_before_the_host_has_weights(make_host, saved):
    reference = make_host()
    with torch.device("meta"):
        model = make_host().to(torch.float16)
    adapter = TemporalAdapter.from_pretrained(model, saved)
    assert {value.dtype for key, value in adapter.state_dict().items() if "logit" not in key} == {torch.float16}
    assert not any(value.is_meta for value in adapter.state_dict().values())
    model.load_state_dict(reference.half().state_dict(), strict=False, assign=True)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_layouts_and_tied_weights_are_saved_by_value(make_host, saved, tmp_path):
    model = make_host()
    adapter = TemporalAdapter.from_pretrained(model, saved)
    first, second = [layer for layer in adapter.layers.values() if hasattr(layer, "convs")][:2]
    second.convs[0].weight = first.convs[0].weight
    first.norms[0].weight = torch.nn.Parameter(torch.arange(16.0)[::2])
    model.to(memory_format=torch.channels_last)
    expected = adapter.state_dict()
    adapter.save_pretrained(tmp_path)
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_an_interrupted_save_leaves_the_old_files(make_host, saved, folder, monkeypatch):
    adapter = TemporalAdapter.from_pretrained(make_host(), saved)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        adapter.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(make_host, folder, fingerprint, name):
    (folder / name).unlink()
    refuse(make_host(), folder, fingerprint, rf"expected a file {name}, got none; pass the folder")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_truncated_file(make_host, folder, fingerprint, name, keep):
    data = (folder / name).read_bytes().rstrip()
    (folder / name).write_bytes(data[:keep])
    match = "expected sha256 .* the file is truncated or altered" if name == WEIGHTS else "expected JSON, got: .*trunc"
    refuse(make_host(), folder, fingerprint, match)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_no_flipped_bit_goes_unnoticed(make_host, folder, fingerprint, name):
    model, path = make_host(), folder / name
    data = path.read_bytes()
    before = fingerprint(model)
    positions = torch.randint(len(data) - 1, (25,)).tolist()
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            same = json.loads(flipped) == json.loads(data)  # a blank between two keys may have become another
        except ValueError:
            same = False
        if not same:
            with pytest.raises(ValueError, match=f"{folder.name}"):
                TemporalAdapter.from_pretrained(model, folder)
    assert fingerprint(model) == before


def test_swapped_tensors(make_host, folder, fingerprint):
    weights = load_file(folder / WEIGHTS)
    first, second = [key for key in weights if key.endswith("convs.0.weight")][:2]
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, folder / WEIGHTS)
    refuse(make_host(), folder, fingerprint, "expected sha256 .* altered")


def test_configuration_of_other_weights(make_host, folder, fingerprint, tmp_path):
    adapter = inject(make_host(), TemporalConfig(transformer=TemporalTransformerConfig(causal=True)))
    adapter.save_pretrained(tmp_path / "other")
    header = json.loads((tmp_path / "other" / CONFIG).read_text())
    header["weights_sha256"] = json.loads((folder / CONFIG).read_text())["weights_sha256"]
    (folder / CONFIG).write_text(json.dumps(header))
    refuse(make_host(), folder, fingerprint, f"expected what {WEIGHTS} was saved with, got something else")


def test_weights_that_are_no_safetensors_file(make_host, folder, fingerprint):
    (folder / WEIGHTS).write_bytes(b"PK")
    header = json.loads((folder / CONFIG).read_text())
    header["weights_sha256"] = hashlib.sha256(b"PK").hexdigest()
    (folder / CONFIG).write_text(json.dumps(header))
    refuse(make_host(), folder, fingerprint, "expected a safetensors file, got: ")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "expected format 'temporal-layers adapter', got 'list'; this is not an adapter"),
        ('{"_class_name": "UNet2DConditionModel"}', "expected format 'temporal-layers adapter', got None"),
        ('{"format": "temporal-layers adapter", "format_version": 3}', "expected format version 1 or 2, got 3; load"),
        ('{"format": "temporal-layers adapter", "format_version": true}', "expected format version 1 or 2, got True"),
        ('{"format": "temporal-layers adapter", "format_version": 1}', r"expected keys .* missing \['base_class', "),
        (b"\xff\xfe", "expected JSON, got: 'utf-8' codec"),
    ],
)
def test_foreign_configurations(make_host, folder, fingerprint, text, match):
    (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    refuse(make_host(), folder, fingerprint, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda header: header["temporal"]["resblock"].update(num_conv=2),
            "TemporalConfig.resblock: unknown key 'num_conv', .*; did you mean 'num_convs'",
        ),
        (
            lambda header: header["temporal"]["resblock"].update(num_convs="2"),
            "TemporalConfig.resblock.num_convs: expected a whole number, got '2'.* written by version",
        ),
        (lambda header: header["temporal"].update(resblock=3), "TemporalConfig.resblock: expected a dictionary, got 3"),
        (lambda header: header["sites"][0].update(name2="x"), "expected a configuration of this version, got: .*name2"),
        (lambda header: header.update(sites=None), "expected a configuration of this version, got: .*NoneType"),
        (lambda header: header["sites"].pop(), r"expected a model with 5 sites, got one with 6; the adapter was made"),
        (
            lambda header: header["sites"][0].update(channels=16),
            r"expected a model with the site .*channels=16.*; the adapter was made for another model \(a UNet2DCond",
        ),
        (
            lambda header: header["temporal"]["resblock"].update(kernel_size=5),
            r"convs.0.weight: expected shape \(8, 8, 5, 1\), got \(8, 8, 3, 1\); the configuration does not belong",
        ),
        (
            lambda header: header["temporal"]["transformer"].update(ff=False),
            r"expected \d+ tensors, got \d+: 0 missing \[\], 18 unknown \['.*; the configuration does not belong",
        ),
        (lambda header: header.update(extra=1), r"missing \[\], unknown \['extra'\]"),
    ],
)
def test_forged_configurations(make_host, folder, fingerprint, change, match):
    rewrite(folder, change)
    refuse(make_host(), folder, fingerprint, match)


def test_adapter_of_another_model(make_host, make_unconditional, saved, fingerprint):
    refuse(make_host(block_out_channels=(16,)), saved, fingerprint, "expected a model with the site .*channels=8")
    refuse(make_host(cross_attention_dim=8), saved, fingerprint, "context_dim=12.* got .*context_dim=8")
    refuse(make_unconditional(), saved, fingerprint, r"the adapter was made for another model \(a UNet2DConditionModel")


def test_loading_into_an_injected_model(make_host, saved, fingerprint):
    model = make_host()
    inject(model)
    refuse(model, saved, fingerprint, "got one that has temporal layers already, named 'default'; call remove")


def test_saving_without_values(make_host, tmp_path):
    with torch.device("meta"):
        adapter = inject(make_host())
    with pytest.raises(ValueError, match="expected a value, got a tensor on the meta device; take off the hooks"):
        adapter.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_alpha_is_in_the_configuration_only(make_host, tmp_path):
    config = TemporalConfig(
        resblock=None, transformer=TemporalTransformerConfig(alpha=AlphaConfig(init=0.25, learned=False))
    )
    inject(make_host(), config).save_pretrained(tmp_path)
    assert not any("blend" in key for key in load_file(tmp_path / WEIGHTS))
    loaded = TemporalAdapter.from_pretrained(make_host(), tmp_path)
    assert {layer.blend.alpha.item() for layer in loaded.layers.values()} == {0.25}


def test_a_file_of_the_first_format(make_host):
    # Written by the library before the configuration had conv_in, patterns, rules and the like.
    folder = Path(__file__).with_name("format_1")
    assert json.loads((folder / CONFIG).read_text())["format_version"] == 1
    adapter = TemporalAdapter.from_pretrained(make_host(up_block_types=("UpBlock2D",)), folder)
    assert adapter.config == TemporalConfig(
        resblock=TemporalResBlockConfig(num_convs=1, alpha=AlphaConfig(shape="channel")),
        transformer=TemporalTransformerConfig(ff_in=False, ff=False, position="rotary"),
    )
    assert adapter.metadata == {}
    weights = load_file(folder / WEIGHTS)
    found = adapter.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key].reshape(weights[key].shape), weights[key]) for key in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_saving_in_another_dtype(make_host, saved, tmp_path, dtype):
    adapter = TemporalAdapter.from_pretrained(make_host(), saved)
    adapter.save_pretrained(tmp_path, dtype=dtype)
    before, stored = load_file(saved / WEIGHTS), load_file(tmp_path / WEIGHTS)
    for key, value in stored.items():
        assert torch.equal(value, before[key].to(torch.float32 if key.endswith("logit") else dtype))
    loaded = TemporalAdapter.from_pretrained(make_host(), tmp_path)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_cannot_hold_weights(make_host, saved, tmp_path, dtype):
    adapter = TemporalAdapter.from_pretrained(make_host(), saved)
    with pytest.raises(ValueError, match=f"dtype: expected a floating dtype of two bytes or more, got {dtype}; use"):
        adapter.save_pretrained(tmp_path / "new", dtype=dtype)
    assert not (tmp_path / "new").exists()


def test_a_value_that_the_dtype_has_not(make_host, saved, tmp_path):
    adapter = TemporalAdapter.from_pretrained(make_host(), saved)
    name, layer = next(iter(adapter.layers.items()))
    with torch.no_grad():
        next(layer.parameters()).fill_(1e5)
    with pytest.raises(
        ValueError, match=rf"{name}.*: expected values within the range of torch.float16, got 1e\+05; use"
    ):
        adapter.save_pretrained(tmp_path / "new", dtype=torch.float16)
    assert not (tmp_path / "new").exists()
    adapter.save_pretrained(tmp_path / "new", dtype=torch.bfloat16)


def test_metadata_goes_through_files(make_host, saved, tmp_path):
    adapter = TemporalAdapter.from_pretrained(make_host(), saved)
    assert adapter.metadata == {}
    adapter.metadata["licence"] = "CC-BY-4.0 \u00a9"
    adapter.save_pretrained(tmp_path, metadata={"notes": "of a test"})
    assert adapter.metadata == {"licence": "CC-BY-4.0 \u00a9"}
    loaded = TemporalAdapter.from_pretrained(make_host(), tmp_path)
    assert loaded.metadata == {"licence": "CC-BY-4.0 \u00a9", "notes": "of a test"}
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


@pytest.mark.parametrize("metadata", [{"steps": 3}, {3: "steps"}, ["steps"]])
def test_metadata_that_is_no_text(make_host, saved, folder, fingerprint, tmp_path, metadata):
    match = "metadata: expected a dictionary from strings to strings, got .*steps.*; turn other values into text"
    adapter = TemporalAdapter.from_pretrained(make_host(), saved)
    with pytest.raises(ValueError, match=match):
        adapter.save_pretrained(tmp_path / "new", metadata=metadata, card=True)
    assert not (tmp_path / "new").exists()
    if 3 not in metadata:  # which JSON cannot say
        rewrite(folder, lambda header: header.update(metadata=metadata))
        refuse(make_host(), folder, fingerprint, "expected a configuration of this version, got: metadata: expected")
