"""Roll-outs as a pipeline: the same as by hand, in parts, resumed, of several futures, from any kind of model."""

import io
import itertools

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from temporal_layers.adapters import TemporalConfig, inject
from temporal_layers.recipes.bases import LabelBase
from temporal_layers.recipes.conditioning import ContextPlanes
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm
from temporal_layers.recipes.pipelines.context import Interrupted
from temporal_layers.recipes.pipelines.prediction import VideoPredictionPipeline
from temporal_layers.recipes.sampling.context import ContextSampling
from temporal_layers.recipes.sampling.prediction import sample_prediction

SHORT = {"num_inference_steps": 2, "window": 4, "eta": 0.5, "output_type": "latent"}


@pytest.fixture
def pipeline(randomise):
    sizes = ImageLDMConfig(height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 16), num_heads=2, context_dim=8)
    model, planes = build_image_ldm(sizes, ("day", "night")), ContextPlanes(max_noise_level=250)
    planes.note(randomise(inject(model.unet, TemporalConfig(context=planes.config()))))
    made = VideoPredictionPipeline.from_image_pipeline(model)
    made.set_progress_bar_config(disable=True)
    return made


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def streamed(pipeline, *args, **how):
    how = {name: value for name, value in {**SHORT, **how}.items() if name != "output_type"}
    return pipeline.stream(*args, **how)


def drawn(*seeds):
    """What the pipeline draws of generators."""
    return tuple(int(torch.randint(2**62, (), generator=generator)) for generator in seeded(*seeds))


def test_it_is_the_roll_out_of_the_parts(pipeline):
    image = torch.rand(2, 1, 3, 16, 24)
    how = {"guidance_scale": 3.0, "context_guidance_scale": 1.5, "context_noise_level": 50}
    made = pipeline(["day", "night"], image, num_frames=9, generator=seeded(1, 2), **SHORT, **how).frames
    options = ContextSampling(
        num_inference_steps=2,
        guidance_scale=3.0,
        context_scale=1.5,
        noise_level=50,
        eta=0.5,
        seed=drawn(1, 2),
    )
    base = pipeline.base
    first = torch.stack([base.encode(clip) for clip in image], dim=0).transpose(1, 2)
    expected = sample_prediction(
        base, pipeline.planes, base.conditioning([0, 1], ["", ""]), first, 9, options, window=4
    )
    torch.testing.assert_close(made, expected)
    assert made.shape == (2, 4, 9, 8, 12)


def go_on(self, noisy, timestep, conditioning, frame_context):
    """A frame is the last one given plus 1 for each frame away from it; 0 before the first, if none is given."""
    count = int(frame_context[0, 4, :, 0, 0].sum())
    last = frame_context[:, :4, count - 1] if count else torch.full_like(noisy[:, :, 0], -1)
    clean = last[:, :, None] + (torch.arange(noisy.shape[2]) - (count - 1))[None, None, :, None, None]
    bar = self.scheduler.alphas_cumprod[timestep]
    if bar == 0:
        return -clean
    noise = (noisy - bar.sqrt() * clean) / (1 - bar).sqrt()
    return bar.sqrt() * noise - (1 - bar).sqrt() * clean


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_model_that_counts_counts_over_all_windows(pipeline, monkeypatch, first):
    monkeypatch.setattr(LabelBase, "predict", go_on)
    start = torch.arange(float(first))[None, None, :, None, None].expand(1, 4, first, 8, 12)
    given = {"image_latents": start} if first else {}
    made = pipeline(num_frames=14, **given, **SHORT).frames
    expected = torch.arange(14.0)[None, None, :, None, None].expand_as(made)
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-2)


def test_what_is_handed_out_is_the_whole_run_and_resumed_it_is_too(pipeline, tmp_path):
    def call(method, **how):
        return method("day", torch.rand(1, 3, 16, 24).round(), num_frames=11, generator=seeded(4)[0], **how)

    torch.manual_seed(0)
    whole = call(pipeline, **SHORT).frames
    torch.manual_seed(0)
    parts = list(call(lambda *args, **how: streamed(pipeline, *args, **how)))
    assert [part.shape[2] for part in parts] == [1, 3, 2, 2, 2, 1]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    for _ in range(2):  # interrupted, and gone on with
        torch.manual_seed(0)
        some = call(lambda *args, **how: streamed(pipeline, *args, **how), folder=tmp_path)
        list(itertools.islice(some, 3))
    torch.manual_seed(0)
    assert torch.equal(call(pipeline, folder=tmp_path, **SHORT).frames, whole)
    with pytest.raises(ValueError, match=r"LatentStore: .* got some with options.seed=.* in place of"):
        pipeline("day", num_frames=11, generator=seeded(5)[0], folder=tmp_path, **SHORT)


def test_futures_of_one_start_differ_and_do_not_depend_on_their_batch(pipeline):
    image = torch.rand(3, 16, 24)
    futures = pipeline("day", image, num_frames=8, num_videos_per_prompt=3, generator=seeded(1, 2, 3), **SHORT).frames
    for one, other in itertools.combinations(range(3), 2):
        assert torch.equal(futures[one, :, 0], futures[other, :, 0])
        assert not torch.allclose(futures[one, :, 1:], futures[other, :, 1:], atol=1e-2)
    alone = pipeline("day", image, num_frames=8, generator=seeded(2), batch_size=1, **SHORT).frames
    torch.testing.assert_close(alone[0], futures[1])
    single = pipeline("day", image, num_frames=8, num_videos_per_prompt=3, generator=seeded(1)[0], **SHORT).frames
    torch.testing.assert_close(single[0], futures[0])
    torch.manual_seed(3)
    first = pipeline("day", image, num_frames=8, **SHORT).frames
    assert not torch.equal(pipeline("day", image, num_frames=8, **SHORT).frames, first)
    torch.manual_seed(3)
    assert torch.equal(pipeline("day", image, num_frames=8, **SHORT).frames, first)


def test_clips_come_prompt_by_prompt(pipeline):
    images = torch.rand(2, 1, 3, 16, 24)
    seeds = seeded(1, 2, 3, 4)
    made = pipeline(["day", "night"], images, num_videos_per_prompt=2, num_frames=5, generator=seeds, **SHORT).frames
    for row, (prompt, image, seed) in enumerate([("day", 0, 1), ("day", 0, 2), ("night", 1, 3), ("night", 1, 4)]):
        alone = pipeline(prompt, images[image], num_frames=5, generator=seeded(seed), **SHORT).frames
        torch.testing.assert_close(alone[0], made[row])
    one_start = pipeline(["day", "night"], images[:1], num_frames=5, generator=seeded(1, 2), **SHORT).frames
    torch.testing.assert_close(one_start[0], made[0])
    one_prompt = pipeline("day", images, num_frames=5, generator=seeded(1, 2), **SHORT).frames
    torch.testing.assert_close(one_prompt[0], made[0])
    assert not torch.allclose(one_prompt[1], one_prompt[0], atol=1e-2)


def test_labels_by_name_and_by_number_and_none(pipeline):
    def run(prompt):
        return pipeline(prompt, num_frames=5, generator=seeded(1), **SHORT).frames

    night = run("night")
    assert torch.equal(run(1), night) and torch.equal(run(2), run(None)) and not torch.equal(run("day"), night)


def test_a_prompt_that_changes_holds_from_a_window_on(pipeline):
    def run(prompt, num_frames=9):
        return pipeline(prompt, num_frames=num_frames, generator=seeded(1), **SHORT).frames

    day, changing = run("day"), run({0: "day", 6: "night"})  # windows make frames 0-3, 4-5, 6-7, 8-9
    assert torch.equal(changing[:, :, :6], day[:, :, :6])
    assert not torch.allclose(changing[:, :, 6:8], day[:, :, 6:8], atol=1e-3)
    assert torch.equal(run({0: "night", 5: "day"}, num_frames=6), run("night", num_frames=6))  # in a window
    two = pipeline([{0: "day", 6: "night"}, "day"], num_frames=9, generator=seeded(1, 1), **SHORT).frames
    torch.testing.assert_close(two, torch.cat([changing, day]))


def test_frames_of_any_kind_come_in_and_go_out(pipeline):
    frames = torch.rand(1, 2, 3, 16, 24)
    array = frames.permute(0, 1, 3, 4, 2).numpy()
    how = {**SHORT, "num_frames": 5, "generator": None}

    def run(image, output_type="latent"):
        return pipeline("day", image, **{**how, "generator": seeded(1), "output_type": output_type}).frames

    latents = run(frames)
    assert torch.equal(run(frames[0]), latents) and torch.equal(run(array), latents)
    images = [Image.fromarray((255 * frame).round().astype(np.uint8)) for frame in array[0]]
    torch.testing.assert_close(run(images), latents, rtol=0.1, atol=0.1)  # 8 bits
    decoded = pipeline.decode_clips(latents)
    torch.testing.assert_close(run(frames, "pt"), decoded.transpose(1, 2))
    np.testing.assert_allclose(run(frames, "np"), decoded.permute(0, 2, 3, 4, 1).numpy(), atol=1e-6)
    assert [frame.size for clip in run(frames, "pil") for frame in clip] == [(24, 16)] * 5
    assert isinstance(pipeline("day", frames, return_dict=False, **how), tuple)
    encoded = pipeline.encode_clips(frames.transpose(1, 2))
    assert torch.equal(pipeline("day", image_latents=encoded, **{**how, "generator": seeded(1)}).frames, latents)


def test_sizes_other_than_that_of_training(pipeline):
    made = pipeline("day", torch.rand(3, 32, 16), num_frames=5, height=32, width=16, **SHORT).frames
    assert made.shape == (1, 4, 5, 16, 8)
    assert pipeline("day", num_frames=5, height=32, width=16, **SHORT).frames.shape == made.shape


def test_callbacks_count_over_all_windows(pipeline):
    seen = []

    def callback(pipe, step, timestep, inputs):
        seen.append((step, int(timestep), inputs["latents"].shape[0]))

    options = {**SHORT, "batch_size": 2}
    pipeline(
        "day", torch.rand(3, 16, 24), num_frames=9, num_videos_per_prompt=3, callback_on_step_end=callback, **options
    )
    # Four windows, each of two clips and then one, of two steps.
    assert [step for step, _, _ in seen] == list(range(16))
    assert [clips for _, _, clips in seen] == [2, 2, 1, 1] * 4
    assert [timestep for _, timestep, _ in seen] == [999, 499] * 8


def test_one_progress_bar_goes_to_its_end(pipeline, monkeypatch):
    bars, progress_bar = [], pipeline.progress_bar
    monkeypatch.setattr(pipeline, "progress_bar", lambda **how: bars.append(progress_bar(**how)) or bars[-1])
    pipeline.set_progress_bar_config(disable=False, file=io.StringIO())
    pipeline("day", num_frames=9, num_videos_per_prompt=3, **SHORT)
    assert [(bar.n, bar.total) for bar in bars] == [(16, 16)]


def test_a_callback_may_change_latents(pipeline):
    def callback(pipe, step, timestep, inputs):
        return {"latents": torch.full_like(inputs["latents"], step)}

    made = pipeline("day", num_frames=8, callback_on_step_end=callback, **SHORT).frames
    expected = torch.tensor([1.0] * 4 + [3.0] * 2 + [5.0] * 2)[None, None, :, None, None]
    assert torch.equal(made, expected.expand_as(made))


@pytest.mark.parametrize(("stop", "frames"), [(0, 1), (1, 4), (2, 4), (3, 6)])
def test_interrupted_it_ends_with_a_whole_window(pipeline, tmp_path, stop, frames):
    image = torch.rand(3, 16, 24)

    def callback(pipe, step, timestep, inputs):
        pipe._interrupt = step == stop

    how = {"num_frames": 12, **SHORT}
    whole = pipeline("day", image, generator=seeded(1), **how).frames
    made = pipeline("day", image, generator=seeded(1), folder=tmp_path, callback_on_step_end=callback, **how).frames
    assert torch.equal(made, whole[:, :, :frames])
    assert torch.equal(pipeline("day", image, generator=seeded(1), folder=tmp_path, **how).frames, whole)


def test_interrupted_before_there_is_a_frame(pipeline):
    def callback(pipe, step, timestep, inputs):
        pipe._interrupt = True

    with pytest.raises(Interrupted, match=r"VideoPredictionPipeline: interrupted before there was a frame"):
        pipeline("day", num_frames=8, callback_on_step_end=callback, **SHORT)


def test_saved_and_loaded_it_gives_the_same(pipeline, tmp_path):
    expected = pipeline("night", num_frames=7, generator=seeded(1), **SHORT).frames
    pipeline.save_pretrained(tmp_path)
    loaded = VideoPredictionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded("night", num_frames=7, generator=seeded(1), **SHORT).frames, expected)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "unconditional"])
def test_other_models(name, request, randomise):
    image_pipeline = request.getfixturevalue(name)
    planes = ContextPlanes(latent_channels=image_pipeline.unet.config.in_channels)
    planes.note(randomise(inject(image_pipeline.unet, TemporalConfig(context=planes.config()))))
    pipeline = VideoPredictionPipeline.from_image_pipeline(image_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    how = {**SHORT, "num_frames": 7, "context_guidance_scale": 1.5}
    if name == "unconditional":
        made = pipeline(image=torch.rand(2, 1, 3, 32, 32), generator=seeded(1, 2), **how).frames
        assert made.shape == (2, 3, 7, 32, 32)
        return
    image = torch.rand(3, 32, 32)
    made = pipeline({0: "a road", 6: "a night road"}, image, negative_prompt="fog", generator=seeded(1), **how).frames
    assert made.shape == (1, 4, 7, 16, 16) and made.isfinite().all()
    for other in ({"negative_prompt": "snow"}, {"guidance_scale": 1.0}):
        changed = {"negative_prompt": "fog", **other}
        assert not torch.equal(pipeline("a road", image, generator=seeded(1), **changed, **how).frames, made)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_other_schedulers_and_precisions(pipeline):
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    how = {**SHORT, "eta": 0.0, "num_frames": 7}
    made = pipeline("day", generator=seeded(1), **how).frames
    pipeline.to(torch.bfloat16)
    coarse = pipeline("day", generator=seeded(1), **how).frames
    assert made.isfinite().all() and coarse.dtype == torch.float32
    torch.testing.assert_close(coarse[:, :, :4], made[:, :, :4], rtol=0.2, atol=0.3)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda pipe: pipe(output_type="gif"), r"VideoPredictionPipeline: output_type: expected one of pil.*got 'gif'"),
        (lambda pipe: pipe("dusk"), r"prompt: expected a label, one of 'day', 'night' or its number.*got 'dusk'"),
        (
            lambda pipe: pipe({3: "day"}),
            r"VideoPredictionPipeline: prompt: .* the first from frame 0, got \[\{3: 'day'\}\]",
        ),
        (lambda pipe: pipe(height=33), r"VideoPredictionPipeline: height and width: expected multiples of 2, got 33"),
        (
            lambda pipe: pipe(image=torch.rand(3, 16, 24), image_latents=torch.zeros(1, 4, 1, 8, 12)),
            r"VideoPredictionPipeline: image: expected it or image_latents, got both",
        ),
        (
            lambda pipe: pipe(image_latents=torch.zeros(1, 3, 1, 8, 12)),
            r"image_latents: expected \(clips, 4, frames, height, width\), got \(1, 3, 1, 8, 12\)",
        ),
        (
            lambda pipe: pipe(["day", "night"], torch.rand(3, 1, 3, 16, 24)),
            r"VideoPredictionPipeline: expected as many prompts as clips of given frames, or .* got 2 and 3",
        ),
        (
            lambda pipe: pipe("day", generator=seeded(1, 2)),
            r"VideoPredictionPipeline: generator: expected one, or one for each of 1 clips, got 2",
        ),
        (
            lambda pipe: pipe(num_frames=0),
            r"VideoPredictionPipeline: num_frames: expected a whole number of at least 1",
        ),
        (lambda pipe: pipe(num_frames=2.5), r"num_frames: expected a whole number of at least 1, got 2.5"),
        (
            lambda pipe: pipe("day", torch.rand(5, 3, 16, 24), num_frames=3),
            r"VideoPredictionPipeline: num_frames: expected at least the 5 given frames, .* got 3; ask for more",
        ),
        (lambda pipe: pipe("day", torch.rand(0, 3, 16, 24)), r"image: expected a frame at least, got none, of Tensor"),
        (lambda pipe: pipe(window=2), r"prediction_windows: .* overlap from 1 to below window=2, got .*overlap=2"),
        (lambda pipe: pipe(context_noise_level=251), r"ContextPlanes.build: expected levels from 0 to 250 .*level=251"),
        (lambda pipe: pipe(eta=1.0), r"ContextSampling: .*eta from 0 to below 1"),
        (
            lambda pipe: pipe(num_videos_per_prompt=0),
            r"VideoPredictionPipeline: num_videos_per_prompt: expected 1 or more, got 0",
        ),
    ],
)
def test_refusals(pipeline, call, text):
    with pytest.raises(ValueError, match=text):
        call(pipeline)


def test_chunks_that_cannot_be_are_refused_before_anything_is_sampled(pipeline):
    def too_late(*told):
        raise AssertionError

    with pytest.raises(ValueError, match="VideoPredictionPipeline: decode_chunk_size: expected a whole number of at"):
        pipeline("day", num_frames=4, decode_chunk_size=0, callback_on_step_end=too_late, **SHORT)


@pytest.mark.parametrize("generator", [3, [3]])
def test_a_seed_in_place_of_a_generator_is_refused(pipeline, generator):
    with pytest.raises(ValueError, match=r"VideoPredictionPipeline: generator: expected a torch.Generator or a list"):
        pipeline("day", num_frames=4, generator=generator, **SHORT)


def test_layers_that_take_no_frames_are_refused(label_model, randomise):
    randomise(inject(label_model.unet))
    with pytest.raises(ValueError, match=r"ContextPlanes.of: expected an adapter with 'frame_context'"):
        VideoPredictionPipeline.from_image_pipeline(label_model)("day")
