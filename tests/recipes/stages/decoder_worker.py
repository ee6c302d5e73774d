"""Trains the decoder of a tiny autoencoder in float64: `python decoder_worker.py FOLDER BATCH_SIZE`, on any number of
processes; all batches of a step together are the same clips."""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from temporal_layers.recipes.stages.decoder import train_decoder
from temporal_layers.recipes.stages.decoder_batches import DecoderOptions
from temporal_layers.recipes.stages.discriminator import DiscriminatorConfig
from temporal_layers.recipes.training.engine import OptimConfig, RunFolder, make_accelerator


def train(folder, batch_size):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae.double().eval()
    clips = torch.rand(5, 3, 5, 20, 20, dtype=torch.float64)
    chosen = DecoderOptions(
        num_frames=3,
        crop=16,
        latent_noise=0.1,
        disc_start=1,
        discriminator=DiscriminatorConfig(width=4, num_layers=2),
    )
    config = OptimConfig(steps=3, batch_size=batch_size, lr=1e-3, weight_decay=0.0)
    run = RunFolder(folder, config) if make_accelerator().is_main_process else None
    train_decoder(vae, clips, config, chosen, seed=3, run=run, progress=False)
    if run is not None:
        torch.save(vae.state_dict(), Path(folder) / "weights.pt")
    return vae


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], int(sys.argv[2]))
