"""Interpolation: against closed forms; the same in parts, in batches of any size, and resumed."""

import itertools

import pytest
import torch

from temporal_layers.recipes.conditioning import ContextPlanes
from temporal_layers.recipes.sampling.context import ContextSampling
from temporal_layers.recipes.sampling.interpolation import (
    interpolate_windows,
    interpolation_windows,
    sample_interpolation,
)
from temporal_layers.recipes.sampling.prediction import predict_windows, sample_prediction
from temporal_layers.recipes.sampling.timeline import Timeline

FEW = ContextSampling(num_inference_steps=4)
NOISY = ContextSampling(num_inference_steps=2, eta=0.5)
RATES = ContextPlanes(rate=True)


def known(clips=3, frames=4):
    return torch.randn(clips, 4, frames, 2, 3)


def labels(*values):
    return {"labels": torch.tensor(values)}


def between(context, conditioning):
    """Linear interpolation between the given frames, plus 100 times the rate in those that are not."""
    given = torch.nonzero(context[0, 4, :, 0, 0]).flatten().tolist()
    clean = torch.zeros_like(context[:, :4])
    for left, right in itertools.pairwise(given):
        for frame in range(left, right + 1):
            share = (frame - left) / (right - left)
            clean[:, :, frame] = (1 - share) * context[:, :4, left] + share * context[:, :4, right]
    return clean + 100 * context[:, -1:] + conditioning["labels"][:, None, None, None, None]


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_eight_frames_become_29_and_then_113(known_base, pairs):
    keys = torch.arange(8.0)[None, None, :, None, None] * torch.randn(2, 4, 1, 2, 3)
    base, told = known_base(between), labels(0.0, 0.0)
    made = sample_interpolation(base, RATES, told, keys, FEW, rate=0.0, pairs=pairs)
    finer = sample_interpolation(base, RATES, told, made, FEW, rate=0.0, pairs=pairs)
    assert made.shape[2] == 29 and finer.shape[2] == 113
    assert torch.equal(made[:, :, ::4], keys)
    expected = torch.arange(113.0)[None, None, :, None, None] / 16 * keys[:, :, 1:2]
    torch.testing.assert_close(finer, expected, rtol=1e-3, atol=5e-3)


def test_the_rate_and_the_conditioning_reach_every_window(known_base):
    keys = known(2, 3)
    made = sample_interpolation(known_base(between), RATES, labels(10.0, 20.0), keys, FEW, rate=1.0)
    middle = (keys[:, :, :2] + keys[:, :, 1:]) / 2 + 100 + torch.tensor([10.0, 20.0])[:, None, None, None, None]
    torch.testing.assert_close(made[:, :, 2::4], middle, rtol=1e-3, atol=1e-2)


def test_windows_of_interpolation():
    assert interpolation_windows(8) == [0, 1, 2, 3, 4, 5, 6]
    assert interpolation_windows(8, 3) == [0, 3, 4]  # the last one overlaps
    assert interpolation_windows(7, 3) == [0, 3]
    assert interpolation_windows(4, 3) == [0]


@pytest.mark.parametrize(("pairs", "count"), list(itertools.product([1, 2, 3], [4, 5, 6, 8])))
def test_windows_do_not_depend_on_how_many_there_are_nor_on_how_they_are_batched(unsure_base, pairs, count):
    keys, told = known(2, 8), labels(1.0, 2.0)

    def run(keys, batch_size):
        options = ContextSampling(num_inference_steps=2, eta=0.5, batch_size=batch_size)
        return sample_interpolation(unsure_base, RATES, told, keys, options, rate=0.0, pairs=pairs)

    whole = run(keys, 1)
    for batch_size in (3, 4, 64):
        torch.testing.assert_close(run(keys, batch_size), whole)
    full = 4 * ((count - 1) // pairs * pairs) + 1  # the last window may have been moved back
    torch.testing.assert_close(run(keys[:, :, :count], 4)[:, :, :full], whole[:, :, :full])
    alone = sample_interpolation(unsure_base, RATES, labels(1.0), keys[:1], NOISY, rate=0.0, pairs=pairs)
    torch.testing.assert_close(alone[0], whole[0])


def test_windows_clips_and_levels_have_noise_of_their_own(known_base):
    """A model that lets the noise through, and equal given frames: no two windows are alike."""
    base = known_base(None)
    base.predict = lambda noisy, timestep, conditioning, frame_context: -noisy
    options, keys = ContextSampling(num_inference_steps=1), torch.zeros(2, 4, 4, 2, 3)
    seen = []
    for rate in (0.0, 1.0):
        made = sample_interpolation(base, RATES, labels(0.0, 0.0), keys, options, rate=rate)
        seen += [made[clip, :, start + 1 : start + 4] for clip in range(2) for start in (0, 4, 8)]
    for one, other in itertools.combinations(seen, 2):
        assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize(
    ("pairs", "sizes"), list(itertools.product([1, 2, 3], [(9,), (1, 3, 5), (2, 1, 1, 5), (7, 2)]))
)
def test_frames_may_come_in_parts(unsure_base, pairs, sizes):
    keys, told = known(2, 9), labels(1.0, 2.0)
    whole = sample_interpolation(unsure_base, RATES, told, keys, NOISY, rate=1.0, pairs=pairs)
    parts = list(
        interpolate_windows(unsure_base, RATES, told, iter(keys.split(sizes, dim=2)), NOISY, rate=1.0, pairs=pairs)
    )
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert whole.shape[2] == 33 and torch.equal(whole[:, :, ::4], keys)
    assert all(part.shape[2] > 0 for part in parts)


def chained(base, start, num_frames, options):
    """A roll-out and two levels of interpolation, of which each takes what the one before hands out."""
    told = labels(1.0)
    keys = predict_windows(base, ContextPlanes(), told, start, num_frames, options, window=5)
    finer = interpolate_windows(base, RATES, told, keys, options, rate=0.0)
    return interpolate_windows(base, RATES, told, finer, options, rate=1.0)


def test_a_cascade_of_parts_is_the_cascade_of_wholes(unsure_base):
    start, told = known(1, 1), labels(1.0)
    keys = sample_prediction(unsure_base, ContextPlanes(), told, start, 8, NOISY, window=5)
    finer = sample_interpolation(unsure_base, RATES, told, keys, NOISY, rate=0.0)
    finest = sample_interpolation(unsure_base, RATES, told, finer, NOISY, rate=1.0)
    assert finest.shape[2] == 113
    assert torch.equal(torch.cat(list(chained(unsure_base, start, 8, NOISY)), dim=2), finest)


def test_memory_of_a_cascade_does_not_grow_with_the_length(unsure_base, peak):
    options, start, frame = ContextSampling(num_inference_steps=1), torch.zeros(1, 4, 1, 16, 16), 4 * 16 * 16 * 4

    def run(num_frames):
        return sum(part.shape[2] for part in chained(unsure_base, start, num_frames, options))

    assert run(5) == 65
    short, long = (peak(lambda num_frames=num_frames: run(num_frames)) for num_frames in (5, 9))
    assert long <= short + 4 * frame  # parts that do not come out even, of 64 frames more
    assert peak(lambda: list(chained(unsure_base, start, 9, options))) > short + 40 * frame


def test_a_window_is_told_what_holds_at_its_first_frame(known_base):
    timeline = Timeline({0: labels(1.0, 2.0), 2: labels(3.0, 4.0)})
    keys = torch.zeros(2, 4, 4, 2, 3)
    options = ContextSampling(num_inference_steps=4, batch_size=64)
    made = sample_interpolation(known_base(between), RATES, timeline, keys, options, rate=0.0)
    expected = torch.tensor([[1.0, 1.0, 3.0], [2.0, 2.0, 4.0]])[:, None, :, None, None]
    torch.testing.assert_close(made[:, :, 2::4], expected.expand(2, 4, 3, 2, 3), rtol=1e-3, atol=1e-2)
    finer = sample_interpolation(known_base(between), RATES, timeline.stretched(4), made, options, rate=0.0)
    torch.testing.assert_close(
        finer[:, :, [2, 34]] - made[:, :, [0, 8]] / 2 - made[:, :, [1, 9]] / 2,
        torch.tensor([[1.0, 3.0], [2.0, 4.0]])[:, None, :, None, None].expand(2, 4, 2, 2, 3),
        rtol=1e-3,
        atol=1e-2,
    )


def test_guidance_moves_away_from_what_is_told_in_place_of_nothing(known_base):
    options = ContextSampling(num_inference_steps=4, guidance_scale=3.0, batch_size=8)
    made = sample_interpolation(
        known_base(between),
        RATES,
        labels(1.0, 2.0),
        torch.zeros(2, 4, 3, 2, 3),
        options,
        rate=0.0,
        negative=labels(-1.0, -2.0),
    )
    expected = torch.tensor([-1 + 3 * 2.0, -2 + 3 * 4.0])[:, None, None, None, None]
    torch.testing.assert_close(made[:, :, 2::4], expected.expand(2, 4, 2, 2, 3), rtol=1e-3, atol=1e-2)


class TestFolder:
    """Frames kept in a folder."""

    def run(self, base, folder, keys=None, options=NOISY, told=None, **how):
        keys = torch.arange(6.0)[None, None, :, None, None].expand(1, 4, 6, 2, 3) if keys is None else keys
        told = labels(1.0) if told is None else told
        return interpolate_windows(base, RATES, told, keys, options, folder=folder, **{"rate": 0.0, **how})

    @pytest.mark.parametrize("done", [0, 1, 3, 5])
    def test_resumed_is_the_uninterrupted_run(self, unsure_base, tmp_path, done):
        whole = torch.cat(list(self.run(unsure_base, None)), dim=2)
        list(itertools.islice(self.run(unsure_base, tmp_path), done))
        assert torch.equal(torch.cat(list(self.run(unsure_base, tmp_path)), dim=2), whole)
        unsure_base.predict = None  # not asked any more
        assert torch.equal(torch.cat(list(self.run(unsure_base, tmp_path)), dim=2), whole)

    def test_anything_else_is_refused(self, unsure_base, tmp_path):
        list(self.run(unsure_base, tmp_path))
        for how, text in (
            (
                {"options": FEW},
                r"LatentStore: .* expected latents of the same settings, got some with options.num_inference_steps=2",
            ),
            ({"rate": 1.0}, r"got some with rate=0.0 in place of 1.0"),
            ({"pairs": 2}, r"got some with pairs=1 in place of 2"),
        ):
            with pytest.raises(ValueError, match=text):
                self.run(unsure_base, tmp_path, **how)
        for how in ({"keys": torch.zeros(1, 4, 6, 2, 3)}, {"told": labels(2.0)}, {"negative": labels(1.0)}):
            with pytest.raises(ValueError, match=r"latents-000000.* go on from the same frames with the same cond"):
                list(self.run(unsure_base, tmp_path, **how))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: interpolation_windows(1), r"interpolation_windows: expected more than pairs=1 given frames .* got 1"),
        (lambda: interpolation_windows(3, 0), r"interpolation_windows: expected more than pairs=0 .* one pair, got 3"),
        (
            lambda: interpolate_windows(None, RATES, {}, known(1, 1), rate=0.0),
            r"interpolation_windows: expected more than pairs=1 given frames .* got 1",
        ),
        (
            lambda: list(interpolate_windows(None, RATES, {}, [known(1, 1), known(1, 1)], rate=0.0, pairs=2)),
            r"interpolation_windows: expected more than pairs=2 given frames .* got 2",
        ),
        (lambda: interpolate_windows(None, RATES, {}, [], rate=0.0, pairs=0), r"expected more than pairs=0 .* got 1"),
        (lambda: list(interpolate_windows(None, RATES, {}, [], rate=0.0)), r"more than pairs=1 given frames .* got 0"),
        (
            lambda: list(interpolate_windows(None, RATES, {}, known(3, 2), ContextSampling(seed=(1, 2)), rate=0.0)),
            r"ContextSampling: seed: .* each of 3 clips, got \(1, 2\)",
        ),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
