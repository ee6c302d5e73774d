"""Latents kept in a folder: what is damaged, half-written or of something else is noticed."""

import pytest
import torch

from temporal_layers.recipes.sampling.latent_store import LatentStore

SETTINGS = {"steps": 4, "scale": 1.5, "size": (2, 3), "nothing": None}
FIRST = {"known": torch.arange(3.0), "told.labels": torch.tensor([1])}


def never():
    raise AssertionError("made again")


@pytest.fixture
def store(tmp_path):
    store = LatentStore(tmp_path / "run", SETTINGS)
    store.piece(0, FIRST, lambda: torch.arange(24.0).reshape(1, 4, 2, 1, 3).transpose(1, 2))
    return store


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


def test_what_is_there_is_not_made_again(store):
    again = LatentStore(store.folder, SETTINGS)
    expected = torch.arange(24.0).reshape(1, 4, 2, 1, 3).transpose(1, 2)
    assert torch.equal(again.piece(0, FIRST, never), expected)
    assert torch.equal(again.piece(1, FIRST, lambda: expected + 1), expected + 1)
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "latents-000000.safetensors",
        "latents-000001.safetensors",
        "settings.json",
    ]


def test_what_an_interrupted_write_leaves_is_removed(store):
    left = store.folder / ".latents-000001.safetensors.123.part"
    left.write_bytes(b"half")
    LatentStore(store.folder, SETTINGS)
    assert not left.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-5],  # ends too early
        lambda data: data[:20],
        lambda data: b"",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),  # another value
        lambda data: data.replace(b"latents", b"latentz"),
    ],
)
def test_damage_is_noticed(store, change):
    path = store.folder / "latents-000000.safetensors"
    damage(path, change)
    with pytest.raises(
        ValueError, match=r"LatentStore: .*latents-000000.*: expected a whole file, .*; delete this file"
    ):
        store.piece(0, FIRST, never)
    path.unlink()
    assert torch.equal(store.piece(0, FIRST, lambda: torch.ones(1)), torch.ones(1))


@pytest.mark.parametrize("change", [lambda data: data[:9], lambda data: b"", lambda data: b"[1, 2]"])
def test_damaged_settings_are_noticed(store, change):
    damage(store.folder / "settings.json", change)
    with pytest.raises(ValueError, match=r"LatentStore: .*settings.json: expected JSON, got damaged data .*delete the"):
        LatentStore(store.folder, SETTINGS)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({**SETTINGS, "steps": 5}, r"expected latents of the same settings, got some with steps=4 in place of 5; name"),
        ({**SETTINGS, "more": 1}, r"got some with more=None in place of 1"),
        ({"steps": 4}, r"got some with scale=1.5 in place of None, size=\[2, 3\] in place of None; name"),
    ],
)
def test_other_settings_are_refused(store, settings, text):
    with pytest.raises(ValueError, match=text):
        LatentStore(store.folder, settings)


@pytest.mark.parametrize(
    "other",
    [
        {"known": torch.arange(3.0), "told.labels": torch.tensor([2])},
        {"known": torch.arange(3.0), "told.tokens": torch.tensor([1])},
        {"known": torch.arange(3.0).double(), "told.labels": torch.tensor([1])},
        {"known": torch.arange(3.0)},
        {"known": torch.empty(0), "told.labels": torch.tensor([1])},
    ],
)
def test_what_is_made_of_something_else_is_refused(store, other):
    with pytest.raises(ValueError, match=r"expected latents that go on from the same frames .* name another folder"):
        store.piece(0, other, never)


def test_files_without_their_settings_are_refused(store):
    (store.folder / "settings.json").unlink()
    other = LatentStore(store.folder, {**SETTINGS, "steps": 5})
    with pytest.raises(ValueError, match="go on from the same frames"):
        other.piece(0, FIRST, never)
