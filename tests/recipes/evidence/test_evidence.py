"""The table of comparisons: signs, seeds, and runs that are kept, missing or made with other settings."""

import dataclasses
import json

import pytest
import torch

from temporal_layers.recipes.evidence import command
from temporal_layers.recipes.evidence.command import EvidenceConfig, run_evidence, run_one, write_tables
from temporal_layers.recipes.evidence.comparisons import Comparison, arm_table, comparison_table, spread, verdict
from temporal_layers.recipes.evidence.corpus import Corpus, render_corpus
from temporal_layers.recipes.evidence.jobs import ATTENTION_ONLY, COMPARISONS, JOBS, Scale
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.stages.temporal import trainable_adapter

RESULTS = {
    "a": {0: {"frechet": 5.0, "psnr": 30.0}, 1: {"frechet": 7.0, "psnr": 31.0}},
    "b": {0: {"frechet": 4.0, "psnr": 29.0}, 1: {"frechet": 9.0, "psnr": 32.0}, 2: {"frechet": 1.0}},
}
TINY = Scale(steps=1, batch_size=1, sampling_steps=1)


def compare(**changes):
    options = {"question": "b or a", "without": "a", "with_it": "b", "paper": "yes", **changes}
    return Comparison(**options)


def test_gains_are_positive_where_the_arm_is_better_and_only_for_seeds_of_both():
    assert compare().gains(RESULTS) == {0: 1.0, 1: -2.0}
    assert compare(metric="psnr", higher=True).gains(RESULTS) == {0: -1.0, 1: 1.0}
    assert compare(without="none").gains(RESULTS) == {}


def test_verdicts_say_how_many_seeds_agree():
    assert verdict({0: 1.0, 1: 0.5}) == "yes, 2 of 2 seeds"
    assert verdict({0: -1.0, 1: 0.0}) == "**no**, 0 of 2 seeds"
    assert verdict({0: -1.0, 1: 0.1}) == "**not with every seed**, 1 of 2"


def test_spread_is_mean_and_sample_standard_deviation():
    assert spread([2.0, 4.0, 6.0]) == "4 ± 2" and spread([1.2345]) == "1.23"


def test_tables_hold_what_was_measured_and_leave_out_what_was_not():
    text = comparison_table([compare(), compare(without="none", question="never")], RESULTS)
    assert "| b or a | Fréchet distance ↓ | 6 ± 1.4 | 6.5 ± 3.5 | **not with every seed**, 1 of 2 | yes |" in text
    assert "never" not in text
    assert arm_table(RESULTS).splitlines()[2:] == [
        "| a | 2 | 6 ± 1.4 | 30.5 ± 0.71 |",
        "| b | 3 | 4.67 ± 4 | 30.5 ± 2.1 |",
    ]


def test_every_arm_of_a_comparison_comes_from_a_run():
    names = set(JOBS) | {"frame_by_frame", "real", "predict_guided", "predict_other_clip", "linear_blending"}
    names |= {"decoder_before", "decoder_noisy", "decoder_noisy_before", "upscale_frame_by_frame", "bilinear"}
    assert {arm for one in COMPARISONS for arm in (one.without, one.with_it)} <= names


def test_attention_alone_has_about_as_many_parameters_as_both():
    counts = []
    for temporal in (None, ATTENTION_ONLY):
        adapter = trainable_adapter(load_shipped().unet, temporal, "temporal")
        counts.append(sum(value.numel() for value in adapter.model.parameters() if value.requires_grad))
    assert counts == [3_224_994, 3_036_775]


def test_a_corpus_survives_its_file(tmp_path):
    corpus = render_corpus(train=1, held_out=1, num_frames=3)
    assert corpus.latents.shape == (1, 4, 3, 16, 24) and corpus.frames.shape == (1, 3, 3, 64, 96)
    assert corpus.real.shape == corpus.others.shape == (1, 3, 3, 64, 96)
    assert not torch.equal(corpus.real, corpus.others)
    corpus.save(tmp_path / "c.safetensors")
    again = Corpus.load(tmp_path / "c.safetensors")
    for field in dataclasses.fields(Corpus):
        value, back = getattr(corpus, field.name), getattr(again, field.name)
        torch.testing.assert_close(value, back, rtol=0, atol=0.5 / 255 if field.name in ("real", "others") else 0)


@pytest.fixture
def counting(monkeypatch):
    """A run that says which seed it got, in place of those that train."""
    monkeypatch.setitem(JOBS, "untrained", lambda corpus, scale, seed: {"real": {"frechet": float(seed)}})


def test_runs_are_written_whole_and_put_together(tmp_path, counting, monkeypatch):
    made = []

    def here(config, name, seed):
        made.append((name, seed))
        run_one(dataclasses.replace(config, run=name, seeds=(seed,)))
        return name, seed, 0.0

    monkeypatch.setattr(command, "_in_process", here)
    config = EvidenceConfig(out=tmp_path, only=("untrained",), seeds=(3, 5), train_clips=1, held_out=1, scale=TINY)
    text = run_evidence(config).read_text(encoding="utf-8")
    assert "| real | 2 | 4 ± 1.4 |" in text
    assert sorted(made) == [("untrained", 3), ("untrained", 5)]
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["results"]["real"] == {"3": {"frechet": 3.0}, "5": {"frechet": 5.0}}
    assert document["settings"]["steps"] == 1 and "torch" in document["versions"]
    (tmp_path / "untrained-3.json").unlink()
    run_evidence(config)
    assert made[2:] == [("untrained", 3)]  # the other is kept
    with pytest.raises(ValueError, match=r"run_evidence: expected the settings in .*settings\.json"):
        run_evidence(dataclasses.replace(config, scale=Scale(steps=2)))
    assert write_tables(tmp_path).read_text(encoding="utf-8") == text


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match=r"only: expected names among untrained, .*got 'vidoe'"):
        EvidenceConfig(only=("vidoe",))
    with pytest.raises(ValueError, match=r"expected a seed and a process at least, got seeds=\(\) and processes=2"):
        EvidenceConfig(seeds=())


@pytest.mark.slow
def test_the_command_runs_in_processes_of_its_own(tmp_path):
    config = EvidenceConfig(out=tmp_path, only=("video",), seeds=(0,), train_clips=2, held_out=16, scale=TINY)
    assert "| video | 1 |" in run_evidence(config).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "video-0.json").read_text())["seconds"] > 0
