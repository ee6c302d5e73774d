"""The discriminator of clips: what it sees, what it is made of, its losses."""

import pytest
import torch
from torch import nn

from temporal_layers.recipes.stages.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator3D,
    hinge_discriminator_loss,
    hinge_generator_loss,
)

TINY = {"width": 4, "num_layers": 2}


def make(**changes):
    return PatchDiscriminator3D(config=DiscriminatorConfig(**{**TINY, **changes}))


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("size", [(16, 16), (19, 31)])
def test_clips_of_any_length_and_odd_sizes_give_a_grid_of_logits(frames, size):
    logits = make()(torch.randn(2, 3, frames, *size))
    # Two halvings, then two convolutions that lose a row and a column each.
    assert logits.shape == (2, 1, frames, size[0] // 4 - 2, size[1] // 4 - 2)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 4, 5])
def test_the_smallest_frame_gives_logits_and_a_smaller_one_is_refused(layers, kernel):
    model = make(num_layers=layers, kernel_pixels=kernel)
    least = model.smallest_frame
    assert min(model(torch.randn(1, 3, 1, least, least)).shape) >= 1
    if least > 1:
        with pytest.raises(
            ValueError, match=rf"at least {least} x {least} pixels, got \(1, 3, 1, {least}, {least - 1}\)"
        ):
            model(torch.randn(1, 3, 1, least, least - 1))
        with pytest.raises(RuntimeError):  # and rightly so: nothing would be left of it
            model.layers(torch.randn(1, 3, 1, least, least - 1))


def seen(model, *, frames=15, side=64):
    """Frames, rows and columns of the input that the logit in the middle has a gradient to."""
    clip = torch.randn(1, 3, frames, side, side, dtype=torch.float64, requires_grad=True)
    logits = model.double()(clip)
    logits[0, 0, frames // 2, logits.shape[3] // 2, logits.shape[4] // 2].backward()
    touched = clip.grad[0].abs().sum(0) > 0
    extents = []
    for axis in range(3):
        rest = tuple(other for other in range(3) if other != axis)
        places = touched.amax(rest).nonzero().flatten()
        extents.append(int(places.max() - places.min()) + 1)
    return tuple(extents)


@pytest.mark.parametrize("changes", [{}, {"num_layers": 1}, {"kernel_frames": 1, "kernel_pixels": 3}])
def test_receptive_field_is_what_the_gradient_reaches(changes):
    model = make(norm="none", **changes)
    frames, pixels = model.receptive_field
    assert seen(model) == (frames, pixels, pixels)


def test_three_layers_of_kernel_four_see_the_seventy_pixels_of_a_patchgan():
    assert PatchDiscriminator3D(config=DiscriminatorConfig(width=1)).receptive_field == (11, 70)


def test_group_norms_add_a_look_at_the_whole_clip_but_at_no_other_clip():
    assert seen(make()) == (15, 64, 64)
    model = make()
    clips = torch.randn(3, 3, 2, 16, 16)
    together = model(clips)
    torch.testing.assert_close(together, torch.cat([model(clip[None]) for clip in clips]))
    torch.testing.assert_close(model.eval()(clips), together, rtol=0, atol=0)


def test_widths_double_up_to_eight_times_and_weights_start_small():
    model = PatchDiscriminator3D(config=DiscriminatorConfig(width=8, num_layers=5))
    convs = [module for module in model.modules() if isinstance(module, nn.Conv3d)]
    assert [conv.out_channels for conv in convs] == [8, 16, 32, 64, 64, 64, 1]
    assert [conv.stride for conv in convs] == [(1, 2, 2)] * 5 + [(1, 1, 1)] * 2
    for conv in convs[1:-1]:
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert conv.weight.mean().abs() < 1e-3 and conv.bias.abs().max() == 0
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 5  # none behind the first convolution and the last


def test_spectral_norm_bounds_every_layer():
    model = make(spectral_norm=True, norm="none")
    with torch.no_grad():
        for _ in range(60):  # the power iteration takes a step a call
            model(torch.randn(1, 3, 1, 16, 16))
    convs = [module for module in model.modules() if isinstance(module, nn.Conv3d)]
    for conv in convs:
        assert torch.linalg.matrix_norm(conv.weight.detach().flatten(1), ord=2).item() == pytest.approx(1, rel=1e-2)
    assert make().layers[0].weight.flatten(1).norm() < 0.5  # without it they are small


def test_hinge_losses_of_known_logits():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0, -0.5])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2 + 0.5) / 4) / 2)
    assert hinge_generator_loss(fake).item() == pytest.approx(0.625)


def test_it_learns_to_tell_flicker_from_stillness_where_single_frames_are_alike():
    torch.manual_seed(0)
    model = make(width=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(60):
        still = torch.randn(4, 3, 1, 16, 16).expand(-1, -1, 4, -1, -1)
        loss = hinge_discriminator_loss(model(still), model(torch.randn(4, 3, 4, 16, 16)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        still = torch.randn(16, 3, 1, 16, 16).expand(-1, -1, 4, -1, -1)
        assert (model(still).mean((1, 2, 3, 4)) > 0).float().mean() > 0.9
        assert (model(torch.randn(16, 3, 4, 16, 16)).mean((1, 2, 3, 4)) < 0).float().mean() > 0.9


def test_bad_sizes_are_refused():
    for changes, text in (
        ({"width": 0}, "width and num_layers of at least 1, got width=0"),
        ({"num_layers": 0}, "got width=4 and num_layers=0"),
        ({"kernel_frames": 2}, "odd kernel_frames of at least 1, got 2"),
        ({"kernel_pixels": 2}, "kernel_pixels of at least 3, got 2"),
        ({"norm": "batch"}, "norm 'group' or 'none', got 'batch'"),
    ):
        with pytest.raises(ValueError, match=f"DiscriminatorConfig: expected .*{text}"):
            make(**changes)
    with pytest.raises(ValueError, match=r"PatchDiscriminator3D: expected clips .* got \(1, 3, 16, 16\)"):
        make()(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"PatchDiscriminator3D: expected clips \(batch, 3, frames"):
        make()(torch.randn(1, 4, 2, 16, 16))
