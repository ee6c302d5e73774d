"""SSIM against torchmetrics, and pairs of clips."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from temporal_layers.recipes.evaluation.reconstruction import compare_pairs, ssim
from temporal_layers.recipes.evaluation.sets import EvaluationBatch


def frames(count=2, height=14, width=17, seed=0):
    return torch.rand(count, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(height=st.integers(11, 30), width=st.integers(11, 30), seed=st.integers(0, 9), share=st.floats(0, 1))
def test_ssim_agrees_with_torchmetrics(height, width, seed, share):
    x = frames(2, height, width, seed)
    y = (1 - share) * x + share * frames(2, height, width, seed + 50)
    _, full = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True)
    inside = full[..., 5:-5, 5:-5]  # the rest is of windows that reach over the edge
    torch.testing.assert_close(ssim(x, y), inside.mean((1, 2, 3)), rtol=1e-9, atol=1e-9)


def test_ssim_of_constant_frames_is_the_formula_of_means():
    x, y = torch.full((1, 3, 12, 12), 0.2), torch.full((1, 3, 12, 12), 0.6)
    c1 = 0.01**2
    expected = (2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1)
    assert ssim(x, y).item() == pytest.approx(expected, rel=1e-6)


def test_ssim_is_symmetric_and_one_for_equal_frames():
    x, y = frames(seed=1), frames(seed=2)
    torch.testing.assert_close(ssim(x, y), ssim(y, x), rtol=1e-12, atol=0)
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))


def test_ssim_refusals():
    with pytest.raises(ValueError, match=r"of at least 11 x 11 pixels, got .*10, 17"):
        ssim(frames(height=10), frames(height=10))
    with pytest.raises(ValueError, match="of one shape"):
        ssim(frames(), frames(width=18))


def batch(clips, places):
    return EvaluationBatch(torch.tensor(places), clips, [""] * len(clips), [10.0] * len(clips))


class Absolute(nn.Module):
    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).abs().mean(dim=(1, 2, 3))


def test_pairs_are_averaged_over_clips(tmp_path):
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(20, 200, (3, 3, 4, 16, 16), dtype=torch.uint8, generator=generator)
    made = true.clone()
    made[0] += 10  # the same error in every frame: no flicker
    made[1, :, 1] += 20
    with pytest.warns(DeprecationWarning):
        torch.jit.script(Absolute()).save(tmp_path / "lpips.pt")
    kept = compare_pairs(
        [batch(made[:2], [0, 1]), batch(made[2:], [2])],
        [batch(true[:2], [0, 1]), batch(true[2:], [2])],
        ["psnr", "ssim", "flicker", "lpips"],
        lpips=str(tmp_path / "lpips.pt"),
    ).moments
    errors = torch.tensor([[10.0] * 4, [0, 20, 0, 0], [0] * 4]) / 255
    psnr = -10 * torch.log10(errors.square().clamp_min(1e-10))
    assert kept["psnr"].count == 3
    assert kept["psnr"].mean.item() == pytest.approx(psnr.mean().item(), rel=1e-5)
    assert kept["flicker"].mean.item() == pytest.approx(2 * 20 / 255 / 3 / 3, rel=1e-5)
    assert kept["lpips"].mean.item() == pytest.approx((2 * errors).mean().item(), rel=1e-4)
    assert 0.9 < kept["ssim"].mean.item() < 1


def test_one_number_needs_no_other(tmp_path):
    true = torch.randint(0, 255, (1, 3, 1, 16, 16), dtype=torch.uint8)  # PSNR as used here needs two frames
    kept = compare_pairs([batch(true, [0])], [batch(true, [0])], ["ssim"]).moments
    assert kept["ssim"].mean.item() == pytest.approx(1)
