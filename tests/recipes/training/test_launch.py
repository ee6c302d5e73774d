"""Settings of the engine, the accelerator they ask for, trackers, gradient checkpointing, signals."""

import importlib.util
import json
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import DistributedType, LoggerType
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from temporal_layers.recipes.training import launch
from temporal_layers.recipes.training.engine import fit
from temporal_layers.recipes.training.launch import (
    EngineConfig,
    StopRequest,
    check_accelerator,
    checkpoint_gradients,
    make_accelerator,
)
from temporal_layers.recipes.training.optim import OptimConfig
from temporal_layers.recipes.training.streams import SampleStream


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation": 0}, "expected accumulation and keep of at least 1 .* got accumulation=0, keep=2 and valid"),
        ({"keep": 0}, "keep=0"),
        ({"validate_every": -1}, "validate_every=-1"),
        ({"precision": "fp8"}, "expected precision 'auto', 'no', 'bf16' or 'fp16', got 'fp8'"),
        ({"trackers": ("mlflow",)}, "expected trackers among 'tensorboard', 'trackio' and 'wandb', got 'mlflow'"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**changes)


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(tracker, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=f"expected the package '{tracker}', got none; pip install {tracker}, or leave"
    ):
        make_accelerator(EngineConfig(trackers=(tracker,)))


def test_an_accelerator_made_for_other_settings_is_refused():
    check_accelerator(Accelerator(), EngineConfig(accumulation=3))
    with pytest.raises(ValueError, match="expected gradient_accumulation_steps=2, as in EngineConfig, got 4"):
        check_accelerator(Accelerator(gradient_accumulation_steps=4), EngineConfig(accumulation=2))
    with pytest.raises(ValueError, match="expected the tracker 'wandb', got one without it"):
        check_accelerator(Accelerator(), EngineConfig(trackers=("wandb",)))


def test_deepspeed_cannot_go_on():
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(
        ValueError, match=r"expected no resume with DeepSpeed, which keeps .* got resume='auto'; DDP and"
    ):
        check_accelerator(accelerator, EngineConfig(resume="auto"))


class Notebook(GeneralTracker):
    """A tracker in memory that stands where accelerate looks for trackio's."""

    name = "trackio"
    requires_logging_directory = False
    runs: list = []  # noqa: RUF012

    def __init__(self, run_name, **options):
        super().__init__()
        self.run = {"name": run_name, "config": None, "values": [], "finished": False}
        self.runs.append(self.run)

    @property
    def tracker(self):
        return self.run

    def store_init_configuration(self, values):
        self.run["config"] = json.loads(json.dumps(values))

    def log(self, values, step, **options):
        self.run["values"].append((step, values))

    def finish(self):
        self.run["finished"] = True


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"loss": (self.w * x).square().mean()}


def test_numbers_reach_the_trackers_and_each_fit_is_a_run(monkeypatch, tmp_path):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Notebook)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TRACKIO])
    monkeypatch.setitem(sys.modules, "trackio", ModuleType("trackio"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "trackio")
    Notebook.runs.clear()
    engine = EngineConfig(trackers=("trackio",), validate_every=2)
    accelerator = make_accelerator(engine, tmp_path)
    for name in ("one stage", "other"):
        fit(
            Slope(),
            SampleStream(lambda position: (torch.ones(1),)),
            OptimConfig(steps=2, batch_size=1, lr=0.1),
            name=name,
            accelerator=accelerator,
            engine=engine,
            progress=False,
            validate=lambda step: {"distance": 7.0},
        )
    assert [run["name"] for run in Notebook.runs] == ["one-stage", "other"]
    for run in Notebook.runs:
        assert run["finished"] and run["config"]["optim.lr"] == 0.1 and run["config"]["seed"] == 0
    first, second, validation = Notebook.runs[0]["values"]
    assert (first[0], second[0], validation) == (0, 1, (1, {"one stage/validation/distance": 7.0}))
    assert first[1]["one stage/loss"] == 1.0 and first[1]["one stage/grad_norm/all"] == pytest.approx(2.0)
    assert 0 < first[1]["one stage/lr"] < 0.1


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    engine = EngineConfig(trackers=("tensorboard",))
    fit(
        Slope(),
        SampleStream(lambda position: (torch.ones(1),)),
        OptimConfig(steps=2, batch_size=1, lr=0.1),
        name="a stage",
        accelerator=make_accelerator(engine, tmp_path),
        engine=engine,
        progress=False,
    )
    assert list(tmp_path.glob("a-stage/**/events.out.tfevents.*"))


def test_gradient_checkpointing_is_turned_on_in_what_is_trained():
    vae = AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    both = nn.ModuleDict({"vae": vae, "text": nn.ModuleList([text])})
    assert checkpoint_gradients(both) == ["vae", "text.0"]
    assert vae.is_gradient_checkpointing and any(getattr(m, "gradient_checkpointing", False) for m in text.modules())
    vae.disable_gradient_checkpointing()
    vae.requires_grad_(False)
    assert checkpoint_gradients(both) == ["text.0"] and not vae.is_gradient_checkpointing
    with pytest.raises(
        ValueError, match=r"expected a trained model with enable_gradient_checkpointing.* got none in Lin"
    ):
        checkpoint_gradients(nn.Linear(1, 1))


def test_signals_are_left_alone_outside_the_main_thread():
    found = []

    def enter():
        with StopRequest() as stop:
            found.append((stop.asked(), stop.previous))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(0, {})]


def test_the_default_accelerator_has_no_trackers():
    assert make_accelerator().log_with == [] and launch.EngineConfig().trackers == ()
