"""Statistics on the disk: what is read back is what was written, and only for what it was written for."""

import torch

from temporal_layers.recipes.evaluation.moments import Moments, Rows, SetStatistics
from temporal_layers.recipes.evaluation.store import StatisticsStore

KEPT = SetStatistics(
    {"fvd/net": Moments.of(torch.rand(5, 3)), "fps": Moments.of(torch.rand(4, 1))},
    {"kvd/net": Rows(torch.arange(4), torch.rand(4, 3, dtype=torch.float64))},
)


def test_round_trip(tmp_path):
    store = StatisticsStore(tmp_path / "cache")
    assert store.load({"set": "a"}) is None
    store.save({"set": "a"}, KEPT)
    found = store.load({"set": "a"})
    assert found.moments.keys() == KEPT.moments.keys() and found.rows.keys() == KEPT.rows.keys()
    for name, one in KEPT.moments.items():
        assert found.moments[name].count == one.count
        assert torch.equal(found.moments[name].mean, one.mean)
        assert torch.equal(found.moments[name].scatter, one.scatter)
    assert torch.equal(found.rows["kvd/net"].places, KEPT.rows["kvd/net"].places)
    assert torch.equal(found.rows["kvd/net"].values, KEPT.rows["kvd/net"].values)


def test_another_identity_finds_nothing(tmp_path):
    store = StatisticsStore(tmp_path)
    store.save({"set": "a", "size": (8, 8)}, KEPT)
    assert store.load({"set": "a", "size": (8, 9)}) is None
    assert store.load({"size": [8, 8], "set": "a"}) is not None  # order and kind of sequence do not matter


def test_a_damaged_file_is_no_statistics(tmp_path):
    store = StatisticsStore(tmp_path)
    path = store.save({"set": "a"}, KEPT)
    path.write_bytes(path.read_bytes()[:-9])
    assert store.load({"set": "a"}) is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no part is left behind
