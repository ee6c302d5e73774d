"""torch.export with any number of clips and frames, and torch.compile of single blocks."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from temporal_layers.adapters import inject

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it traces
    pytest.mark.filterwarnings("ignore::FutureWarning"),
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


def test_export_with_any_batch_and_clip_length(make_unet, randomise):
    model = make_unet(**TINY)
    randomise(inject(model))
    example = (torch.randn(2, 4, 3, 8, 8), torch.tensor(7), torch.randn(2, 3, 12))
    shapes = {"sample": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}, "args": (None, {0: Dim.DYNAMIC})}
    with torch.no_grad():
        exported = torch.export.export(model, example, dynamic_shapes=shapes, strict=False).module()
        for batch, frames in ((1, 2), (3, 5), (2, 8)):
            clips, text = torch.randn(batch, 4, frames, 8, 8), torch.randn(batch, 3, 12)
            close(exported(clips, torch.tensor(7), text).sample, model(clips, 7, text).sample)
    copy.deepcopy(model)  # tracing leaves nothing behind that could not be copied


@pytest.mark.parametrize("order", ["injection first", "compiled first"])
def test_compile_repeated_blocks_with_any_clip_length(make_unet, randomise, order):
    model, twin = make_unet(**TINY), make_unet(**TINY)
    twin.load_state_dict(model.state_dict())
    backend = CompileCounterWithBackend("eager")
    if order == "compiled first":
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    weights = randomise(inject(twin)).state_dict()
    inject(model)
    model.load_state_dict(weights, strict=False)
    if order == "injection first":
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    with torch.no_grad():
        for frames in range(2, 12):  # more lengths than dynamo recompiles for
            clips, text = torch.randn(2, 4, frames, 8, 8), torch.randn(2, 3, 12)
            close(model(clips, 7, text).sample, twin(clips, 7, text).sample)
    assert 1 <= backend.frame_count <= 3
