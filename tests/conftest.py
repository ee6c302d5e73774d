"""What every test relies on: one thread, a fixed seed, no network, the same hypothesis examples on every run."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import hypothesis
import pytest
import torch
from torch.profiler import ProfilerActivity, profile


class TorchRandom:
    """Lets hypothesis seed torch before each example, so that a failing example fails again when it is replayed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(torch_random)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)  # --hypothesis-profile=thorough
hypothesis.settings.load_profile("ci")


def pytest_configure():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def peak(tmp_path):
    """Bytes that a call holds at its worst beyond those there before, its result included, by PyTorch's allocator."""
    # Without acc_events torch 2.11 warns that it forgets events, which it has handed over by then.
    options = {"activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True}

    @torch.no_grad()
    def peak(call):
        with profile(**options) as profiler:
            call()
        path = Path(tmp_path, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
        changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
        held = most = 0
        for _, change in changes:
            held += change
            most = max(most, held)
        return most

    return peak
