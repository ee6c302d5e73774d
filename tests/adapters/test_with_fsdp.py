"""FSDP2 on two processes: the same result, the same gradients, and one whole adapter file."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import distributed

from temporal_layers.adapters import TemporalAdapter, adapter_of, inject

WORLD = 2
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")  # names stay those of the image model


def make_model():
    spec = importlib.util.spec_from_file_location("shared", Path(__file__).parent / "conftest.py")
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    torch.manual_seed(0)
    model = UNet2DConditionModel(**shared.UNET)
    adapter = inject(model).freeze()
    with torch.no_grad():
        for _, parameter in [*adapter.named_parameters("temporal"), *adapter.named_parameters("alpha")]:
            parameter.normal_(std=0.2)
    return model, torch.randn(WORLD, 4, 3, 8, 8), torch.randn(WORLD, 3, 12)


def loss_of(model, clips, text):
    return model(clips, 7, text).sample.square().mean()


def work(rank, port, folder):
    """One process: a step on its clip, and what it sees written down for the test."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        mesh = distributed.init_device_mesh("cpu", (WORLD,))
        model, clips, text = make_model()
        for module in model.modules():
            if type(module).__name__ in BLOCKS:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss = loss_of(model, clips[rank : rank + 1], text[rank : rank + 1])
        loss.backward()
        gradients = {
            name: parameter.grad.full_tensor()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_model_state_dict(model, options=options)
        adapter_of(model).save_pretrained(folder / "adapter")
        if rank == 0:
            torch.save({"gradients": gradients, "state": whole}, folder / "seen.pt")
        torch.save(loss.detach(), folder / f"loss{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Scripts of their own: a spawned process would have to import this file, which pytest loads by its path.
    command = [sys.executable, "-P", __file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(port), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * WORLD, "\n".join(errors)
    model, clips, text = make_model()
    adapter = adapter_of(model)
    losses = [torch.load(tmp_path / f"loss{rank}.pt") for rank in range(WORLD)]
    for rank, loss in enumerate(losses):
        alone = loss_of(model, clips[rank : rank + 1], text[rank : rank + 1]).detach()
        torch.testing.assert_close(loss, alone, rtol=1e-6, atol=1e-7)
    loss_of(model, clips, text).backward()
    seen = torch.load(tmp_path / "seen.pt")
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert seen["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen["gradients"][name], gradient, rtol=1e-5, atol=1e-8, msg=lambda t, n=name: n + t)
    assert seen["state"].keys() == model.state_dict().keys()
    assert all(torch.equal(value, seen["state"][name]) for name, value in model.state_dict().items())
    plain, _, _ = make_model()
    adapter_of(plain).remove()
    loaded = TemporalAdapter.from_pretrained(plain, tmp_path / "adapter").state_dict()
    assert loaded.keys() == adapter.state_dict().keys()
    assert all(torch.equal(value, loaded[name]) for name, value in adapter.state_dict().items())
    assert '"base_class": "UNet2DConditionModel"' in (tmp_path / "adapter" / "config.json").read_text()


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
