"""The handle: groups of parameters, freezing, the printed table."""

import io

import pytest
import torch

from temporal_layers import AlphaConfig, TemporalConvConfig, TemporalResBlockConfig, TemporalTransformerConfig
from temporal_layers.adapters import TemporalConfig, adapter_of, inject

SUMMARY = """\
site                        layer                     channels  heads  text         alpha  parameters
-----------------------------------------------------------------------------------------------------
down_blocks.0.attentions.0  TemporalTransformerBlock         8    2x4    12         0.250         624
down_blocks.0.resnets.0     TemporalResBlock                 8      -     -  0.500..0.731         704
up_blocks.0.resnets.0       TemporalResBlock                 8      -     -         0.500         704
up_blocks.0.resnets.1       TemporalResBlock                 8      -     -         0.500         704
UNet2DConditionModel: 4 sites, 2,736 temporal parameters (of them 24 alpha), 9,436 spatial, 12,172 trainable
"""


@pytest.fixture
def adapter(make_unet):
    model = make_unet(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    config = TemporalConfig(
        resblock=TemporalResBlockConfig(alpha=AlphaConfig(shape="channel")),
        transformer=TemporalTransformerConfig(
            ff_in=False, ff=False, position="none", alpha=AlphaConfig(init=0.25, learned=False)
        ),
        transformer_policy="after_attention",
    )
    return inject(model, config)


def test_groups_are_disjoint_and_complete(adapter):
    groups = {name: dict(adapter.named_parameters(name)) for name in ("spatial", "temporal", "alpha")}
    assert [name for name, _ in adapter.named_parameters()] == [name for name, _ in adapter.model.named_parameters()]
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(dict(adapter.model.named_parameters()))
    assert set(groups["alpha"]) == {name for name in names if name.endswith(".blend.logit")}
    assert set(groups["temporal"]) == {name for name in names if ".temporal." in name} - set(groups["alpha"])


def test_optimiser_groups(adapter):
    groups = adapter.parameter_groups(lr=1e-4, alpha_lr=1e-2, weight_decay=0.1)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("temporal", 1e-4, 0.1),
        ("alpha", 1e-2, 0.0),
    ]
    groups = adapter.parameter_groups(lr=1e-4, spatial_lr=1e-6, weight_decay=0.1)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("temporal", 1e-4, 0.1),
        ("alpha", 1e-4, 0.0),
        ("spatial", 1e-6, 0.1),
    ]
    listed = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in listed} == {id(parameter) for parameter in adapter.model.parameters()}
    torch.optim.AdamW(groups)


def test_decay_does_not_move_alpha(adapter):
    logits = [parameter for _, parameter in adapter.named_parameters("alpha")]
    with torch.no_grad():
        for logit in logits:
            logit.fill_(3.0)
    groups = adapter.parameter_groups(lr=0.1, weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups)
    for parameter in adapter.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    temporal = groups[0]["params"][0]
    before = temporal.detach().clone()
    optimizer.step()
    assert all(torch.equal(logit, torch.full_like(logit, 3.0)) for logit in logits)
    torch.testing.assert_close(temporal.detach(), before * 0.95)


def test_empty_groups_are_left_out(make_unet):
    fixed = AlphaConfig(learned=False)
    config = TemporalConfig(resblock=TemporalResBlockConfig(alpha=fixed), transformer=None)
    assert [group["name"] for group in inject(make_unet(), config).parameter_groups(lr=1.0)] == ["temporal"]


def test_freeze_and_unfreeze_restore_what_was_trainable(adapter):
    adapter.model.conv_in.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in adapter.model.named_parameters()}
    assert adapter.freeze() is adapter
    adapter.freeze()  # a second time does not take the frozen state for the original one
    trainable = {name for name, parameter in adapter.model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in before if ".temporal." in name}
    assert adapter_of(adapter.model).unfreeze().model is adapter.model
    assert {name: parameter.requires_grad for name, parameter in adapter.model.named_parameters()} == before
    adapter.unfreeze()
    assert {name: parameter.requires_grad for name, parameter in adapter.model.named_parameters()} == before


def test_summary(adapter, capsys):
    with torch.no_grad():
        adapter.layers["down_blocks.0.resnets.0"].blend.logit[:, 3] = 1.0
    adapter.summary()
    assert capsys.readouterr().out == SUMMARY
    stream = io.StringIO()
    adapter.summary(stream)
    assert stream.getvalue() == SUMMARY


def test_summary_columns_line_up_and_add_up(make_unet):
    adapter = inject(make_unet())
    stream = io.StringIO()
    adapter.freeze().summary(stream)
    *table, total = stream.getvalue().splitlines()
    assert len({len(line) for line in table}) == 1
    counts = [int(line.split()[-1].replace(",", "")) for line in table[2:]]
    temporal = sum(p.numel() for name, p in adapter.model.named_parameters() if ".temporal." in name)
    assert sum(counts) == temporal
    assert total.endswith(f"{temporal:,} trainable")


KINDS = """\
site                     layer                     channels  heads  text  alpha  parameters
------------------------------------------------------------------------------------------
conv_in                 TemporalTransformerBlock         8    4x2     -  0.500         280
down_blocks.0.resnets.0 TemporalTransformerBlock         8    2x4     -  0.500         281
mid_block.attentions.0  TemporalTransformerBlock         8    2x4    12  0.500         625
conv_out                TemporalConv                     4      -     -      -          52
"""


def test_summary_of_layers_whose_heads_the_site_does_not_know(make_unet):
    plain = {"ff_in": False, "ff": False, "position": "none"}
    config = TemporalConfig(
        resblock=None,
        transformer=TemporalTransformerConfig(num_heads=2, **plain),
        transformer_policy="after_pair",
        conv_in=TemporalTransformerConfig(num_heads=4, alpha=AlphaConfig(learned=False), **plain),
        conv_out=TemporalConvConfig(),
        include=("conv_in", "conv_out", r"down_blocks.0.resnets.0", "mid_block"),
    )
    model = make_unet(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    adapter = inject(model, config)
    stream = io.StringIO()
    adapter.summary(stream)
    *rows, _ = stream.getvalue().splitlines()
    assert [row.split() for row in rows[2:]] == [line.split() for line in KINDS.splitlines()[2:]]
    adapter.scale = {"conv_out": 0.5}
    stream = io.StringIO()
    adapter.summary(stream)
    rows = [row.split() for row in stream.getvalue().splitlines()[:-1]]
    assert [row[-2] for row in rows[:1] + rows[2:]] == ["scale", "1", "1", "1", "0.5"]


def test_summary_on_meta_shows_the_start_of_alpha(make_unet):
    with torch.device("meta"):
        adapter = inject(make_unet())
    stream = io.StringIO()
    adapter.summary(stream)
    assert {line.split()[-2] for line in stream.getvalue().splitlines()[2:-1]} == {"0.500"}


def test_repr(adapter):
    assert repr(adapter) == "TemporalAdapter(UNet2DConditionModel, 4 sites)"
    inject(adapter.model, TemporalConfig(resblock=None), name="zoom")
    assert repr(adapter) == "TemporalAdapter(UNet2DConditionModel, 1 sites, 'zoom'; aside: 'default')"
    adapter.remove()
    assert repr(adapter) == "TemporalAdapter(UNet2DConditionModel, removed)"
