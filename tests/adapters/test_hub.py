"""Adapters on the Hugging Face Hub, without a network: what would be asked for and what would be sent."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from temporal_layers.adapters import TemporalAdapter, TemporalConfig, hub, inject, merge

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@pytest.fixture
def adapter(make_unet, randomise):
    adapter = randomise(inject(make_unet()))
    adapter.metadata.update(
        title="Slow pans",
        notes="Trained on the sea.",
        base_model="someone/image-model",
        licence="OpenRAIL",
        fps="8 | 16",
    )
    return adapter


@pytest.fixture
def asked(monkeypatch, tmp_path, adapter):
    """A hub with one repository; records what it is asked for."""
    calls = []
    adapter.save_pretrained(tmp_path / "copy")

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tmp_path / "copy")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return calls


@pytest.fixture
def sent(monkeypatch):
    """Records what is sent to the hub, with the contents of the files."""
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", repo_id, options))

        def upload_folder(self, folder_path, **options):
            files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            calls.append(("upload_folder", files, options))
            request = "https://hub/pull/1" if options["create_pr"] else None
            return SimpleNamespace(commit_url="https://hub/commit/1", pr_url=request)

    monkeypatch.setattr(hub, "HfApi", Api)
    return calls


def test_a_repository_is_fetched_and_loaded(adapter, asked, make_unet):
    loaded = TemporalAdapter.from_pretrained(
        make_unet(), "someone/slow-pans", revision="v1", token="secret", local_files_only=True
    )
    assert asked == [
        (
            "someone/slow-pans",
            {
                "revision": "v1",
                "token": "secret",
                "local_files_only": True,
                "allow_patterns": [CONFIG, WEIGHTS],  # nothing else of the repository comes here
            },
        )
    ]
    found, expected = loaded.state_dict(), adapter.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert loaded.metadata == adapter.metadata
    assert merge(["someone/slow-pans"], weights=[1.0]).metadata == adapter.metadata


def test_a_folder_goes_first(adapter, asked, make_unet, tmp_path, monkeypatch):
    adapter.save_pretrained(tmp_path / "someone" / "slow-pans")
    monkeypatch.chdir(tmp_path)
    TemporalAdapter.from_pretrained(make_unet(), "someone/slow-pans")
    assert asked == []


@pytest.mark.parametrize("source", ["runs", "./runs/motion", "a/b/c", "/runs/motion", "someone/"])
def test_what_is_no_repository_is_not_asked_for(asked, make_unet, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"expected a file config.json, got none; pass the folder"):
        TemporalAdapter.from_pretrained(make_unet(), source)
    assert asked == []


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Cannot find the requested files\nin the disk cache and outgoing traffic is disabled."),
        ConnectionError("no route to host"),
        huggingface_hub.errors.HFValidationError("Repo id must not contain '--'"),
    ],
)
def test_a_repository_that_cannot_be_had(make_unet, monkeypatch, fingerprint, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    model = make_unet()
    before = fingerprint(model)
    match = rf"expected a folder or a .* got 'someone/pans': .*the hub said {type(error).__name__}: .*download it and p"
    with pytest.raises(ValueError, match=match):
        TemporalAdapter.from_pretrained(model, "someone/pans")
    assert fingerprint(model) == before


def test_offline_as_huggingface_hub_means_it(make_unet, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"the hub said LocalEntryNotFoundError: .*; check the name and the connection"
    ):
        TemporalAdapter.from_pretrained(make_unet(), "someone/pans", local_files_only=True)
    assert issubclass(RepositoryNotFoundError, OSError)  # which is how a repository that is not there comes


def test_push(adapter, sent, tmp_path):
    address = adapter.push_to_hub(
        "someone/slow-pans", dtype=torch.float16, metadata={"steps": "130"}, private=True, token="secret",
        revision="dev", commit_message="Pans",
    )  # fmt: skip
    assert address == "https://hub/commit/1"
    (token, create, upload) = sent
    assert token == ("token", "secret")
    assert create == ("create_repo", "someone/slow-pans", {"private": True, "repo_type": "model", "exist_ok": True})
    adapter.save_pretrained(tmp_path, dtype=torch.float16, metadata={"steps": "130"})
    card = upload[1].pop("README.md").decode()
    assert upload[1] == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert upload[2] == {
        "repo_id": "someone/slow-pans", "repo_type": "model", "revision": "dev", "commit_message": "Pans",
        "create_pr": False,
    }  # fmt: skip
    assert 'TemporalAdapter.from_pretrained(unet, "someone/slow-pans")' in card and "| steps | 130 |" in card


def test_push_without_a_card_as_a_request(adapter, sent):
    merged = merge([adapter], weights=[1.0])
    assert merged.push_to_hub("someone/slow-pans", card=False, create_pr=True) == "https://hub/pull/1"
    assert set(sent[-1][1]) == {CONFIG, WEIGHTS}


def test_the_card_says_what_it_is(adapter, tmp_path):
    adapter.save_pretrained(tmp_path, dtype=torch.bfloat16, card=True)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "base_model": "someone/image-model",
        "library_name": "temporal-layers",
        "license": "openrail",
        "pipeline_tag": "text-to-video",
        "tags": ["temporal-layers", "video", "safetensors", "bfloat16"],
    }
    count = sum(value.numel() for value in adapter.state_dict().values())
    for line in (
        "# Slow pans",
        "Trained on the sea.",
        "| made for | UNet2DConditionModel of someone/image-model |",
        f"| sites | {len(adapter.sites)} |",
        f"| parameters | {count:,} |",
        "| stored as | bfloat16 |",
        "| licence | OpenRAIL |",
        r"| fps | 8 \| 16 |",
        'unet = UNet2DConditionModel.from_pretrained("someone/image-model", subfolder="unet")',
        'adapter = TemporalAdapter.from_pretrained(unet, "path/to/this/folder")',
    ):
        assert line in card.text.splitlines()


def test_a_licence_in_words_and_a_base_that_is_no_repository(adapter, tmp_path):
    adapter.metadata.update(licence="As SVD: non-commercial, see the page", base_model="/data/models/mine")
    adapter.save_pretrained(tmp_path, card=True)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "as-svd-non-commercial-see-the-page")
    assert "base_model" not in data


def test_a_card_of_a_decoder_without_metadata(make_vae, tmp_path):
    inject(make_vae(), TemporalConfig.for_decoder()).save_pretrained(tmp_path, card=True)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "temporal-layers",
        "tags": ["temporal-layers", "video", "safetensors", "float32"],
    }
    assert "# Temporal layers for AutoencoderKL" in card.text and "| licence | not stated |" in card.text
    assert 'vae = AutoencoderKL.from_pretrained("...", subfolder="vae")' in card.text


def test_a_card_for_a_class_that_diffusers_has_not(adapter, tmp_path):
    class Mine(type(adapter.model).spatial_class):
        pass

    adapter.remove()
    adapter.model.__class__ = Mine
    inject(adapter.model).save_pretrained(tmp_path, card=True)
    assert "unet = ...  # the Mine" in (tmp_path / "README.md").read_text()


def test_no_card_unless_asked_for(adapter, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    adapter.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
