"""The order of a run: every clip once a round, batches of one bucket, the same whoever asks for which part."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temporal_layers.recipes.data.opening import VideoInfo
from temporal_layers.recipes.data.sampling import Bucket, SamplingConfig, Schedule
from temporal_layers.recipes.training.streams import Shuffled

sizes = st.lists(st.integers(0, 13), min_size=1, max_size=4).filter(sum)


def schedule(counts, seed=0):
    """Buckets whose items are numbered through."""
    ends = np.cumsum([0, *counts])
    return Schedule([np.arange(a, b) for a, b in pairwise(ends)], seed)


@given(sizes, st.integers(1, 5), st.integers(0, 3))
@settings(deadline=None)
def test_every_item_of_a_bucket_comes_once_before_any_comes_again(counts, size, seed):
    made = schedule(counts, seed)
    draws = [draw for number in range(3 * sum(counts) // size + 2) for draw in made.batch(number, size)]
    assert [draw.position for draw in draws] == list(range(len(draws)))
    for bucket, count in enumerate(counts):
        items = [draw.item for draw in draws if draw.bucket == bucket]
        rounds = [items[start : start + count] for start in range(0, len(items), count)] if count else []
        assert all(len(set(part)) == len(part) for part in rounds)
        assert all(set(part) == set(made.members[bucket]) for part in rounds if len(part) == count)


@given(sizes, st.integers(1, 5))
@settings(deadline=None)
def test_a_batch_has_one_bucket_and_buckets_come_in_proportion_to_their_items(counts, size):
    made = schedule(counts)
    batches = [made.batch(number, size) for number in range(4 * sum(counts))]
    assert all(len({draw.bucket for draw in batch}) == 1 for batch in batches)
    seen = Counter(draw.bucket for batch in batches for draw in batch)
    for bucket, count in enumerate(counts):
        expected = len(batches) * size * count / sum(counts)
        # Within a round buckets take turns in any order, and what is left of one waits for the next round.
        assert abs(seen[bucket] - expected) <= count + size * len(counts) + size


@given(sizes, st.integers(1, 4), st.integers(1, 4), st.integers(0, 40), st.integers(0, 5))
@settings(deadline=None)
def test_any_batch_can_be_asked_for_at_once_and_shared_between_processes(counts, size, processes, number, seed):
    run = schedule(counts, seed)
    walked = [run.batch(each, size * processes) for each in range(number + 1)][-1]
    resumed = schedule(counts, seed).batch(number, size * processes)
    assert resumed == walked


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 30))
@settings(deadline=None)
def test_with_one_bucket_the_order_is_that_of_the_training_streams(count, size, number):
    order = Shuffled(count, 4)
    batch = schedule([count], 4).batch(number, size)
    assert [draw.item for draw in batch] == [order[number * size + index] for index in range(size)]


def test_rounds_differ_and_so_do_seeds():
    made, other = schedule([40], 0), schedule([40], 1)
    orders = [[draw.item for draw in each.batch(number, 40)] for each in (made, other) for number in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_substitutes_come_from_the_bucket_and_from_the_seed_and_the_position():
    made = schedule([5, 50])
    draw = next(draw for number in range(9) for draw in made.batch(number, 2) if draw.bucket == 1)
    found = [made.substitute(draw, attempt) for attempt in range(1, 30)]
    assert {each.bucket for each in found} == {1} and {each.position for each in found} == {draw.position}
    assert all(each.item >= 5 for each in found) and len({each.item for each in found}) > 10
    assert found == [schedule([5, 50]).substitute(draw, attempt) for attempt in range(1, 30)]
    assert found != [schedule([5, 50], 1).substitute(draw, attempt) for attempt in range(1, 30)]


def test_a_schedule_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="Schedule: expected an item in at least one bucket, got none"):
        schedule([0, 0])


def test_windows_depend_on_the_position_and_fill_the_room():
    config = SamplingConfig(buckets=((8, 32, 48),), fps=5.0)
    windows = [config.window(config.buckets[0], 0, position) for position in range(200)]
    assert windows == [config.window(config.buckets[0], 0, position) for position in range(200)]
    for values in ([w.share for w in windows], [w.crop[0] for w in windows], [w.crop[1] for w in windows]):
        assert min(values) < 0.05 and max(values) > 0.95 and abs(np.mean(values) - 0.5) < 0.1
    assert abs(np.corrcoef([w.share for w in windows], [w.crop[0] for w in windows])[0, 1]) < 0.2
    assert windows[0] != config.window(config.buckets[0], 1, 0)
    assert (windows[0].num_frames, windows[0].size, windows[0].fps) == (8, (32, 48), 5.0)


def test_windows_can_be_kept_in_place():
    config = SamplingConfig(buckets=((8, 32, 48),), stride=2, start="first", crop="centre")
    window = config.window(config.buckets[0], 0, 3)
    assert (window.share, window.crop, window.stride) == (0.0, (0.5, 0.5), 2)


BUCKETS = ((8, 64, 64), (8, 48, 96), (8, 96, 48), (16, 48, 96), (8, 128, 128))


@pytest.mark.parametrize(
    ("height", "width", "seconds", "expected"),
    [
        (720, 1280, 1.5, (8, 48, 96)),  # log(1280 / 720) is nearer to log 2 than to 0
        (1280, 720, 1.5, (8, 96, 48)),
        (60, 66, 1.0, (8, 64, 64)),
        (500, 500, 1.0, (8, 128, 128)),
        (500, 500, 2.0, (16, 48, 96)),  # length comes before proportions
        (64, 64, 0.85, None),
        (64, 64, 0.0, (8, 64, 64)),  # does not say how long it is
    ],
)
def test_a_video_goes_to_the_bucket_that_suits_it(height, width, seconds, expected):
    config = SamplingConfig(buckets=BUCKETS, fps=8.0)
    index = config.nearest(VideoInfo(height, width, 24.0, seconds))
    assert (None if index is None else config.buckets[index]) == expected


def test_a_video_with_too_low_a_rate_suits_no_bucket():
    assert SamplingConfig(buckets=BUCKETS, fps=8.0).nearest(VideoInfo(64, 64, 5.0, 60.0)) is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"buckets": ()}, r"buckets: expected different .* got \(\)"),
        ({"buckets": ((8, 0, 8),)}, r"buckets: expected different .* got \(\(8, 0, 8\),\)"),
        ({"buckets": ((8, 8, 8), (8, 8, 8))}, "buckets: expected different"),
        ({"start": "last"}, "expected start 'random' or 'first' and crop 'random' or 'centre', got start='last'"),
        ({"crop": "left"}, "got start='random', crop='left'"),
    ],
)
def test_bad_sampling(options, text):
    with pytest.raises(ValueError, match=f"SamplingConfig: .*{text}"):
        SamplingConfig(**{"buckets": ((8, 8, 8),), **options})
    with pytest.raises(ValueError, match="Window: expected fps above 0 without a stride"):
        SamplingConfig(buckets=((8, 8, 8),), fps=4.0, stride=2)


def test_buckets_are_named_tuples():
    assert SamplingConfig(buckets=[[8, 16, 24]]).buckets == (Bucket(frames=8, height=16, width=24),)
