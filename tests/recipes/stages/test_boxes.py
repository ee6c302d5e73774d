"""Stage "boxes": objective, samples and measures in closed form, training of the adapter alone, the whole stage."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from temporal_layers.recipes.bases import LabelBase, PipelineBase
from temporal_layers.recipes.boxes import BOXES, BoxBase, BoxTokens, add_boxes, load_boxes, load_shipped_boxes
from temporal_layers.recipes.cli import main as cli
from temporal_layers.recipes.driving import LABELS, DrivingCorpus
from temporal_layers.recipes.image_ldm import ImageLDM, ImageLDMConfig, build_image_ldm
from temporal_layers.recipes.stages import boxes as stage
from temporal_layers.recipes.stages.box_judge import BoxJudge, found, train_judge
from temporal_layers.recipes.stages.box_measures import box_effect, outlined, placement
from temporal_layers.recipes.stages.box_samples import BoxObjective, BoxSamples, inside_error
from temporal_layers.recipes.stages.boxed_images import BoxDataConfig, annotated_images, cut_boxes, driving_images
from temporal_layers.recipes.stages.boxes import BoxesConfig, train_boxes
from temporal_layers.recipes.stages.image import HELD_OUT
from temporal_layers.recipes.training.engine import OptimConfig
from temporal_layers.recipes.training.streams import SampleStream

TINY = ImageLDMConfig(
    height=32, width=48, vae_channels=(8, 8), unet_channels=(16, 16), num_heads=2, context_dim=8, num_tokens=2
)
ONE = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
NONE = torch.empty(0, 4)


def options(**changes):
    return OptimConfig(**{"steps": 2, "batch_size": 2, "lr": 1e-2, "weight_decay": 0.0, **changes})


@pytest.fixture
def base():
    return add_boxes(LabelBase(build_image_ldm(TINY, ("day", "night"), seed=0)), max_boxes=2)


# -- objective and samples --------------------------------------------------------------------------------------------


def test_the_loss_is_the_image_models_and_that_in_the_boxes(base):
    latents, noise = torch.randn(2, 4, 16, 24), torch.randn(2, 4, 16, 24)
    timesteps = torch.tensor([200, 800])
    told = base.with_boxes(base.conditioning([0, 1], ["", ""]), [ONE, NONE])
    bar = base.scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
    with torch.no_grad():
        losses = BoxObjective(base, list(told), box_weight=0.5)(latents, noise, timesteps, *told.values())
        output = base.predict(bar.sqrt() * latents + (1 - bar).sqrt() * noise, timesteps, told)
        errors = (output - (bar.sqrt() * noise - (1 - bar).sqrt() * latents)).square()
    inside = errors[0, :, 4:12, 6:18].mean() / 2  # nothing of the second image, which has no box
    torch.testing.assert_close(losses["inside"], inside)
    torch.testing.assert_close(losses["loss"], errors.mean() + 0.5 * inside)


def test_the_error_in_boxes_weighs_places_by_their_share():
    errors = torch.zeros(1, 2, 2)
    errors[0, 0, 0] = 3.0
    # Of the four places it covers a quarter, a half, a half and all.
    box = torch.tensor([[[0.25, 0.25, 1.0, 1.0]]])
    assert inside_error(errors, box).item() == pytest.approx(3 * 0.25 / 2.25)
    assert inside_error(errors, torch.zeros(1, 2, 4)).item() == 0


def test_samples_drop_text_and_boxes_each_by_itself():
    conditioning = {"labels": torch.zeros(8, dtype=torch.int64), BOXES: ONE.expand(8, 1, 4)}
    nothing = {"labels": torch.tensor([7]), BOXES: torch.zeros(1, 1, 4)}
    draw = BoxSamples(
        torch.zeros(8, 4, 2, 2), conditioning, nothing, num_timesteps=10, label_drop=0.4, box_drop=0.25, seed=0
    )
    _, noise, timesteps, labels, boxes = next(SampleStream(draw).batches(0, batch_size=2000))
    no_label, no_box = labels == 7, boxes.sum((1, 2)) == 0
    assert no_label.float().mean() == pytest.approx(0.4, abs=0.04)
    assert no_box.float().mean() == pytest.approx(0.25, abs=0.04)
    assert (no_label & no_box).float().mean() == pytest.approx(0.1, abs=0.03)
    assert noise.std() == pytest.approx(1, abs=0.05) and set(timesteps.tolist()) == set(range(10))
    again = BoxSamples(
        torch.zeros(8, 4, 2, 2), conditioning, nothing, num_timesteps=10, label_drop=0.4, box_drop=0.25, seed=0
    )
    assert all(torch.equal(one, other) for one, other in zip(draw(5), again(5), strict=True))


# -- training ---------------------------------------------------------------------------------------------------------


def test_only_the_adapter_is_trained(base):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in base.unet.parameters()]
    start = {name: value.clone() for name, value in base.reader.adapter.state_dict().items()}
    frames = torch.rand(4, 3, 32, 48)
    rows = base.conditioning([0, 1, 0, 1], [""] * 4)
    history = train_boxes(base, frames, rows, [ONE] * 4, options(steps=3, batch_size=4), progress=False)
    assert len(history) == 3 and all(map(math.isfinite, history))
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    assert trainable == [parameter.requires_grad for parameter in base.unet.parameters()]
    assert not any(torch.equal(value, start[name]) for name, value in base.reader.adapter.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.reader.adapter.parameters())


def test_squares_where_the_boxes_say_are_learned(base):
    # Frames are black but for a white square: without the box nobody knows where it is.
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(24, 2, generator=generator) * 0.6
    boxes = torch.cat([corners, corners + 0.4], dim=1)[:, None]
    frames = torch.zeros(24, 3, 32, 48)
    for frame, box in zip(frames, boxes[:, 0].tolist(), strict=True):
        left, top, right, bottom = (round(v * n) for v, n in zip(box, (48, 32, 48, 32), strict=True))
        frame[:, top:bottom, left:right] = 1
    train, held_out = slice(0, 16), slice(16, 24)
    rows = base.conditioning([0] * 24, [""] * 24)
    part, rest = ({name: value[rows_of] for name, value in rows.items()} for rows_of in (train, held_out))
    config = options(steps=60, batch_size=4, lr=2e-3)
    train_boxes(base, frames[train], part, list(boxes[train]), config, progress=False)
    effect = box_effect(base, frames[held_out], rest, list(boxes[held_out]))
    assert effect["given"] < 0.9 * min(effect["swapped"], effect["none"])


def test_a_model_without_an_adapter_is_not_trained(base):
    told = BoxBase(base.base, BoxTokens(torch.zeros(8)))
    with pytest.raises(ValueError, match=r"train_boxes: base: expected one of add_boxes or load_boxes, .* BoxTokens"):
        train_boxes(told, torch.rand(1, 3, 32, 48), base.conditioning([0], [""]), [ONE], options(), progress=False)


def test_images_without_a_set_of_boxes_each_are_refused(base):
    rows = base.conditioning([0, 1], ["", ""])
    for frames, boxes, got in (
        (torch.rand(2, 3, 32, 48), [ONE], "2 images and 1"),
        (torch.rand(0, 3, 32, 48), [], "0 im"),
    ):
        with pytest.raises(ValueError, match=f"train_boxes: expected boxes for each of at least one image, got {got}"):
            train_boxes(base, frames, rows, boxes, options(), progress=False)


# -- measures ---------------------------------------------------------------------------------------------------------


class Seen(BoxJudge):
    """A judge that finds what is bright in the first channel, one share for each four by four pixels."""

    def logits(self, frames):
        return torch.logit(torch.nn.functional.avg_pool2d(frames[:, 0], 4), eps=1e-6)


def test_agreement_is_the_intersection_over_the_union():
    frames = torch.zeros(3, 3, 16, 32)
    frames[0, :, 8:, 8:16] = 1.0  # the box itself
    frames[1, :, 8:, 12:20] = 1.0  # half of it, and as much beside it
    frames[2, :, 8:, 8:16] = 0.5  # half sure
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0]]).expand(3, 1, 4)
    expected = [1.0, 1 / 3, 0.5]
    assert [found(Seen(), frame[None], boxes[:1]) for frame in frames] == pytest.approx(expected, abs=1e-4)
    assert found(Seen(), frames, boxes) == pytest.approx(sum(expected) / 3, abs=1e-4)
    assert found(Seen(), frames[:1], torch.tensor([[[0.75, 0.0, 1.0, 0.5]]])) == pytest.approx(0.0, abs=1e-4)


def test_a_judge_learns_to_find_things_and_repeats_with_its_seed():
    images = driving_images((64, 96), 24)
    frames, boxes = images.frames.clone(), torch.zeros(24, 1, 4)
    boxes[:, 0] = torch.rand(24, 4, generator=torch.Generator().manual_seed(1)) * 0.3
    boxes[:, 0, 2:] = boxes[:, 0, :2] + 0.4
    for frame, (left, top, right, bottom) in zip(frames, boxes[:, 0].tolist(), strict=True):
        frame[0, round(64 * top) : round(64 * bottom), round(96 * left) : round(96 * right)] = 255
    config = OptimConfig(steps=60, batch_size=16, lr=4e-3)
    judge = train_judge(frames[:16], boxes[:16], config)
    real = found(judge, frames[16:].float() / 255, boxes[16:])
    assert real > 0.6 and real > found(judge, frames[16:].float() / 255, boxes[16:].roll(1, 0)) + 0.2
    first, second = (train_judge(frames[:16], boxes[:16], options()).last.weight for _ in range(2))
    assert torch.equal(first, second)


def test_an_untrained_model_places_nothing(base):
    rows, frames = base.conditioning([0, 1], ["", ""]), torch.zeros(2, 3, 32, 48)
    frames[:, :, 8:24, 12:36] = 1
    numbers, pairs = placement(base, Seen(), frames, rows, [ONE, ONE], num_inference_steps=2)
    torch.testing.assert_close(pairs[0], pairs[1], atol=1e-4, rtol=0)
    assert pairs.shape == (2, 2, 3, 32, 48)
    assert numbers["real"] == pytest.approx(1, abs=1e-4)
    assert numbers["told"] == pytest.approx(numbers["untold"], abs=1e-3) and numbers["told"] < 0.9
    effect = box_effect(base, frames, rows, [ONE, ONE])
    assert effect["given"] == effect["swapped"] == pytest.approx(effect["none"], rel=1e-5)


def test_outlines_are_drawn_where_the_boxes_are():
    [frame] = outlined(torch.zeros(1, 3, 32, 48), [ONE])
    rows, columns = frame[0].nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 24, 12, 36)
    assert frame[0, 9:24, 13:36].max() == 0


def test_the_shipped_adapter_makes_cars_likelier_where_the_boxes_are():
    images = driving_images((64, 96), 12, first=HELD_OUT + 500)
    images = images.chosen([row for row, boxes in enumerate(images.boxes) if len(boxes)])
    base = load_shipped_boxes()
    rows = base.conditioning(images.labels, images.captions)
    effect = box_effect(base, images.frames, rows, images.boxes, timesteps=(700,))
    assert effect["given"] < 0.8 * effect["none"] and effect["given"] < 0.7 * effect["swapped"]


# -- images -----------------------------------------------------------------------------------------------------------


def test_driving_images_are_stills_with_their_boxes():
    images = driving_images((64, 96), 6, first=3, seed=1)
    corpus = DrivingCorpus(seed=1)
    frames, labels = corpus.stills(range(3, 9))
    assert torch.equal(images.frames, (frames * 255).round().to(torch.uint8)) and images.labels == labels.tolist()
    assert all(torch.equal(one, corpus.boxes(i, corpus.still_frame(i))) for i, one in enumerate(images.boxes, 3))
    some = images.chosen([4, 0])
    assert len(some) == 2 and some.captions == [images.captions[4], images.captions[0]]
    assert torch.equal(some.frames[1], images.frames[0]) and torch.equal(some.boxes[0], images.boxes[4])


@pytest.fixture
def annotated(tmp_path):
    """A folder of two images and annotations, in one of which a square of 20 pixels is white."""
    pixels = np.zeros((60, 100, 3), dtype=np.uint8)
    pixels[20:40, 40:60] = 255
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    document = {
        "images": [
            {"id": n, "file_name": f"{name}.png", "height": 60, "width": 100} for n, name in ((7, "a"), (9, "b"))
        ],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "tree"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [40, 20, 20, 20], "iscrowd": 0},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 50, 50], "iscrowd": 0},
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 90, 50], "iscrowd": 1},
            {"image_id": 9, "category_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 0},
        ],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(document))
    return BoxDataConfig(images=tmp_path / "images", annotations=tmp_path / "boxes.json", label=1)


@pytest.mark.parametrize("size", [(48, 48), (24, 60), (32, 48), (90, 30)])
def test_annotated_boxes_follow_their_image(annotated, size):
    images = annotated_images(annotated, size, 3)
    assert images.frames.shape == (2, 3, *size) and images.labels == [1, 1] and images.captions == ["a photo"] * 2
    [[left, top, right, bottom]] = images.boxes[0].tolist()
    bright = images.frames[0, 0] > 127
    rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    found = [left * size[1], top * size[0], right * size[1], bottom * size[0]]
    assert np.abs(np.array(found) - expected).max() <= 1.01


def test_boxes_are_cut_and_sorted_and_left_out():
    # A square from the middle of 100 x 60: columns 20 to 80.
    boxes = cut_boxes([[0, 0, 30, 10], [10, 0, 30, 30], [30, 30, 10, 10], [0, 0, 10, 10]], (60, 100), (30, 30))
    expected = torch.tensor([[0.0, 0.0, 20 / 60, 0.5], [10 / 60, 0.5, 20 / 60, 40 / 60]])
    torch.testing.assert_close(boxes, expected)
    assert cut_boxes([], (60, 100), (30, 30)).shape == (0, 4)
    assert cut_boxes([[40, 20, 0, 5]], (60, 100), (30, 30)).shape == (0, 4)


def test_bad_annotations_are_refused(annotated, tmp_path):
    with pytest.raises(ValueError, match="BoxDataConfig: expected images and annotations together, got only one"):
        BoxDataConfig(images=tmp_path)
    with pytest.raises(ValueError, match=r"category: expected one of .*: car, tree, got 'dog'"):
        annotated_images(dataclasses.replace(annotated, category="dog"), (32, 48), 2)
    document = json.loads(annotated.annotations.read_text())
    annotated.annotations.write_text(json.dumps({**document, "images": []}))
    with pytest.raises(ValueError, match="annotations: expected images, got none in"):
        annotated_images(annotated, (32, 48), 2)


# -- the stage --------------------------------------------------------------------------------------------------------


def test_the_whole_stage_leaves_what_is_loaded_again(tmp_path):
    model, out = tmp_path / "model", tmp_path / "run"
    build_image_ldm(TINY, LABELS, seed=0).save_pretrained(model)
    flags = "--num-images 6 --held-out 4 --max-boxes 2 --optim.steps 2 --optim.batch-size 2 --optim.checkpoint-every 1"
    assert cli(["train", "boxes", "--model", str(model), "--out", str(out), *flags.split()]) == 0
    loaded = load_boxes(LabelBase(ImageLDM.from_pretrained(model)), out / "boxes")
    assert loaded.reader.adapter.config.channels == [16, 16]
    result = json.loads((out / "result.json").read_text())
    assert set(result["error in boxes"]) == {"given", "swapped", "none"}
    assert set(result["placement"]) == {"real", "told", "swapped", "untold"}
    assert (out / "samples.png").exists() and (out / "boxes-1").is_dir()
    more = [*flags.split(), "--start-from", str(out / "boxes"), "--held-out", "0"]
    assert cli(["train", "boxes", "--model", str(model), "--out", str(tmp_path / "more"), *more]) == 0
    assert "placement" not in json.loads((tmp_path / "more" / "result.json").read_text())


def test_the_stage_trains_a_pipeline_on_annotated_images(stable_diffusion, annotated, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "load_base", lambda name: PipelineBase(stable_diffusion))
    config = BoxesConfig(out=tmp_path / "run", data=annotated, max_boxes=2, held_out=1, optim=options(steps=1))
    base = stage.run_boxes_stage(config)
    assert load_boxes(PipelineBase(stable_diffusion), tmp_path / "run" / "boxes").unet is base.unet
    with pytest.raises(ValueError, match=r"held_out: expected fewer than all 2 images, got 2; 0 trains"):
        stage.run_boxes_stage(dataclasses.replace(config, out=tmp_path / "none", held_out=2))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_images": 0}, "BoxesConfig.num_images: expected a whole number of at least 1, got 0"),
        ({"max_boxes": 0}, "BoxesConfig.max_boxes: expected a whole number of at least 1, got 0"),
        ({"held_out": -1}, "BoxesConfig.held_out: expected a whole number of at least 0, got -1"),
        ({"box_weight": -0.5}, "BoxesConfig.box_weight: expected at least 0, got -0.5"),
        ({"label_drop": 1.5}, "BoxesConfig.label_drop: expected a value from 0 to 1, got 1.5"),
        ({"box_drop": -0.1}, "BoxesConfig.box_drop: expected a value from 0 to 1, got -0.1"),
    ],
)
def test_bad_settings_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        BoxesConfig(**changes)
