"""torch.compile: one graph, no graph per clip length, and layers injected after compilation are not missed."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from temporal_layers.adapters import TemporalConfig, inject

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it traces
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),  # in diffusers
    pytest.mark.timeout(300),  # tracing is slow where cores are shared
]

TINY = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (8,),
    "mid_block_type": None,
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


def test_one_graph_and_no_graph_per_clip_length(make_unet, randomise):
    model = make_unet(**TINY)
    randomise(inject(model))
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    text = torch.randn(2, 3, 12)
    with torch.no_grad():
        for frames in (2, 3, 5, 8):
            clips = torch.randn(2, 4, frames, 8, 8)
            close(compiled(clips, 7, text).sample, model(clips, 7, text).sample)
    assert backend.frame_count <= 3  # one static, then dynamic; never one for every length


def test_layers_injected_after_compilation_run(make_unet, randomise):
    model = make_unet(**TINY)
    model.compile(backend="eager", fullgraph=True)
    images, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12)
    clips = torch.randn(2, 4, 3, 8, 8)
    with torch.no_grad():
        image = model(images, 7, text).sample
        adapter = randomise(inject(model, TemporalConfig(transformer=None)))
        close(model(clips, 7, text).sample, model.forward(clips, 7, text).sample)
        with adapter.disabled():
            still = model(clips, 7, text).sample
        assert not torch.allclose(model(clips, 7, text).sample, still, atol=1e-3)
        adapter.remove()
        assert torch.equal(model(images, 7, text).sample, image)


def test_training_step_with_checkpointing(make_unet, randomise):
    model = make_unet(**TINY)
    randomise(inject(model))
    clips, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 3, 12)
    model(clips, 7, text).sample.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(clips, 7, text).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name])
