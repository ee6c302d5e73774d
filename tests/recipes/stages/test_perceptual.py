"""Perceptual losses: against their definitions, from files, and what is refused."""

import builtins
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from temporal_layers.recipes.stages.image_objectives import detail_loss
from temporal_layers.recipes.stages.perceptual import (
    EdgeLoss,
    EncoderFeatureLoss,
    LearnedLoss,
    apply_to_clips,
    perceptual_loss,
)


def make_vae():
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


class Distance(nn.Module):
    """Stands for a learned loss: a convolution, dropout, and one number a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.conv(output) - self.conv(target)).square().mean((1, 2, 3), keepdim=True)


def expected_distance(network, output, target):
    difference = F.conv2d(output - target, network.conv.weight)
    return difference.square().mean()


def test_encoder_features_are_lpips_with_unit_weights():
    vae = make_vae().double()
    output, target = torch.rand(2, 2, 3, 16, 16, dtype=torch.float64).mul(2).sub(1)
    kept = []
    modules = [vae.encoder.conv_in, *vae.encoder.down_blocks]
    handles = [module.register_forward_hook(lambda *call: kept.append(call[2])) for module in modules]
    with torch.no_grad():
        vae.encode(torch.cat([output, target]))
    for handle in handles:
        handle.remove()
    expected = 0.0
    for maps in kept:
        made, want = (F.normalize(part, dim=1) for part in maps.chunk(2))
        expected = expected + (1 - (made * want).sum(1)).mean() * 2  # |a - b|^2 of unit vectors
    loss = perceptual_loss("encoder", vae)
    torch.testing.assert_close(loss(output, target).double(), expected, rtol=1e-4, atol=1e-6)
    assert loss(target, target) == 0
    assert list(loss.parameters()) == []  # the autoencoder has them already


def test_encoder_features_have_a_gradient_to_the_output_through_a_frozen_encoder():
    vae = make_vae().requires_grad_(False)
    output = torch.rand(1, 3, 16, 16).requires_grad_()
    EncoderFeatureLoss(vae)(output, torch.rand(1, 3, 16, 16)).backward()
    assert output.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_edges_and_none():
    output, target = torch.rand(2, 2, 3, 16, 16)
    loss = perceptual_loss("edges", make_vae())
    assert isinstance(loss, EdgeLoss) and torch.equal(loss(output, target), detail_loss(output, target))
    assert perceptual_loss("none", make_vae()) is None


def test_clips_are_compared_frame_by_frame():
    output, target = torch.rand(2, 2, 3, 4, 16, 16)
    network = LearnedLoss(Distance())
    frames = [expected_distance(network.network, output[:, :, frame], target[:, :, frame]) for frame in range(4)]
    torch.testing.assert_close(apply_to_clips(network, output, target), torch.stack(frames).mean())


@pytest.mark.parametrize("kind", ["script", "export"])
def test_a_loss_from_a_file_is_frozen_and_gives_gradients(kind, tmp_path):
    network = Distance()
    if kind == "script":
        path = tmp_path / "loss.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(network).save(path)  # in training mode
    else:
        path = tmp_path / "loss.pt2"
        count = torch.export.Dim("count", min=2)
        example = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
        program = torch.export.export(network.eval(), example, dynamic_shapes=({0: count}, {0: count}))
        torch.export.save(program, path)
    loss = perceptual_loss(str(path), make_vae()).train()
    output, target = torch.rand(2, 1, 3, 6, 16, 16)
    output.requires_grad_()
    value = apply_to_clips(loss, output, target)
    expected = torch.stack([expected_distance(network, output[:, :, f], target[:, :, f]) for f in range(6)]).mean()
    torch.testing.assert_close(value, expected)  # and so without dropout
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    (gradient,) = torch.autograd.grad(value, output)
    (wanted,) = torch.autograd.grad(expected, output)
    torch.testing.assert_close(gradient, wanted)


def test_lpips_is_taken_from_its_package_if_there_is_one(monkeypatch):
    asked = []
    module = types.ModuleType("lpips")
    module.LPIPS = lambda **options: asked.append(options) or Distance()
    monkeypatch.setitem(sys.modules, "lpips", module)
    loss = perceptual_loss("lpips", make_vae())
    assert asked == [{"net": "vgg", "verbose": False}]
    assert isinstance(loss, LearnedLoss) and not loss.network.training


def test_a_missing_lpips_is_explained(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "lpips":
            raise ModuleNotFoundError("No module named 'lpips'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        ValueError, match=r"lpips: expected the package lpips to be importable, got No module .* choose"
    ):
        perceptual_loss("lpips", make_vae())


def test_bad_losses_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of none, edges, encoder, lpips or the path .* got 'vgg'"):
        perceptual_loss("vgg", make_vae())
    torch.save(Distance().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt to hold a TorchScript archive .* save the scripted module"):
        perceptual_loss(str(tmp_path / "weights.pt"), make_vae())
    (tmp_path / "broken.pt2").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"broken.pt2 to hold .* program of torch.export"):
        perceptual_loss(str(tmp_path / "broken.pt2"), make_vae())
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    with pytest.raises(ValueError, match=r"EncoderFeatureLoss: expected an autoencoder .* got AutoencoderTiny; choose"):
        EncoderFeatureLoss(tiny)

    class Blind(nn.Module):
        @torch.no_grad()
        def forward(self, output, target):
            return (output - target).abs().mean()

    clips = torch.rand(1, 3, 2, 8, 8, requires_grad=True)
    with pytest.raises(
        ValueError, match="apply_to_clips: expected a perceptual loss with a gradient, got one from Blind"
    ):
        apply_to_clips(Blind(), clips, torch.rand(1, 3, 2, 8, 8))
