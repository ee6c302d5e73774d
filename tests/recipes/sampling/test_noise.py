"""Noise that clips begin with: its distribution, against closed forms with bounds that follow from the sample size."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from temporal_layers.recipes.denoising import clip_noise
from temporal_layers.recipes.sampling.noise import clip_generators, clips_of_noise, one_a_clip, windows_of_noise

SIGMAS = 5
"""Of a sample's deviation: beyond it by chance once in two million."""


def make(kind, shape=(4, 6, 48, 64), clips=1, seed=0):
    generators = clip_generators(seed, range(clips))
    if kind == "windows":
        return windows_of_noise(shape, generators, window=4, step=2)
    options = {
        "independent": {},
        "mixed": {"correlation": 0.6},
        "progressive": {"correlation": 0.6, "progressive": True},
    }
    return clips_of_noise(shape, generators, **options[kind])


KINDS = ("independent", "mixed", "progressive", "windows")


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_standard_normal(kind):
    for frame in make(kind)[0].unbind(1):
        values = frame.flatten().double().numpy()
        assert stats.kstest(values, "norm").pvalue > 1e-4
        assert abs(values.mean()) < SIGMAS / len(values) ** 0.5
        assert abs(values.var() - 1) < SIGMAS * (2 / len(values)) ** 0.5
        # No correlation within the frame either, from pixel to pixel and from channel to channel.
        assert abs((frame[:, :, 1:] * frame[:, :, :-1]).mean()) < SIGMAS / len(values) ** 0.5
        assert abs((frame[1:] * frame[:-1]).mean()) < SIGMAS / (len(values) * 3 / 4) ** 0.5


def covariance(kind, frames=6):
    """Of the frames, in closed form."""
    distance = (torch.arange(frames)[:, None] - torch.arange(frames)).abs().double()
    if kind == "mixed":
        return torch.where(distance == 0, 1.0, 0.6)
    return 0.6**distance if kind == "progressive" else (distance == 0).double()


@pytest.mark.parametrize("kind", ["independent", "mixed", "progressive"])
def test_frames_have_the_covariance_of_the_paper(kind):
    frames = make(kind)[0].transpose(0, 1).flatten(1).double()
    found, expected = frames @ frames.T / frames.shape[1], covariance(kind)
    # Wishart: the variance of an entry is (1 + r^2) / n.
    deviation = ((1 + expected.square()) / frames.shape[1]).sqrt()
    assert ((found - expected).abs() < SIGMAS * deviation).all()


def test_progressive_noise_is_the_recursion_of_the_paper():
    """With its alpha, and with the same draws."""
    alpha, shape = 1.3, (2, 5, 3, 4)
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    frames = [draws[:, 0]]
    for frame in draws.unbind(1)[1:]:
        frames.append(alpha / (1 + alpha**2) ** 0.5 * frames[-1] + frame / (1 + alpha**2) ** 0.5)
    generator = torch.Generator().manual_seed(1)
    correlation = (alpha**2 / (1 + alpha**2)) ** 0.5
    made = clip_noise(shape, correlation=correlation, progressive=True, generator=generator)
    torch.testing.assert_close(made, torch.stack(frames, dim=1))


def test_progressive_noise_of_correlation_one_stands_still():
    made = clip_noise((3, 4, 5, 5), correlation=1.0, progressive=True)
    assert torch.equal(made, made[:, :1].expand_as(made))


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_depends_on_seed_and_place_alone(kind):
    three = make(kind, clips=3, shape=(2, 6, 3, 4))
    assert torch.equal(three[:1], make(kind, shape=(2, 6, 3, 4)))
    assert torch.equal(three, make(kind, clips=3, shape=(2, 6, 3, 4)))
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(three, make(kind, clips=3, shape=(2, 6, 3, 4), seed=1))


@given(st.integers(1, 9), st.integers(1, 30), st.data())
def test_every_window_has_all_frames_of_the_first(window, num_frames, data):
    step, seed = data.draw(st.integers(1, window)), data.draw(st.integers(0, 9))
    shape = (3, num_frames, 2, 2)
    noise = windows_of_noise(shape, clip_generators(seed, range(2)), window=window, step=step)
    assert noise.shape == (2, *shape)
    first = clips_of_noise((3, min(window, num_frames), 2, 2), clip_generators(seed, range(2)))
    assert torch.equal(noise[:, :, :window], first)
    for start in range(0, num_frames - window + 1, step):
        for clip in range(2):  # whole frames are moved, so that one value tells which one it is
            part = noise[clip, :, start : start + window]
            assert torch.equal(part[:, part[0, :, 0, 0].argsort()], first[clip][:, first[clip][0, :, 0, 0].argsort()])


def test_orders_are_shuffled_and_those_of_a_clip_its_own():
    noise = windows_of_noise((1, 64, 1, 1), clip_generators(0, range(2)), window=16, step=8).flatten(1)
    one, two = (clip.argsort(stable=True) for clip in noise)
    assert not torch.equal(one, two)
    assert len({tuple(noise[0, start : start + 16].tolist()) for start in range(0, 49, 8)}) == 7


def test_windows_of_noise_move_on():
    for step in (0, 5):
        with pytest.raises(ValueError, match=rf"windows_of_noise: step: expected 1 to the 4 frames .*, got {step}"):
            windows_of_noise((1, 8, 1, 1), clip_generators(0, range(2)), window=4, step=step)


def test_windows_of_noise_may_be_mixed_or_progressive():
    options = {"correlation": 0.8, "progressive": True}
    noise = windows_of_noise((1, 9, 2, 2), clip_generators(3, [0]), window=4, step=2, **options)
    assert torch.equal(noise[:, :, :4], clips_of_noise((1, 4, 2, 2), clip_generators(3, [0]), **options))


def test_sources_are_none_one_or_one_a_clip():
    one, other = torch.Generator(), torch.Generator()
    assert one_a_clip("Pipeline", one, 2) == [one, one]
    assert one_a_clip("Pipeline", (one, other), 2) == [one, other]
    assert one_a_clip("Pipeline", None, 2) == [torch.default_generator] * 2
    for seed in (3, [one, 3]):
        with pytest.raises(
            ValueError, match=r"Pipeline: generator: expected a torch.Generator or a list .*manual_seed"
        ):
            one_a_clip("Pipeline", seed, 2)
    with pytest.raises(ValueError, match=r"Pipeline: generator: expected one on the CPU, or .* 3 clips, got 2 on cpu"):
        one_a_clip("Pipeline", [one, other], 3)
    elsewhere = Mock(spec=torch.Generator, device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"Pipeline: generator: expected one on the CPU, .* got 2 on cpu, cuda"):
        one_a_clip("Pipeline", [one, elsewhere], 2)
