"""``temporal-layers inspect`` on configurations of published and of tiny models."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console

from temporal_layers.adapters import TemporalConfig, inject
from temporal_layers.recipes import cli
from temporal_layers.recipes.inspect_model import tree

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def run(capsys, *arguments):
    code = cli.main(["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_counts_of_stable_diffusion_need_no_weights(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SD15))
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert "down_blocks.0.attentions.0.transformer_blocks.0  TemporalTransformerBlock" in out
    assert "38 sites, 649,687,078 temporal parameters (of them 38 alpha), 859,520,964 spatial" in out
    # 649,687,078 parameters of 4 and 2 bytes; training adds 16 bytes for each of them to the frozen 859,520,964.
    assert "temporal weights: 2.60 GB with float32 weights, 1.30 GB with bfloat16 weights" in out
    assert "training, beside activations: 13.83 GB with float32 weights, 12.11 GB with bfloat16 weights" in out


def test_the_tree_has_every_layer_under_its_site(capsys):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    adapter = inject(unet)
    Console(width=120).print(tree("unet", adapter))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "unet: UNet2DConditionModel" and "ModuleList" not in "".join(lines)
    assert sum("+ Temporal" in line for line in lines) == len(adapter.sites)
    first = next(index for index, line in enumerate(lines) if line.endswith("attentions.0 Transformer2DModel"))
    assert lines[first + 1].endswith("transformer_blocks.0 BasicTransformerBlock")
    layer = adapter.layers["down_blocks.0.attentions.0.transformer_blocks.0"]
    assert lines[first + 2].endswith(f"+ TemporalTransformerBlock {sum(p.numel() for p in layer.parameters()):,}")


def test_json_is_what_an_injection_does(tmp_path, capsys, stable_diffusion):
    pipeline, folder = stable_diffusion, tmp_path / "pipeline"
    pipeline.save_pretrained(folder)
    code, out, _ = run(capsys, folder, "--json", "--include", "up_blocks", "--exclude", r"resnets\.0")
    assert code == 0
    found = json.loads(out)
    assert set(found) == {"unet", "vae"}
    patterns = {"include": ("up_blocks",), "exclude": (r"resnets\.0",)}
    for name, config in (("unet", TemporalConfig(**patterns)), ("vae", TemporalConfig.for_decoder())):
        if name == "vae":
            config = TemporalConfig(resblock=config.resblock, transformer=None, **patterns)
        adapter = inject(getattr(pipeline, name), config)
        counts = [sum(p.numel() for p in layer.parameters()) for layer in adapter.layers.values()]
        assert [site["name"] for site in found[name]["sites"]] == list(adapter.layers)
        assert [site["parameters"] for site in found[name]["sites"]] == counts
        assert found[name]["temporal_parameters"] == sum(counts)
        assert TemporalConfig.from_dict(found[name]["config"]) == config


def test_options_choose_the_layers(tmp_path, capsys):
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    arguments = (
        tmp_path / "unet" / "config.json",
        "--json",
        "--policy",
        "after_pair",
        "--no-resblock",
        "--num-heads",
        "4",
    )
    code, out, _ = run(capsys, *arguments)
    sites = json.loads(out)["unet"]["sites"]
    assert code == 0
    assert {site["layer"] for site in sites} == {"TemporalTransformerBlock"}
    assert len(sites) == 7
    inject(unet, TemporalConfig(transformer=None)).save_pretrained(tmp_path / "adapter")
    code, out, _ = run(capsys, tmp_path / "unet", "--json", "--adapter", tmp_path / "adapter")
    assert {site["layer"] for site in json.loads(out)["unet"]["sites"]} == {"TemporalResBlock"}


def test_what_cannot_be_injected_is_said(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    code, out, err = run(capsys, tmp_path)
    assert (code, out) == (1, "")
    assert "expected an image model, got a video model" in err
    code, out, _ = run(capsys, tmp_path, "--json")
    assert code == 1
    assert "got a video model" in next(iter(json.loads(out).values()))["refused"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a config.json, a folder with one, or a pipeline folder, got a folder without"),
        ("{", "expected JSON, got: "),
        ("{}", "expected _class_name to be a model of diffusers, got None"),
        ('{"_class_name": "DDIMScheduler"}', "expected _class_name to be a model of diffusers, got 'DDIMScheduler'"),
        ("[1]", "expected _class_name to be a model of diffusers, got 'list'"),
    ],
)
def test_bad_paths(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    code, _, err = run(capsys, tmp_path)
    assert code == 1
    assert message in err


def test_a_path_that_is_not_there_and_a_pipeline_without_models(tmp_path, capsys):
    code, _, err = run(capsys, tmp_path / "nowhere")
    assert code == 1
    assert "got nothing there" in err
    (tmp_path / "model_index.json").write_text("{}")
    code, _, err = run(capsys, tmp_path)
    assert code == 1
    assert "expected a pipeline with an image UNet or autoencoder of diffusers, got no models" in err
