"""Roll-outs: against closed forms; the same handed out in parts, resumed, and from several seeds."""

import itertools

import pytest
import torch

from temporal_layers.recipes.conditioning import ContextPlanes
from temporal_layers.recipes.sampling.context import ContextSampling
from temporal_layers.recipes.sampling.prediction import predict_windows, prediction_windows, sample_prediction
from temporal_layers.recipes.sampling.timeline import Timeline

FEW = ContextSampling(num_inference_steps=4)
NOISY = ContextSampling(num_inference_steps=2, eta=0.5, context_scale=1.5)


def known(clips=3, frames=4):
    return torch.randn(clips, 4, frames, 2, 3)


def labels(*values):
    return {"labels": torch.tensor(values)}


def go_on(context, conditioning):
    """A frame is the one before it plus the step between the last two given; plus 1 if only one is given."""
    mask = context[:, 4, :, 0, 0]
    count = int(mask[0].sum())
    assert (mask[:, :count] == 1).all() and (mask[:, count:] == 0).all()
    last = context[:, :4, count - 1]
    step = last - context[:, :4, count - 2] if count > 1 else torch.ones_like(last)
    away = torch.arange(context.shape[2]) - (count - 1)
    return last[:, :, None] + step[:, :, None] * away[None, None, :, None, None]


@pytest.mark.parametrize("num_frames", [3, 5, 8, 11])
def test_a_roll_out_goes_on_from_the_last_frames(known_base, num_frames):
    first = known(2, 1)
    base = known_base(go_on)
    made = sample_prediction(base, ContextPlanes(), labels(0.0, 0.0), first, num_frames, FEW, window=5)
    expected = first + torch.arange(float(num_frames))[None, None, :, None, None]
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=2e-3)
    assert torch.equal(made[:, :, :1], first)
    given = [int(context[0, 4, :, 0, 0].sum()) for context in base.calls]
    assert given[0] == 1 and set(given[4:]) <= {2}  # 4 calls a window: one frame first, then two


def test_a_roll_out_knows_the_speed_of_two_frames(known_base):
    first = known(1, 3)
    made = sample_prediction(known_base(go_on), ContextPlanes(), labels(0.0), first, 7, FEW, window=4)
    step = first[:, :, 2] - first[:, :, 1]
    for ahead in range(1, 5):
        torch.testing.assert_close(made[:, :, 2 + ahead], first[:, :, 2] + ahead * step, rtol=1e-3, atol=5e-3)


def test_windows_of_a_roll_out():
    assert prediction_windows(20, first=1, window=8) == [(0, 1), (6, 2), (12, 2)]
    assert prediction_windows(8, first=1, window=8) == [(0, 1)]
    assert prediction_windows(1, first=1, window=8) == []
    assert prediction_windows(16, first=0, window=8) == [(0, 0), (6, 2), (12, 2)]
    assert prediction_windows(9, first=4, window=4, overlap=1) == [(3, 1), (6, 1)]
    for num_frames in range(2, 40):
        covered = [1]
        for start, given in prediction_windows(num_frames, first=1, window=5):
            assert start + given == len(covered) and given == min(2, len(covered))
            covered += [1] * (5 - given)
        assert len(covered) >= num_frames > len(covered) - 5


@pytest.mark.parametrize("first", [0, 1, 3])
def test_what_is_handed_out_is_the_whole_run(unsure_base, first):
    start = known(2, first)
    arguments = (unsure_base, ContextPlanes(), labels(1.0, 2.0), start, 15, NOISY)
    parts = list(predict_windows(*arguments, window=5))
    whole = sample_prediction(*arguments, window=5)
    assert torch.equal(torch.cat(parts, dim=2), whole) and whole.shape[2] == 15
    sizes = [first] if first else []
    for _, given in prediction_windows(15, first=first, window=5):
        sizes.append(min(5 - given, 15 - sum(sizes)))
    assert [part.shape[2] for part in parts] == sizes
    assert torch.equal(whole[:, :, :first], start)


def test_a_longer_roll_out_begins_with_a_shorter_one(unsure_base):
    arguments = (unsure_base, ContextPlanes(), labels(1.0), known(1, 1))
    longer = sample_prediction(*arguments, 30, NOISY, window=5)
    assert torch.equal(sample_prediction(*arguments, 12, NOISY, window=5), longer[:, :, :12])


def test_clips_that_begin_with_nothing_go_on_from_their_own_frames(known_base):
    """The first window is what the model says of nothing, here the label; those behind it count on."""

    def begin(context, conditioning):
        if context[0, 4].any():
            return go_on(context, conditioning)
        steps = torch.arange(float(context.shape[2]))[None, None, :, None, None]
        return (conditioning["labels"][:, None, None, None, None] + steps).expand_as(context[:, :4])

    base = known_base(begin)
    options = ContextSampling(num_inference_steps=4, context_scale=1.5)
    planes, nothing = ContextPlanes(), torch.empty(2, 4, 0, 2, 3)
    made = sample_prediction(base, planes, labels(3.0, 7.0), nothing, 5, FEW, window=5)
    expected = torch.tensor([3.0, 7.0])[:, None, None, None, None] + torch.arange(5.0)[None, None, :, None, None]
    torch.testing.assert_close(made, expected.expand_as(made), rtol=1e-3, atol=2e-3)
    longer = sample_prediction(base, planes, labels(3.0, 7.0), nothing, 9, FEW, window=5)
    assert torch.equal(longer[:, :, :5], made)
    torch.testing.assert_close(longer[:, :, 8], made[:, :, 4] + 4, rtol=1e-3, atol=2e-2)
    sample_prediction(base, planes, labels(3.0, 7.0), nothing, 5, options, window=5)
    assert len(base.calls[-1]) == 2  # guidance towards no frame is left out


def test_seeds_are_several_futures_of_one_start(unsure_base):
    start = known(1, 1).repeat(3, 1, 1, 1, 1)
    options = ContextSampling(num_inference_steps=2, eta=0.5, seed=(0, 1, 2))
    arguments = (unsure_base, ContextPlanes())
    futures = sample_prediction(*arguments, labels(1.0, 1.0, 1.0), start, 14, options, window=5)
    for one, other in itertools.combinations(range(3), 2):
        assert not torch.allclose(futures[one, :, 1:], futures[other, :, 1:], atol=1e-2)
    alone = ContextSampling(num_inference_steps=2, eta=0.5, seed=1)
    torch.testing.assert_close(
        sample_prediction(*arguments, labels(1.0), start[:1], 14, alone, window=5)[0], futures[1]
    )


def test_no_window_repeats_the_noise_of_another_nor_of_another_seed(known_base):
    """A model that says what it sees lets the noise through: no two windows of any seed are alike."""
    base = known_base(None)
    base.predict = lambda noisy, timestep, conditioning, frame_context: -noisy
    start, seen = torch.zeros(1, 4, 2, 2, 3), []
    for seed in range(3):
        options = ContextSampling(num_inference_steps=1, seed=seed)
        parts = predict_windows(base, ContextPlanes(), labels(0.0), start, 20, options, window=5)
        seen += [part for part in parts if part.shape[2] == 3]
    assert len(seen) == 18
    for one, other in itertools.combinations(seen, 2):
        assert not torch.allclose(one, other, atol=1e-2)


def test_a_window_is_told_what_holds_at_its_first_new_frame(known_base):
    def told(context, conditioning):
        return conditioning["labels"][:, None, None, None, None].expand_as(context[:, :4])

    timeline = Timeline({0: labels(1.0, 2.0), 6: labels(3.0, 4.0), 8: labels(5.0, 6.0)})
    made = sample_prediction(known_base(told), ContextPlanes(), timeline, known(2, 1), 14, FEW, window=5)
    # New frames 1-4, 5-7, 8-10 and 11-13.
    expected = torch.tensor([[1.0] * 7 + [5.0] * 6, [2.0] * 7 + [6.0] * 6])[:, None, :, None, None]
    torch.testing.assert_close(made[:, :, 1:], expected.expand_as(made[:, :, 1:]), rtol=1e-3, atol=1e-2)


def test_memory_does_not_grow_with_the_length(unsure_base, peak):
    options, start, frame = ContextSampling(num_inference_steps=1), torch.zeros(1, 4, 1, 16, 16), 4 * 16 * 16 * 4
    arguments = (unsure_base, ContextPlanes(), labels(0.0), start)

    def run(num_frames):
        for part in predict_windows(*arguments, num_frames, options, window=5):
            assert part.shape[2] <= 4

    run(6)
    short, long = (peak(lambda num_frames=num_frames: run(num_frames)) for num_frames in (9, 30))
    assert long <= short < peak(lambda: sample_prediction(*arguments, 30, options, window=5)) - 10 * frame


class TestFolder:
    """Frames kept in a folder."""

    def run(self, base, folder, num_frames=15, options=NOISY, told=None, first=None, **how):
        first = torch.ones(2, 4, 1, 2, 3) if first is None else first
        told = labels(1.0, 2.0) if told is None else told
        return predict_windows(
            base, ContextPlanes(), told, first, num_frames, options, folder=folder, **{"window": 5, **how}
        )

    @pytest.fixture
    def whole(self, unsure_base):
        return torch.cat(list(self.run(unsure_base, None)), dim=2)

    @pytest.mark.parametrize("done", range(5))
    def test_resumed_is_the_uninterrupted_run(self, unsure_base, tmp_path, whole, done):
        list(itertools.islice(self.run(unsure_base, tmp_path), done))
        predict, windows = unsure_base.predict, []
        unsure_base.predict = lambda *args, **kwargs: windows.append(1) or predict(*args, **kwargs)
        made = torch.cat(list(self.run(unsure_base, tmp_path)), dim=2)
        assert torch.equal(made, whole)
        assert len(windows) == 2 * (5 - max(done - 1, 0))  # two steps a window; the first part is the start
        assert torch.equal(torch.cat(list(self.run(not_asked(unsure_base), tmp_path)), dim=2), whole)

    def test_it_can_be_made_longer(self, unsure_base, tmp_path, whole):
        list(self.run(unsure_base, tmp_path, num_frames=7))  # ends within a window
        assert torch.equal(torch.cat(list(self.run(unsure_base, tmp_path)), dim=2), whole)

    def test_the_future_may_change_and_the_past_may_not(self, unsure_base, tmp_path):
        list(self.run(unsure_base, tmp_path, num_frames=8))
        changed = Timeline({0: labels(1.0, 2.0), 8: labels(5.0, 5.0)})
        list(self.run(unsure_base, tmp_path, told=changed))
        with pytest.raises(
            ValueError, match=r"LatentStore: .*latents-000002.* expected latents that go on from the same"
        ):
            list(self.run(unsure_base, tmp_path))

    def test_anything_else_is_refused(self, unsure_base, tmp_path):
        list(self.run(unsure_base, tmp_path, num_frames=8))
        seed = ContextSampling(num_inference_steps=2, eta=0.5, context_scale=1.5, seed=1)
        for how, text in (
            (
                {"options": seed},
                r"LatentStore: .* expected latents of the same settings, got some with options.seed=0 in place of 1",
            ),
            ({"window": 6}, r"got some with window=5 in place of 6; name another folder"),
            ({"overlap": 1}, r"got some with overlap=2 in place of 1"),
        ):
            with pytest.raises(ValueError, match=text):
                self.run(unsure_base, tmp_path, **how)
        for how in ({"first": torch.zeros(2, 4, 1, 2, 3)}, {"told": labels(1.0, 3.0)}, {"negative": labels(1.0, 1.0)}):
            with pytest.raises(ValueError, match=r"latents-000000.* go on from the same frames with the same cond"):
                list(self.run(unsure_base, tmp_path, **how))
        unsure_base.weight += 1
        with pytest.raises(ValueError, match=r"got some with unet='\w+' in place of '\w+'"):
            self.run(unsure_base, tmp_path)


def not_asked(base):
    """A base that must not be asked."""
    base.predict = None
    return base


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: prediction_windows(5, first=-1, window=4), r"prediction_windows: .* no frame or more .* got first=-1"),
        (lambda: prediction_windows(5, first=1, window=2), r"prediction_windows: .* below window=2, got .* overlap=2"),
        (
            lambda: predict_windows(None, None, {}, known(3, 1), 5, ContextSampling(seed=(1, 2))),
            r"ContextSampling: seed: .* each of 3 clips, got \(1, 2\)",
        ),
        (lambda: Timeline({}), r"Timeline: expected a part that holds from frame 0 on, .* got parts from frames \[\]"),
        (lambda: Timeline({0: {}, -1: {}}), r"Timeline: .* none before, got parts from frames \[-1, 0\]"),
        (
            lambda: Timeline({0: labels(1.0), 4: labels(1.0, 2.0)}),
            r"Timeline: expected parts of the names and shapes .* \{'labels': \(1,\)\}, got .*\(2,\)\} from frame 4",
        ),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
