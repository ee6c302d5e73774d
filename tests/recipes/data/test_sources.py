"""Sources: every kind lists the videos that lie there, with what is said of them, and opens none."""

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.recipes.data.decoding import PyAvDecoder
from temporal_layers.recipes.data.items import DrivingFile, ItemTable, VideoFile, VideoItem
from temporal_layers.recipes.data.shards import ShardSample, expand, read_index, scan
from temporal_layers.recipes.data.sources import DataConfig, csv_source, folder_source, make_source
from temporal_layers.recipes.data.video_io import bunny_path
from temporal_layers.recipes.driving import DrivingConfig, DrivingCorpus

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
files = st.builds(VideoFile, texts, st.integers(0, 2**40), st.none() | st.integers(0, 2**40), texts, texts)


@given(st.lists(st.builds(VideoItem, texts, files, texts, st.integers(-5, 5)), max_size=6))
def test_a_table_gives_back_what_was_put_in(items):
    table = ItemTable(items)
    assert list(table) == items and len(table) == len(items)
    assert list(pickle.loads(pickle.dumps(table))) == items
    with pytest.raises(IndexError):
        table[len(items)]


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_a_folder_takes_captions_from_sidecars_and_from_a_list(tmp_path):
    for name in ("a.mp4", "b/c.webm", "b/d.mkv", "e.mov"):
        touch(tmp_path / name)
    (tmp_path / "a.txt").write_text(" a cat \n")
    (tmp_path / "b" / "c.txt").write_text("not this one")
    rows = [{"path": "b/c.webm", "caption": "a dog", "label": 4}, {"file_name": "b/d.mkv", "text": "a fox"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    items = list(folder_source(tmp_path, caption="something", label=7))
    assert [(item.key, item.caption, item.label) for item in items] == [
        ("a.mp4", "a cat", 7),
        ("b/c.webm", "a dog", 4),
        ("b/d.mkv", "a fox", 7),
        ("e.mov", "something", 7),
    ]
    assert [item.file for item in items] == [VideoFile(str(tmp_path / item.key)) for item in items]


@pytest.mark.parametrize(
    "line", ["nonsense", '{"path": "a.mp4"}', "[1]", '{"path": "a", "caption": "b", "label": "c"}']
)
def test_a_list_of_captions_that_cannot_be_read_is_an_error(tmp_path, line):
    touch(tmp_path / "a.mp4")
    (tmp_path / "captions.jsonl").write_text('{"path": "a.mp4", "caption": "x"}\n' + line)
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 2: expected an object with path and caption, got "):
        folder_source(tmp_path)


def write_rows(path, *rows):
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return path


def test_a_plain_csv_file(tmp_path):
    table = [("path", "caption", "label"), ("a.mp4", 'a cat, "running"', "3"), ("/abs/b.mp4", "", "")]
    items = list(csv_source(write_rows(tmp_path / "t.csv", *table), caption="something", label=7))
    assert [(item.key, item.caption, item.label) for item in items] == [
        ("a.mp4", 'a cat, "running"', 3),
        ("/abs/b.mp4", "something", 7),
    ]
    assert [item.file.path for item in items] == [str(tmp_path / "a.mp4"), "/abs/b.mp4"]


def test_webvids_columns_name_files_by_page_and_number(tmp_path):
    table = [
        ("videoid", "contentUrl", "duration", "page_dir", "name"),
        ("21179416", "https://example.org/1.mp4", "PT00H00M11S", "006001_006050", "Aerial shot of winter forest"),
        ("5629184", "https://example.org/2.mp4", "PT00H00M29S", "", "Senior couple"),
    ]
    path = write_rows(tmp_path / "results_2M_train.csv", *table)
    here = [item.file.path for item in csv_source(path)]
    assert here == [str(tmp_path / "006001_006050" / "21179416.mp4"), str(tmp_path / "5629184.mp4")]
    (tmp_path / "videos").mkdir()
    assert csv_source(path)[0].file.path == str(tmp_path / "videos" / "006001_006050" / "21179416.mp4")
    item = csv_source(path, root="/elsewhere")[0]
    assert item == VideoItem(
        "21179416", VideoFile("/elsewhere/006001_006050/21179416.mp4"), "Aerial shot of winter forest", 0
    )


def test_csv_files_that_cannot_be_read_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"csv_source: expected a CSV file, got '.*none\.csv'"):
        csv_source(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"t\.csv: expected the column path or videoid in the first line, got url, x;"):
        csv_source(write_rows(tmp_path / "t.csv", ("url", "x"), ("a", "b")))
    with pytest.raises(ValueError, match=r"t\.csv, line 3: label: expected a whole number, got 'cat'"):
        csv_source(write_rows(tmp_path / "t.csv", ("path", "label"), ("a", "1"), ("b", "cat")))


def write_shard(path, *members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shard(tmp_path):
    video = bunny_path().read_bytes()
    return write_shard(
        tmp_path / "shard-0000.tar",
        ("000.mp4", video),
        ("000.txt", b" a rabbit \n"),
        ("000.cls", b"5"),
        ("000.json", json.dumps({"caption": "not this one", "label": 1}).encode()),
        ("000.webp", b"a preview"),
        ("dir/001.json", json.dumps({"text": "a squirrel", "label": 2, "fps": 12.5}).encode()),
        ("dir/001.MP4", video),
        ("002.mp4", video),
        ("003.json", b'{"caption": "the download failed"}'),
        ("004.mp4", video),
        ("004.cls", b"five"),
        ("__about__.json", b"{}"),
    )


def test_a_shard_lists_its_samples_wherever_their_members_lie(shard):
    items = list(make_source(DataConfig(path=str(shard), caption="something", label=7)))
    assert [(item.key, item.caption, item.label) for item in items] == [
        ("shard-0000.tar/000", "a rabbit", 5),
        ("shard-0000.tar/dir/001", "a squirrel", 2),
        ("shard-0000.tar/002", "something", 7),
        ("shard-0000.tar/003", "the download failed", 7),
        ("shard-0000.tar/004", "something", 7),
    ]
    for item in items[:3]:
        assert item.file.read() == bunny_path().read_bytes()
        assert PyAvDecoder().probe(item.file).fps == 12.5
    assert items[1].file.name == f"{shard}:dir/001.MP4"
    for item, reason in zip(items[3:], ("expected a video", "expected readable .txt, .cls and .json"), strict=True):
        with pytest.raises(ValueError, match=rf"shard-0000\.tar:00\d.*: {reason}"):
            PyAvDecoder().probe(item.file)


def test_an_archive_is_scanned_again_only_when_it_has_changed(shard, monkeypatch):
    from temporal_layers.recipes.data import shards

    first, scans = read_index(str(shard)), []
    monkeypatch.setattr(shards, "scan", lambda path: scans.append(path) or scan(path))
    assert read_index(str(shard)) == first and not scans
    write_shard(shard, ("000.mp4", b"other"))
    assert [sample.size for sample in read_index(str(shard))] == [5] and len(scans) == 1
    index = shard.with_name("shard-0000.tar.index.json")
    index.write_text(index.read_text()[:-20])
    assert [sample.size for sample in read_index(str(shard))] == [5] and len(scans) == 2


def test_indices_lie_where_they_are_told_to(tmp_path, shard, caplog):
    other = tmp_path / "other" / shard.name
    other.parent.mkdir()
    write_shard(other, ("zzz.mp4", b""))
    folder = tmp_path / "indices"
    for path in (shard, other, shard, other):
        keys = [sample.key for sample in read_index(str(path), folder)]
        assert keys == (["zzz"] if path == other else ["000", "dir/001", "002", "003", "004"])
    assert len(list(folder.iterdir())) == 2 and not shard.with_name(f"{shard.name}.index.json").exists()
    assert len(read_index(str(shard), Path("/proc/nowhere"))) == 5
    assert "the index was not stored" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "compressed", "text", "missing"])
def test_a_damaged_archive_is_an_item_that_says_so(shard, damage):
    whole = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(whole[:60000])  # in the second video
    elif damage == "compressed":
        shard.unlink()
        with tarfile.open(shard, "w:gz") as archive:
            archive.add(bunny_path(), "000.mp4")
    elif damage == "text":
        shard.write_text("no archive" * 100)
    else:
        shard.unlink()
    *good, last = make_source(DataConfig(path=str(shard)))
    assert [item.key for item in good] == (["shard-0000.tar/000", "shard-0000.tar/dir/001"] if damage == "cut" else [])
    expected = "expected a tar archive, got none" if damage == "missing" else "expected a whole, uncompressed tar"
    with pytest.raises(ValueError, match=rf"open_video: .*shard-0000\.tar: {expected}"):
        PyAvDecoder().probe(last.file)
    if damage == "cut":
        PyAvDecoder().probe(good[0].file)
        with pytest.raises(ValueError, match=r"dir/001\.MP4: truncated: expected .* bytes in .*, got 60000; copy"):
            PyAvDecoder().probe(good[1].file)


def test_patterns_of_archives(tmp_path):
    names = expand("x-{008..011}-{a,b}.tar")
    assert names == [f"x-{n:03d}-{c}.tar" for n in range(8, 12) for c in "ab"]
    for name in ("s-2.tar", "s-10.tar"):
        write_shard(tmp_path / name, (f"{name[2:-4]}.mp4", b""))
    assert expand(str(tmp_path / "s-*.tar")) == [str(tmp_path / "s-10.tar"), str(tmp_path / "s-2.tar")]
    for path in (tmp_path, tmp_path / "s-{10,2}.tar", tmp_path / "s-*.tar"):
        assert [item.key for item in make_source(DataConfig(path=str(path)))] == ["s-10.tar/10", "s-2.tar/2"]
    with pytest.raises(ValueError, match=r"expand: expected files that match '.*t-\*\.tar', got none"):
        expand(str(tmp_path / "t-*.tar"))
    for bad in ("{3..1}", "{a..b}", "{x}"):
        with pytest.raises(ValueError, match=r"expand: expected \{first\.\.last\} or \{a,b\} in"):
            expand(f"s-{bad}.tar")


def test_samples_are_kept_whole_in_the_index(tmp_path):
    path = write_shard(tmp_path / "a.tar", ("k.mp4", b"123"), ("k.txt", "ä".encode()))
    [sample] = read_index(str(path))
    assert sample == read_index(str(path))[0] == ShardSample("k", "k.mp4", 512, 3, "ä", None)


def test_the_driving_corpus_is_a_source():
    config = DrivingConfig(height=32, width=48)
    source = make_source(DataConfig(path="driving", clips=5, first=100, clip_frames=12, driving=config, driving_seed=2))
    corpus = DrivingCorpus(config, seed=2)
    for number, item in enumerate(source, 100):
        clip = corpus.clip(number, 1)
        assert item == VideoItem(str(number), DrivingFile(number, 12, 2, config), clip.caption, clip.label)
    assert len(source) == 5


def test_what_cannot_be_a_source_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"DataConfig: path: expected a folder.* got an empty string"):
        DataConfig(path="")
    with pytest.raises(ValueError, match=r"DataConfig: expected clips and clip_frames of 1 or more .* got clips=0"):
        DataConfig(clips=0)
    with pytest.raises(
        ValueError, match=r"make_source: expected a folder, a .csv file.* got '.*nowhere'; check the path"
    ):
        make_source(DataConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="DataConfig: kind: expected auto, folder, csv, shards or driving, got 'zip'"):
        make_source(DataConfig(path=str(tmp_path), kind="zip"))
    with pytest.raises(ValueError, match=r"make_source: .*t\.csv: expected at least one video, got none"):
        make_source(DataConfig(path=str(write_rows(tmp_path / "t.csv", ("path",)))))
