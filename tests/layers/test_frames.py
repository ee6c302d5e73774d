"""Folding frames into the batch and back, against einops."""

import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers import fold_frames, unfold_frames
from temporal_layers.frames import frames_to_height, height_to_frames

sizes = st.integers(1, 4)


@given(b=sizes, c=sizes, f=sizes, h=sizes, w=sizes)
def test_fold_and_unfold_are_einops_and_undo_each_other(b, c, f, h, w):
    clips = torch.arange(b * c * f * h * w).reshape(b, c, f, h, w)
    images = fold_frames(clips)
    assert torch.equal(images, rearrange(clips, "b c f h w -> (b f) c h w"))
    assert torch.equal(unfold_frames(images, f), clips)


@given(b=sizes, c=sizes, f=sizes, h=sizes, w=sizes, channels_last=st.booleans())
def test_frames_to_height_is_einops_and_is_undone(b, c, f, h, w, channels_last):
    images = torch.arange(b * f * c * h * w).reshape(b * f, c, h, w)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    maps = frames_to_height(images, f)
    assert torch.equal(maps, rearrange(images, "(b f) c h w -> b c f (h w)", f=f))
    back = height_to_frames(maps, h, w)
    assert torch.equal(back, images)
    assert back.is_contiguous(memory_format=torch.channels_last)


def test_views_where_memory_allows():
    images = torch.randn(6, 4, 2, 3)
    assert unfold_frames(images, 3).data_ptr() == images.data_ptr()
    assert frames_to_height(images, 3).data_ptr() != images.data_ptr()  # one copy, to channels-last

    channels_last = images.to(memory_format=torch.channels_last)
    maps = frames_to_height(channels_last, 3)
    assert maps.data_ptr() == channels_last.data_ptr()
    assert maps.is_contiguous(memory_format=torch.channels_last)  # so that it is an ordinary 2-D map to a kernel
    assert height_to_frames(maps, 2, 3).data_ptr() == channels_last.data_ptr()


def test_guidance_halves_keep_their_frames():
    clips = torch.randn(2, 4, 3, 2, 2)
    doubled = torch.cat([fold_frames(clips)] * 2)
    assert torch.equal(unfold_frames(doubled, 3), torch.cat([clips, clips]))
