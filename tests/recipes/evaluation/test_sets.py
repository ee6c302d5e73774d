"""Which clips of a set are taken, shard by shard, and the hash that tells sets apart."""

import tarfile
from dataclasses import replace

import pytest
import torch

from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import DataConfig, make_source
from temporal_layers.recipes.driving import DrivingConfig, DrivingCorpus
from temporal_layers.recipes.evaluation.sets import ClipSet, SamplingPlan, check_pairs

HERE = LoaderConfig(workers=0)
PLAN = SamplingPlan(samples=10, num_frames=4, fps=None, size=(16, 24))


def source_of(folder):
    return make_source(DataConfig(path=str(folder), caption=""))


def clips_of(plan, folder):
    return ClipSet("real", source_of(folder), plan)


def read(clips, **shard):
    batches = list(clips.batches(batch_size=3, loader=HERE, **shard))
    return torch.cat([batch.places for batch in batches]), torch.cat([batch.frames for batch in batches])


def test_every_video_is_taken_at_most_once(folders):
    clips = clips_of(PLAN, folders[0])
    items = [clips.item(place) for place in range(10)]
    assert len(set(items)) == 10 and items != sorted(items)
    assert [clips_of(replace(PLAN, seed=1), folders[0]).item(place) for place in range(10)] != items


def test_shards_are_the_whole(folders):
    clips = clips_of(PLAN, folders[0])
    places, frames = read(clips)
    shards = [read(clips, rank=rank, world_size=3) for rank in range(3)]
    order = torch.cat([p for p, _ in shards]).argsort()
    assert places.tolist() == list(range(10))
    assert torch.equal(torch.cat([f for _, f in shards])[order], frames)
    assert frames.dtype == torch.uint8 and frames.shape == (10, 3, 4, 16, 24)


def test_worker_processes_change_nothing(folders):
    clips = clips_of(PLAN, folders[0])
    [batch] = clips.batches(batch_size=10, loader=LoaderConfig(workers=1))
    assert torch.equal(batch.frames, read(clips)[1])


def test_clips_of_one_video_are_from_stretches_of_their_own(folders):
    plan = replace(PLAN, samples=56, num_frames=1, per_video=4)
    clips = clips_of(plan, folders[0])
    shares = {}
    for place in range(56):
        shares.setdefault(clips.item(place), []).append(clips.window(place).share)
    assert len(shares) == 14
    for stretches in shares.values():
        assert [int(4 * share) for share in sorted(stretches)] == [0, 1, 2, 3]


def test_the_rate_is_that_of_the_file(folders):
    [batch, *_] = clips_of(PLAN, folders[0]).batches(batch_size=2, loader=HERE)
    assert batch.rates == pytest.approx([10.0, 10.0])


def test_ordered_clips_begin_with_the_first_frame():
    source = make_source(DataConfig(clips=2, clip_frames=9, driving=DrivingConfig(height=32, width=32)))
    plan = SamplingPlan(samples=2, num_frames=3, fps=None, size=(32, 32), ordered=True)
    _, frames = read(ClipSet("real", source, plan))
    expected = DrivingCorpus(DrivingConfig(height=32, width=32)).clip(1, 3).frames
    torch.testing.assert_close(frames[1].float() / 255, expected, atol=0.5 / 255 + 1e-6, rtol=0)


def test_the_hash_follows_contents_captions_and_plan(folders, tmp_path, helpers):
    clips = helpers.make_clips(10, seed=5)
    one = clips_of(PLAN, helpers.write_set(tmp_path / "one", clips)).digest()
    assert clips_of(PLAN, helpers.write_set(tmp_path / "copy", clips)).digest() == one
    assert clips_of(PLAN, helpers.write_set(tmp_path / "text", clips, captions=["x"])).digest() != one
    clips[3] = clips[3].flip(-1)
    assert clips_of(PLAN, helpers.write_set(tmp_path / "other", clips)).digest() != one
    plans = [replace(PLAN, **change) for change in ({"seed": 1}, {"num_frames": 3}, {"size": (8, 8)}, {"fps": 5.0})]
    assert len({clips_of(plan, tmp_path / "one").digest() for plan in plans} | {one}) == 5


def test_the_hash_of_generated_clips_follows_their_settings():
    def digest(**options):
        return ClipSet("real", make_source(DataConfig(clips=10, **options)), PLAN).digest()

    assert digest() == digest() != digest(first=1)
    assert digest() != digest(driving_seed=1)


def test_the_hash_of_a_stretch_is_that_of_its_bytes(folders, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for path in sorted(folders[0].glob("*.webp")):
            archive.add(path, arcname=f"{path.stem}.mp4")
    assert clips_of(PLAN, tmp_path).digest() == clips_of(PLAN, folders[0]).digest()


def test_refusals(folders, tmp_path, helpers):
    with pytest.raises(
        ValueError, match="real: expected at least 20 videos for 20 samples of at most 1 a video, got 14"
    ):
        clips_of(replace(PLAN, samples=20), folders[0])
    with pytest.raises(ValueError, match="expected at least 15 videos for 30 samples of at most 2 a video, got 14"):
        clips_of(replace(PLAN, samples=30, per_video=2), folders[0])
    folder = helpers.write_set(tmp_path / "bad", helpers.make_clips(10))
    (folder / "004.webp").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"real: .*004.webp.*mend or remove it"):
        read(clips_of(PLAN, folder))


def test_pairs_are_told_by_their_names(folders, tmp_path, helpers):
    plan = replace(PLAN, ordered=True)
    decoded = helpers.write_set(tmp_path / "decoded", helpers.make_clips(14))
    check_pairs(clips_of(plan, decoded), clips_of(plan, folders[0]))
    (decoded / "003.webp").rename(decoded / "003a.webp")
    with pytest.raises(ValueError, match=r"pairs of videos of one name, got 003a .generated. beside 003 .real."):
        check_pairs(clips_of(plan, decoded), clips_of(plan, folders[0]))
