"""GLIGEN, diffusers' gated self-attention to boxes: boxes of a clip or of each frame reach their frames."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from temporal_layers.adapters import TemporalConfig, inject


@pytest.fixture
def gated(make_unet):
    """A UNet with gates that are open and boxes that matter."""
    model = make_unet(attention_type="gated")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha_attn", "alpha_dense")):
                parameter.fill_(1.0)
            elif ".fuser." in name or name.startswith("position_net."):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def placed(count, boxes=2):
    """Arguments of GLIGEN for a number of images; the last box of each is not there."""
    masks = torch.ones(count, boxes)
    masks[:, -1] = 0
    return {"boxes": torch.rand(count, boxes, 4), "positive_embeddings": torch.randn(count, boxes, 12), "masks": masks}


def repeated(gligen, frames):
    return {name: torch.stack([row for row in value for _ in range(frames)]) for name, value in gligen.items()}


@pytest.mark.parametrize("policy", ["after_transformer_block", "after_attention"])
def test_boxes_of_a_clip_are_boxes_of_all_its_frames(gated, fold, policy):
    clips, text, gligen = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, 12), placed(2)
    wanted = {"gligen": repeated(gligen, 3)}
    expected = gated(fold(clips), 7, torch.repeat_interleave(text, 3, 0), cross_attention_kwargs=wanted).sample
    plain = gated(fold(clips), 7, torch.repeat_interleave(text, 3, 0)).sample
    inject(gated, TemporalConfig(transformer_policy=policy))
    given = {"gligen": gligen}
    assert torch.equal(fold(gated(clips, 7, text, cross_attention_kwargs=given).sample), expected)
    assert torch.equal(fold(gated(clips, 7, text, None, None, None, given).sample), expected)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert given["gligen"] is gligen and gligen["boxes"].shape == (2, 2, 4)  # what the user holds is left alone


def test_boxes_of_each_frame_reach_that_frame(gated, fold):
    clips, text, gligen = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, 12), placed(6)
    expected = gated(fold(clips), 7, text.repeat_interleave(3, 0), cross_attention_kwargs={"gligen": gligen}).sample
    inject(gated)
    result = gated(clips, 7, text, cross_attention_kwargs={"gligen": gligen}).sample
    assert torch.equal(fold(result), expected)


def test_with_trained_temporal_layers_boxes_move_the_frame_they_are_for_most(gated, randomise):
    randomise(inject(gated), std=0.05)
    clips, text, gligen = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 12), placed(3)
    moved = {**gligen, "boxes": gligen["boxes"].clone()}
    moved["boxes"][1] = 1 - moved["boxes"][1]
    before, after = (gated(clips, 7, text, cross_attention_kwargs={"gligen": one}).sample for one in (gligen, moved))
    change = (after - before).square().mean(dim=(0, 1, 3, 4))
    assert change.argmax() == 1 and change.min() > 0  # the others hear of it through the temporal layers


def test_gates_that_are_closed_are_the_image_model(make_unet, fold):
    plain = make_unet()
    gated = UNet2DConditionModel.from_config(plain.config, attention_type="gated").eval()
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected
    inject(gated)
    clips, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, 12)
    expected = plain(fold(clips), 7, text.repeat_interleave(3, 0)).sample
    result = gated(clips, 7, text, cross_attention_kwargs={"gligen": placed(2)}).sample
    assert torch.equal(fold(result), expected)


def test_nothing_in_place_of_boxes_is_passed_on(gated, fold):
    clips, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, 12)
    inject(gated)
    for given in (None, {}, {"gligen": None}):
        assert torch.equal(gated(clips, 7, text, cross_attention_kwargs=given).sample, gated(clips, 7, text).sample)


def test_boxes_of_another_number_of_clips_are_refused(gated):
    inject(gated)
    text = torch.randn(2, 5, 12)
    with pytest.raises(ValueError, match=r"cross_attention_kwargs\['gligen'\]\['boxes'\]: expected 2 \(clips\) or 6"):
        gated(torch.randn(2, 4, 3, 8, 8), 7, text, cross_attention_kwargs={"gligen": placed(3)})
