"""Stage "motion-lora": objective, training of the LoRA alone, files, strengths, company of other LoRAs."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from temporal_layers.adapters import adapter_of, inject
from temporal_layers.recipes.bases import LabelBase, PipelineBase
from temporal_layers.recipes.cli import main as cli
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm
from temporal_layers.recipes.stages.clips import ClipsConfig, TensorClips, driving_clips, encode_clips
from temporal_layers.recipes.stages.dreambooth import LORA, train_dreambooth
from temporal_layers.recipes.stages.loras import (
    LORA_FILE,
    add_lora,
    load_lora,
    lora_parameters,
    lora_strengths,
    set_lora_strengths,
)
from temporal_layers.recipes.stages.motion_lora import (
    MotionLoraConfig,
    MotionObjective,
    ReversedClips,
    load_motion_lora,
    motion_targets,
    save_motion_lora,
    train_motion_lora,
    without_anchor,
)
from temporal_layers.recipes.stages.video import load_shipped_adapter
from temporal_layers.recipes.training.engine import OptimConfig

TINY = ImageLDMConfig(
    height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 32), num_heads=2, context_dim=8, num_tokens=2
)
FRAMES = 3
FAST = OptimConfig(steps=2, batch_size=1, lr=5e-2)
OPTIONS = {"num_frames": FRAMES, "rank": 2, "progress": False}


def randomised(unet):
    adapter = inject(unet)
    with torch.no_grad():
        for layer in adapter.layers.values():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return adapter


@pytest.fixture
def base():
    base = LabelBase(build_image_ldm(TINY, ("day", "night"), seed=0))
    randomised(base.unet)
    return base


def make_clips(base, count=1, frames=4):
    latents = torch.randn(count, base.latent_shape[0], frames, *base.latent_shape[1:])
    return TensorClips(latents, base.conditioning([0] * count, ["a road"] * count))


def plain_state(unet):
    """The weights beneath the LoRAs."""
    return {
        name.replace(".base_layer", ""): value.clone()
        for name, value in unet.state_dict().items()
        if ".lora_" not in name
    }


@pytest.fixture
def predict(base):
    clips = torch.randn(2, 4, FRAMES, *base.latent_shape[1:], generator=torch.Generator().manual_seed(3))

    def predict(one=base, noisy=clips):
        with torch.no_grad():
            return one.predict(noisy, torch.tensor([400]), {"labels": torch.tensor([0, 1])})

    return predict


# -- objective --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debias", [0.0, 1.0, 0.5])
def test_the_loss_and_that_without_an_anchor_written_out(base, debias):
    latents, noise = torch.randn(2, 2, 4, FRAMES, *base.latent_shape[1:])
    timesteps, labels, anchors = torch.tensor([100, 800]), torch.tensor([0, 1]), torch.tensor([2, 0])
    with torch.no_grad():
        losses = MotionObjective(base, ["labels"], debias=debias)(anchors, latents, noise, timesteps, labels)
        repeated = timesteps.repeat_interleave(FRAMES)
        fold = lambda clips: torch.stack([clip[:, f] for clip in clips for f in range(FRAMES)])  # noqa: E731
        noisy = base.scheduler.add_noise(fold(latents), fold(noise), repeated)
        target = base.scheduler.get_velocity(fold(latents), fold(noise), repeated)
        noisy = noisy.unflatten(0, (2, FRAMES)).transpose(1, 2)
        output = fold(base.unet(noisy, timesteps, base.ldm.conditioner(labels)).sample)
        total, motion = 0.0, 0.0
        for clip in range(2):
            anchor = clip * FRAMES + int(anchors[clip])
            for frame in range(clip * FRAMES, (clip + 1) * FRAMES):
                total += (output[frame] - target[frame]).square().mean() / 6
                scale = (debias**2 + 1) ** 0.5
                said = scale * output[frame] - debias * output[anchor]
                wanted = scale * target[frame] - debias * target[anchor]
                motion += (said - wanted).square().mean() / 6
    torch.testing.assert_close(losses["loss"], total + motion if debias else total, rtol=1e-4, atol=1e-5)
    assert ("motion" in losses) == bool(debias)


def test_what_frames_share_counts_less():
    moving, still = torch.randn(1, 2, 4, 3, 3), torch.randn(1, 2, 1, 3, 3).expand(1, 2, 4, 3, 3)
    anchors = torch.tensor([1])
    taken = without_anchor(still, anchors, 1.0)
    torch.testing.assert_close(taken, still * (2**0.5 - 1))
    assert without_anchor(moving, anchors, 1.0).square().mean() > 1.5 * moving.square().mean()


def test_reversed_clips():
    clips = TensorClips(torch.arange(10.0).reshape(1, 1, 10, 1, 1), {"labels": torch.tensor([3])})
    reverse = ReversedClips(clips)
    assert (len(reverse), reverse.num_frames(0), reverse.conditioning(0)["labels"].item()) == (1, 10, 3)
    assert reverse.latents(0).flatten().tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert reverse.latents(0, 2, 5).flatten().tolist() == [7, 6, 5]


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_learns_the_motion_of_one_clip():
    base, _ = load_shipped_adapter()
    clip = driving_clips(base.frame_size, 1, 4)[0]
    clips = ReversedClips(TensorClips(encode_clips(base, clip.frames[None]), base.conditioning([clip.label], [""])))
    config = OptimConfig(steps=20, batch_size=1, lr=1e-2, schedule="cosine", weight_decay=0.0)
    train_motion_lora(base, clips, config, num_frames=4, rank=8, progress=False)
    noise = torch.randn(6, *clips.latents(0).shape, generator=torch.Generator().manual_seed(1))
    given = (torch.zeros(6, dtype=torch.int64), clips.latents(0).expand_as(noise), noise, torch.arange(100, 1000, 150))
    objective = MotionObjective(base, ["labels"])
    with torch.no_grad():
        trained = objective(*given, torch.full((6,), clip.label))["loss"]
        set_lora_strengths(base.unet, {})
        untrained = objective(*given, torch.full((6,), clip.label))["loss"]
    assert trained < 0.94 * untrained


def test_training_leaves_everything_else_alone(base, predict):
    before, untrained = plain_state(base.unet), predict()
    flags = {name: parameter.requires_grad for name, parameter in base.unet.named_parameters()}
    assert all(flags.values())  # as after an injection: the temporal layers would be trained along
    train_motion_lora(base, make_clips(base), FAST, **OPTIONS)
    trained = predict()
    assert not torch.allclose(trained, untrained, atol=1e-2)
    set_lora_strengths(base.unet, {})
    torch.testing.assert_close(predict(), untrained, rtol=1e-5, atol=1e-6)
    set_lora_strengths(base.unet, {"motion": 1.0})
    assert torch.equal(predict(), trained)
    after = plain_state(base.unet)
    assert after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert not base.unet.training
    now = {n.replace(".base_layer", ""): p.requires_grad for n, p in base.unet.named_parameters() if ".lora_" not in n}
    assert now == flags and not any(parameter.requires_grad for parameter in lora_parameters(base.unet, "motion"))
    base.unet.delete_adapters("motion")
    base.unet.unload_lora()
    assert torch.equal(predict(), untrained) and plain_state(base.unet).keys() == base.unet.state_dict().keys()


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_every_target_is_trained_and_is_in_a_temporal_layer(base, targets):
    expected = {
        name
        for name, module in base.unet.named_modules()
        if ".temporal." in name
        and isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        and (targets == "all" or name.rpartition(".")[2] in ("to_q", "to_k", "to_v", "to_out"))
    }
    assert set(motion_targets(base.unet, targets)) == expected and len(expected) > 20
    train_motion_lora(base, make_clips(base), FAST, targets=targets, debias=1.0, **OPTIONS)
    ups = {
        name.partition(".lora_B")[0]: value
        for name, value in base.unet.state_dict().items()
        if ".lora_B.motion" in name
    }
    assert ups.keys() == expected and all(value.abs().max() > 0 for value in ups.values())
    assert set(motion_targets(base.unet, targets)) == expected  # with a LoRA on them, too


def test_training_repeats_with_its_seed(base):
    def run(seed):
        return train_motion_lora(copy.deepcopy(base), clips, FAST, seed=seed, debias=1.0, label_drop=0.5, **OPTIONS)

    clips = make_clips(base, count=2)
    assert run(0) == run(0) != run(1)


# -- files, strengths, company ----------------------------------------------------------------------------------------


def test_a_saved_lora_is_small_and_does_in_another_model_what_it_did(base, predict, tmp_path):
    untrained, twin = predict(), copy.deepcopy(base)
    train_motion_lora(base, make_clips(base), FAST, **OPTIONS)
    save_motion_lora(base.unet, tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    assert all(".temporal." in name and ".lora_" in name for name in tensors)
    assert len(tensors) == 2 * len(motion_targets(base.unet))
    load_motion_lora(twin.unet, tmp_path, name="pan")
    torch.testing.assert_close(predict(twin), predict(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predict(), untrained, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in lora_parameters(twin.unet, "pan"))


def test_the_strength_scales_the_change_of_the_weights(base, predict, tmp_path):
    plain, twin = copy.deepcopy(base), copy.deepcopy(base)
    train_motion_lora(base, make_clips(base), FAST, **OPTIONS)
    save_motion_lora(base.unet, tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    load_motion_lora(twin.unet, tmp_path, strength=0.5)
    for strength in (0.5, 0.0, -1.0):
        set_lora_strengths(twin.unet, {"motion": strength})
        assert lora_strengths(twin.unet) == {"motion": pytest.approx(strength)}
        merged = copy.deepcopy(plain)
        with torch.no_grad():
            for name in motion_targets(base.unet):
                up, down = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
                merged.unet.get_submodule(name).weight.add_(strength * up @ down)
        torch.testing.assert_close(predict(twin), predict(merged), rtol=1e-4, atol=1e-4)


def test_motions_and_looks_go_together_and_keep_their_strength(base, predict, tmp_path):
    """Two motions and a look, against the three changes added to the weights by hand."""
    merged, twin = copy.deepcopy(base), copy.deepcopy(base)
    frames = torch.rand(2, 3, 16, 24)
    train_dreambooth(base, frames, 1, config=FAST, lora_rank=2, train_text=False, progress=False)
    train_motion_lora(base, make_clips(base), FAST, name="pan", **OPTIONS)
    set_lora_strengths(base.unet, {LORA: 0.7, "pan": 0.5})
    train_motion_lora(base, make_clips(base), FAST, name="zoom", targets="all", **OPTIONS)
    assert lora_strengths(base.unet) == pytest.approx({LORA: 0.7, "pan": 0.5, "zoom": 1.0})
    for name in ("pan", "zoom", LORA):
        save_motion_lora(base.unet, tmp_path / name, name=name)
    with torch.no_grad():
        for name, strength in lora_strengths(base.unet).items():
            tensors = load_file(tmp_path / name / LORA_FILE)
            for layer in {key.rpartition(".lora_")[0] for key in tensors}:
                up, down = tensors[f"{layer}.lora_B.weight"], tensors[f"{layer}.lora_A.weight"]
                weight = merged.unet.get_submodule(layer).weight
                weight.add_((strength * up.flatten(1) @ down.flatten(1)).reshape(weight.shape))
    torch.testing.assert_close(predict(), predict(merged), rtol=1e-3, atol=1e-3)
    load_motion_lora(twin.unet, tmp_path / "zoom", name="zoom")
    load_lora(twin.unet, tmp_path / LORA, LORA, strength=0.7, prefix=None)
    load_motion_lora(twin.unet, tmp_path / "pan", name="pan", strength=0.5)
    torch.testing.assert_close(predict(twin), predict(), rtol=1e-4, atol=1e-4)
    with adapter_of(merged.unet).disabled(), adapter_of(base.unet).disabled():
        torch.testing.assert_close(predict(), predict(merged), rtol=1e-4, atol=1e-4)
    base.unet.delete_adapters("pan")
    assert lora_strengths(base.unet) == pytest.approx({LORA: 0.7, "zoom": 1.0})


def test_a_lora_that_is_off_stays_off_while_another_is_trained(base):
    train_motion_lora(base, make_clips(base), FAST, name="pan", **OPTIONS)
    set_lora_strengths(base.unet, {"pan": 0.0})
    assert lora_strengths(base.unet) == {"pan": 0.0}
    before = [parameter.clone() for parameter in lora_parameters(base.unet, "pan")]
    train_motion_lora(base, make_clips(base), FAST, name="zoom", **OPTIONS)
    assert lora_strengths(base.unet) == {"pan": 0.0, "zoom": 1.0}
    assert all(torch.equal(*pair) for pair in zip(before, lora_parameters(base.unet, "pan"), strict=True))


def test_a_stable_diffusion_gets_a_motion_lora(stable_diffusion, tmp_path):
    base = PipelineBase(stable_diffusion)
    randomised(base.unet)
    train_motion_lora(base, make_clips(base), FAST, **OPTIONS)
    save_motion_lora(base.unet, tmp_path)
    twin = PipelineBase(copy.deepcopy(stable_diffusion))
    twin.unet.delete_adapters("motion")
    twin.pipeline.unet.load_lora_adapter(tmp_path, prefix=None, weight_name=LORA_FILE)  # as diffusers does it
    noisy, steps, told = torch.randn(1, 4, FRAMES, 16, 16), torch.tensor([300]), base.conditioning([0], ["a road"])
    with torch.no_grad():
        expected = base.predict(noisy, steps, told)
        torch.testing.assert_close(twin.predict(noisy, steps, told), expected, rtol=1e-4, atol=1e-5)
        base.unet.disable_lora()
        assert not torch.allclose(base.predict(noisy, steps, told), expected, atol=1e-2)


# -- refusals and the command -----------------------------------------------------------------------------------------


def test_what_is_refused(base, tmp_path):
    plain = LabelBase(build_image_ldm(TINY, ("day",), seed=0))
    with pytest.raises(ValueError, match=r"motion LoRA: expected a UNet2DConditionModel with temporal layers, got one"):
        train_motion_lora(plain, make_clips(plain), FAST, **OPTIONS)
    with pytest.raises(ValueError, match=r"motion LoRA: expected a UNet2DConditionModel with temporal layers, got one"):
        load_motion_lora(plain.unet, tmp_path)
    with pytest.raises(ValueError, match=r"motion_targets: targets: expected 'attention' or 'all', got 'alpha'"):
        motion_targets(base.unet, "alpha")
    with pytest.raises(ValueError, match=r"train_motion_lora: clips: expected at least one, and all of at least 3"):
        train_motion_lora(base, make_clips(base, frames=2), FAST, **OPTIONS)
    with pytest.raises(
        ValueError, match=r"add_lora: targets: expected names of layers in the UNet2DConditionModel, go"
    ):
        add_lora(base.unet, "motion", [], rank=1)
    with pytest.raises(ValueError, match=r"set_lora_strengths: expected names among \[\], got \['pan'\]; load them"):
        set_lora_strengths(base.unet, {"pan": 1.0})
    train_motion_lora(base, make_clips(base), FAST, **OPTIONS)
    with pytest.raises(
        ValueError, match=r"LoRA: expected a new name, got 'motion', which is there; choose another, or"
    ):
        train_motion_lora(base, make_clips(base), FAST, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"expected rank of at least 1 and num_frames of at least 2, got rank=0 and num_frames=16"),
        (
            {"debias": -1.0},
            r"expected debias of at least 0 and label_drop from 0 to 1, got debias=-1\.0 and label_drop",
        ),
        ({"clips": ClipsConfig(model="x")}, r"expected adapter, the temporal layers for clips\.model='x', got none"),
        (
            {"clips": ClipsConfig(latents="streamed")},
            r"clips\.latents: expected 'cached' for a few clips, got 'streamed'",
        ),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=f"MotionLoraConfig: {message}"):
        MotionLoraConfig(**options)


def test_the_command(tmp_path):
    words = ["train", "motion-lora", "--out", str(tmp_path), "--num-frames", "4", "--rank", "2", "--reverse"]
    words += ["--clips.data.clips", "1", "--clips.data.clip-frames", "4", "--optim.steps", "1", "--debias", "1"]
    assert cli(words) == 0
    assert (tmp_path / "lora" / LORA_FILE).stat().st_size < 500_000
    assert {"config.json", "versions.json", "result.json", "losses.jsonl"} <= {path.name for path in tmp_path.iterdir()}
    assert "motion" in json.loads((tmp_path / "losses.jsonl").read_text().splitlines()[0])
