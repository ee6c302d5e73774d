"""Which sites the options of TemporalConfig pick, against lists written out by hand."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from temporal_layers import (
    TemporalConv,
    TemporalConvConfig,
    TemporalResBlockConfig,
    TemporalTransformerBlock,
    TemporalTransformerConfig,
)
from temporal_layers.adapters import (
    SiteRule,
    TemporalConfig,
    inject,
    plan,
    register_attention,
    register_model,
    register_resnet,
)
from temporal_layers.adapters.registry import HOSTS, MODELS

HEADS = TemporalTransformerConfig(num_heads=2)
RESNETS = [
    "down_blocks.0.resnets.0",
    "down_blocks.1.resnets.0",
    "up_blocks.0.resnets.0",
    "up_blocks.0.resnets.1",
    "up_blocks.1.resnets.0",
    "up_blocks.1.resnets.1",
    "mid_block.resnets.0",
    "mid_block.resnets.1",
]
ATTENTIONS = [
    "down_blocks.0.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
    "mid_block.attentions.0",
]


def names(model, **options):
    return {site.name for site in plan(model, TemporalConfig(**options))}


def test_every_policy_picks_its_sites(make_unet):
    model = make_unet()
    blocks = {f"{name}.transformer_blocks.0" for name in ATTENTIONS}
    assert names(model) == {*RESNETS, *blocks}
    assert names(model, transformer=None) == set(RESNETS)
    assert names(model, resblock=None) == blocks
    assert names(model, transformer_policy="after_attention") == {*RESNETS, *ATTENTIONS}
    alone = {"resblock": None, "transformer": HEADS}
    assert names(model, transformer_policy="after_resnet", **alone) == set(RESNETS)
    # AnimateDiff: behind the attentions; in blocks that have none, behind the residual blocks.
    without = {"down_blocks.1.resnets.0", "up_blocks.0.resnets.0", "up_blocks.0.resnets.1"}
    assert names(model, transformer_policy="after_pair", **alone) == {*ATTENTIONS, *without}


def test_pairs_are_those_of_the_video_model_of_animatediff(make_unet):
    from diffusers import UNetMotionModel

    motion = UNetMotionModel(
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12, layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_num_attention_heads=2,
        num_attention_heads=2,
    )  # fmt: skip
    # motion_modules.N stands behind attentions.N, or behind resnets.N in a block without attentions.
    modules = {name for name, _ in motion.named_modules() if name.split(".")[-2:-1] == ["motion_modules"]}
    pairs = names(make_unet(), transformer_policy="after_pair", resblock=None, transformer=HEADS)
    assert {
        name.replace("resnets", "motion_modules").replace("attentions", "motion_modules") for name in pairs
    } == modules


def test_layers_behind_residual_blocks_need_heads_of_their_own(make_unet, fingerprint):
    model = make_unet()
    before = fingerprint(model)
    config = TemporalConfig(resblock=None, transformer_policy="after_resnet")
    with pytest.raises(
        ValueError, match=r"inject: down_blocks\.0\.resnets\.0: .*num_heads: .*got None in both; set num_h"
    ):
        inject(model, config)
    assert fingerprint(model) == before


def test_patterns_include_and_exclude(make_unet):
    model = make_unet()
    assert names(model, include=("mid_block",)) == {
        "mid_block.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0.transformer_blocks.0",
    }  # fmt: skip
    assert names(model, include=("^down", r"resnets\.1"), exclude=("attentions", "mid")) == {
        "down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "up_blocks.0.resnets.1", "up_blocks.1.resnets.1",
    }  # fmt: skip
    for option in ("include", "exclude"):
        with pytest.raises(
            ValueError, match="a pattern that is found in the name of a site, got 'middle', which is in"
        ):
            plan(model, TemporalConfig(**{option: ("middle",)}))
    with pytest.raises(ValueError, match="got 'middle'"):
        plan(model, TemporalConfig(rules=(SiteRule(pattern="middle", transformer=HEADS),)))
    with pytest.raises(ValueError, match="expected at least one residual block or attention"):
        plan(model, TemporalConfig(include=("mid",), exclude=("_block",)))


def test_rules_set_options_for_some_sites(make_unet):
    wide, narrow = TemporalResBlockConfig(kernel_size=5), TemporalResBlockConfig(num_convs=1)
    config = TemporalConfig(
        rules=(
            SiteRule(pattern="mid_block", resblock=wide),
            SiteRule(pattern="block", resblock=narrow, transformer=HEADS),
        )
    )
    layers = inject(make_unet(), config).layers
    for name, layer in layers.items():
        if "resnets" in name:
            assert layer.config == (wide if "mid" in name else narrow)
        else:
            assert layer.config == HEADS  # the rule for the middle says nothing of transformers
    assert TemporalConfig.from_dict(config.to_dict()) == config


def test_extra_layers_behind_the_first_and_the_last_convolution(make_unet, make_vae, randomise):
    model = make_unet()
    clips, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 3, 12)
    images = clips.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        expected = model(images, 7, text.repeat_interleave(3, 0)).sample
    config = TemporalConfig(
        resblock=None,
        transformer=None,
        conv_in=TemporalTransformerConfig(attentions=("self", "self"), projection=True, num_heads=2, head_dim=6),
        conv_out=TemporalConvConfig(),
    )
    adapter = inject(model, config)
    assert [(site.name, site.kind) for site in adapter.sites] == [("conv_in", "conv_in"), ("conv_out", "conv_out")]
    first, last = adapter.layers.values()
    assert isinstance(first, TemporalTransformerBlock)
    assert first.proj_in.out_features == 12
    assert isinstance(last, TemporalConv)
    with torch.no_grad():
        assert torch.equal(model(clips, 7, text).sample.transpose(1, 2).flatten(0, 1), expected)
        randomise(adapter)
        out = model(clips, 7, text).sample
        # What an ordinary 3-D convolution makes of the image model's output, the first layer switched off.
        adapter.layers["conv_in"].proj_out.weight.zero_()
        adapter.layers["conv_in"].proj_out.bias.zero_()
        weight = last.conv.weight.unsqueeze(-1)
        folded = expected.unflatten(0, (2, 3)).transpose(1, 2)
        by_hand = nn.functional.conv3d(folded, weight, last.conv.bias, padding=(1, 0, 0))
        torch.testing.assert_close(model(clips, 7, text).sample, by_hand, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, by_hand, atol=1e-3)
    vae = make_vae()
    decoder = inject(vae, TemporalConfig(transformer=None, conv_out=TemporalConvConfig()))
    assert decoder.sites[-1].name == "decoder.conv_out"


def test_a_missing_convolution_is_an_error():
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        model = AutoencoderDC(
            in_channels=3, latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(0, 1), decoder_layers_per_block=(0, 1), attention_head_dim=4,
            encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
        )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"decoder\.conv_out: expected a 2-D convolution .* got DCUpBlock2d; leave conv_o"
    ):
        plan(model, TemporalConfig(conv_out=TemporalConvConfig()))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: SiteRule(pattern="a"),
            "SiteRule: expected resblock or transformer or both, got None for both; to leave",
        ),
        (
            lambda: SiteRule(pattern="(", resblock=TemporalResBlockConfig()),
            r"SiteRule.pattern: expected a regular expr",
        ),
        (
            lambda: TemporalConfig(include=("[",)),
            r"TemporalConfig.include\[0\]: expected a regular expression, got '\['",
        ),
        (lambda: TemporalConfig(exclude="mid"), "TemporalConfig.exclude: expected a tuple, got the string 'mid'"),
        (
            lambda: TemporalConfig(transformer_policy="after_pair"),
            "TemporalConfig.resblock: expected None with transformer_policy='after_pair', .* one temporal layer",
        ),
        (lambda: TemporalTransformerConfig(num_heads=0), "num_heads: expected a whole number of at least 1, got 0"),
        (
            lambda: TemporalTransformerBlock(10, config=TemporalTransformerConfig(head_dim=4)),
            "TemporalTransformerConfig.head_dim: expected a divisor of dim=10, got 4; set num_heads as well",
        ),
        (lambda: TemporalConvConfig(kernel_size=2), "TemporalConvConfig.kernel_size: expected an odd number, got 2"),
        (
            lambda: TemporalConv(4)(torch.zeros(2, 3, 1, 1), num_frames=2),
            r"TemporalConv: .* 4, height, width\), got \(2, 3",
        ),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_options_of_heads_take_precedence():
    config = TemporalTransformerConfig(head_dim=4)
    assert TemporalTransformerBlock(8, num_heads=8, config=config).attentions[0].num_heads == 2
    block = TemporalTransformerBlock(8, num_heads=8, config=TemporalTransformerConfig(num_heads=3, head_dim=5))
    assert (block.attentions[0].num_heads, block.attentions[0].head_dim) == (3, 5)


class Block(nn.Module):
    """A residual block of a user's own, with a timestep embedding."""

    def __init__(self):
        super().__init__()
        self.conv, self.embed = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x, when):
        return x + self.conv(x) + self.embed(when)[..., None, None]


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x, *, words=None):
        return x + self.lin(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + words.mean((1, 2))[:, None, None, None]


class OwnUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.mixer = Block(), Mixer()

    def forward(self, sample, when, words):
        return (self.mixer(self.block(sample, when.float()[:, None].expand(-1, 6)), words=words),)


@pytest.fixture
def registered():
    before = dict(HOSTS), dict(MODELS)
    register_model(OwnUNet)
    register_resnet(Block, channels="conv.out_channels", temb="when", temb_channels="embed.in_features")
    register_attention(
        "Mixer", channels=lambda mixer: mixer.lin.out_features, num_heads=2, context="words", context_dim=5
    )
    yield
    for entries, old in zip((HOSTS, MODELS), before, strict=True):
        entries.clear()
        entries.update(old)


def test_own_classes_in_three_lines(registered, randomise):
    model = OwnUNet()
    adapter = inject(model)
    resnet, attention = adapter.sites
    assert (resnet.channels, resnet.temb_channels, resnet.num_groups) == (4, 6, 4)
    assert (attention.channels, attention.num_heads, attention.head_dim, attention.context_dim) == (4, 2, 2, 5)
    clips, when, words = torch.randn(2, 4, 3, 6, 5), torch.tensor([1, 2]), torch.randn(2, 7, 5)
    with torch.no_grad():
        randomise(adapter)
        (out,) = model(clips, when, words)
        assert out.shape == clips.shape
        # The layers get the embedding and the text: called by hand, they give the same.
        images = clips.transpose(1, 2).flatten(0, 1)
        temb = when.float()[:, None].expand(-1, 6).repeat_interleave(3, 0)
        hidden = Block.forward(model.block, images, temb)
        hidden = adapter.layers["block"](hidden, temb, num_frames=3)
        hidden = Mixer.forward(model.mixer, hidden, words=words.repeat_interleave(3, 0))
        hidden = adapter.layers["mixer"](hidden, words, num_frames=3)
    torch.testing.assert_close(out, hidden.unflatten(0, (2, 3)).transpose(1, 2))


@dataclass
class Output:
    sample: torch.Tensor


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, "more"), Output], ids=["tensor", "tuple", "attribute"])
def test_what_own_models_may_be_called_with_and_return(registered, randomise, fold, wrap):
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, noisy, *maps, when=None):
            return wrap(self.block(noisy + sum(maps), when))

    def result_of(output):
        return output.sample if isinstance(output, Output) else output[0] if isinstance(output, tuple) else output

    register_model(Denoiser)
    model, clips, when = Denoiser(), torch.randn(2, 4, 3, 6, 5), torch.randn(2, 6)
    maps, single = torch.randn(2, 2, 4, 3, 6, 5), torch.randn(2, 4, 6, 5)
    with torch.no_grad():
        folded = (*map(fold, (clips, *maps)), single.repeat_interleave(3, 0))
        expected = result_of(model(*folded, when=when.repeat_interleave(3, 0)))
        inject(model)
        found = result_of(model(clips, *maps, single, when=when))
        by_name = result_of(model(noisy=clips, when=when))
    assert torch.equal(fold(found), expected)
    assert by_name.shape == clips.shape


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,)], ids=["tensor", "tuple"])
def test_what_own_autoencoders_may_return(registered, fold, wrap):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, latents):
            return self.block(latents, torch.zeros(len(latents), 6))

    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Decoder()

        def encode(self, pixels):
            return wrap(pixels / 2)

        def decode(self, latents):
            return wrap(self.decoder(latents))

        def forward(self, pixels):
            return pixels

    register_model(Autoencoder, family="autoencoder", part="decoder")
    model, clips = Autoencoder(), torch.randn(2, 4, 3, 6, 5)
    with torch.no_grad():
        expected = model.decode(fold(clips))
        inject(model)
        found, latents = model.decode(clips), model.encode(clips)
    if isinstance(found, tuple):
        (expected,), (found,), (latents,) = expected, found, latents
    assert torch.equal(fold(found), expected) and torch.equal(latents, clips / 2)


def test_an_own_model_that_returns_something_else(registered):
    class Wordy(OwnUNet):
        def forward(self, sample, when, words):
            return {"prediction": super().forward(sample, when, words)[0]}

    model = Wordy()
    inject(model)
    with pytest.raises(ValueError, match=r"Wordy: expected a model that returns a tensor, .* got a dict; return one"):
        model(torch.randn(2, 4, 3, 6, 5), torch.tensor([1, 2]), torch.randn(2, 7, 5))


@pytest.mark.parametrize(
    ("register", "match"),
    [
        (
            lambda: register_model("UNet2DModel"),
            "register_model: UNet2DModel: expected a class that is not registered yet",
        ),
        (
            lambda: register_model("A", family="vae"),
            "register_model: family: expected one of 'unet', 'autoencoder', got",
        ),
        (
            lambda: register_resnet(3, channels=4),
            r"register_resnet: cls: expected a class or its name, got 3; pass type\(",
        ),
        (
            lambda: register_resnet("A", channels=4, temb="t"),
            "register_resnet: temb_channels: expected a value together with temb, got None; pass both or neither",
        ),
        (
            lambda: register_attention("A", channels=4, num_heads=1, context_dim=4),
            "register_attention: context: expected a value together with context_dim, got None",
        ),
    ],
)
def test_bad_registrations(register, match):
    with pytest.raises(ValueError, match=match):
        register()
    assert "A" not in HOSTS
    assert "A" not in MODELS


def test_registrations_that_do_not_fit_the_class(registered, fingerprint):
    HOSTS[Block] = type(HOSTS[Block])(kind="resnet", channels="convolution.out_channels")
    with pytest.raises(ValueError, match="plan: block: expected a Block with the attributes of its registration, got"):
        plan(OwnUNet())
    HOSTS[Block] = type(HOSTS[Block])(kind="resnet", channels=4, temb="time", temb_channels=6)
    model = OwnUNet()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"Block: expected a forward with the argument 'time', .* got x, when"):
        inject(model)
    assert fingerprint(model) == before
    MODELS[OwnUNet] = type(MODELS[OwnUNet])(family="unet", part="decoder")
    with pytest.raises(
        ValueError, match="plan: OwnUNet: expected a child 'decoder', as its registration says, got none"
    ):
        plan(model)


def test_subclasses_count(make_unet):
    class Mine(UNet2DConditionModel):
        pass

    model = make_unet()
    model.__class__ = Mine
    assert names(model) == names(make_unet())
