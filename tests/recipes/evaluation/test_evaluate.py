"""Whole evaluations of small sets: numbers as from their formulas, caching, refusals before any work."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import DataConfig, make_source
from temporal_layers.recipes.evaluation import evaluate as module
from temporal_layers.recipes.evaluation.evaluate import Options, evaluate
from temporal_layers.recipes.evaluation.networks import FeatureNetwork, NetworkConfig
from temporal_layers.recipes.evaluation.presets import NEED_NETWORK, PRESETS, Measure, Preset
from temporal_layers.recipes.evaluation.sets import ClipSet, SamplingPlan
from temporal_layers.recipes.metrics import frame_difference, warp_error

NET = NetworkConfig(kind="torchscript", name="pooled")
FRAMES = replace(NET, reads="frames")
FVD = Preset(
    about="",
    measures=(Measure(kind="frechet", network=NET), Measure(kind="kernel", network=NET)),
    samples=12,
    num_frames=4,
)


def source_of(folder):
    return make_source(DataConfig(path=str(folder), caption=""))


def options(networks, **others):
    return Options(batch_size=5, loader=LoaderConfig(workers=0), networks=networks, **others)


def pixels(folder, samples=12, seed=0):
    plan = SamplingPlan(samples=samples, num_frames=4, fps=None, size=(16, 24), seed=seed)
    clips = ClipSet("real", source_of(folder), plan)
    [batch] = clips.batches(batch_size=samples, loader=LoaderConfig(workers=0))
    return batch.frames.float() / 255


def test_distances_are_those_of_the_features(folders, pooled):
    found = evaluate(*map(source_of, folders), FVD, options=options({NET: pooled}))
    x, y = (pooled(pixels(folder)).numpy() for folder in folders)
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root)
    assert found["FVD[pooled]"].value == pytest.approx(expected, rel=1e-6)
    assert found["FVD[pooled]"].samples == found["FVD[pooled]"].real_samples == 12
    assert found["KVD[pooled]"].network == pooled.identity
    with pytest.raises(KeyError, match="FVD"):
        found["FVD"]


def test_a_result_says_what_it_depends_on(folders, pooled):
    found = evaluate(*map(source_of, folders), FVD, seed=3, options=options({NET: pooled})).as_dict()
    plain = json.loads(json.dumps(found))
    assert plain["sampling"]["size"] == [16, 24] and plain["sampling"]["num_frames"] == 4
    assert plain["sampling"]["samples"] == 12 and plain["sampling"]["seed"] == 3
    assert plain["fps"] == {"generated": pytest.approx(10), "real": pytest.approx(10)}
    assert plain["digests"]["generated"] != plain["digests"]["real"]
    assert plain["version"] and plain["measures"][0]["network"]["digest"] == "none"


def test_a_set_is_at_no_distance_from_itself(folders, pooled):
    source = source_of(folders[0])
    found = evaluate(source, source, FVD, options=options({NET: pooled}))
    assert found["FVD[pooled]"].value == pytest.approx(0, abs=1e-9)


def test_scores_of_one_set_come_with_those_of_the_real_one(folders):
    preset = Preset(
        about="", measures=(Measure(kind="warp_error"), Measure(kind="frame_difference")), samples=12, num_frames=4
    )
    found = evaluate(*map(source_of, folders), preset, options=options({}))
    for name, function in (("warp error", warp_error), ("frame difference", frame_difference)):
        assert found[name].value == pytest.approx(function(pixels(folders[0])), rel=1e-5)
        assert found[name].real == pytest.approx(function(pixels(folders[1])), rel=1e-5)
        assert found[name].spread > 0
    alone = evaluate(source_of(folders[0]), None, preset, options=options({}))
    assert alone["warp error"].value == pytest.approx(found["warp error"].value)
    assert alone["warp error"].real is None


def frame_network(**others):
    return FeatureNetwork(
        name="frames", digest="none", module=lambda f: f.double().mean((2, 3)), reads="frames", **others
    )


def test_frame_features_give_fid_and_consistency(folders):
    preset = Preset(
        about="",
        measures=(Measure(kind="frechet", network=FRAMES), Measure(kind="consistency", network=FRAMES)),
        samples=12,
        num_frames=4,
    )
    found = evaluate(*map(source_of, folders), preset, options=options({FRAMES: frame_network()}))
    assert found["FID[frames]"].samples == 48
    means = pixels(folders[0]).mean((3, 4)).transpose(1, 2)
    cosine = torch.nn.functional.cosine_similarity(means[:, :-1], means[:, 1:], dim=2)
    assert found["frame consistency[frames]"].value == pytest.approx(cosine.mean().item(), rel=1e-5)
    assert found["frame consistency[frames]"].samples == 12


def test_clipsim_is_the_mean_cosine_of_captions_and_frames(tmp_path, helpers):
    clips = helpers.make_clips(3)
    folder = helpers.write_set(tmp_path, clips, captions=["red", "green", "blue"])
    axes = torch.eye(3, dtype=torch.float64)
    network = frame_network(embed_text=lambda texts: axes[[["red", "green", "blue"].index(text) for text in texts]])
    preset = Preset(about="", measures=(Measure(kind="text", network=FRAMES),), samples=3, num_frames=4)
    found = evaluate(source_of(folder), source_of(folder), preset, options=options({FRAMES: network}))[
        "CLIPSIM[frames]"
    ]
    means = pixels(folder, samples=3).mean((3, 4))
    plan = SamplingPlan(samples=3, num_frames=4, fps=None, size=(16, 24))
    items = [ClipSet("generated", source_of(folder), plan).item(place) for place in range(3)]
    cosines = [(means[place, item] / means[place].norm(dim=0)).mean() for place, item in enumerate(items)]
    assert found.value == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-5)
    assert found.real is None and found.real_samples is None


def test_text_and_consistency_refuse_what_they_cannot_use(folders, pooled):
    def run(measure, networks):
        preset = Preset(about="", measures=(measure,), samples=12, num_frames=4)
        evaluate(source_of(folders[0]), None, preset, options=options(networks))

    text = Measure(kind="text", network=FRAMES)
    with pytest.raises(ValueError, match="text: expected a network that embeds texts as well, got frames"):
        run(text, {FRAMES: frame_network()})
    with pytest.raises(ValueError, match=r"expected a caption for each generated video.*NAME.txt"):
        run(text, {FRAMES: frame_network(embed_text=lambda texts: None)})
    with pytest.raises(ValueError, match=r"consistency: expected a network that reads frames.*got one row a clip"):
        run(Measure(kind="consistency", network=NET), {NET: pooled})


def test_pairs_are_compared_by_name(folders, tmp_path, helpers):
    decoded = helpers.write_set(tmp_path / "decoded", helpers.make_clips(14, seed=1))
    preset = replace(PRESETS["reconstruction"], samples=14, num_frames=4)
    found = evaluate(source_of(decoded), source_of(folders[0]), preset, options=options({}))
    assert found["PSNR"].value == pytest.approx(100) and found["PSNR"].samples == 14
    assert found["SSIM"].value == pytest.approx(1) and found["flicker"].value == 0
    worse = evaluate(source_of(folders[1]), source_of(folders[0]), replace(preset, samples=13), options=options({}))
    assert worse["PSNR"].value < 30 and worse["SSIM"].value < 1


def test_real_statistics_are_read_only_once(folders, pooled, tmp_path, monkeypatch):
    read = []
    batches = ClipSet.batches
    monkeypatch.setattr(ClipSet, "batches", lambda self, **given: read.append(self.name) or batches(self, **given))
    generated, real = map(source_of, folders)
    given = options({NET: pooled}, cache=tmp_path / "cache")
    first = evaluate(generated, real, FVD, options=given)
    assert read == ["generated", "real"]
    again = evaluate(generated, real, FVD, options=given)
    assert read == ["generated", "real", "generated"]
    assert again == first
    evaluate(generated, real, FVD, seed=1, options=given)
    evaluate(generated, real, FVD, size=(8, 8), options=given)
    evaluate(generated, real, FVD, options=replace(given, networks={NET: replace(pooled, digest="other")}))
    evaluate(generated, real, replace(FVD, measures=FVD.measures[:1]), options=given)
    assert read.count("real") == 5


def test_what_must_fail_fails_before_videos_are_read(folders, pooled, monkeypatch):
    monkeypatch.setattr(module, "_batches", None)
    generated, real = map(source_of, folders)
    with pytest.raises(ValueError, match="real: expected a set to compare with, got none"):
        evaluate(generated, None, FVD, options=options({NET: pooled}))
    with pytest.raises(ValueError, match="frechet: pooled: expected more samples than the 6 features, got 6"):
        evaluate(generated, real, replace(FVD, samples=6), options=options({NET: pooled}))
    scores = Preset(about="", measures=(Measure(kind="inception", network=NET),), samples=12, num_frames=4)
    with pytest.raises(ValueError, match=r"inception_score: expected at least 6 samples.*got 12 in all"):
        evaluate(generated, None, scores, options=options({NET: pooled}))
    with pytest.raises(ValueError, match="real: expected at least 14 videos for 14 samples"):
        evaluate(generated, real, replace(FVD, samples=14), options=options({NET: pooled}))


def test_presets_hold_together():
    for name, preset in PRESETS.items():
        assert preset.about, name
        for measure in preset.measures:
            assert (measure.network is not None) == (measure.kind in NEED_NETWORK)
    assert PRESETS["rds-fvd"].samples == 2048 and PRESETS["rds-fvd"].fps == 30 and PRESETS["rds-fvd"].num_frames == 16
    assert PRESETS["ucf101-fvd"].samples == PRESETS["fid-10k"].samples == 10_000
    assert PRESETS["msrvtt-clipsim"].samples * PRESETS["msrvtt-clipsim"].num_frames == 47_840


def test_descriptions_are_checked():
    with pytest.raises(ValueError, match=r"kind: expected one of frechet, kernel.*got 'fvd'"):
        Measure(kind="fvd")
    with pytest.raises(ValueError, match="frechet: expected a network, got None"):
        Measure(kind="frechet")
    with pytest.raises(ValueError, match="psnr: expected no network"):
        Measure(kind="psnr", network=NET)
    with pytest.raises(ValueError, match="either all of them or none to compare pairs"):
        Preset(about="", measures=(Measure(kind="psnr"), Measure(kind="warp_error")), samples=1, num_frames=2)
    with pytest.raises(ValueError, match=r"samples, num_frames and per_video of at least 1.*got samples=0"):
        Preset(about="", measures=(Measure(kind="psnr"),), samples=0, num_frames=2)
