"""The decoder's losses: against plain autograd in float64, under autocast, and what each turn leaves alone."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from temporal_layers import TemporalConvConfig, TemporalResBlockConfig
from temporal_layers.adapters import TemporalConfig, inject
from temporal_layers.recipes.stages.decoder_loss import (
    LARGEST_WEIGHT,
    DecoderObjective,
    LastLayer,
    adaptive_weight,
    encode_mode,
)
from temporal_layers.recipes.stages.discriminator import DiscriminatorConfig, PatchDiscriminator3D
from temporal_layers.recipes.stages.perceptual import EdgeLoss

LAYERS = TemporalResBlockConfig(timestep_embedding=False, norm="frame", zero_init=False)


def make_vae(*, conv_out=False):
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    last = TemporalConvConfig() if conv_out else None
    adapter = inject(vae, TemporalConfig(resblock=LAYERS, transformer=None, conv_out=last))
    if conv_out:
        nn.init.normal_(vae.decoder.conv_out.temporal.conv.weight)  # the identity would hide a mistake
    return vae, adapter


def make_objective(*, dtype=torch.float64, **options):
    torch.manual_seed(1)
    vae, adapter = make_vae()
    adapter.freeze()
    discriminator = PatchDiscriminator3D(config=DiscriminatorConfig(width=4, num_layers=2))
    return DecoderObjective(vae, discriminator, perceptual=EdgeLoss(), perceptual_weight=0.7, **options).to(dtype)


def make_batch(*, dtype=torch.float64, frames=3, size=16, gate=1.0):
    torch.manual_seed(2)
    clips, noise = torch.rand(2, 3, frames, size, size), 0.1 * torch.randn(2, 4, frames, size // 2, size // 2)
    return clips.to(dtype), noise.to(dtype), torch.full((2,), gate)


@pytest.mark.parametrize("conv_out", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_gradient_at_the_last_layer_is_autograds_and_leaves_no_trace(conv_out, frozen, chunked):
    vae, adapter = make_vae(conv_out=conv_out)
    vae.double()
    last = LastLayer(vae)
    assert last.layer is (vae.decoder.conv_out.temporal.conv if conv_out else vae.decoder.conv_out)
    latents = torch.randn(2, 4, 6, 5, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(vae.decode(latents).sample.pow(3).mean(), last.layer.weight)
    if frozen:
        vae.requires_grad_(False)
        latents.requires_grad_()
    if chunked:
        adapter.enable_temporal_chunking(2)
    with last.recorded():
        loss = vae.decode(latents).sample.pow(3).mean()
    torch.testing.assert_close(last.gradient(loss), expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(last.gradient(2 * loss), 2 * expected, rtol=1e-8, atol=1e-12)  # the graph is still there
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert last.layer.weight.requires_grad is not frozen
    assert len(last.calls) == (6 if chunked and not conv_out else len(last.calls))
    last.forget()
    assert last.calls == [] and not last.layer._forward_hooks


def test_adaptive_weight_by_hand():
    reconstruction, adversarial = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, -2.0]])
    assert adaptive_weight(reconstruction, adversarial).item() == pytest.approx(5 / (2 + 1e-4), rel=1e-6)
    assert adaptive_weight(reconstruction, torch.zeros(1, 2)).item() == LARGEST_WEIGHT
    assert adaptive_weight(torch.zeros(1, 2), adversarial).item() == 0
    assert adaptive_weight(1e-4 * reconstruction, torch.zeros(1, 2)).item() == pytest.approx(5, rel=1e-5)


def test_generator_turn_is_the_sum_that_autograd_makes_by_hand():
    objective = make_objective(disc_weight=0.3)
    vae, discriminator = objective.vae, objective.discriminator
    clips, noise, gate = make_batch()
    losses = objective(clips, noise, gate)
    weight = vae.decoder.conv_out.weight.requires_grad_()
    target = 2 * clips - 1
    latents = vae.encode(target).latent_dist.mode()
    output = vae.decode(latents + noise).sample
    l1 = (output - target).abs().mean()
    edges = sum(objective.perceptual(output[:, :, f].float(), target[:, :, f]) for f in range(3)) / 3
    adversarial = -discriminator(output).mean()
    reconstruction = l1 + 0.7 * edges
    sizes = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    expected = reconstruction + 0.3 * (sizes[0] / (sizes[1] + 1e-4)).detach() * adversarial
    for name, value in (("loss", expected), ("l1", l1), ("perceptual", edges), ("adversarial", adversarial)):
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-5, atol=1e-8, msg=name)
    weight.requires_grad_(False)
    layers = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    got, want = (torch.autograd.grad(value, layers) for value in (losses["loss"], expected))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_discriminator_turn_is_the_hinge_loss_of_true_and_decoded_clips():
    objective = make_objective()
    clips, noise, gate = make_batch()
    losses = objective(clips, noise, gate, turn="discriminator")
    with torch.no_grad():
        target = 2 * clips - 1
        output = objective.vae.decode(objective.vae.encode(target).latent_dist.mode() + noise).sample
        real, fake = objective.discriminator(target), objective.discriminator(output)
    expected = ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()) / 2
    torch.testing.assert_close(losses["loss"].double(), expected, rtol=1e-6, atol=0)
    assert losses["real_logits"].item() == pytest.approx(real.mean().item(), rel=1e-5)


def test_each_turn_has_gradients_for_its_own_parameters_only():
    objective = make_objective()
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    owners = {"generator": "vae.", "discriminator": "discriminator."}
    assert set(objective.turns) == set(owners)
    for turn in objective.turns:
        objective(*make_batch(), turn=turn)["loss"].backward()
        touched = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
        assert touched == {name for name in trained if name.startswith(owners[turn])}
        objective.zero_grad(set_to_none=True)
    assert {name for name, parameter in objective.named_parameters() if parameter.requires_grad} == trained


def test_before_its_start_the_adversarial_loss_is_not_there():
    objective = make_objective()
    losses = objective(*make_batch(gate=0.0))
    assert set(losses) == {"loss", "l1", "perceptual"}
    torch.testing.assert_close(losses["loss"], losses["l1"] + 0.7 * losses["perceptual"])


def test_without_a_discriminator_there_are_no_turns():
    vae, _ = make_vae()
    objective = DecoderObjective(vae.double())
    assert not hasattr(objective, "turns")
    assert set(objective(*make_batch())) == {"loss", "l1"}


def test_the_encoder_runs_once_for_both_turns_and_again_for_another_batch():
    objective = make_objective()
    calls = []
    objective.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    batch, other = make_batch(), make_batch()
    first = [objective(*batch, turn=turn)["loss"].detach() for turn in objective.turns]
    assert len(calls) == 1
    objective(*other)
    assert len(calls) == 2
    assert [objective(*batch, turn=turn)["loss"].detach() for turn in objective.turns] == first


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.07), (torch.float16, 0.0075)])
def test_the_weight_holds_under_autocast(dtype, tolerance):
    exact = make_objective()(*make_batch(size=64, frames=4))["adversarial_weight"].item()
    objective, batch = make_objective(dtype=torch.float32), make_batch(size=64, frames=4, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        losses = objective(*batch)
    assert losses["loss"].dtype == torch.float32
    assert losses["adversarial_weight"].item() == pytest.approx(exact, rel=tolerance)
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in objective.vae.parameters() if p.requires_grad)


def test_the_gradient_of_a_mean_over_a_large_clip_survives_half_precision():
    vae, _ = make_vae()
    last, latents = LastLayer(vae), torch.randn(1, 4, 2, 8, 8)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            with last.recorded():
                output = vae.decode(latents).sample
            gradients.append(last.gradient(1e-7 * output.float().sum()))  # 6e-8 is the least that fp16 holds
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 0.01


def test_what_cannot_be_trained_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Tanh())

        def encode(self, frames):
            return frames

    with pytest.raises(
        ValueError, match=r"LastLayer: expected .* ends with a 2-D convolution, got Odd; .*disc_weight=0"
    ):
        LastLayer(Odd())
    with pytest.raises(
        ValueError, match=r"encode_mode: expected .* latent_dist, latents or latent, got Odd, .* Tensor"
    ):
        encode_mode(Odd(), torch.zeros(1, 3, 8, 8))
