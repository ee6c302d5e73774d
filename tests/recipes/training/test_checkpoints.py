"""Checkpoints on the disk: whole, checked, few; what is damaged is seen, and what does not fit is cleaned up."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from temporal_layers.recipes.training.checkpoints import Checkpoints, read, verify


def state_of(value, size=100):
    return {"parameters": {"w": torch.full((size,), float(value))}, "step": value, "history": [0.5, float("inf")]}


def flip(path, at=-200):
    """Change one bit of a file, away from its start and its end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_what_is_written_is_read_and_the_last_ones_are_kept(tmp_path):
    store = Checkpoints(tmp_path / "a" / "b", keep=2)
    assert store.latest() == (None, [])
    written = [store.write(step, state_of(step), about={"seed": 3}) for step in (9, 10, 100_000_000)]
    assert [path.name for path in store.paths()] == ["step-00000010", "step-100000000"]
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000010", "step-100000000"]
    assert store.latest() == (written[-1], [])
    manifest = verify(written[-1])
    assert (manifest["step"], manifest["about"]) == (100_000_000, {"seed": 3})
    found = read(written[-1])
    assert torch.equal(found["parameters"]["w"], state_of(100_000_000)["parameters"]["w"])
    assert found["history"] == [0.5, float("inf")]


def test_a_step_that_is_written_again_takes_the_place_of_the_first(tmp_path):
    store = Checkpoints(tmp_path, keep=3)
    store.write(1, state_of(1))
    flip(store.write(2, state_of(2)) / "state.pt")
    path = store.write(2, state_of(7))
    assert read(path)["step"] == 7 and verify(path)["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path / "state.pt"), r"state\.pt: expected \d+ bytes, got \d+: cut off"),
        (lambda path: flip(path / "state.pt"), r"state\.pt: expected the bytes that were written, got others: corrupt"),
        (lambda path: (path / "state.pt").unlink(), r"state\.pt: expected \d+ bytes, got 0: cut off"),
        (lambda path: (path / "manifest.json").unlink(), r"a readable manifest\.json, got FileNotFoundError"),
        (lambda path: cut(path / "manifest.json") or cut(path / "manifest.json"), "got JSONDecodeError"),
        (lambda path: (path / "manifest.json").write_text("[]"), "got TypeError"),
        (lambda path: (path / "manifest.json").write_text('{"format": 1}'), "got KeyError: 'files'"),
        (
            lambda path: (path / "manifest.json").write_text('{"format": 9, "files": {}, "step": 1, "about": {}}'),
            "expected format 1, got 9; use the version that wrote it",
        ),
    ],
)
def test_the_one_before_a_damaged_one_is_used(tmp_path, damage, message):
    store = Checkpoints(tmp_path, keep=3)
    good, bad = store.write(1, state_of(1)), store.write(2, state_of(2))
    damage(bad)
    path, [problem] = store.latest()
    assert path == good and read(path)["step"] == 1
    assert str(bad) in problem
    with pytest.raises(ValueError, match=message):
        verify(bad)


def test_nothing_usable_is_said_of_all(tmp_path):
    store = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        cut(store.write(step, state_of(step)) / "state.pt")
    path, problems = store.latest()
    assert path is None and ["step-0000000" + str(n) in p for n, p in zip((2, 1), problems, strict=True)] == [True] * 2


def test_what_was_left_half_way_is_no_checkpoint_and_is_removed(tmp_path):
    store = Checkpoints(tmp_path, keep=1)
    good = store.write(1, state_of(1))
    (tmp_path / ".step-00000002.part").mkdir()
    (tmp_path / ".step-00000002.part" / "state.pt").write_bytes(b"half")
    (tmp_path / ".x.part").write_bytes(b"half")
    assert store.paths() == [good]
    assert store.latest() == (good, [])
    assert os.listdir(tmp_path) == [good.name]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_and_no_parts(small_disk):
    store = Checkpoints(small_disk, keep=3)
    good = store.write(1, state_of(1, size=30_000))
    store.write(2, state_of(2, size=30_000))
    for size in (30_000, 60_000):  # of the 300 kB, 240 are taken
        with pytest.raises(OSError) as caught:
            store.write(3, state_of(3, size=size))
        assert caught.value.errno == errno.ENOSPC
        path, problems = store.latest()
        assert problems == [] and verify(path)["step"] == 2
        assert sorted(os.listdir(small_disk)) == ["step-00000001", "step-00000002"]
    assert verify(good)["step"] == 1


def test_a_limit_on_the_size_of_a_file_is_an_error_with_its_code(tmp_path):
    """The same where nothing can be mounted: the kernel refuses the write in the middle of the file."""
    import resource
    import signal

    store = Checkpoints(tmp_path, keep=3)
    good = store.write(1, state_of(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            store.write(2, state_of(2, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert store.latest() == (good, []) and os.listdir(tmp_path) == [good.name]


def test_errors_that_are_not_the_disks_pass_as_they_are(tmp_path):
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        Checkpoints(tmp_path, keep=1).write(1, {"code": lambda: None})
    assert os.listdir(tmp_path) == []


def test_processes_that_write_one_file_leave_it_whole(tmp_path):
    script = tmp_path / "write.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "from temporal_layers.recipes.training.files import replace_text\n"
        "target = Path(sys.argv[1])\n"
        "target.with_name(sys.argv[2]).touch()\n"
        "while len(list(target.parent.glob('?'))) < 3:\n    time.sleep(0.001)\n"
        "for _ in range(300):\n    replace_text(target, sys.argv[2] * 1000)\n"
    )
    target = tmp_path / "target.json"
    writers = [subprocess.Popen([sys.executable, script, target, letter]) for letter in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert target.read_text() in {letter * 1000 for letter in "abc"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "target.json", "write.py"]
