"""Every refusal says who, what was expected and what came, and leaves the model as it was."""

import contextlib

import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)

from temporal_layers import AlphaConfig, TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalAdapter, TemporalConfig, adapter_of, inject, plan
from temporal_layers.adapters import attach as attach_module


@pytest.fixture
def unchanged(fingerprint):
    """Asserts that the body raises a matching ValueError and leaves ``model`` as it was."""

    @contextlib.contextmanager
    def unchanged(model, match):
        before = fingerprint(model)
        with pytest.raises(ValueError, match=match):
            yield
        assert fingerprint(model) == before

    return unchanged


def test_injecting_twice(make_unet, unchanged):
    model = make_unet()
    inject(model)
    with unchanged(model, r"inject: UNet2DConditionModel: expected a plain image model or .* call remove"):
        inject(model)
    with unchanged(model, r"plan: UNet2DConditionModel: expected a plain image model, got one that has .* call remove"):
        plan(model)


@pytest.mark.parametrize(
    "config", [TemporalConfig(transformer=None), TemporalConfig(resblock=None)], ids=["no resnet", "no attention"]
)
def test_no_matching_site(make_unet, unchanged, config):
    model = make_unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
    if config.resblock is not None:
        for block in (*model.down_blocks, *model.up_blocks):
            block.resnets = torch.nn.ModuleList()
    with unchanged(model, r"plan: UNet2DConditionModel: expected at least one .* got none \(resblock=(set|None), "):
        inject(model, config)


CROSS = {"block_out_channels": (32,), "layers_per_block": 1, "cross_attention_dim": 8}
VIDEO_MODELS = {
    "UNet3DConditionModel": lambda: UNet3DConditionModel(
        **CROSS,
        down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",),
        attention_head_dim=8,
    ),
    "UNetMotionModel": lambda: UNetMotionModel(
        **CROSS,
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
        motion_num_attention_heads=2,
        num_attention_heads=2,
    ),
    "UNetSpatioTemporalConditionModel": lambda: UNetSpatioTemporalConditionModel(
        **CROSS,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        num_attention_heads=(2,),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    ),
    "AutoencoderKLTemporalDecoder": lambda: AutoencoderKLTemporalDecoder(block_out_channels=(32,), layers_per_block=1),
}


@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_video_models(unchanged, name):
    with torch.device("meta"):
        model = VIDEO_MODELS[name]()
    with unchanged(model, rf"plan: {name}: expected an image model, got a video model: '.+' is a .+; inject into the"):
        inject(model)


@pytest.mark.parametrize(
    "config", ["default", {"resblock": None}, TemporalResBlockConfig()], ids=lambda c: type(c).__name__
)
def test_configurations_of_another_kind(make_unet, unchanged, config):
    model = make_unet()
    match = rf"plan: config: expected a TemporalConfig or None, got a {type(config).__name__}; make one with"
    with unchanged(model, match):
        inject(model, config)
    with unchanged(model, match):
        plan(model, config)


def test_a_folder_in_place_of_the_model(make_unet, tmp_path):
    with pytest.raises(
        ValueError, match=r"from_pretrained: source: expected a folder, .* got a UNet2DConditionModel; the model"
    ):
        TemporalAdapter.from_pretrained(str(tmp_path), make_unet())


@pytest.mark.parametrize("flags", [True, [[True, False, False]] * 2], ids=["bool", "list"])
def test_flags_of_images_that_are_no_tensor(make_unet, flags):
    model = make_unet()
    inject(model)
    match = (
        r"UNet2DConditionModel: image_only: expected a tensor of shape \(2, 3\), .* got a (bool|list); make one with"
    )
    with pytest.raises(ValueError, match=match):
        model(torch.randn(2, 4, 3, 8, 8), 7, torch.randn(2, 3, 12), image_only=flags)


def test_unknown_modules_and_pipelines(make_unet, unchanged):
    part = make_unet().down_blocks[0]
    with unchanged(
        part,
        "a registered image model .*UNet2DConditionModel, .* got CrossAttnDownBlock2D; pass the UNet",
    ):
        inject(part)

    class Pipeline:
        unet = part

    with pytest.raises(
        ValueError, match=r"a registered image model .*UNet2DConditionModel, .* got Pipeline; .* pipe\.unet"
    ):
        plan(Pipeline())


def test_a_host_with_a_child_called_temporal(make_unet, unchanged):
    model = make_unet()
    model.mid_block.resnets[0].temporal = torch.nn.Identity()
    with unchanged(model, r"plan: mid_block\.resnets\.0: expected a ResnetBlock2D without an attribute 'temporal'"):
        inject(model)


@pytest.mark.parametrize("where", ["", "mid_block.resnets.0"])
def test_an_unknown_patched_forward(make_unet, unchanged, where):
    model = make_unet()
    module = model.get_submodule(where)
    module.forward = lambda *args, **kwargs: None
    who = where or "model"
    match = rf"{who}: (ResnetBlock2D|UNet2DConditionModel): expected the class's own forward, got a 'forward' patched"
    with unchanged(model, match):
        inject(model)
    del module.forward
    adapter = inject(model)
    module.forward = lambda *args, **kwargs: None
    with unchanged(model, match):
        adapter.remove()
    assert adapter.sites


def test_removing_after_something_else_changed_a_class(make_unet, unchanged):
    model = make_unet()
    adapter = inject(model)
    resnet = model.mid_block.resnets[0]
    resnet.__class__ = type("FSDPResnetBlock2D", (type(resnet),), {})  # what fully_shard does
    match = (
        r"mid_block\.resnets\.0: expected the class that injection gave it, got FSDPResnetBlock2D; something changed"
    )
    with unchanged(model, match):
        adapter.remove()


def test_options_that_do_not_fit_a_site_name_it(make_unet, unchanged):
    model = make_unet(block_out_channels=(12, 24), norm_num_groups=4, attention_head_dim=4)
    config = TemporalConfig(transformer=TemporalTransformerConfig(position="rotary"))
    with unchanged(
        model, r"inject: down_blocks\.0\.attentions\.0\.transformer_blocks\.0: .*head_dim: expected a .*even"
    ):
        inject(model, config)


@pytest.mark.parametrize("failing", [0, 3, 11])
def test_an_interruption_half_way_is_rolled_back(make_unet, fingerprint, monkeypatch, failing):
    model = make_unet()
    model.enable_gradient_checkpointing()
    before, calls, swap = fingerprint(model), [], attach_module.swap_class

    def interrupted(module, *swap_to):
        calls.append(module)
        if len(calls) > failing:
            raise KeyboardInterrupt
        swap(module, *swap_to)

    monkeypatch.setattr(attach_module, "swap_class", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inject(model)
    assert len(calls) == failing + 1
    assert fingerprint(model) == before
    monkeypatch.undo()
    assert len(inject(model).sites) == 12


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sample": (4, 8, 8)}, r"UNet2DConditionModel: expected clips \(batch, .* got shape \(4, 8, 8\)"),
        (
            {"image_only": (3, 2)},
            r"UNet2DConditionModel: image_only: expected shape \(2, 3\), .* got \(3, 2\); build it from",
        ),
        (
            {"image_only": (6,)},
            r"image_only: expected shape \(2, 3\), one flag for each frame of each clip, got \(6,\)",
        ),
        (
            {"sample": (2, 4, 8, 8), "image_only": (2, 1)},
            r"image_only: expected None for images, .* got shape \(2, 1\); pass clips as 5-D",
        ),
        (
            {"text": (3, 5, 12)},
            r"encoder_hidden_states: expected 2 \(clips\) or 6 \(clips times frames\) in front, got shape \(3, 5, 12\)",
        ),
        ({"text": (1, 5, 12)}, "encoder_hidden_states: .*; the image model would repeat it in silence or fail"),
        ({"timestep": (3, 2)}, r"timestep: expected \(2, 3\), one for each frame of each clip, got \(3, 2\)"),
        ({"timestep": (1, 3)}, r"timestep: expected \(2, 3\), .*; or pass \(\), \(1,\), \(2,\)"),
        ({"timestep": (4,)}, r"timestep: expected 2 \(clips\) or 6 \(clips times frames\) in front, got shape \(4,\)"),
        ({"class_labels": (1,)}, "class_labels: expected 2"),
        ({"added_cond_kwargs": {"time_ids": (5, 6)}}, r"added_cond_kwargs\['time_ids'\]: expected 2 .* shape \(5, 6\)"),
        (
            {"down_block_additional_residuals": [(2, 8, 8, 8), (1, 8, 8, 8)]},
            r"down_block_additional_residuals\[1\]: exp",
        ),
    ],
)
def test_wrong_arguments_of_a_call(make_unet, unchanged, arguments, match):
    model = make_unet()
    inject(model)
    shapes = {"sample": (2, 4, 3, 8, 8), "text": (2, 5, 12), "timestep": (), **arguments}

    def make(shape):
        if isinstance(shape, dict):
            return {key: make(value) for key, value in shape.items()}
        return [make(entry) for entry in shape] if isinstance(shape, list) else torch.ones(shape)

    values = {key: make(shape) for key, shape in shapes.items()}
    sample, timestep, text = values.pop("sample"), values.pop("timestep"), values.pop("text")
    with unchanged(model, match):
        model(sample, timestep, text, **values)


def test_a_batch_that_is_no_whole_number_of_clips(make_unet, unchanged):
    model = make_unet()
    adapter = inject(model)
    adapter.num_frames = 3
    with unchanged(model, "UNet2DConditionModel: expected a batch that is a multiple of num_frames=3 .* got 4 images"):
        model(torch.randn(4, 4, 8, 8), 7, torch.randn(4, 5, 12))


@pytest.mark.parametrize("value", [0, -2, 2.0, "2", True])
def test_wrong_num_frames(make_unet, value):
    adapter = inject(make_unet())
    with pytest.raises(ValueError, match=r"num_frames: expected a whole number of at least 1, or None for images, got"):
        adapter.num_frames = value
    assert adapter.num_frames is None


def test_wrong_decoder_input(make_vae, unchanged):
    model = make_vae()
    inject(model)
    with unchanged(model, r"AutoencoderKL: expected clips .* got shape \(4, 8, 8\)"):
        model.decode(torch.randn(4, 8, 8))


def test_plain_and_removed_models_have_no_adapter(make_unet):
    model = make_unet()
    with pytest.raises(ValueError, match="adapter_of: expected a model with temporal layers, got a plain UNet2DCond"):
        adapter_of(model)
    adapter = inject(model)
    adapter.remove()
    for use in (adapter.remove, adapter.freeze, adapter.state_dict, adapter.summary, lambda: adapter.sites):
        with pytest.raises(ValueError, match="got none: they were removed; call inject again"):
            use()
    with pytest.raises(ValueError, match="they were removed"), adapter.disabled():
        pass


def test_unknown_parameter_group(make_unet):
    adapter = inject(make_unet())
    with pytest.raises(ValueError, match="group: expected 'spatial', 'temporal', 'alpha' or None, got 'temporl'"):
        list(adapter.named_parameters("temporl"))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TemporalConfig(resblock=None, transformer=None), "expected resblock or transformer or both, got None"),
        (
            lambda: TemporalConfig(transformer_policy="after"),
            "transformer_policy: expected one of 'after_transformer_block', .* got 'after'",
        ),
        (
            lambda: TemporalConfig(transformer=TemporalTransformerConfig(in_norm="clip", projection=True)),
            "expected in_norm='none' with transformer_policy='after_transformer_block' .* got 'clip'; use 'after_att",
        ),
    ],
)
def test_wrong_configurations(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([], r"TemporalConfig: expected a dictionary, got \[\]"),
        ({"resblok": None}, "TemporalConfig: unknown key 'resblok', expected among .*; did you mean 'resblock'"),
        (
            {"zzz": None},
            "TemporalConfig: unknown key 'zzz', expected among resblock, transformer, .* rules$",
        ),
        ({"resblock": {"causal": "false"}}, "TemporalConfig.resblock.causal: expected true or false, got 'false'"),
        ({"resblock": {"causal": 1}}, "TemporalConfig.resblock.causal: expected true or false, got 1"),
        ({"resblock": {"num_convs": True}}, "resblock.num_convs: expected a whole number, got True"),
        ({"resblock": {"num_convs": 2.0}}, "resblock.num_convs: expected a whole number, got 2.0"),
        ({"resblock": {"num_convs": 0}}, "num_convs: expected a whole number of at least 1, got 0"),
        ({"resblock": {"alpha": None}}, "TemporalConfig.resblock.alpha: expected a dictionary, got None"),
        ({"resblock": {"alpha": {"init": "0.5"}}}, "resblock.alpha.init: expected a number, got '0.5'"),
        ({"transformer": {"position": 3}}, "transformer.position: expected a string, got 3"),
        ({"transformer": {"position": "sinus"}}, "position: expected one of .*, got 'sinus'"),
        ({"transformer": {"attentions": "self"}}, "transformer.attentions: expected a list, got 'self'"),
        ({"transformer": {"attentions": ["self", 1]}}, r"transformer.attentions\[1\]: expected a string, got 1"),
        ({"transformer": {"window": "8"}}, "transformer.window: expected a whole number, got '8'"),
    ],
)
def test_wrong_configuration_dictionaries(values, match):
    with pytest.raises(ValueError, match=match):
        TemporalConfig.from_dict(values)


def test_configuration_dictionaries_round_trip():
    config = TemporalConfig(
        resblock=TemporalResBlockConfig(num_convs=4, dropout=0.25, alpha=AlphaConfig(init=0, learned=False)),
        transformer=TemporalTransformerConfig(
            attentions=("self", "self"), window=8, alpha=AlphaConfig(shape="frame", num_frames=5)
        ),
        transformer_policy="after_attention",
    )
    assert TemporalConfig.from_dict(config.to_dict()) == config
    assert TemporalConfig.from_dict({}) == TemporalConfig()
    assert TemporalConfig.from_dict(TemporalConfig.for_decoder().to_dict()) == TemporalConfig.for_decoder()
