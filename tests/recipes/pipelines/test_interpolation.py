"""Interpolation as a pipeline: the same as by hand, in parts, resumed; 8 frames, 29 and 113; the shipped model."""

import io
import itertools

import pytest
import torch

from temporal_layers.adapters import TemporalConfig, inject
from temporal_layers.recipes.bases import LabelBase
from temporal_layers.recipes.conditioning import ContextPlanes
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm
from temporal_layers.recipes.pipelines.interpolation import VideoInterpolationPipeline
from temporal_layers.recipes.pipelines.prediction import VideoPredictionPipeline
from temporal_layers.recipes.sampling.context import ContextSampling
from temporal_layers.recipes.sampling.interpolation import sample_interpolation
from temporal_layers.recipes.stages.context import with_context
from temporal_layers.recipes.stages.video import load_shipped_adapter

SHORT = {"num_inference_steps": 2, "eta": 0.5, "output_type": "latent"}
PLANES = ContextPlanes(max_noise_level=250, rate=True)


def make_pipeline(randomise, planes):
    sizes = ImageLDMConfig(height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 16), num_heads=2, context_dim=8)
    model = build_image_ldm(sizes, ("day", "night"))
    planes.note(randomise(inject(model.unet, TemporalConfig(context=planes.config()))))
    made = VideoInterpolationPipeline.from_image_pipeline(model)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pipeline(randomise):
    return make_pipeline(randomise, PLANES)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def keys(clips=1, count=3):
    return torch.randn(clips, 4, count, 8, 12, generator=torch.Generator().manual_seed(0))


def test_it_is_the_interpolation_of_the_parts(pipeline):
    how = {"guidance_scale": 3.0, "context_noise_level": 50, "batch_size": 3}
    made = pipeline(["day", "night"], frames_latents=keys(2), generator=seeded(1, 2), **SHORT, **how).frames
    seeds = tuple(int(torch.randint(2**62, (), generator=generator)) for generator in seeded(1, 2))
    options = ContextSampling(
        num_inference_steps=2, eta=0.5, guidance_scale=3.0, noise_level=50, batch_size=3, seed=seeds
    )
    base = pipeline.base
    told = base.conditioning([0, 1], ["", ""])
    middle = sample_interpolation(base, PLANES, told, keys(2), options, rate=0.0)
    expected = sample_interpolation(base, PLANES, told, middle, options, rate=1.0)
    torch.testing.assert_close(made, expected)
    assert made.shape == (2, 4, 33, 8, 12) and torch.equal(made[:, :, ::16], keys(2))
    level = {"levels": 1, "first_level": 1, "frames_latents": middle}
    torch.testing.assert_close(
        pipeline(["day", "night"], generator=seeded(1, 2), **level, **SHORT, **how).frames, expected
    )


def between(self, noisy, timestep, conditioning, frame_context):
    """Linear interpolation between the given frames, plus 1 in the last channel where the rate is told to be 1."""
    given = torch.nonzero(frame_context[0, 4, :, 0, 0]).flatten().tolist()
    clean = torch.zeros_like(noisy)
    for left, right in itertools.pairwise(given):
        for frame in range(left, right + 1):
            share = (frame - left) / (right - left)
            clean[:, :, frame] = (1 - share) * frame_context[:, :4, left] + share * frame_context[:, :4, right]
    clean[:, 3] += frame_context[:, -1]
    bar = self.scheduler.alphas_cumprod[timestep]
    if bar == 0:
        return -clean
    noise = (noisy - bar.sqrt() * clean) / (1 - bar).sqrt()
    return bar.sqrt() * noise - (1 - bar).sqrt() * clean


@pytest.mark.parametrize("pairs", [1, 3])
def test_eight_frames_become_29_and_then_113(pipeline, monkeypatch, pairs):
    monkeypatch.setattr(LabelBase, "predict", between)
    start = torch.arange(8.0)[None, None, :, None, None].expand(1, 4, 8, 8, 12)
    how = {"frames_latents": start, "pairs": pairs, "batch_size": 8, **SHORT}
    once = pipeline(levels=1, **how).frames
    torch.testing.assert_close(once[0, 0, :, 0, 0], torch.arange(29.0) / 4, rtol=1e-3, atol=1e-2)
    twice = pipeline(**how).frames
    assert once.shape[2] == 29 and twice.shape[2] == 113
    torch.testing.assert_close(twice[0, 0, :, 0, 0], torch.arange(113.0) / 16, rtol=1e-3, atol=1e-2)
    told = twice[0, 3, :, 0, 0] - torch.arange(113.0) / 16
    expected = torch.tensor([0.0 if frame % 4 == 0 else 1.0 for frame in range(113)])  # of the second level alone
    torch.testing.assert_close(told, expected, rtol=1e-3, atol=1e-2)


def test_what_is_handed_out_is_the_whole_run_and_resumed_it_is_too(pipeline, tmp_path):
    how = {"num_inference_steps": 2, "eta": 0.5, "frames_latents": keys()}
    whole = pipeline("day", generator=seeded(4), output_type="latent", **how).frames
    parts = list(pipeline.stream("day", generator=seeded(4), **how))
    assert torch.equal(torch.cat(parts, dim=2), whole) and len(parts) == 8
    for _ in range(2):  # interrupted, and gone on with
        list(itertools.islice(pipeline.stream("day", generator=seeded(4), folder=tmp_path, **how), 4))
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("latents-*"))
    assert [len([name for name in kept if name.startswith(f"level-{level}")]) for level in (0, 1)] == [1, 2]
    resumed = pipeline("day", generator=seeded(4), folder=tmp_path, output_type="latent", **how).frames
    assert torch.equal(resumed, whole)
    with pytest.raises(ValueError, match=r"LatentStore: .* got some with options.seed=.* in place of"):
        pipeline("day", generator=seeded(5), folder=tmp_path, **how)


def test_a_prompt_that_changes_is_counted_in_given_frames(pipeline):
    def run(prompt):
        return pipeline(prompt, frames_latents=keys(), generator=seeded(1), **SHORT).frames

    day, night, changing = run("day"), run("night"), run({0: "day", 1: "night"})
    torch.testing.assert_close(changing[:, :, :17], day[:, :, :17])
    torch.testing.assert_close(changing[:, :, 16:], night[:, :, 16:])
    assert not torch.allclose(day[:, :, 17:], night[:, :, 17:], atol=1e-3)


def test_frames_in_and_out(pipeline):
    frames = torch.rand(2, 3, 3, 16, 24)
    how = {**SHORT, "levels": 1, "output_type": "pt"}
    made = pipeline("day", frames, generator=seeded(1, 2), **how).frames
    assert made.shape == (2, 9, 3, 16, 24) and 0 <= made.min() <= made.max() <= 1
    latents = pipeline.encode_clips(frames.transpose(1, 2))
    torch.testing.assert_close(made[:, ::4], pipeline.decode_clips(latents).transpose(1, 2))
    again = pipeline("day", frames_latents=latents, generator=seeded(1, 2), **how).frames
    torch.testing.assert_close(again, made)
    several = pipeline("day", frames[:1], num_videos_per_prompt=2, generator=seeded(1, 3), **how).frames
    torch.testing.assert_close(several[0], made[0])
    assert not torch.allclose(several[1], several[0], atol=1e-3)


def test_steps_are_counted_over_all_windows_and_levels(pipeline, monkeypatch):
    bars, progress_bar, seen = [], pipeline.progress_bar, []
    monkeypatch.setattr(LabelBase, "predict", lambda self, noisy, *told, **temporal: noisy)
    monkeypatch.setattr(pipeline, "progress_bar", lambda **how: bars.append(progress_bar(**how)) or bars[-1])

    def callback(pipe, step, timestep, inputs):
        seen.append(step)

    pipeline.set_progress_bar_config(disable=False, file=io.StringIO())
    # Two windows and then eight.
    for clips, batch_size, loops in ((1, 1, 2 + 8), (1, 3, 1 + 3), (2, 4, 1 + 4), (2, 3, 2 + 8), (3, 2, 2 * 2 + 8 * 2)):
        seen.clear()
        how = {"frames_latents": keys(clips), "batch_size": batch_size, "callback_on_step_end": callback, **SHORT}
        pipeline(**how)
        assert seen == list(range(2 * loops)) and (bars[-1].n, bars[-1].total) == (2 * loops, 2 * loops)


def test_interrupted_it_ends_with_whole_windows(pipeline):
    def callback(pipe, step, timestep, inputs):
        pipe._interrupt = step == 4

    how = {"frames_latents": keys(), "batch_size": 1, "levels": 1, **SHORT}
    whole = pipeline("day", generator=seeded(1), **{**how, "frames_latents": keys(count=5)}).frames
    made = pipeline(
        "day", generator=seeded(1), callback_on_step_end=callback, **{**how, "frames_latents": keys(count=5)}
    ).frames
    assert torch.equal(made, whole[:, :, :9])


def test_saved_and_loaded_it_gives_the_same(pipeline, tmp_path):
    expected = pipeline("night", frames_latents=keys(), generator=seeded(1), **SHORT).frames
    pipeline.save_pretrained(tmp_path)
    loaded = VideoInterpolationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded("night", frames_latents=keys(), generator=seeded(1), **SHORT).frames, expected)


def test_a_model_that_is_not_told_the_rate(randomise):
    pipeline = make_pipeline(randomise, ContextPlanes())
    assert pipeline(frames_latents=keys(), **SHORT).frames.shape[2] == 33
    with pytest.raises(ValueError, match=r"first_level: expected 0, as the model is not told the rate, got 1"):
        pipeline(frames_latents=keys(), levels=1, first_level=1)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({}, r"VideoInterpolationPipeline: frames: expected it or frames_latents, got none"),
        ({"frames_latents": keys(), "levels": 3}, r"at least one level, of 2 .* got levels=3 and first_level=0"),
        ({"frames_latents": keys(), "first_level": 1}, r"at least one level, of 2 .* got levels=2 and first_level=1"),
        ({"frames_latents": keys(), "levels": 0}, r"at least one level, .* got levels=0"),
        ({"frames_latents": keys(count=1)}, r"interpolation_windows: expected more than pairs=1 given frames .* got 1"),
        ({"frames_latents": keys(), "output_type": "gif"}, r"output_type: expected one of pil"),
        (
            {"frames_latents": keys(2), "generator": seeded(1)},
            r"VideoInterpolationPipeline: generator: expected one, or one for each of 2 clips, got 1",
        ),
    ],
)
def test_refusals(pipeline, how, text):
    with pytest.raises(ValueError, match=text):
        pipeline(**how)


def test_the_shipped_model_predicts_and_interpolates():
    """The shipped temporal layers, made to take given frames: two steps each, from a label to 13 frames."""
    base, _ = load_shipped_adapter()
    with_context(base, PLANES, None, "both")
    options = {"num_inference_steps": 2, "output_type": "latent"}
    predict = VideoPredictionPipeline.from_image_pipeline(base.ldm)
    interpolate = VideoInterpolationPipeline.from_image_pipeline(base.ldm)
    for pipeline in (predict, interpolate):
        pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    first = predict("night rain", num_frames=4, window=4, **options).frames
    key_frames = predict("night rain", image_latents=first[:, :, :2], num_frames=4, window=4, **options).frames
    assert torch.equal(key_frames[:, :, :2], first[:, :, :2])
    filled = interpolate("night rain", frames_latents=key_frames, levels=1, batch_size=3, **options).frames
    assert filled.shape == (1, 4, 13, 16, 24) and torch.equal(filled[:, :, ::4], key_frames)
    frames = interpolate.decode_clips(filled)
    days = interpolate.decode_clips(predict("day clear", num_frames=4, window=4, **options).frames)
    assert frames.shape == (1, 3, 13, 64, 96) and frames.mean() < days.mean()
