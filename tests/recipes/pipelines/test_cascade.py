"""The cascade: its stages are the pipelines, called one after the other, and nothing else."""

import pytest
import torch

from temporal_layers.recipes.pipelines.cascade import STAGES, VideoCascade
from temporal_layers.recipes.pipelines.video_ldm import VideoLDMPipeline

FEW = {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def parts(cascade_parts):
    return cascade_parts


def run(cascade, **options):
    stages = {"key_frames": {**FEW, "window": 4}, "interpolation": FEW, "upscaling": FEW}
    stages = {name: value for name, value in stages.items() if getattr(cascade, name) is not None}
    words = {"num_key_frames": 3, "progress": False, "output_type": "pt", **stages, **options}
    return cascade("night", generator=torch.Generator().manual_seed(3), **words)


def test_it_is_its_stages_one_after_the_other(parts):
    keys, between, upscaling = parts
    cascade = VideoCascade(*parts)
    seen = []
    found = run(cascade, keep=STAGES, on_stage=lambda name, result, fps: seen.append((name, tuple(result.shape), fps)))
    generator = torch.Generator().manual_seed(3)
    options = {"generator": generator, "output_type": "latent", **FEW}
    latents = keys("night", num_frames=3, window=4, **options).frames
    torch.testing.assert_close(found.stages["key frames"], latents)
    latents = between("night", frames_latents=latents, **options).frames
    torch.testing.assert_close(found.stages["interpolation"], latents)
    clips = between.decode_clips(latents)
    torch.testing.assert_close(found.stages["decoding"], clips)
    large = upscaling(clips.transpose(1, 2), **{**options, "output_type": "pt"}).frames
    torch.testing.assert_close(found.frames, large)
    torch.testing.assert_close(found.stages["upscaling"], large.transpose(1, 2))
    assert found.frames.shape == (1, 33, 3, 32, 48) and found.fps == 30
    assert seen == [
        ("key frames", (1, 4, 3, 8, 12), 1.875),
        ("interpolation", (1, 4, 33, 8, 12), 30.0),
        ("decoding", (1, 3, 33, 16, 24), 30.0),
        ("upscaling", (1, 3, 33, 32, 48), 30.0),
    ]


def test_clips_are_decoded_through_the_temporal_layers_for_their_rate(parts):
    found = run(VideoCascade(*parts[:2]), keep=("interpolation",))
    with parts[1].decoder.disabled():
        plain = parts[1].decode_clips(found.stages["interpolation"])
    assert (plain.transpose(1, 2) - found.frames).abs().max() > 1e-3
    keys = run(VideoCascade(*parts[:2]), levels=0, keep=("key frames",))
    torch.testing.assert_close(keys.frames, parts[0].decode_clips(keys.stages["key frames"]).transpose(1, 2))


@pytest.mark.parametrize(("levels", "frames", "fps"), [(0, 3, 2.0), (1, 9, 8.0), (2, 33, 32.0)])
def test_levels_of_interpolation(parts, levels, frames, fps):
    found = run(VideoCascade(*parts[:2], fps=2.0), levels=levels)
    assert found.frames.shape == (1, frames, 3, 16, 24) and found.fps == fps and not found.stages


def test_stages_may_be_missing_and_key_frames_may_come_in_one_piece(parts):
    pipeline = VideoLDMPipeline(**parts[0].components, labels=["day", "night"], frame_size=[16, 24])
    cascade = VideoCascade(pipeline)
    found = run(cascade, levels=0, key_frames=FEW)
    assert found.frames.shape == (1, 3, 3, 16, 24)


def test_several_clips_of_given_first_frames(parts):
    image = torch.rand(2, 1, 3, 16, 24)
    sources = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    stages = {"key_frames": {**FEW, "window": 4}, "interpolation": FEW}
    words = {"num_key_frames": 2, "levels": 1, "progress": False, "output_type": "pt", **stages}
    both = VideoCascade(*parts[:2])(["day", "night"], image, generator=sources, **words).frames
    alone = VideoCascade(*parts[:2])("night", image[1:], generator=torch.Generator().manual_seed(2), **words).frames
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_the_bar_goes_over_all_stages_and_the_parts_show_none(parts, capsys):
    run(VideoCascade(*parts), progress=True)
    text = capsys.readouterr()
    assert "100 %" in text.out and "upscaling" in text.out and "it/s" not in text.err
    assert not getattr(parts[0], "_progress_bar_config", {})


def test_an_interrupt_leaves_what_is_done(parts):
    done = []

    def stop(pipeline, step, timestep, told):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            VideoCascade(*parts),
            on_stage=lambda name, *rest: done.append(name),
            upscaling={**FEW, "callback_on_step_end": stop},
        )
    assert done == ["key frames", "interpolation", "decoding"]


def test_files(parts, tmp_path):
    cascade = VideoCascade(*parts)
    cascade.save_pretrained(tmp_path)
    loaded = VideoCascade.from_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded).frames, run(cascade).frames, rtol=1e-4, atol=1e-4)
    VideoCascade(parts[0]).save_pretrained(tmp_path / "keys")
    assert VideoCascade.from_pretrained(tmp_path / "keys", fps=3.0).upscaling is None
    with pytest.raises(ValueError, match=r"VideoCascade.from_pretrained: expected a folder with key_frames/"):
        VideoCascade.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"output_type": "latent"}, r"output_type: expected 'pil', 'np' or 'pt', got 'latent'"),
        ({"levels": 3}, r"expected levels from 0 to 2 .* got levels=3"),
        (
            {"num_key_frames": 1},
            r"expected .* or 2 to interpolate between, got .*num_key_frames=1",
        ),
        ({"keep": ("pixels",)}, r"keep: expected some of key frames, .* got pixels"),
    ],
)
def test_refusals(parts, options, text):
    with pytest.raises(ValueError, match=f"VideoCascade: {text}"):
        run(VideoCascade(*parts), **options)


def test_chunks_that_cannot_be_are_refused_before_the_first_stage(parts):
    done = []
    with pytest.raises(ValueError, match=r"decode_chunk_size: expected a whole number of at least 1, got 0"):
        run(VideoCascade(*parts), decode_chunk_size=0, on_stage=lambda name, *rest: done.append(name))
    assert done == []


def test_missing_and_wrong_stages_are_named(parts):
    with pytest.raises(ValueError, match=r"VideoCascade: levels: expected 0 without an interpolation pipeline, got 2"):
        run(VideoCascade(parts[0]))
    with pytest.raises(ValueError, match=r"VideoCascade: key_frames: expected a VideoPredictionPipeline or VideoLDM"):
        VideoCascade(None)
    with pytest.raises(ValueError, match=r"VideoCascade: upscaling: expected a VideoUpscalePipeline, got VideoInterp"):
        VideoCascade(parts[0], None, parts[1])
