"""The stream of clips: the same samples for any number of workers and processes, from any batch on; bad files named."""

import logging
import multiprocessing
import pickle
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from temporal_layers.recipes.data.decoding import PyAvDecoder
from temporal_layers.recipes.data.loader import ClipBatch, ClipStream, LoaderConfig, open_stream
from temporal_layers.recipes.data.probing import Probe, probe_all
from temporal_layers.recipes.data.sampling import SamplingConfig
from temporal_layers.recipes.data.sources import DataConfig, folder_source, make_source
from temporal_layers.recipes.data.video_io import bunny_path, write_video
from temporal_layers.recipes.training.streams import positions

# Processes that are forked while threads run are warned about from Python 3.12 on; these do nothing but decode.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

SAMPLING = SamplingConfig(buckets=((4, 24, 32),), fps=5.0)
HERE = LoaderConfig(workers=0)


def same(first, second):
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second, strict=True))


def greys(batch):
    """Which of the grey videos the clips of a batch are."""
    return (batch.frames.float().mean((1, 2, 3, 4)) / 28).round().int().tolist()


def test_a_batch_holds_what_its_fields_say(grey_folder):
    stream = ClipStream(folder_source(grey_folder, label=3), SAMPLING, HERE, seed=1)
    batch = next(stream.batches(2, batch_size=3))
    assert isinstance(batch, ClipBatch)
    assert batch.frames.shape == (3, 3, 4, 24, 32) and batch.frames.dtype == torch.uint8
    numbers = greys(batch)
    assert batch.captions == [f"grey number {number}" for number in numbers]
    assert batch.keys == [f"{number}.mp4" for number in numbers]
    assert torch.equal(batch.labels, torch.tensor([3, 3, 3])) and torch.equal(batch.fps, torch.tensor([5.0] * 3))
    assert batch.positions == list(positions(2, 3))


def test_clips_are_the_windows_that_the_schedule_says(counted_video):
    stream = ClipStream(folder_source(counted_video.parent), SAMPLING, HERE, seed=5)
    for number, batch in enumerate(islice(stream.batches(0, batch_size=1), 4)):
        window = SAMPLING.window(SAMPLING.buckets[0], 5, number)
        assert torch.equal(batch.frames[0], PyAvDecoder().window(counted_video, window)[0])


@given(st.integers(1, 4), st.integers(0, 12), st.integers(1, 3))
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_round_has_every_clip_once_wherever_it_is_entered_and_shared(grey_folder, size, first, processes):
    source = folder_source(grey_folder)
    whole = ClipStream(source, SAMPLING, HERE, seed=2).batches(0, batch_size=size * processes)
    whole = list(islice(whole, first + 2))
    seen = [number for batch in whole for number in greys(batch)]
    for start in range(0, len(seen) - 8, 9):
        assert sorted(seen[start : start + 9]) == list(range(9))
    for rank in range(processes):
        stream = ClipStream(source, SAMPLING, HERE, seed=2)
        part = islice(stream.batches(first, batch_size=size, rank=rank, world_size=processes), 2)
        for batch, expected in zip(part, whole[first:], strict=True):
            rows = slice(rank * size, (rank + 1) * size)
            assert same(batch, [column[rows] for column in expected])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(grey_folder, workers):
    source = folder_source(grey_folder)
    expected = list(islice(ClipStream(source, SAMPLING, HERE).batches(3, batch_size=2), 6))
    stream = ClipStream(source, SAMPLING, LoaderConfig(workers=workers))
    assert all(map(same, islice(stream.batches(3, batch_size=2), 6), expected))
    # Entered again, with the workers that run already: what they had ready of the first run is thrown away.
    assert all(map(same, islice(stream.batches(4, batch_size=2), 5), expected[1:]))
    stream.close()


def test_a_second_run_ends_the_first(grey_folder):
    stream = ClipStream(folder_source(grey_folder), SAMPLING, HERE)
    first = stream.batches(0, batch_size=1)
    next(first)
    stream.batches(0, batch_size=1)
    with pytest.raises(RuntimeError, match=r"ClipStream: these batches ended when batches\(\) or close\(\)"):
        next(first)


def test_closing_ends_the_workers_and_so_does_an_error(grey_folder, tmp_path):
    before = set(multiprocessing.active_children())
    stream = ClipStream(folder_source(grey_folder), SAMPLING, LoaderConfig(workers=2))
    batches = stream.batches(0, batch_size=1)
    first = next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(RuntimeError, match="these batches ended"):
        next(batches)
    assert same(next(stream.batches(0, batch_size=1)), first)
    stream.close()
    (tmp_path / "a.mp4").write_bytes(b"")
    stream = ClipStream(folder_source(tmp_path), SAMPLING, LoaderConfig(workers=1))
    with pytest.raises(ValueError, match="expected at most max_bad_share"):
        next(stream.batches(0, batch_size=1))
    assert set(multiprocessing.active_children()) <= before


def test_prepare_makes_of_a_batch_what_an_objective_takes(grey_folder):
    stream = ClipStream(
        folder_source(grey_folder), SAMPLING, HERE, prepare=lambda batch: (batch.frames.float() / 255, batch.captions)
    )
    frames, captions = next(stream.batches(0, batch_size=2))
    assert frames.dtype == torch.float32 and frames.max() <= 1 and len(captions) == 2


@pytest.fixture
def shapes(tmp_path):
    """Videos of several proportions and lengths, at 10 frames per second."""
    for name, (frames, height, width) in {
        "wide-0": (12, 32, 64),
        "wide-1": (12, 32, 60),
        "wide-2": (14, 32, 64),
        "high-0": (12, 64, 32),
        "long-0": (30, 32, 64),
        "long-1": (30, 64, 32),
        "short-0": (3, 32, 64),
    }.items():
        write_video(tmp_path / f"{name}.mp4", torch.full((3, frames, height, width), 0.5), 10)
    return tmp_path


def test_buckets_sort_videos_and_a_batch_has_one_shape(shapes):
    sampling = SamplingConfig(buckets=((10, 16, 32), (10, 32, 16), (20, 24, 24)))
    loader = LoaderConfig(workers=0, max_bad_share=0.2)
    stream = open_stream(DataConfig(path=str(shapes), index_folder=shapes / "index"), sampling, loader)
    assert stream.bucket_sizes == [3, 1, 2]
    assert list(stream.bad.reasons) == [str(shapes / "short-0.mp4")] and stream.bad.replaced == 0
    assert "too short, or its rate too low" in str(stream.bad) and "1 of 7 videos" in str(stream.bad)
    kinds = {(10, 16, 32): "wide", (10, 32, 16): "high", (20, 24, 24): "long"}
    seen = set()
    for batch in islice(stream.batches(0, batch_size=2), 9):
        kind = kinds[tuple(batch.frames.shape[2:])]
        assert all(key.startswith(kind) for key in batch.keys)
        seen.add(kind)
    assert seen == {"wide", "high", "long"}
    assert (shapes / "index" / "probes.jsonl").read_text().count("\n") == 7


def test_probes_are_needed_for_buckets_and_must_fit(shapes):
    source, sampling = folder_source(shapes), SamplingConfig(buckets=((4, 16, 32), (4, 32, 16)))
    with pytest.raises(ValueError, match=r"ClipStream: expected probes, to sort videos into 2 buckets, got None; pass"):
        ClipStream(source, sampling)
    with pytest.raises(ValueError, match="ClipStream: expected a probe for each of 7 items, got 1; probe again"):
        ClipStream(source, sampling, probes=[Probe(None, "x")])
    with pytest.raises(
        ValueError, match=r"(?s)ClipStream: expected a video that suits a bucket, got none\. 7 of 7 vid.*x"
    ):
        ClipStream(source, sampling, probes=[Probe(None, "x")] * 7)


@pytest.fixture
def spoilt(grey_folder, tmp_path):
    """The grey videos, and four that cannot be used."""
    for path in grey_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = bunny_path().read_bytes()
    (tmp_path / "a-empty.mp4").write_bytes(b"")
    (tmp_path / "b-text.mp4").write_text("no video")
    (tmp_path / "c-truncated.mp4").write_bytes(whole[:25000])
    write_video(tmp_path / "d-short.mp4", torch.zeros(3, 3, 32, 48), 10)
    return tmp_path


REASONS = {
    "a-empty.mp4": "expected a readable video, got damaged data",
    "b-text.mp4": "expected a readable video, got damaged data",
    "c-truncated.mp4": "truncated: expected 33357 bytes, got 25000",
    "d-short.mp4": "expected at least 4 frames at 5 fps, got 2",
}


def test_bad_videos_are_replaced_counted_and_named(spoilt, caplog):
    source, loader = folder_source(spoilt), LoaderConfig(workers=0, max_bad_share=0.5)
    stream = ClipStream(source, SAMPLING, loader, seed=1)
    with caplog.at_level(logging.WARNING):
        batches = list(islice(stream.batches(0, batch_size=1), 26))
    seen = [batch.keys[0] for batch in batches]
    assert all(greys(batch) == [int(batch.keys[0][0])] for batch in batches)
    # Good ones come where they would have come, and each of the four bad ones was met once a round, and replaced.
    counts = [seen[:13].count(f"{number}.mp4") for number in range(9)]
    assert min(counts) >= 1 and sum(counts) == 13
    assert stream.bad.replaced >= 8 and stream.bad.tried == 13
    assert {name.rsplit("/", 1)[1]: True for name in stream.bad.reasons} == dict.fromkeys(REASONS, True)
    for name, reason in stream.bad.reasons.items():
        assert REASONS[name.rsplit("/", 1)[1]] in reason and caplog.text.count(f"skipped {name}") == 1
    assert str(stream.bad).startswith("4 of 13 videos could not be read\n")

    parallel = ClipStream(source, SAMPLING, LoaderConfig(workers=2, max_bad_share=0.5), seed=1)
    assert all(map(same, islice(parallel.batches(0, batch_size=1), 26), batches))
    parallel.close()
    assert parallel.bad.reasons == stream.bad.reasons and parallel.bad.replaced == stream.bad.replaced


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_videos_stop_the_run_with_their_list(spoilt, workers):
    stream = ClipStream(folder_source(spoilt), SAMPLING, LoaderConfig(workers=workers, max_bad_share=0.3))
    with pytest.raises(
        ValueError, match=r"ClipStream: expected at most max_bad_share=0\.3 .* to be unreadable"
    ) as error:
        list(islice(stream.batches(0, batch_size=1), 40))
    assert all(name in str(error.value) and reason in str(error.value) for name, reason in REASONS.items())


def test_bad_videos_found_by_probing_count_as_well(spoilt):
    source = folder_source(spoilt)
    probes = list(probe_all(source))
    assert [probe.info is None for probe in probes] == [False] * 9 + [True] * 3 + [False]
    with pytest.raises(ValueError, match=r"expected at most max_bad_share=0\.1 of the videos"):
        ClipStream(source, SAMPLING, HERE, probes=probes)
    stream = ClipStream(source, SAMPLING, LoaderConfig(workers=0, max_bad_share=0.4), probes=probes)
    assert stream.bucket_sizes == [9]
    assert sorted(n for batch in islice(stream.batches(0, batch_size=3), 3) for n in greys(batch)) == list(range(9))


def test_a_source_without_any_readable_video_is_an_error(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    stream = ClipStream(folder_source(tmp_path), SAMPLING, LoaderConfig(workers=0, max_bad_share=1.0))
    with pytest.raises(
        ValueError, match=r"ClipStream: expected a readable video within 16 attempts, got none\. 2 of 2"
    ):
        next(stream.batches(0, batch_size=1))


def test_probes_are_kept_until_a_video_changes(grey_folder, tmp_path, monkeypatch):
    for path in grey_folder.glob("[0-3].mp4"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "bad.mp4").write_bytes(b"")
    source, store = folder_source(tmp_path), tmp_path / "kept" / "probes.jsonl"
    first = list(probe_all(source, store=store))
    probed = []
    real = PyAvDecoder.probe
    monkeypatch.setattr(PyAvDecoder, "probe", lambda self, file: probed.append(file.name) or real(self, file))
    assert list(probe_all(source, store=store)) == first and not probed
    (tmp_path / "2.mp4").write_bytes((grey_folder / "2.mp4").read_bytes() + b"0")
    store.write_text(store.read_text()[:-30])  # as if stopped while writing the last line
    assert list(probe_all(source, store=store)) == first
    assert [name.rsplit("/", 1)[1] for name in probed] == ["2.mp4", "bad.mp4"]
    assert list(probe_all(source, workers=2)) == first


def test_a_thorough_probe_decodes_every_frame(tmp_path):
    whole = bytearray(bunny_path().read_bytes())
    whole[18000:19000] = bytes(1000)
    (tmp_path / "a.mp4").write_bytes(whole)
    source = folder_source(tmp_path)
    [quick], [thorough] = probe_all(source), probe_all(source, thorough=True)
    assert quick.info is not None
    assert thorough.info is None and "got damaged data" in thorough.fault


def test_sources_and_clips_can_be_sent_to_processes(grey_folder):
    for source in (folder_source(grey_folder), make_source(DataConfig(clips=3))):
        stream = ClipStream(source, SAMPLING, HERE)
        clips = pickle.loads(pickle.dumps(stream._clips))
        assert len(clips.source) == len(source)


@pytest.mark.parametrize(
    "options", [{"workers": -1}, {"prefetch": 0}, {"max_bad_share": 1.5}], ids=lambda options: next(iter(options))
)
def test_bad_loader_settings(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=rf"LoaderConfig: expected workers of 0 or more.* got .*{name}={value}"):
        LoaderConfig(**options)
