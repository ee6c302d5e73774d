"""Images with things where boxes say (Video LDM, section 4.1): how a frozen image model is told, and sampling with it.

The paper lets a user place cars, makes an image of that and lets the driving model start from it; how its boxes enter
is not told. Here they are drawn into a map that a T2I-Adapter reads (Mou et al. 2023, in diffusers' class), which adds
to the features of the frozen UNet and begins with nothing. GLIGEN's UNets, which read a token of each box, are taken as
they are published.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import T2IAdapter, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from temporal_layers.recipes.bases import Conditioning, LabelBase, VideoBase, on_device
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.sampling.loop import Branch, GuidedModel, denoise
from temporal_layers.recipes.sampling.sampler import Sampler

SHIPPED_BOXES = Path(__file__).parent / "weights" / "driving_boxes"

BOXES = "boxes"
"""Name of the boxes among the conditioning: ``(rows, max_boxes, 4)``, zeros where there is none."""

Boxes = Float[Tensor, "boxes 4"]
"""Of one image: left, top, right and bottom as shares of its width and height."""


class BoxReader(Protocol):
    """How boxes reach a UNet."""

    def __call__(self, boxes: Float[Tensor, "rows boxes 4"], size: tuple[int, int]) -> dict[str, Any]:
        """Arguments of the UNet by name.

        Args:
            boxes: Of each image, or of each clip; zeros where there is none.
            size: Height and width of the image in pixels.
        """

    def to(self, device: str) -> BoxReader:
        """Move everything to a device, in place."""


class BoxMap:
    """Draws boxes into a map, from which a T2I-Adapter makes features that are added to those of the UNet.

    Args:
        adapter: Reads one channel: the share of each pixel that lies in a box.
    """

    def __init__(self, adapter: T2IAdapter) -> None:
        self.adapter = adapter

    def __call__(self, boxes: Float[Tensor, "rows boxes 4"], size: tuple[int, int]) -> dict[str, Any]:
        """As in `BoxReader`."""
        drawn = box_coverage(boxes.float(), *size).unsqueeze(1)
        return {"down_intrablock_additional_residuals": list(self.adapter(drawn.to(boxes.dtype)))}

    def to(self, device: str) -> BoxMap:
        """As in `BoxReader`."""
        self.adapter.to(device)
        return self

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the adapter in half precision, as diffusers and `load_boxes` read it."""
        copy.deepcopy(self.adapter).half().save_pretrained(folder)


class BoxTokens:
    """Hands boxes to a GLIGEN UNet (Li et al. 2023), whose gated self-attentions read a token of each.

    Args:
        embedding: Of what is in the boxes, by the text encoder.
    """

    def __init__(self, embedding: Float[Tensor, " width"]) -> None:
        self.embedding = embedding

    def __call__(self, boxes: Float[Tensor, "rows boxes 4"], size: tuple[int, int]) -> dict[str, Any]:
        """As in `BoxReader`."""
        masks = (boxes[..., 2] > boxes[..., 0]).to(boxes.dtype)
        embeddings = self.embedding.to(boxes).expand(*boxes.shape[:2], -1)
        return {
            "cross_attention_kwargs": {"gligen": {"boxes": boxes, "masks": masks, "positive_embeddings": embeddings}}
        }

    def to(self, device: str) -> BoxTokens:
        """As in `BoxReader`."""
        self.embedding = self.embedding.to(device)
        return self


class BoxBase:
    """An image model that is told where things are, beside what it is told already.

    Boxes are one more tensor of the conditioning, so all that drops, repeats and guides conditioning does so with
    boxes. For clips there is a set of boxes a clip, or one a frame.

    Args:
        base: The image model, with temporal layers or without.
        reader: How boxes reach its UNet.
        max_boxes: Boxes of an image at most. A GLIGEN UNet has to get as many as in its training, which is 30.
    """

    def __init__(self, base: VideoBase, reader: BoxReader, *, max_boxes: int = 8) -> None:
        self.base, self.reader, self.max_boxes = base, reader, max_boxes
        self.unet, self.scheduler = base.unet, base.scheduler
        self.frame_size, self.latent_shape = base.frame_size, base.latent_shape
        self.encode, self.decode = base.encode, base.decode

    def to(self, device: str) -> BoxBase:
        """Move everything to a device, in place."""
        self.base.to(device)
        self.reader.to(device)
        return self

    def conditioning(self, labels: Sequence[int], captions: Sequence[str]) -> Conditioning:
        """That of the image model, without boxes."""
        return self.with_boxes(self.base.conditioning(labels, captions), [torch.empty(0, 4)] * len(labels))

    def no_conditioning(self, count: int) -> Conditioning:
        """Conditioning that says nothing, boxes included."""
        return self.with_boxes(self.base.no_conditioning(count), [torch.empty(0, 4)] * count)

    def with_boxes(self, conditioning: Conditioning, boxes: Sequence[Boxes]) -> Conditioning:
        """Conditioning with these boxes.

        Args:
            conditioning: One row an image or a clip.
            boxes: Of each.

        Raises:
            ValueError: If there are too many boxes, or one has no area or is not in the frame.
        """
        padded = torch.zeros(len(boxes), self.max_boxes, 4)
        for row, some in enumerate(boxes):
            _check_boxes(some, self.max_boxes)
            padded[row, : len(some)] = some
        return {**conditioning, BOXES: padded}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **temporal: Any) -> Tensor:
        """As that of the image model, which gets the boxes as well."""
        rest = dict(conditioning)
        boxes = rest.pop(BOXES).to(noisy.device, self.unet.dtype)
        factor = self.frame_size[0] // self.latent_shape[1]
        told = self.reader(boxes, (noisy.shape[-2] * factor, noisy.shape[-1] * factor))
        return self.base.predict(noisy, timesteps, rest, **told, **temporal)


def _check_boxes(boxes: Tensor, max_boxes: int) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) > max_boxes:
        raise ValueError(f"boxes: expected ({max_boxes} at most, 4) for an image, got {tuple(boxes.shape)}")
    fine = ((boxes[:, :2] >= 0) & (boxes[:, :2] < boxes[:, 2:]) & (boxes[:, 2:] <= 1)).all(1)  # of NaN nothing is true
    if not fine.all():
        raise ValueError(
            "boxes: expected left < right and top < bottom, as shares of width and height from 0 to 1, got "
            f"{boxes[~fine][0].tolist()}"
        )


def box_coverage(boxes: Float[Tensor, "*n boxes 4"], height: int, width: int) -> Float[Tensor, "*n height width"]:
    """Share of each pixel that lies in the box that covers most of it.

    Args:
        boxes: Without area where there is none.
        height: Of the image in pixels, or in latents.
        width: Likewise.
    """

    def covered(low: Tensor, high: Tensor, count: int) -> Tensor:
        first = torch.arange(count, device=low.device, dtype=low.dtype)
        return (torch.minimum(high * count, first + 1) - torch.maximum(low * count, first)).clamp(0, 1)

    across = covered(boxes[..., 0, None], boxes[..., 2, None], width)
    down = covered(boxes[..., 1, None], boxes[..., 3, None], height)
    return (down[..., :, None] * across[..., None, :]).amax(-3)


def add_boxes(base: VideoBase, *, max_boxes: int = 8, seed: int = 0) -> BoxBase:
    """An image model with an adapter that is to be trained to read boxes: until then it is the image model.

    Args:
        base: The image model, which stays as it is.
        max_boxes: Of an image.
        seed: Of the adapter's weights; the global generator is left as it was.

    Raises:
        ValueError: If its UNet has a layout that diffusers' adapters do not fit.
    """
    layout = _layout(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = T2IAdapter(**layout)
    with torch.no_grad():  # all that is left is the way from the first convolution, which is 0, through the skips
        for module in adapter.modules():
            if isinstance(module, nn.Conv2d):
                module.bias.zero_()
        adapter.adapter.conv_in.weight.zero_()
    if base.unet.dtype != adapter.dtype:
        adapter.to(base.unet.dtype)
    adapter.to(base.unet.device).eval()
    return BoxBase(base, BoxMap(adapter), max_boxes=max_boxes)


def _layout(base: VideoBase) -> dict[str, Any]:
    """Arguments of the adapter whose features are as large as those of the UNet they are added to."""
    unet, factor = base.unet, base.frame_size[0] // base.latent_shape[1]
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            "add_boxes: base: expected one with a UNet2DConditionModel, which takes features of adapters, got "
            f"{type(unet).__name__}"
        )
    channels, attends = unet.config.block_out_channels, ["Attn" in name for name in unet.config.down_block_types]
    options = {"in_channels": 1, "channels": list(channels), "num_res_blocks": 1}
    if all(attends[:-1]) and not attends[-1]:  # Stable Diffusion 1 and 2
        return {**options, "adapter_type": "full_adapter", "downscale_factor": factor}
    if not attends[0] and all(attends[1:]) and len(channels) in (2, 3):  # the first is added behind its downsampler
        return {**options, "adapter_type": "full_adapter_xl", "downscale_factor": 2 * factor}
    raise ValueError(
        "add_boxes: base: expected a UNet with attention in all down blocks but the last (Stable Diffusion 1 and 2), "
        "or in all but the first, of 2 or 3 (XL), since diffusers' adapters fit those, got "
        f"{unet.config.down_block_types}"
    )


def load_boxes(base: VideoBase, folder: Path | str, *, max_boxes: int = 8) -> BoxBase:
    """An image model with a trained adapter.

    Args:
        base: The image model that the adapter was trained on, which stays as it is.
        folder: That `BoxMap.save_pretrained` wrote.
        max_boxes: Of an image.

    Raises:
        ValueError: If the folder holds no adapter, or one for another model.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    layout = _layout(base)
    wrong = sorted(key for key, value in layout.items() if config.get(key) != value)
    if config.get("_class_name") != "T2IAdapter" or wrong:
        got = {key: config[key] for key in wrong if key in config} or config.get("_class_name", "none")
        raise ValueError(
            f"load_boxes: expected the folder of a T2IAdapter with {layout}, got {got} in {folder}; take the image "
            "model that it was trained on"
        )
    adapter = T2IAdapter.from_pretrained(folder, torch_dtype=base.unet.dtype).to(base.unet.device).eval()
    return BoxBase(base, BoxMap(adapter), max_boxes=max_boxes)


def load_shipped_boxes() -> BoxBase:
    """The driving image model that comes with the package, told where cars are."""
    return load_boxes(LabelBase(load_shipped()), SHIPPED_BOXES)


def gligen_base(base: VideoBase, phrase: str) -> BoxBase:
    """A GLIGEN pipeline for text and boxes as it is published.

    Args:
        base: ``PipelineBase(pipeline)``.
        phrase: What is in the boxes.

    Raises:
        ValueError: If the UNet has no gates, or the text encoder's embeddings do not fit them.
    """
    pipeline, unet = getattr(base, "pipeline", None), base.unet
    kind = getattr(unet.config, "attention_type", None)
    if pipeline is None or kind != "gated":
        raise ValueError(
            "gligen_base: base: expected a pipeline whose UNet has attention_type='gated', got a "
            f"{type(base).__name__} with {kind!r}; add_boxes makes one that reads boxes of any other"
        )
    tokens = pipeline.tokenizer([phrase], padding=True, return_tensors="pt").to(unet.device)
    with torch.no_grad():
        embedding = pipeline.text_encoder(**tokens).pooler_output[0]
    width = unet.position_net.positive_len
    if len(embedding) != width:
        raise ValueError(
            f"gligen_base: base: expected a text encoder with pooled embeddings of width {width}, as the UNet's "
            f"position network takes them, got {len(embedding)}"
        )
    return BoxBase(base, BoxTokens(embedding), max_boxes=30)


@torch.no_grad()
def sample_boxes(
    base: BoxBase,
    conditioning: Conditioning,
    boxes: Sequence[Boxes],
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "images channels h w"] | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float = 2.0,
    box_scale: float = 2.0,
    batch_size: int = 16,
) -> Float[Tensor, "images 3 height width"]:
    """Sample images with things where the boxes are: start frames for a video model.

    Args:
        base: Of `load_shipped_boxes`, `load_boxes` or `gligen_base`.
        conditioning: One row an image, of ``base.conditioning``.
        boxes: Of each image.
        generator: Source of the noise if none is given.
        noise: Standard normal starting point, if it is to be chosen.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance towards label or text; 1 turns it off.
        box_scale: Guidance towards the boxes; 1 turns it off. Each guidance costs a pass of the UNet.
        batch_size: Images at a time, which bounds the memory.

    Returns:
        Frames in [0, 1], on the CPU.

    Raises:
        ValueError: If the boxes are bad, or boxes or noise are not as many as the rows.
    """
    told = base.with_boxes(conditioning, boxes)
    shape = (len(boxes), *base.latent_shape)
    noise = torch.randn(shape, generator=generator) if noise is None else noise
    rows = {name: len(value) for name, value in {**told, "noise": noise}.items()}
    if set(rows.values()) != {len(boxes)}:
        raise ValueError(f"sample_boxes: expected a row of everything for {len(boxes)} images, got {rows}")
    sampler, device = Sampler(base.scheduler, num_inference_steps), base.unet.device
    nothing, parts = base.no_conditioning(len(boxes)), []
    for first in range(0, len(boxes), batch_size):
        part = slice(first, first + batch_size)
        given, free = (
            on_device({name: value[part] for name, value in some.items()}, device) for some in (told, nothing)
        )
        model = GuidedModel(
            base,
            Branch(given),
            without_text=Branch({**free, BOXES: given[BOXES]}),
            without_context=Branch({**given, BOXES: free[BOXES]}),
            text_scale=guidance_scale,
            context_scale=box_scale,
            frame_by_frame=True,
        )
        start = noise[part].unsqueeze(2).to(device, base.unet.dtype)
        parts.append(base.decode(denoise(model, sampler, sampler.start(start)).squeeze(2)).cpu())
    return torch.cat(parts)
