"""Feature networks: what a network is given, what it may return, and how the ready-made ones are loaded."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, VideoMAEConfig, VideoMAEModel

from temporal_layers.recipes.evaluation.networks import (
    FeatureNetwork,
    NetworkConfig,
    file_digest,
    load_network,
    weights_digest,
)

CLIPS = torch.rand(2, 3, 4, 16, 24, generator=torch.Generator().manual_seed(0))


def network(module, **options):
    return FeatureNetwork(name="net", digest="none", module=module, **options)


def first_pixels(pixels):
    return pixels.flatten(1)[:, :5]


def test_rows_are_float64_one_for_each_clip_or_frame():
    clips = network(first_pixels)(CLIPS)
    assert clips.dtype == torch.float64 and clips.shape == (2, 5)
    frames = network(first_pixels, reads="frames")(CLIPS)
    assert frames.shape == (8, 5)
    torch.testing.assert_close(frames[5], CLIPS[1, :, 1].flatten()[:5].double())


def test_values_are_scaled_by_mean_and_deviation():
    seen = network(nn.Identity(), mean=(0.1, 0.2, 0.3), std=(2.0, 4.0, 5.0)).prepared(CLIPS)
    torch.testing.assert_close(seen[:, 1], (CLIPS[:, 1] - 0.2) / 4)
    torch.testing.assert_close(seen[:, 2], (CLIPS[:, 2] - 0.3) / 5)


def test_crop_keeps_proportions_and_squash_keeps_everything():
    """A disc in the middle stays round under one, and becomes an ellipse under the other."""
    rows, columns = torch.meshgrid(torch.arange(40) - 19.5, torch.arange(80) - 39.5, indexing="ij")
    disc = (rows**2 + columns**2 < 14**2).float().expand(1, 3, 1, 40, 80)
    crop = network(nn.Identity(), size=(40, 40)).prepared(disc)[0, 0, 0] > 0.5
    squash = network(nn.Identity(), size=(40, 40), fit="squash").prepared(disc)[0, 0, 0] > 0.5
    assert crop.any(0).sum() == crop.any(1).sum() == 28
    assert squash.any(1).sum() == 28 and squash.any(0).sum() == 14


@given(height=st.integers(2, 30), width=st.integers(2, 30), fit=st.sampled_from(["crop", "squash"]))
def test_any_size_becomes_the_one_asked_for_within_the_range(height, width, fit):
    clips = torch.rand(1, 3, 2, height, width)
    seen = network(nn.Identity(), size=(12, 9), fit=fit).prepared(clips)
    assert seen.shape == (1, 3, 2, 12, 9)
    assert seen.min() >= 0 and seen.max() <= 1


def test_probabilities_become_logarithms():
    probabilities = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    rows = network(lambda _: probabilities, output="probabilities")(CLIPS)
    torch.testing.assert_close(rows[0].exp(), probabilities[0].double())
    assert rows.isfinite().all()


def test_refusals_of_clips_and_outputs():
    with pytest.raises(ValueError, match="net: expected clips of 16 frames, got 4"):
        network(first_pixels, num_frames=16)(CLIPS)
    with pytest.raises(ValueError, match=r"one row for each of 2 clips, got \(1, 5\)"):
        network(lambda pixels: first_pixels(pixels)[:1])(CLIPS)
    with pytest.raises(ValueError, match="one row for each of 2 clips, got dict"):
        network(lambda pixels: {})(CLIPS)
    with pytest.raises(ValueError, match="expected finite output"):
        network(lambda pixels: first_pixels(pixels) / 0)(CLIPS)


def test_refusals_of_descriptions():
    with pytest.raises(ValueError, match="kind: expected one of driving, torchscript, videomae, clip, got 'i3d'"):
        NetworkConfig(kind="i3d")
    with pytest.raises(ValueError, match=r"value_range: expected \(black, white\)"):
        NetworkConfig(value_range=(1.0, 1.0))
    with pytest.raises(ValueError, match="driving: expected the output features or logits, got 'probabilities'"):
        load_network(NetworkConfig(output="probabilities"))


class Scripted(nn.Module):
    """Like published I3D files: keyword switches, and features or logits."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, clips: torch.Tensor, rescale: bool = True, return_features: bool = False) -> torch.Tensor:
        rows = self.scale * clips.flatten(2).mean(2)
        if return_features:
            return rows if not rescale else 2 * rows
        return rows[:, :2]


@pytest.fixture
def script(tmp_path):
    with pytest.warns(DeprecationWarning):
        torch.jit.script(Scripted()).save(tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_torchscript_gets_its_range_and_keywords(script):
    config = NetworkConfig(
        kind="torchscript",
        path=str(script),
        value_range=(-1.0, 1.0),
        keywords=(("rescale", False), ("return_features", True)),
    )
    net = load_network(config)
    assert net.name == "net" and net.digest == file_digest(script)
    torch.testing.assert_close(net(CLIPS), (3 * (2 * CLIPS - 1).flatten(2).mean(2)).double(), rtol=1e-5, atol=1e-5)


def test_torchscript_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"i3d: expected a TorchScript file, got ''.*--network FILE"):
        load_network(NetworkConfig(kind="torchscript", name="i3d"))
    torch.save({"weight": torch.ones(1)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"to be a TorchScript archive, got.*state dict alone is not enough"):
        load_network(NetworkConfig(kind="torchscript", path=str(tmp_path / "state.pt")))


def test_videomae_of_a_folder(tmp_path):
    config = VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = VideoMAEModel(config).eval()
    model.save_pretrained(tmp_path)
    net = load_network(NetworkConfig(kind="videomae", path=str(tmp_path), fit="squash"))
    assert net.num_frames == 4 and net.size == (16, 16) and net.digest == weights_digest(model)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    clips = CLIPS[..., :16]
    with torch.no_grad():
        expected = model(((clips - mean) / std).transpose(1, 2)).last_hidden_state.mean(1)
    torch.testing.assert_close(net(clips), expected.double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="videomae: expected a folder or repository of a VideoMAEModel"):
        load_network(NetworkConfig(kind="videomae", path=str(tmp_path / "none")))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, tokenizer_in):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer, size = tokenizer_in(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": size, "max_position_embeddings": 12, "bos_token_id": size - 2, "eos_token_id": size - 1}
    config = CLIPConfig(
        text_config={**tower, **text, "pad_token_id": size - 1},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=6,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_embeds_frames_and_texts_as_its_own_forward_does(clip_folder):
    net = load_network(NetworkConfig(kind="clip", path=str(clip_folder), reads="frames"))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    frames, texts = net(CLIPS), net.embed_text(["a video", "night road"])
    assert frames.shape == (8, 6) and texts.shape == (2, 6) and texts.dtype == torch.float64
    words = AutoTokenizer.from_pretrained(clip_folder)(["a video", "night road"], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=net.prepared(CLIPS), **words)
    cosine = nn.functional.cosine_similarity(frames[:, None], texts[None], dim=2)
    expected = output.logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(cosine, expected.detach().double(), rtol=1e-4, atol=1e-5)


def test_digests_follow_the_weights():
    torch.manual_seed(0)
    one, same = nn.Linear(3, 2), nn.Linear(3, 2)
    same.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(same)
    with torch.no_grad():
        same.bias[0] += 1e-3
    assert weights_digest(one) != weights_digest(same)
    assert weights_digest(one) != weights_digest(one.half())


def test_identity_is_plain_and_complete():
    net = network(first_pixels, size=(8, 8))
    assert json.loads(json.dumps(net.identity))["size"] == [8, 8]
    assert set(net.identity) == {"name", "digest", "reads", "output", "size", "fit", "mean", "std", "num_frames"}
