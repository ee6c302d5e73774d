"""Stage "dreambooth": objective, training of the image model beside untouched temporal layers, files, two texts."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from temporal_layers.adapters import TemporalAdapter, adapter_of, inject
from temporal_layers.recipes.bases import LabelBase, PipelineBase, load_base
from temporal_layers.recipes.cli import main as cli
from temporal_layers.recipes.image_ldm import ImageLDMConfig, build_image_ldm
from temporal_layers.recipes.sampling.clips import sample_clips
from temporal_layers.recipes.stages.dreambooth import (
    LORA,
    DreamBoothConfig,
    DreamBoothObjective,
    DreamBoothSamples,
    run_dreambooth_stage,
    subject_frames,
    train_dreambooth,
)
from temporal_layers.recipes.stages.dreambooth_preview import PreviewConfig, look_distance
from temporal_layers.recipes.stages.personal import TwoTexts, ask, frozen_text, image_model, text_parts
from temporal_layers.recipes.stages.personal_files import load_images, load_personal_lora, save_personal
from temporal_layers.recipes.stages.prior import prior_images
from temporal_layers.recipes.training.engine import OptimConfig

TINY = ImageLDMConfig(
    height=16, width=24, vae_channels=(8, 8), unet_channels=(16, 32), num_heads=2, context_dim=8, num_tokens=2
)
FAST = OptimConfig(steps=2, batch_size=2, lr=1e-3)
QUIET = {"progress": False}


def with_adapter(base):
    """Temporal layers that would change everything, so that a mix-up shows."""
    adapter = inject(base.unet)
    with torch.no_grad():
        for layer in adapter.layers.values():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return adapter


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.fixture
def labelled():
    """The label model with a new label and temporal layers."""
    base = LabelBase(build_image_ldm(TINY, ("day", "night"), seed=0))
    base.ldm.vae.register_to_config(scaling_factor=5.0)  # latents of a random encoder are small
    label = base.ldm.add_label("orange", like="day")
    with_adapter(base)
    return base, label


@pytest.fixture
def captioned(stable_diffusion):
    base = PipelineBase(stable_diffusion)
    with_adapter(base)
    return base


def frames_of(base, count=2, seed=0):
    return torch.rand(count, 3, *base.frame_size, generator=torch.Generator().manual_seed(seed))


def loss_of(base, frames, prompt, *, draws=16):
    """The denoising loss written out: an independent computation without the stage's objective."""
    generator = torch.Generator().manual_seed(7)
    latents = base.encode(frames).repeat(draws, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (len(latents),), generator=generator)
    scheduler = base.scheduler
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    with torch.no_grad():
        output = base.predict(noisy, timesteps, ask(base, [prompt] * len(latents)))
    return (output - target).square().mean().item()


# -- the label model ------------------------------------------------------------------------------------------------


def test_a_new_label_starts_as_a_copy_and_leaves_the_others_alone():
    ldm = build_image_ldm(TINY, ("day", "night"), seed=0)
    before = [ldm.conditioner(torch.tensor([label])) for label in (0, 1, ldm.conditioner.null_label)]
    label = ldm.add_label("orange", like="night")
    assert (label, ldm.labels, ldm.conditioner.null_label) == (2, ("day", "night", "orange"), 3)
    after = [ldm.conditioner(torch.tensor([label])) for label in (0, 1, 3, 2)]
    assert all(torch.equal(*pair) for pair in zip([*before, before[1]], after, strict=True))
    again = type(ldm.conditioner).from_config(ldm.conditioner.config)
    again.load_state_dict(ldm.conditioner.state_dict())
    assert torch.equal(again(torch.tensor([2])), before[1])
    for name, like in (("day", "night"), ("dawn", "noon")):
        with pytest.raises(ValueError, match=r"ImageLDM\.add_label: expected a new name and, for like, one of 'day'"):
            ldm.add_label(name, like=like)


# -- objective and samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_is_that_of_the_subject_plus_the_weighted_one_of_the_class(labelled, weight):
    base, label = labelled
    latents, noise = torch.randn(2, 3, 2, *base.latent_shape)
    timesteps = torch.tensor([[10, 900], [500, 30], [700, 999]])
    losses = DreamBoothObjective(base, [label, 0], prior_weight=weight, texts={})(latents, noise, timesteps)
    expected = []
    with torch.no_grad():
        for column, prompt in enumerate((label, 0)):
            z, e, t = latents[:, column], noise[:, column], timesteps[:, column]
            output = base.ldm.unet(
                base.scheduler.add_noise(z, e, t), t, base.ldm.conditioner(torch.full((3,), prompt))
            ).sample
            expected.append((output - base.scheduler.get_velocity(z, e, t)).square().mean())
    torch.testing.assert_close(losses["subject"], expected[0])
    torch.testing.assert_close(losses["prior"], expected[1])
    torch.testing.assert_close(losses["loss"], expected[0] + weight * expected[1])


def test_samples_are_pairs_that_depend_on_seed_and_position_alone():
    sets = [torch.arange(2.0).reshape(2, 1, 1, 1), 10 + torch.arange(5.0).reshape(5, 1, 1, 1)]
    samples = DreamBoothSamples(sets, num_timesteps=1000, seed=3)
    drawn = [samples(position) for position in range(10)]
    assert sorted(latents[1].item() for latents, _, _ in drawn[:5]) == [10, 11, 12, 13, 14]
    assert all(sorted(drawn[i + j][0][0].item() for j in (0, 1)) == [0, 1] for i in range(0, 10, 2))
    again = DreamBoothSamples(sets, num_timesteps=1000, seed=3)
    for position in (7, 2):
        assert all(torch.equal(*pair) for pair in zip(again(position), drawn[position], strict=True))
    other = DreamBoothSamples(sets, num_timesteps=1000, seed=4)(7)
    assert not torch.equal(other[1], drawn[7][1])
    assert drawn[0][2][0] != drawn[0][2][1]  # a noise level for each


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_learns_the_subject_keeps_the_class_and_leaves_the_adapter_alone(labelled):
    base, label = labelled
    adapter = adapter_of(base.unet)
    adapter.num_frames = 2  # images are images during training nevertheless
    frames, prior = frames_of(base, 2), subject_frames(4)[:, :, ::4, ::4]
    spatial = [name for name, _ in adapter.named_parameters("spatial")]
    layers, rows, unet = adapter.state_dict(), state(base.ldm.conditioner)["tokens.weight"], state(base.unet)
    layers = {name: value.clone() for name, value in layers.items()}
    flags = {name: parameter.requires_grad for name, parameter in base.unet.named_parameters()}
    with adapter.disabled():
        adapter.num_frames = None
        before = loss_of(base, frames, label), loss_of(base, prior, 0)
        adapter.num_frames = 2
    config = OptimConfig(steps=40, batch_size=2, lr=3e-3, schedule="cosine", weight_decay=0.0)
    history = train_dreambooth(base, frames, label, prior, 0, config, **QUIET)
    assert len(history) == 40 and adapter.num_frames == 2
    adapter.num_frames = None
    assert loss_of(base, frames, label) < 0.8 * before[0]
    assert loss_of(base, prior, 0) < 1.05 * before[1]
    after = state(base.unet)
    assert moved(unet, after) == set(spatial)
    assert all(torch.equal(value, layers[name]) for name, value in adapter.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in base.unet.named_parameters()} == flags
    assert not base.unet.training
    now = base.ldm.conditioner.tokens.weight
    assert [torch.equal(*pair) for pair in zip(now, rows, strict=True)] == [False, True, False, True]
    noise = torch.randn(1, 4, 2, *base.latent_shape[1:])
    clip = sample_clips(base, base.conditioning([label], [""]), noise, num_inference_steps=2)
    assert clip.shape == (1, 3, 2, 16, 24) and clip.isfinite().all()


def test_without_the_prior_loss_the_class_goes_astray(labelled):
    """What prior preservation is for; it fails if the weight of the second loss does nothing."""
    base, label = labelled
    prior = subject_frames(4)[:, :, ::4, ::4]
    frames = 1 - prior
    config = OptimConfig(steps=30, batch_size=1, lr=3e-3, schedule="cosine", weight_decay=0.0)
    untouched = copy.deepcopy(base)
    train_dreambooth(base, frames, label, prior, 0, config, **QUIET)
    train_dreambooth(untouched, frames, label, config=config, **QUIET)
    assert loss_of(base, prior, 0) < 0.9 * loss_of(untouched, prior, 0)


@pytest.mark.parametrize("train_text", [True, False])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_what_is_trained_in_a_pipeline(captioned, train_text, lora_rank):
    base = captioned
    adapter = adapter_of(base.unet)
    spatial = {name for name, _ in adapter.named_parameters("spatial")}
    parts = {"unet": base.unet, **text_parts(base)}
    before = {name: state(part) for name, part in parts.items()}
    flags = {name: parameter.requires_grad for name, parameter in base.unet.named_parameters()}
    if lora_rank:  # whose layers rename the weights beneath them
        flags = {name: flag for name, flag in flags.items() if "attn" not in name}
    given = (frames_of(base), "a road", frames_of(base, 3, seed=1), "a video", FAST)
    train_dreambooth(base, *given, train_text=train_text, lora_rank=lora_rank, **QUIET)
    after = {name: state(part) for name, part in parts.items()}
    renamed = {
        part: {name.replace(".base_layer", ""): value for name, value in values.items()}
        for part, values in after.items()
    }
    changed = {name: moved(before[name], renamed[name]) for name in parts}
    added = {name: renamed[name].keys() - before[name].keys() for name in parts}
    if lora_rank:
        assert changed == {"unet": set(), "text_encoder": set()}
        assert added["unet"] and not any(".temporal." in name for name in added["unet"])
        assert bool(added["text_encoder"]) == train_text
        ups = [name for name in added["unet"] if "lora_B" in name]
        assert all(renamed["unet"][name].abs().max() > 0 for name in ups)
    else:
        assert added == {"unet": set(), "text_encoder": set()}
        assert changed["unet"] == spatial
        assert any("encoder.layers" in name for name in changed["text_encoder"]) == train_text
    assert {name: parameter.requires_grad for name, parameter in base.unet.named_parameters() if name in flags} == flags


def test_gradients_reach_the_text_encoder_through_the_prompt(captioned):
    base = captioned
    texts = text_parts(base)
    texts["text_encoder"].requires_grad_(True)
    objective = DreamBoothObjective(base, ["a road", "a video"], prior_weight=1.0, texts=texts)
    latents, noise = torch.randn(2, 1, 2, *base.latent_shape)
    objective(latents, noise, torch.tensor([[300, 600]]))["loss"].backward()
    embedding = texts["text_encoder"].get_input_embeddings().weight
    tokenizer = base.pipeline.tokenizer
    used = set(tokenizer("a road").input_ids) | set(tokenizer("a video").input_ids)
    rows = {index for index, row in enumerate(embedding.grad) if row.abs().max() > 0}
    assert rows >= used - {tokenizer.pad_token_id} and len(rows) < len(embedding)


def test_the_size_of_a_pipeline_with_two_text_encoders(stable_diffusion_xl):
    base = PipelineBase(stable_diffusion_xl)
    before = {name: state(part) for name, part in text_parts(base).items()}
    assert before.keys() == {"text_encoder", "text_encoder_2"}
    train_dreambooth(base, frames_of(base), "a road", config=FAST, **QUIET)
    assert all(moved(before[name], state(part)) for name, part in text_parts(base).items())


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_tuned_pipeline_is_a_plain_one_into_which_the_adapter_loads(captioned, tmp_path):
    base = captioned
    adapter_of(base.unet).save_pretrained(tmp_path / "adapter")
    train_dreambooth(base, frames_of(base), "a road", frames_of(base, 2, seed=1), "a video", FAST, **QUIET)
    folder = save_personal(base, tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(folder)
    assert not any("temporal" in name for name in plain.unet.state_dict())
    again = PipelineBase(plain)
    TemporalAdapter.from_pretrained(again.unet, tmp_path / "adapter")
    noise = torch.randn(1, 4, 2, 16, 16)
    clips = [
        sample_clips(one, one.conditioning([0], ["a road"]), noise, num_inference_steps=2) for one in (base, again)
    ]
    torch.testing.assert_close(*clips, rtol=1e-4, atol=1e-5)


def test_the_tuned_label_model_loads_again(labelled, tmp_path):
    base, label = labelled
    adapter_of(base.unet).freeze()
    flags = [parameter.requires_grad for parameter in base.unet.parameters()]
    again = load_base(save_personal(base, tmp_path))
    assert again.ldm.labels == ("day", "night", "orange") and not hasattr(again.unet, "_temporal_state")
    assert [parameter.requires_grad for parameter in base.unet.parameters()] == flags
    images, told = torch.randn(2, *base.latent_shape), torch.tensor([label, 0])
    outputs = [one.predict(images, torch.tensor(500), {"labels": told}) for one in (base, again)]
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.01)  # the file holds half precision


def test_the_image_model_in_a_unet_shares_its_weights(labelled):
    base, _ = labelled
    twin = image_model(base.unet)
    assert adapter_of(base.unet) and not hasattr(twin, "_temporal_state")
    own = dict(base.unet.named_parameters())
    assert all(parameter is own[name] for name, parameter in twin.named_parameters())


def test_a_lora_is_saved_alone_and_loads_into_the_original_pipeline(captioned, tmp_path):
    base = captioned
    original = copy.deepcopy(base.pipeline)
    adapter_of(original.unet).remove()
    config = OptimConfig(steps=3, batch_size=1, lr=1e-1)
    train_dreambooth(base, frames_of(base), "a road", config=config, lora_rank=2, **QUIET)
    folder = save_personal(base, tmp_path, lora=LORA)
    images, steps = torch.randn(1, 4, 16, 16), torch.tensor([400])
    with torch.no_grad():
        expected = base.predict(images, steps, ask(base, ["a road"]))
        plain = PipelineBase(original)
        untuned = plain.predict(images, steps, ask(plain, ["a road"]))
        load_personal_lora(plain, folder)
        got = plain.predict(images, steps, ask(plain, ["a road"]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(untuned, expected, atol=1e-2)


def test_a_lora_on_the_unet_is_one_of_diffusers(captioned, tmp_path):
    base = captioned
    original = copy.deepcopy(base.pipeline)
    config = OptimConfig(steps=3, batch_size=1, lr=1e-1)
    train_dreambooth(base, frames_of(base), "a road", config=config, lora_rank=2, train_text=False, **QUIET)
    original.load_lora_weights(save_personal(base, tmp_path, lora=LORA))
    clips, steps = torch.randn(1, 4, 2, 16, 16), torch.tensor([400])
    with torch.no_grad():
        told = ask(base, ["a road"])
        expected = base.predict(clips, steps, told)
        torch.testing.assert_close(PipelineBase(original).predict(clips, steps, told), expected, rtol=1e-4, atol=1e-5)
        base.unet.disable_lora()
        assert not torch.allclose(base.predict(clips, steps, told), expected, atol=1e-2)


def test_a_lora_of_the_label_model(labelled, tmp_path):
    base, label = labelled
    original = copy.deepcopy(base)
    original.ldm.labels = ("day", "night")
    config = OptimConfig(steps=3, batch_size=1, lr=1e-1)
    train_dreambooth(base, frames_of(base), label, config=config, lora_rank=2, **QUIET)
    load_personal_lora(original, save_personal(base, tmp_path, lora=LORA))
    assert original.ldm.labels == ("day", "night", "orange")
    clips, steps = torch.randn(1, 4, 2, *base.latent_shape[1:]), torch.tensor([400])
    with torch.no_grad():
        expected, got = (one.predict(clips, steps, {"labels": torch.tensor([label])}) for one in (base, original))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        base.unet.disable_lora()
        assert not torch.allclose(base.predict(clips, steps, {"labels": torch.tensor([label])}), expected, atol=1e-2)


def test_only_known_bases_are_saved(tmp_path):
    with pytest.raises(ValueError, match=r"save_personal: base: expected a LabelBase or a PipelineBase, got object"):
        save_personal(object(), tmp_path)


def test_images_are_cropped_in_the_middle(tmp_path):
    picture = Image.new("RGB", (40, 10), (255, 0, 0))
    picture.paste((0, 0, 255), (15, 0, 25, 10))
    picture.save(tmp_path / "b.png")
    Image.new("L", (10, 10), 128).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    frames = load_images(tmp_path, (5, 5))
    assert frames.shape == (2, 3, 5, 5)
    torch.testing.assert_close(frames[0], torch.full((3, 5, 5), 128 / 255))
    torch.testing.assert_close(frames[1][:, 2, 2], torch.tensor([0.0, 0.0, 1.0]), rtol=0, atol=0.02)
    assert frames[1][2].min() > 0.5  # red is what was cropped
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"load_images: folder: expected images \(\.png, .*got .*empty without any"):
        load_images(tmp_path / "empty", (5, 5))


def test_prior_images_are_made_once_and_more_are_added(labelled, tmp_path, monkeypatch):
    base, _ = labelled
    adapter_of(base.unet).num_frames = 2
    options = {"num_inference_steps": 2, "guidance_scale": 1.5}
    first = prior_images(base, 0, 2, tmp_path, batch_size=1, **options)
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    three = prior_images(base, 0, 3, tmp_path, **options)
    assert torch.equal(three[:2], first) and not torch.equal(three[2], three[1])
    assert all((tmp_path / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    together = prior_images(base, 0, 3, tmp_path / "other", batch_size=3, **options)
    torch.testing.assert_close(together, three, rtol=0, atol=1.01 / 255)  # a rounding of 256 values
    with pytest.raises(ValueError, match=r"prior_images: folder: expected images made with .*'prompt': 1, .*delete it"):
        prior_images(base, 1, 3, tmp_path, **options)


def test_the_distance_of_two_looks():
    images = torch.rand(3, 3, 8, 12)
    assert look_distance(images, images.flip(0)) < 1e-6
    assert look_distance(images, images + 0.25) == pytest.approx(0.25)
    left = torch.zeros(1, 3, 8, 12)
    left[..., :6] = 1
    assert look_distance(left, left.flip(-1)) == pytest.approx(1.0)  # the mean colours of whole images are equal
    assert look_distance(left, torch.zeros(2, 3, 4, 6)) == pytest.approx(0.5**0.5)


# -- two texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["labelled", "captioned"])
def test_temporal_layers_go_on_reading_the_text_they_know(kind, request):
    base = request.getfixturevalue(kind)
    base, prompt = base if kind == "labelled" else (base, "a road")
    original = frozen_text(base)
    noise, steps = torch.randn(2, 4, 3, *base.latent_shape[1:]), torch.tensor([400])
    asked = ([prompt] * 2, [""] * 2) if kind == "labelled" else ([0] * 2, [prompt] * 2)
    both = TwoTexts(base, original)
    with torch.no_grad():
        untuned = base.predict(noise, steps, base.conditioning(*asked))
        torch.testing.assert_close(both.predict(noise, steps, both.conditioning(*asked)), untuned)
        before = both.conditioning(*asked)["temporal_encoder_hidden_states"].clone()
    train_dreambooth(base, frames_of(base), prompt, config=OptimConfig(steps=2, batch_size=2, lr=1e-1), **QUIET)
    with torch.no_grad():
        conditioning = both.conditioning(*asked)
        assert torch.equal(conditioning["temporal_encoder_hidden_states"], before)
        own = base.conditioning(*asked)
        text = own.get("encoder_hidden_states")
        text = base.ldm.conditioner(own["labels"]) if text is None else text
        assert not torch.allclose(text, before, atol=1e-2)
        expected = base.unet(noise, steps, encoder_hidden_states=text, temporal_encoder_hidden_states=before).sample
        assert torch.equal(both.predict(noise, steps, conditioning), expected)
        images = both.predict(noise[:, :, 0], steps, conditioning)
        assert torch.equal(images, base.predict(noise[:, :, 0], steps, own))
        clips = sample_clips(both, conditioning, noise, num_inference_steps=2, guidance_scale=2.0)
    assert clips.shape[:3] == (2, 3, 3)


def test_a_base_without_text_has_nothing_to_freeze_or_ask(unconditional):
    base = PipelineBase(unconditional)
    with pytest.raises(ValueError, match=r"frozen_text: base: expected one with text encoders or labels, got Pipeline"):
        frozen_text(base)
    with pytest.raises(ValueError, match=r"ask: base: expected a model with text or labels, got one without"):
        train_dreambooth(base, frames_of(base), "a road", **QUIET)


# -- refusals and the command -----------------------------------------------------------------------------------------


def test_what_training_refuses(labelled):
    base, label = labelled
    with pytest.raises(
        ValueError, match=r"train_dreambooth: expected prior_frames and class_prompt together, got only"
    ):
        train_dreambooth(base, frames_of(base), label, class_prompt=0)
    with pytest.raises(
        ValueError, match=r"expected frames and prior_frames \(images, 3, height, width\).*\(0, 3, 16, 24"
    ):
        train_dreambooth(base, frames_of(base)[:0], label)
    with pytest.raises(ValueError, match=r"ask: prompts: expected numbers of labels for a LabelBase, got \['day'\]"):
        train_dreambooth(base, frames_of(base), "day")


def test_a_caption_is_not_a_label(captioned):
    with pytest.raises(ValueError, match=r"ask: prompts: expected captions for a PipelineBase, got \[3\]"):
        train_dreambooth(captioned, frames_of(captioned), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prior": -1}, r"expected num_prior, prior_weight and lora_rank of at least 0, got -1, 1\.0 and 0"),
        ({"prompt": "a", "class_prompt": "a"}, r"expected two prompts, got 'a' for both"),
        ({"model": "somewhere"}, r"expected images, a folder with the subject, for model='somewhere', got None"),
        (
            {"model": "somewhere", "images": Path("photos")},
            r"optim\.lr: expected one for model='somewhere', got 0\.0004, the default for the shipped model",
        ),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=f"DreamBoothConfig: {message}"):
        DreamBoothConfig(**options)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_stage_on_the_shipped_model(tmp_path, lora_rank):
    preview = PreviewConfig(clips=1 - lora_rank // 2, num_frames=2, sampling_steps=1)
    config = DreamBoothConfig(
        out=tmp_path, num_prior=1, prior_steps=1, lora_rank=lora_rank, optim=FAST, preview=preview
    )
    base = run_dreambooth_stage(config)
    assert base.ldm.labels[-1] == "orange" and len(list((tmp_path / "prior").glob("*.png"))) == 1
    records = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 2 and {"subject", "prior"} <= steps[0].keys()
    assert {"config.json", "versions.json", "result.json"} <= {path.name for path in tmp_path.iterdir()}
    result = json.loads((tmp_path / "result.json").read_text())
    assert ("subject_distance_after" in result) == (tmp_path / "preview.png").exists() == (not lora_rank)
    if not lora_rank:
        assert load_base(tmp_path / "model").ldm.labels[-1] == "orange"


def test_the_command_on_a_pipeline_of_a_folder(stable_diffusion, tmp_path):
    stable_diffusion.save_pretrained(tmp_path / "base")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (50, 40), (200, 100, 0)).save(tmp_path / "photos" / "one.jpg")
    words = ["train", "dreambooth", "--model", str(tmp_path / "base"), "--images", str(tmp_path / "photos")]
    words += ["--out", str(tmp_path / "run"), "--prompt", "a road", "--class-prompt", "a video"]
    words += [
        "--num-prior",
        "1",
        "--prior-steps",
        "1",
        "--optim.steps",
        "1",
        "--optim.lr",
        "1e-6",
        "--optim.batch-size",
        "1",
    ]
    assert cli(words) == 0
    tuned = load_base(tmp_path / "run" / "model")
    assert isinstance(tuned, PipelineBase) and tuned.frame_size == (32, 32)
