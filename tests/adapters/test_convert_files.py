"""Files of published video weights: reading, refusing, reporting, writing back."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, MotionAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from temporal_layers import AlphaConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalAdapter, TemporalConfig, inject
from temporal_layers.adapters.convert import (
    Source,
    detect,
    export_foreign,
    image_model_of,
    load_foreign,
    micro_conditioning,
    save_foreign,
    source_of,
)

spec = importlib.util.spec_from_file_location("video_models", Path(__file__).parent / "video_models.py")
video = importlib.util.module_from_spec(spec)
spec.loader.exec_module(video)


@pytest.fixture
def motion():
    return video.animatediff("v2")


@pytest.fixture
def tensors(motion):
    return video.animatediff_original(video.motion_part(motion))


@pytest.fixture
def unet(motion):
    return video.image_unet_of(motion)


def nested(tensors):
    return {"epoch": 3, "global_step": 7, "state_dict": {f"module.{key}": value for key, value in tensors.items()}}


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".safetensors"])
def test_every_kind_of_file(tmp_path, tensors, unet, suffix):
    path = tmp_path / f"mm{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path, {"license": "made up"})
    else:
        torch.save(nested(tensors), path)
    adapter, report = load_foreign(unet, path)
    stated = "made up" if suffix == ".safetensors" else "not stated in the file"
    assert stated in report.licence and adapter.metadata["licence"] == report.licence
    assert set(report.ignored) >= (set() if suffix == ".safetensors" else {"epoch", "global_step"})
    assert report.source.prefix == ("" if suffix == ".safetensors" else "module.")
    exported = export_foreign(adapter)
    assert {key.removeprefix("module."): 0 for key in exported}.keys() == tensors.keys()
    assert all(torch.equal(exported[report.source.prefix + key], value) for key, value in tensors.items())


def test_pickles_with_code_are_refused(tmp_path, tensors, unet, fingerprint):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "mm.ckpt"
    torch.save({"state_dict": tensors, "config": Code()}, path)
    before = fingerprint(unet)
    with pytest.raises(ValueError, match=r"mm\.ckpt: expected tensors in plain containers, got a pickle with more in"):
        load_foreign(unet, path)
    assert not (tmp_path / "ran").exists()
    assert fingerprint(unet) == before


def test_a_folder_of_diffusers(tmp_path, motion, unet):
    made = MotionAdapter.from_config(
        {"block_out_channels": (32, 64), "motion_layers_per_block": 1, "motion_norm_num_groups": 8}
    )
    made.load_state_dict(video.motion_part(motion))
    made.save_pretrained(tmp_path / "adapter")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: x\n---\n# Card\nlicense: none of this\n")
    adapter, report = load_foreign(unet, tmp_path / "adapter")
    assert report.licence == "apache-2.0"
    assert report.source == dataclasses.replace(report.source, family="animatediff", style="diffusers", version="v2")
    MotionAdapter.from_config(made.config).load_state_dict(export_foreign(adapter), strict=True)


def test_a_folder_in_pieces(tmp_path, motion, unet):
    values = video.motion_part(motion)
    names, stem = sorted(values), "diffusion_pytorch_model"
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: values[name] for name in part}, tmp_path / f"{number}.safetensors")
    weight_map = {name: f"{index % 2}.safetensors" for index, name in enumerate(names)}
    (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _, report = load_foreign(unet, tmp_path)
    assert report.loaded.keys() | report.ignored.keys() == values.keys()


def test_the_report_has_every_name(tensors, unet):
    adapter, report = load_foreign(unet, tensors)
    assert report.loaded.keys() | report.ignored.keys() == tensors.keys()
    targets = [target for found in report.loaded.values() for target in found]
    assert sorted(targets) == sorted(adapter.state_dict())
    text = str(report)
    assert all(name in text for name in (*tensors, *targets))
    assert "14 ignored: position table: computed, not stored" in report.summary()
    name = "mid_block.motion_modules.0.temporal_transformer.proj_in.weight"
    assert report.loaded[name] == ("mid_block.attentions.0.temporal.proj_in.weight",)


def test_source_and_licence_are_saved_with_the_adapter(tmp_path, tensors, unet, motion):
    adapter, report = load_foreign(unet, tensors, licence="mine, all of it")
    adapter.save_pretrained(tmp_path / "saved")
    again = TemporalAdapter.from_pretrained(video.image_unet_of(motion), tmp_path / "saved")
    assert source_of(again) == report.source
    assert again.metadata["licence"] == "mine, all of it"
    save_foreign(again, tmp_path / "mm.safetensors")
    assert {key: value.tolist() for key, value in load_file(tmp_path / "mm.safetensors").items()} == {
        key: value.tolist() for key, value in tensors.items()
    }
    with safe_open(tmp_path / "mm.safetensors", "pt") as file:
        assert file.metadata()["license"] == "mine, all of it"
    assert source_of(inject(video.image_unet_of(motion))) is None


def test_half_precision_comes_back_bit_for_bit(tensors, unet):
    half = {key: value.half() for key, value in tensors.items()}
    odd = next(iter(half))
    half[odd] = tensors[odd]
    adapter, report = load_foreign(unet, half)
    assert report.notes == () and report.source.exceptions == (f"{odd} float32",)
    assert {parameter.dtype for parameter in adapter.model.parameters()} == {torch.float32}
    exported = export_foreign(adapter)
    assert all(exported[key].dtype == value.dtype and torch.equal(exported[key], value) for key, value in half.items())


def test_rounding_to_the_model_is_noted(tensors, unet):
    _, report = load_foreign(nn.Module.to(unet, torch.bfloat16), tensors)
    assert "tensors were rounded to the model's dtype" in report.notes[0]


def test_export_in_the_other_style(tensors, unet, motion):
    adapter, report = load_foreign(unet, tensors)
    exported = export_foreign(adapter, dataclasses.replace(report.source, style="diffusers"))
    assert exported.keys() == video.motion_part(motion).keys()
    assert all(torch.equal(exported[key], value) for key, value in video.motion_part(motion).items())


@pytest.mark.parametrize(
    ("make", "named", "head_dim"),
    [
        (video.svd, video.svd_sgm, 16),
        (video.svd_decoder, video.svd_decoder_sgm, None),
        (video.modelscope, video.modelscope_original, 8),
    ],
    ids=["svd", "svd-decoder", "modelscope"],
)
def test_authors_files_become_diffusers_models(make, named, head_dim):
    model = make()
    file = named(model)
    adapter, report = load_foreign(image_model_of(file, head_dim=head_dim), file)
    exported = export_foreign(adapter, dataclasses.replace(report.source, style="diffusers", prefix=""))
    type(model).from_config(model.config).load_state_dict(exported, strict=True)
    assert all(torch.equal(exported[key], value) for key, value in model.state_dict().items())


def test_a_trained_adapter_becomes_a_motion_adapter(unet, randomise):
    block = TemporalTransformerConfig(
        attentions=("self", "self"),
        ff_in=False,
        position="sinusoidal",
        in_norm="clip",
        projection=True,
        num_heads=8,
        alpha=AlphaConfig(init=0.0, learned=False),
    )
    adapter = randomise(inject(unet, TemporalConfig(resblock=None, transformer=block, transformer_policy="after_pair")))
    exported = export_foreign(adapter, Source(family="animatediff", max_frames=16))
    made = MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8, motion_max_seq_length=16
    )
    made.load_state_dict(exported, strict=True)
    assert torch.equal(
        made.mid_block.motion_modules[0].proj_in.weight, adapter.layers["mid_block.attentions.0"].proj_in.weight
    )


def test_micro_conditioning_keeps_the_dtype():
    assert micro_conditioning(torch.tensor([[6, 127, 0]]), 8).shape == (1, 24)
    assert micro_conditioning(torch.tensor([[6, 127, 0]]), 8).dtype == torch.float32
    assert micro_conditioning(torch.zeros(2, 3, dtype=torch.float64), 8).dtype == torch.float64


def without(tensors, part):
    return {key: value for key, value in tensors.items() if part not in key}


MID = "mid_block.motion_modules.0.temporal_transformer"
REFUSED = [
    (lambda t: {}, {}, r"detect: expected the names of one of animatediff .*got 0 tensors such as none"),
    (lambda t: {"a.b": torch.ones(1)}, {}, r"got 1 tensors such as a\.b; pass the file of the UNet"),
    (lambda t: t | {f"{MID}.extra": torch.ones(1)}, {}, rf"0 missing \[\], 1 unknown \['{MID}.extra'\]"),
    (lambda t: without(t, f"{MID}.proj_in.bias"), {}, rf"1 missing \['{MID}.proj_in.bias'\], 0 unknown"),
    (lambda t: without(t, f"{MID}.transformer_blocks.0.attention_blocks.1.pos"), {}, "1 missing .*pos_encoder.pe"),
    (
        lambda t: t | {f"{MID}.proj_in.bias": torch.ones(48)},
        {},
        rf"mid_block\.attentions\.0\.temporal\.proj_in\.bias: expected '{MID}.proj_in.bias' of shape \(64,\), got \(48",
    ),
    (
        lambda t: t | {k: v + 1 for k, v in t.items() if k.endswith("1.pos_encoder.pe")},
        {},
        "pos_encoder.pe: expected the sinusoid of AnimateDiff, .*learned positions are not supported",
    ),
    (lambda t: t, {"num_heads": 5}, r"inject: .*num_heads: expected a divisor of dim=.*got 5"),
    (lambda t: t, {"spatial": "load"}, "load_foreign: spatial: expected one of 'check', 'skip', got 'load'"),
    (lambda t: t, {"in_norm": "none"}, "load_foreign: in_norm: expected one of None, 'clip', 'frame', got 'none'"),
]


@pytest.mark.parametrize(("change", "options", "message"), REFUSED)
def test_refusals_leave_the_model_alone(change, options, message, tensors, unet, fingerprint):
    before = fingerprint(unet)
    with pytest.raises(ValueError, match=message):
        load_foreign(unet, change(tensors), **options)
    assert fingerprint(unet) == before


def test_unknown_tensors_may_be_left_out(tensors, unet):
    _, report = load_foreign(unet, tensors | {f"{MID}.extra": torch.ones(1)}, allow_unknown=True)
    assert report.unknown == (f"{MID}.extra",) and "1 unknown, not loaded" in report.summary()


def test_other_models_are_refused(tensors, unet, fingerprint):
    before = fingerprint(unet)
    with pytest.raises(ValueError, match="the file is for another model, or incomplete"):
        load_foreign(unet, video.animatediff_original(video.motion_part(video.animatediff("sdxl"))))
    with pytest.raises(ValueError, match=r"one of animatediff .*got \d+ tensors such as first_stage_model"):
        load_foreign(unet, video.svd_decoder_sgm(video.svd_decoder()))
    assert fingerprint(unet) == before
    vae = AutoencoderKL(block_out_channels=(32,), layers_per_block=1)
    with pytest.raises(ValueError, match="detect: expected the names of one of svd-decoder"):
        load_foreign(vae, tensors)


def test_groups_of_another_number_are_refused(tmp_path, motion, unet):
    save_file(video.motion_part(motion), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"motion_norm_num_groups": 16}))
    with pytest.raises(ValueError, match=r"down_blocks\.0\.attentions\.0: expected a norm with 16 groups, .* got 8"):
        load_foreign(unet, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"motion_num_attention_heads": [8, 4]}))
    with pytest.raises(
        ValueError, match=r"motion_num_attention_heads: expected one number for all blocks, got \[8, 4\]"
    ):
        load_foreign(unet, tmp_path)


def test_image_weights_in_the_file_are_compared(fingerprint):
    file = video.modelscope_original(video.modelscope())
    unet = image_model_of(file, head_dim=8)
    with torch.no_grad():
        unet.conv_out.bias += 1
    before = fingerprint(unet)
    with pytest.raises(
        ValueError, match=r"conv_out\.bias: expected the value of 'out\.2\.bias' in state dict, got ano"
    ):
        load_foreign(unet, file)
    assert fingerprint(unet) == before
    _, report = load_foreign(unet, file, spatial="skip")
    assert report.ignored["out.2.bias"] == "image model: left out (spatial='skip')"


def test_image_model_of_refuses(tensors):
    with pytest.raises(ValueError, match="expected a whole video model of SVD or ModelScope, got animatediff v2"):
        image_model_of(tensors)
    file = video.modelscope().state_dict()
    with pytest.raises(ValueError, match=r"expected a complete image model, got 1 tensors missing \['conv_out.bias'\]"):
        image_model_of(without(file, "conv_out.bias"), head_dim=8)
    with pytest.raises(ValueError, match=r"got 1 tensors missing \['conv_out.weight'\]"):
        image_model_of(without(file, "conv_out.weight"), head_dim=8)
    with pytest.raises(ValueError, match=r"expected the shapes of modelscope .* size mismatch for conv_out\.bias"):
        image_model_of(file | {"conv_out.bias": torch.ones(7)}, head_dim=8)


def broken(path):
    path.write_bytes(b"no such file format")
    return path


def list_of_tensors(path):
    torch.save([torch.ones(1)], path)
    return path


FILES = [
    (lambda path: path / "nothing.ckpt", r"nothing\.ckpt: expected a file or a folder, got none"),
    (lambda path: path, r"expected one weights file, diffusion_pytorch_model\.safetensors for instance, got none"),
    (lambda path: broken(path / "a.safetensors"), r"a\.safetensors: expected a safetensors file, got"),
    (lambda path: broken(path / "a.onnx"), r"a\.onnx: expected a file named \.safetensors, \.ckpt, .*, got \.onnx"),
    (lambda path: broken(path / "a.ckpt"), r"a\.ckpt: expected "),
    (lambda path: list_of_tensors(path / "a.pt"), r"a\.pt: expected tensors by name, got a list"),
]


@pytest.mark.parametrize(("make", "message"), FILES)
def test_files_that_are_none(make, message, tmp_path, unet):
    with pytest.raises(ValueError, match=message):
        load_foreign(unet, make(tmp_path))


def test_a_cut_off_file(tmp_path, tensors, unet):
    path = tmp_path / "mm.ckpt"
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"mm\.ckpt: expected a PyTorch file, got: .*it is damaged"):
        load_foreign(unet, path)


def test_export_refuses_other_layers(tmp_path, tensors, unet, motion):
    plain = inject(video.image_unet_of(motion))
    with pytest.raises(ValueError, match="export_foreign: source: expected a Source, got None for an adapter that was"):
        export_foreign(plain)
    with pytest.raises(
        ValueError, match=r"TemporalConfig\.resblock: expected None, got options; only adapters of that"
    ):
        export_foreign(plain, Source(family="animatediff"))
    adapter, _ = load_foreign(unet, tensors)
    with pytest.raises(ValueError, match=r"save_foreign: .*mm\.ckpt: expected a file named \.safetensors, got \.ckpt"):
        save_foreign(adapter, tmp_path / "mm.ckpt")
    with pytest.raises(ValueError, match=r"Source\.style: expected one of 'sgm', 'diffusers', got 'original'"):
        Source(family="svd", style="original")
    with pytest.raises(ValueError, match=r"Source\.from_json: expected what to_json wrote, got .*colour"):
        Source.from_json('{"colour": 1}')


def test_export_refuses_shared_tensors_that_differ():
    file = video.svd_sgm(video.svd(depth=2))
    adapter, _ = load_foreign(image_model_of(file, head_dim=16), file)
    layer = adapter.layers["mid_block.attentions.0.transformer_blocks.1"]
    with torch.no_grad():
        layer.blend.logit += 1
    with pytest.raises(
        ValueError, match=r"shares 'model\.diffusion_model\.middle_block\.1\.time_mixer\.mix_factor' in"
    ):
        export_foreign(adapter)


def test_export_refuses_loras_and_weights_elsewhere(tensors, unet):
    from peft import LoraConfig

    adapter, report = load_foreign(unet, tensors)
    adapter.model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(
        ValueError, match=r"export_foreign: .*to_q\.base_layer\.weight: expected the tensors of the image"
    ):
        export_foreign(adapter)
    adapter.model.unload_lora()
    adapter.model.to("meta")
    with pytest.raises(ValueError, match="expected a value, got a tensor on the meta device"):
        export_foreign(adapter, report.source)


def test_detect_tells_versions():
    for version in ("v1", "v2", "v3", "sdxl"):
        assert detect(video.motion_part(video.animatediff(version))).version == version
