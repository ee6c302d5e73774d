"""A training run of a real, tiny, injected UNet, for tests that need processes of their own.

    python worker.py '[{"folder": "...", "steps": 8, ...}, ...]'

runs one job after the other; `train` is also what the tests call for the runs to compare with.
"""

import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import UNet2DConditionModel
from torch import nn

from temporal_layers.adapters import inject
from temporal_layers.recipes.training.engine import EngineConfig, OptimConfig, RunFolder, fit
from temporal_layers.recipes.training.streams import SampleStream, generator_at

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run is told.

    Attributes:
        pause: Seconds that a sample takes longer, so that the run can be killed in between.
        term_at: Step at which the last process gets SIGTERM.
        shard: Whether to cut the model up with FSDP2.
        turns: Whether to train a generator and a discriminator instead of the UNet.
    """

    folder: str
    steps: int = 8
    batch_size: int = 1
    accumulation: int = 1
    dropout: float = 0.0
    ema_decay: float = 0.0
    checkpoint_every: int = 3
    resume: str | None = None
    double: bool = False
    shard: bool = False
    turns: bool = False
    pause: float = 0.0
    term_at: int | None = None
    lr: float = 1e-2


class Denoising(nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, noisy, noise, timesteps, text):
        predicted = self.unet(noisy, timesteps, text).sample
        return {"loss": (predicted - noise).square().mean(), "size": predicted.abs().mean()}


class Rivals(nn.Module):
    """A generator and a discriminator; each turn leaves the other's parameters, or some of them, without gradients."""

    turns = ("generator", "discriminator")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        self.discriminator = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, noisy, noise, timesteps, text, *, turn):
        made, real = self.generator(text.mean(1)), noisy.mean((1, 3, 4))
        if turn == "generator":
            return {"loss": -self.discriminator(made).mean() + (made - real).square().mean()}
        gap = self.discriminator(made.detach()) - self.discriminator(real)
        return {"loss": (gap + gap.square()).mean(), "gap": gap.mean()}

    def groups(self):
        return {turn: [{"params": list(getattr(self, turn).parameters())}] for turn in self.turns}


def make_unet(dropout=0.0):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=8,
        dropout=dropout,
    )
    return unet, inject(unet).freeze()


def stream_of(job):
    dtype = torch.float64 if job.double else torch.float32

    def draw(position):
        time.sleep(job.pause)
        samples = job.batch_size * job.accumulation * PartialState().num_processes
        if job.term_at is not None and PartialState().is_last_process and position // samples == job.term_at:
            signal.raise_signal(signal.SIGTERM)
        generator = generator_at(3, position)
        clip, noise = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=dtype)
        text = torch.randn(2, 8, generator=generator, dtype=dtype)
        return (clip + noise) / 2, noise, torch.randint(1000, (), generator=generator), text

    return SampleStream(draw)


def train(job):
    """Run a job; returns losses and the trained parameters (not with shards)."""
    torch.set_num_threads(1)
    config = OptimConfig(
        steps=job.steps,
        batch_size=job.batch_size,
        lr=job.lr,
        ema_decay=job.ema_decay,
        checkpoint_every=job.checkpoint_every,
    )
    if job.turns:
        objective = Rivals()
        groups = objective.groups()
    else:
        unet, adapter = make_unet(job.dropout)
        objective = Denoising(unet.double() if job.double else unet).train()
        if job.shard:
            shard(objective)
        groups = adapter.parameter_groups(lr=config.lr, alpha_lr=3 * config.lr, weight_decay=0.1)
    history = fit(
        objective,
        stream_of(job),
        config,
        name="tiny unet",
        seed=11,
        groups=groups,
        run=RunFolder(job.folder, config),
        engine=EngineConfig(accumulation=job.accumulation, resume=job.resume),
        progress=False,
    )
    trained = {name: p.detach() for name, p in objective.named_parameters() if p.requires_grad and not job.shard}
    return history, trained


def shard(objective):
    """Cut an objective up as its user would, before ``fit`` sees it."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PartialState().num_processes,))
    for module in objective.modules():
        if type(module).__name__ in BLOCKS:
            fully_shard(module, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def records(folder):
    """The log without what a clock has put into it."""
    lines = (Path(folder) / "losses.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


if __name__ == "__main__":
    for options in json.loads(sys.argv[1]):
        try:
            train(Job(**options))
        except SystemExit:
            if "term_at" not in options:
                raise
