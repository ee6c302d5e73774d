"""Streams: what a position gets depends on nothing but the seed and the position."""

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.recipes.training.streams import SampleStream, Shuffled, generator_at, positions


def noise_at(position):
    generator = generator_at(5, position)
    return torch.randn(3, generator=generator), torch.tensor(position)


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 4))
def test_processes_share_the_positions_of_a_batch_between_them(number, batch_size, world_size):
    parts = [positions(number, batch_size, rank, world_size) for rank in range(world_size)]
    assert [p for part in parts for p in part] == list(positions(number, batch_size * world_size))
    assert positions(number, batch_size)[-1] + 1 == positions(number + 1, batch_size)[0]


@given(st.integers(0, 20), st.integers(1, 4))
def test_a_stream_entered_later_goes_on_as_if_it_had_run(first, batch_size):
    stream = SampleStream(noise_at)
    whole = list(islice(stream.batches(0, batch_size=batch_size), first + 2))
    for (noise, number), (expected, expected_number) in zip(
        islice(stream.batches(first, batch_size=batch_size), 2), whole[first:], strict=True
    ):
        assert torch.equal(noise, expected) and torch.equal(number, expected_number)


def test_two_processes_get_the_halves_of_one_process_with_twice_the_batch():
    stream = SampleStream(noise_at)
    [whole] = islice(stream.batches(7, batch_size=4), 1)
    halves = [next(stream.batches(7, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    for part, expected in zip(zip(*halves, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(part), expected)


@given(st.integers(1, 30), st.integers(0, 3))
def test_every_epoch_takes_every_item_once(length, epoch):
    shuffled = Shuffled(length, seed=2)
    assert Counter(shuffled[epoch * length + i] for i in range(length)) == Counter(range(length))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        return [Shuffled(40, seed)[epoch * 40 + i] for i in range(40)]

    assert order(0, 0) == order(0, 0) and order(0, 0) != order(0, 1) != order(1, 1)
    with pytest.raises(ValueError, match="expected at least one item, got 0"):
        Shuffled(0, 0)


def test_generators_differ_by_seed_position_and_purpose():
    draws = [
        torch.rand(1, generator=generator_at(*key)).item() for key in ((0, 0), (1, 0), (0, 1), (0, 0, "noise"), (0, 10))
    ]
    assert len(set(draws)) == len(draws)
    assert torch.rand(1, generator=generator_at(0, 0)).item() == draws[0]
