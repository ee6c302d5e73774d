"""Tiny random models and the measures the tests of the adapters share."""

import hashlib

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
UNCONDITIONAL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
VAE = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


@pytest.fixture
def make_unet():
    return lambda **changes: UNet2DConditionModel(**{**UNET, **changes}).eval()


@pytest.fixture
def make_unconditional():
    return lambda **changes: UNet2DModel(**{**UNCONDITIONAL, **changes}).eval()


@pytest.fixture
def make_vae():
    return lambda **changes: AutoencoderKL(**{**VAE, **changes}).eval()


@pytest.fixture(params=["conditional", "unconditional"])
def make_any_unet(request, make_unet, make_unconditional):
    """A factory of each kind of UNet, and the arguments behind its sample and timestep for a number of clips."""
    if request.param == "conditional":
        return make_unet, lambda batch: (torch.randn(batch, 3, 12),)
    return make_unconditional, lambda batch: ()


@pytest.fixture
def randomise():
    """Gives the temporal layers weights as after a training that moved everything."""

    def randomise(adapter, std=0.2):
        with torch.no_grad():
            for layer in adapter.layers.values():
                for parameter in layer.parameters():
                    parameter.copy_(torch.randn_like(parameter, dtype=torch.float32) * std)
        return adapter

    return randomise


@pytest.fixture
def fold():
    """Frames innermost into the batch, written out once more with loops: independent of the library."""
    return lambda clips: torch.stack([clip[:, frame] for clip in clips for frame in range(clips.shape[2])])


@pytest.fixture
def fingerprint():
    """A value that differs when anything an injection touches differs: weights, classes, attributes, trainability."""

    def fingerprint(model):
        digest = hashlib.sha256()
        for name, module in model.named_modules():
            digest.update(f"{name} {id(type(module))} {sorted(module.__dict__)} {module.training}\n".encode())
            checkpoint = module.__dict__.get("_gradient_checkpointing_func")
            digest.update(f"{id(checkpoint) if checkpoint else None}\n".encode())
        for name, parameter in model.named_parameters():
            digest.update(f"{name} {id(parameter)} {parameter.requires_grad}\n".encode())
        for name, value in model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            if not value.is_meta:
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    return fingerprint
