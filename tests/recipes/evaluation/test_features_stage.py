"""Stage "features": its samples, what reordering does to what is known, and a whole short run."""

import json
from dataclasses import replace

import pytest
import torch

from temporal_layers.recipes import cli
from temporal_layers.recipes.driving import LABELS, DrivingConfig, DrivingCorpus
from temporal_layers.recipes.evaluation.driving_network import ORDERS, DrivingNetwork, build_driving_network
from temporal_layers.recipes.evaluation.features_stage import (
    FeatureObjective,
    FeatureSamples,
    FeaturesConfig,
    degraded,
    measure_network,
    render_labelled,
    reordered,
    run_features_stage,
    train_features,
)
from temporal_layers.recipes.training.engine import OptimConfig

SMALL = DrivingConfig(height=32, width=32, fps=10.0)


@pytest.fixture(scope="module")
def clips():
    return render_labelled(DrivingCorpus(SMALL), 6, 5)


def test_labels_are_those_of_the_corpus(clips):
    clip = DrivingCorpus(SMALL).clip(4, 5)
    assert clips.labels[4] == clip.label
    speed, curvature, nearness = clips.motions[4].tolist()
    assert speed == pytest.approx(clip.speed / 10) and curvature == pytest.approx(100 * clip.curvature.mean().item())
    gaps = clip.lead_distance
    assert nearness == pytest.approx((10 / gaps).mean().item() if gaps.min() > 0 else 0.0)
    torch.testing.assert_close(clips.frames[4].float() / 255, clip.frames, atol=0.5 / 255 + 1e-6, rtol=0)
    assert (clips.motions[:, 2] == 0).any() and (clips.motions[:, 2] > 0).any()  # with and without a car ahead


def test_reordering_changes_what_it_should():
    frames = torch.arange(4.0).view(1, 4, 1, 1).expand(3, 4, 2, 2)
    motions, shuffle = torch.tensor([1.2, 0.3, 0.5]), torch.tensor([2, 0, 3, 1])
    found = {name: reordered(frames, motions, index, shuffle) for index, name in enumerate(ORDERS)}
    assert [clip[0, :, 0, 0].tolist() for clip, _ in found.values()] == [
        [0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [2, 2, 2, 2]
    ]  # fmt: skip
    assert found["forward"][1].tolist() == motions.tolist()
    assert found["backward"][1].tolist() == pytest.approx([-1.2, 0.3, 0.5])
    assert found["still"][1].tolist() == pytest.approx([0, 0.3, 0.5])
    assert found["shuffled"][1].isnan().all()


def test_samples_depend_on_seed_and_position_alone(clips):
    one, other = FeatureSamples(clips, seed=1), FeatureSamples(clips, seed=1)
    other(7)
    for ours, theirs in zip(one(3), other(3), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    drawn = [one(position) for position in range(200)]
    counts = torch.bincount(torch.stack([sample[2] for sample in drawn]), minlength=4)
    assert counts.min() > 20 and counts[0] > 60
    mirrored = [motions[1] for _, _, order, motions, _ in drawn if order == 0]
    assert min(mirrored) < 0 < max(mirrored)


def test_faults_are_what_was_done():
    frames, seen = torch.rand(3, 4, 32, 48), set()
    for seed in range(40):
        made, faults = degraded(frames, torch.Generator().manual_seed(seed))
        error, fine = (made - frames).square().mean().item() ** 0.5, made.diff(dim=-1).square().mean().item()
        noise, blur = faults.tolist()
        seen.add((noise > 0, blur > 0))
        if noise == blur == 0:
            assert torch.equal(made, frames)
        elif noise:
            assert 0.5 * noise / 10 < error < 1.02 * noise / 10  # less where it is cut off at 0 and 1
        elif blur > 0.5:
            assert fine < 0.7 * frames.diff(dim=-1).square().mean()
        assert made.min() >= 0 and made.max() <= 1 and 0 <= noise <= 2 and 0 <= blur < 2.6
    assert seen == {(False, False), (True, False), (False, True)}


def test_unknown_motion_costs_nothing():
    network = build_driving_network(len(LABELS), (32, 32))
    objective = FeatureObjective(network)
    frames, labels, orders = torch.rand(2, 3, 4, 32, 32), torch.tensor([0, 5]), torch.tensor([0, 2])
    motions = torch.tensor([[1.0, 0.5, 0.2], [torch.nan] * 3])
    faults = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    losses = objective(frames, labels, orders, motions, faults)
    expected = (network.motions(network(frames[:1])) - motions[:1]).square().sum()
    torch.testing.assert_close(losses["motion"], expected)
    torch.testing.assert_close(losses["loss"], losses["label"] + losses["order"] + losses["motion"] + losses["fault"])
    fault = (network.faults(network(frames)) - faults).square().sum() / 2
    torch.testing.assert_close(losses["fault"], fault)
    losses["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    nothing = objective(frames[1:], labels[1:], orders[1:], motions[1:], faults[1:])
    assert nothing["motion"] == 0


def test_training_lowers_the_loss(clips):
    network = build_driving_network(len(LABELS), (32, 32), seed=1)
    samples = FeatureSamples(clips, seed=5)
    batch = [torch.stack(column) for column in zip(*map(samples, range(24)), strict=True)]

    def loss():
        with torch.no_grad():
            return FeatureObjective(network)(*batch)["loss"].item()

    before = loss()
    history = train_features(network, clips, OptimConfig(steps=60, batch_size=4, lr=4e-3), progress=False)
    assert len(history) == 60 and loss() < 0.8 * before
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_a_run_leaves_a_network_and_its_measures(tmp_path, capsys):
    config = FeaturesConfig(
        out=tmp_path,
        clips=3,
        num_frames=3,
        driving=SMALL,
        optim=OptimConfig(steps=2, batch_size=2, lr=1e-3),
        held_out=4,
    )
    network = run_features_stage(config)
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"label accuracy", "order accuracy", "speed explained", "cpu_seconds", "loss"} <= result.keys()
    loaded = DrivingNetwork.from_pretrained(tmp_path / "model", torch_dtype=torch.float32).eval()
    frames = torch.rand(2, 3, 3, 32, 32)
    torch.testing.assert_close(loaded(frames), network(frames), rtol=2e-2, atol=2e-3)  # stored in half precision
    assert loaded.config.frame_size == [32, 32] or tuple(loaded.config.frame_size) == (32, 32)
    held = render_labelled(DrivingCorpus(SMALL), 4, 3, first=1 << 20)
    assert measure_network(network, held)["label accuracy"] == result["label accuracy"]


def test_refusals():
    with pytest.raises(ValueError, match=r"clips of at least 1, num_frames of at least 2.*got clips=0"):
        FeaturesConfig(clips=0)
    with pytest.raises(ValueError, match="num_frames=1"):
        replace(FeaturesConfig(), num_frames=1)


def test_the_command_is_there(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "features", "--print-config"])
    assert stop.value.code == 0 and "held_out" in capsys.readouterr().out
