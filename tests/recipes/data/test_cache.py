"""The cache: what is read is what encoding on the spot gives; it can be interrupted, and a stale one is refused."""

import dataclasses
import json
import pickle
from itertools import islice

import pytest
import torch

from temporal_layers.recipes.bases import LabelBase, PipelineBase, load_base
from temporal_layers.recipes.data import cache_command, cache_writer
from temporal_layers.recipes.data.cache import CacheConfig, CachedClip, CachedClips, fingerprint
from temporal_layers.recipes.data.cache_writer import base_identity, write_cache
from temporal_layers.recipes.data.decoding import PyAvDecoder, Window
from temporal_layers.recipes.data.items import ItemTable
from temporal_layers.recipes.data.loader import LoaderConfig
from temporal_layers.recipes.data.sources import DataConfig, folder_source, make_source
from temporal_layers.recipes.data.video_io import write_video
from temporal_layers.recipes.driving import DrivingConfig
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.training.streams import SampleStream

HERE = LoaderConfig(workers=0)
DRIVING = DataConfig(clips=5, clip_frames=6, driving=DrivingConfig(height=32, width=48))
CONFIG = CacheConfig(base="shipped", size=(32, 48), items_per_file=2)


@pytest.fixture(scope="module")
def base():
    return LabelBase(load_shipped())


@pytest.fixture(scope="module")
def cached(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "driving"
    write_cache(base, make_source(DRIVING), folder, CONFIG, loader=HERE, batch_frames=4)
    return folder


def test_latents_are_those_of_encoding_on_the_spot(base, cached):
    source, clips = make_source(DRIVING), CachedClips(cached)
    assert len(clips) == 5
    for index, item in enumerate(source):
        frames, fps = PyAvDecoder().window(item.file, Window(num_frames=6, size=(32, 48)))
        expected = base.encode(frames.transpose(0, 1).float() / 255).transpose(0, 1)
        # Batches of other sizes sum in another order.
        torch.testing.assert_close(clips.latents(index), expected, rtol=1e-4, atol=1e-5)
        assert clips[index] == CachedClip(item.key, item.caption, item.label, 6, fps, clips[index].conditioning)
        assert torch.equal(clips.conditioning(index)["labels"], torch.tensor([item.label]))


def test_a_window_of_latents_is_a_part_of_all(cached):
    clips = CachedClips(cached)
    whole = clips.latents(3)
    assert whole.shape == (4, 6, 8, 12)
    assert torch.equal(clips.latents(3, 2, 5), whole[:, 2:5]) and torch.equal(clips.latents(3, 4), whole[:, 4:])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_can_be_stored_narrower(base, cached, tmp_path, dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    write_cache(base, make_source(DRIVING), tmp_path, config, loader=HERE, batch_frames=4)
    expected = CachedClips(cached).latents(1).to(getattr(torch, dtype))
    assert torch.equal(CachedClips(tmp_path).latents(1), expected)


def test_rate_and_length_are_those_asked_for(base, tmp_path, counted_video):
    config = CacheConfig(base="shipped", size=(32, 48), fps=5.0, max_frames=7)
    write_cache(base, folder_source(counted_video.parent), tmp_path, config, loader=HERE)
    clips = CachedClips(tmp_path)
    frames, _ = PyAvDecoder().window(counted_video, Window(num_frames=7, size=(32, 48), fps=5.0))
    assert clips[0].num_frames == 7 and clips[0].fps == 5.0
    expected = base.encode(frames.transpose(0, 1).float() / 255).transpose(0, 1)
    torch.testing.assert_close(clips.latents(0), expected, rtol=1e-4, atol=1e-5)


def test_every_caption_is_embedded_once(stable_diffusion, grey_folder, tmp_path, monkeypatch):
    base = PipelineBase(stable_diffusion)
    items = list(folder_source(grey_folder))[:5]
    texts = ["a road", "a day", "a road", "a day", "snow"]
    source = ItemTable(dataclasses.replace(item, caption=text) for item, text in zip(items, texts, strict=True))
    asked = []
    real = base.conditioning
    monkeypatch.setattr(base, "conditioning", lambda labels, captions: asked.extend(captions) or real(labels, captions))
    config = CacheConfig(base="tiny", size=(32, 32), max_frames=2)
    write_cache(base, source, tmp_path, config, loader=HERE)
    assert sorted(asked) == ["a day", "a road", "snow"]
    clips = CachedClips(tmp_path)
    for index, text in enumerate(texts):
        expected = real([0], [text])["encoder_hidden_states"]
        torch.testing.assert_close(clips.conditioning(index)["encoder_hidden_states"], expected, rtol=1e-4, atol=1e-5)


class Interrupted(Exception):
    pass


def test_an_interrupted_cache_goes_on_where_it_stopped(base, cached, tmp_path, monkeypatch):
    source, calls = make_source(DRIVING), []

    def stop(done, total):
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        write_cache(base, source, tmp_path, CONFIG, loader=HERE, batch_frames=4, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache.json",
        "clips-00000.safetensors",
        "conditioning-00000.safetensors",
    ]
    with pytest.raises(ValueError, match=r"CachedClips: .*: expected a finished cache, got one under way; run"):
        CachedClips(tmp_path)
    (tmp_path / "clips-00001.partial-0").write_bytes(b"cut off")
    real = cache_writer.encode_frames
    monkeypatch.setattr(cache_writer, "encode_frames", lambda *a, **k: calls.append(1) or real(*a, **k))
    write_cache(base, source, tmp_path, CONFIG, loader=HERE, batch_frames=4)
    assert len(calls) == 3  # of five clips, two were there
    for path in cached.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    write_cache(base, source, tmp_path, CONFIG, loader=HERE, batch_frames=4)
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_share_the_files_and_workers_change_nothing(base, cached, tmp_path):
    for rank in (1, 0):
        assert not (tmp_path / "index.json").exists()
        loader = LoaderConfig(workers=rank)
        write_cache(
            base, make_source(DRIVING), tmp_path, CONFIG, loader=loader, batch_frames=4, rank=rank, world_size=2
        )
    for path in cached.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"base": "other"}, "base='shipped' in place of 'other'"),
        ({"size": (64, 96)}, r"size=\[32, 48\] in place of \[64, 96\]"),
        ({"fps": 4.0}, "fps=None in place of 4.0"),
        ({"dtype": "float16"}, "dtype='float32' in place of 'float16'"),
    ],
)
def test_a_cache_of_something_else_is_refused(base, cached, change, text):
    config = dataclasses.replace(CONFIG, **change)
    for who, call in {
        "write_cache": lambda: write_cache(base, make_source(DRIVING), cached, config),
        "CachedClips": lambda: CachedClips(cached, config=config),
    }.items():
        with pytest.raises(
            ValueError, match=rf"{who}: .*: expected a cache of the same .* got one with {text}; delete"
        ):
            call()


def test_a_cache_of_other_data_is_refused(cached, grey_folder, tmp_path):
    source = make_source(DRIVING)
    assert len(CachedClips(cached, config=CONFIG, source=source)) == 5
    for other in (dataclasses.replace(DRIVING, clips=4), dataclasses.replace(DRIVING, driving_seed=1)):
        with pytest.raises(ValueError, match="expected a cache of the same model, data and settings, got one with sou"):
            CachedClips(cached, source=make_source(other))
    for name in ("1.mp4", "1.txt"):
        (tmp_path / name).write_bytes((grey_folder / name).read_bytes())
    prints = [fingerprint(folder_source(tmp_path))]
    (tmp_path / "1.txt").write_text("another caption")
    prints.append(fingerprint(folder_source(tmp_path)))
    (tmp_path / "1.mp4").write_bytes((tmp_path / "1.mp4").read_bytes() + b"0")
    prints.append(fingerprint(folder_source(tmp_path)))
    assert len(set(prints)) == 3


def test_bad_videos_are_left_out_and_named(base, grey_folder, tmp_path):
    videos, folder = tmp_path / "videos", tmp_path / "cache"
    videos.mkdir()
    for name in ("1.mp4", "3.mp4"):
        (videos / name).write_bytes((grey_folder / name).read_bytes())
    (videos / "0.mp4").write_bytes(b"")
    write_video(videos / "2.mp4", torch.zeros(3, 3, 32, 48), 10)
    source, config = folder_source(videos), dataclasses.replace(CONFIG, min_frames=8)
    with pytest.raises(ValueError, match=r"expected at most max_bad_share=0\.1 of the videos to be unreadable"):
        write_cache(base, source, folder, config, loader=HERE)
    write_cache(base, source, folder, config, loader=LoaderConfig(workers=0, max_bad_share=0.5))
    clips = CachedClips(folder)
    assert [clip.key for clip in clips] == ["1.mp4", "3.mp4"]
    reasons = {name.rsplit("/", 1)[1]: reason for name, reason in clips.bad.items()}
    assert "got damaged data" in reasons["0.mp4"] and "expected at least 8 frames at 10 fps, got 3" in reasons["2.mp4"]


def test_a_cache_is_a_stream_of_windows(cached):
    clips = CachedClips(cached)
    stream = SampleStream(lambda position: clips.draw(position, num_frames=4, seed=3))
    batches = list(islice(stream.batches(0, batch_size=5), 3))
    starts = set()
    for latents, labels in batches:
        found = set()
        for window, label in zip(latents, labels, strict=True):
            [(index, start)] = [
                (index, start)
                for index in range(5)
                for start in range(3)
                if torch.equal(window, clips.latents(index, start, start + 4))
            ]
            assert clips[index].label == label
            found.add(index)
            starts.add(start)
        assert found == set(range(5))
    assert starts == {0, 1, 2}
    assert all(torch.equal(a, b) for a, b in zip(next(stream.batches(2, batch_size=5)), batches[2], strict=True))
    with pytest.raises(
        ValueError, match=r"CachedClips: \d: expected at least num_frames=9, got 6; write the cache with"
    ):
        clips.draw(0, num_frames=9, seed=3)


def test_a_cache_can_be_sent_to_processes(cached):
    clips = CachedClips(cached)
    expected = clips.latents(2)
    assert torch.equal(pickle.loads(pickle.dumps(clips)).latents(2), expected)


def test_a_damaged_file_is_named(base, tmp_path):
    write_cache(base, make_source(DRIVING), tmp_path, CONFIG, loader=HERE)
    path = tmp_path / "clips-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"clips-00001\.safetensors: expected a file of a cache, got damaged data"):
        CachedClips(tmp_path)
    with pytest.raises(ValueError, match=r"CachedClips: .*nowhere: expected a finished cache, got none"):
        CachedClips(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"base": ""}, "base: expected a name for the image model, got an empty string"),
        ({"dtype": "int8"}, "dtype: expected one of float32, float16, bfloat16, got 'int8'"),
        ({"items_per_file": 0}, "expected items_per_file and min_frames of 1 or more .* got items_per_file=0"),
        ({"min_frames": 9, "max_frames": 8}, "max_frames not below min_frames, got .*min_frames=9, max_frames=8"),
    ],
)
def test_bad_cache_settings(options, text):
    with pytest.raises(ValueError, match=f"CacheConfig: {'.*' if 'max_frames' in options else ''}{text}"):
        CacheConfig(**{"base": "x", "size": (32, 48), **options})


def test_the_identity_of_a_model_changes_with_its_weights(base, stable_diffusion):
    names = [base_identity(base), base_identity(base)]
    with torch.no_grad():
        pipeline = PipelineBase(stable_diffusion)
        names.append(base_identity(pipeline))
        pipeline.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
        names.append(base_identity(pipeline))
        stable_diffusion.text_encoder.get_input_embeddings().weight[0, 0] += 1e-3
        names.append(base_identity(pipeline))
        unchanged = base_identity(pipeline)
        pipeline.unet.conv_in.weight[0, 0, 0, 0] += 1
    assert names[0] == names[1] and len(set(names)) == 4 and unchanged == names[-1] == base_identity(pipeline)


def test_the_command_writes_a_cache_and_refuses_a_stale_one(tmp_path, capsys):
    out = tmp_path / "cache"
    words = ["--data.clips", "2", "--data.clip-frames", "3", "--data.driving.height", "64", "--out", str(out)]
    words += ["--loader.workers", "0"]
    assert cache_command.main(words) == 0
    assert capsys.readouterr().out == f"{out}: 2 clips, 6 frames, 0 videos left out\n"
    assert json.loads((out / "cache.json").read_text())["base"] == base_identity(load_base())
    assert cache_command.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "clips": 2, "frames": 6, "bad": {}}
    assert cache_command.main([*words, "--stride", "2"]) == 1
    assert "temporal-layers data cache: write_cache: " in capsys.readouterr().err
