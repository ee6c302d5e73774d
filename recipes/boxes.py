"""Images with things where boxes say (Video LDM, section 4.1): gates in a frozen image model, and sampling with them.

The paper lets a user place cars, makes an image of that and lets the driving model start from it; how its boxes enter
is not told. Here it is GLIGEN (Li et al. 2023) in diffusers' own layers: a position network makes a token of each box,
and in every transformer block a gated self-attention, closed at the start, reads those tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from temporal_layers.recipes.bases import Conditioning, LabelBase, VideoBase, on_device
from temporal_layers.recipes.image_ldm import load_shipped
from temporal_layers.recipes.sampling.loop import Branch, GuidedModel, denoise
from temporal_layers.recipes.sampling.sampler import Sampler

SHIPPED_BOXES = Path(__file__).parent / "weights" / "driving_boxes"

BOXES = "boxes"
"""Name of the boxes among the conditioning: ``(clips, max_boxes, 4)``, zeros where there is none."""

WEIGHTS = "diffusion_pytorch_model.safetensors"


def is_gated(unet: nn.Module) -> bool:
    """Whether a UNet reads boxes."""
    return isinstance(unet, UNet2DConditionModel) and unet.config.attention_type == "gated"


def gated(unet: nn.Module, *, seed: int = 0) -> UNet2DConditionModel:
    """A copy of a UNet that reads boxes, with all gates closed: until they are trained it is the image model.

    Args:
        unet: Without temporal layers or LoRAs, which go on top of the copy.
        seed: Of the new weights; the global generator is left as it was.

    Raises:
        ValueError: If the UNet reads boxes already, or has layers that diffusers' class does not build.
    """
    if not isinstance(unet, UNet2DConditionModel) or unet.config.attention_type != "default":
        kind = getattr(getattr(unet, "config", None), "attention_type", None)
        raise ValueError(
            f"gated: expected a UNet2DConditionModel with attention_type='default', got {type(unet).__name__} with "
            f"attention_type={kind!r}; one that is 'gated' is used as it is"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        copied = UNet2DConditionModel.from_config(unet.config, attention_type="gated")
    missing, unexpected = copied.load_state_dict(unet.state_dict(), strict=False)
    strange = [*unexpected, *(name for name in missing if not _of_boxes(name))]
    if strange:
        raise ValueError(
            f"gated: expected the layers of the image model alone, got others, such as {strange[0]!r}; make the gated "
            "copy first, then inject temporal layers or add LoRAs"
        )
    if copied.dtype != unet.dtype:
        copied.to(unet.dtype)
    return copied.to(unet.device).train(unet.training)


def box_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """What a gated UNet has more than the image model, by name."""
    return {name: parameter for name, parameter in unet.named_parameters() if _of_boxes(name)}


def _of_boxes(name: str) -> bool:
    return name.startswith("position_net.") or ".fuser." in name


class BoxBase:
    """An image model that is told where things are, beside what it is told already.

    Boxes are one more tensor of the conditioning, so all that drops, repeats and guides conditioning does so with
    boxes: a box a clip, or one a frame, for clips as for images.

    Args:
        base: An image model whose UNet is gated: one of `add_boxes`, or a GLIGEN pipeline for text and boxes.
        phrase: What is in the boxes, for a pipeline; the label model knows one kind of thing.
        max_boxes: Boxes an image at most, as in training: those that are not there count too. 30 in GLIGEN.

    Raises:
        ValueError: If the UNet reads no boxes, or the text encoder's embeddings do not fit it.
    """

    def __init__(self, base: VideoBase, *, phrase: str = "a car", max_boxes: int = 30) -> None:
        if not is_gated(base.unet):
            raise ValueError(
                f"BoxBase: base: expected one whose UNet is gated, got a {type(base.unet).__name__} that is not; make "
                "one with add_boxes(base)"
            )
        self.base, self.phrase, self.max_boxes = base, phrase, max_boxes
        self.unet, self.scheduler = base.unet, base.scheduler
        self.frame_size, self.latent_shape = base.frame_size, base.latent_shape
        self.encode, self.decode = base.encode, base.decode
        self.embedding = _embedding(base, phrase)

    def to(self, device: str) -> BoxBase:
        """Move everything to a device, in place."""
        self.base.to(device)
        self.embedding = self.embedding.to(device)
        return self

    def conditioning(self, labels: Sequence[int], captions: Sequence[str]) -> Conditioning:
        """That of the image model, without boxes."""
        return self.with_boxes(self.base.conditioning(labels, captions), [torch.empty(0, 4)] * len(labels))

    def no_conditioning(self, count: int) -> Conditioning:
        """Conditioning that says nothing, boxes included."""
        return self.with_boxes(self.base.no_conditioning(count), [torch.empty(0, 4)] * count)

    def with_boxes(self, conditioning: Conditioning, boxes: Sequence[Float[Tensor, "_ 4"]]) -> Conditioning:
        """Conditioning with these boxes.

        Args:
            conditioning: One row an image or a clip.
            boxes: Of each: left, top, right and bottom as shares of width and height.

        Raises:
            ValueError: If there are too many boxes, or one has no area or is not in the frame.
        """
        padded = torch.zeros(len(boxes), self.max_boxes, 4)
        for row, some in enumerate(boxes):
            _check_boxes(some, self.max_boxes)
            padded[row, : len(some)] = some
        return {**conditioning, BOXES: padded}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **temporal: Tensor | None
    ) -> Tensor:
        """As that of the image model, with the boxes for its gates."""
        rest = dict(conditioning)
        boxes = rest.pop(BOXES).to(noisy.device, self.unet.dtype)
        gligen = {
            "boxes": boxes,
            "masks": (boxes[..., 2] > boxes[..., 0]).to(boxes.dtype),
            "positive_embeddings": self.embedding.to(boxes).expand(*boxes.shape[:2], -1),
        }
        return self.base.predict(noisy, timesteps, rest, cross_attention_kwargs={"gligen": gligen}, **temporal)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write what the UNet has more than the image model, in half precision, and how many boxes it reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().half().cpu().contiguous() for name, value in box_parameters(self.unet).items()}
        save_file(weights, folder / WEIGHTS)
        config = {"_class_name": "BoxBase", "max_boxes": self.max_boxes, "phrase": self.phrase}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _embedding(base: VideoBase, phrase: str) -> Float[Tensor, " width"]:
    width = base.unet.position_net.positive_len
    pipeline = getattr(base, "pipeline", None)
    if pipeline is None:  # one kind of thing: there is nothing to tell
        return torch.zeros(width, device=base.unet.device)
    tokens = pipeline.tokenizer([phrase], padding=True, return_tensors="pt").to(base.unet.device)
    with torch.no_grad():
        pooled = pipeline.text_encoder(**tokens).pooler_output[0]
    if len(pooled) != width:
        raise ValueError(
            "BoxBase: base: expected a text encoder whose pooled embeddings are as wide as the UNet's position network "
            f"takes them, {width}, got {len(pooled)}; take Stable Diffusion 1.x or 2.x"
        )
    return pooled


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
        boxes: Left, top, right and bottom as shares of width and height; without area where there is none.
        height: Of the image in pixels, or in latents.
        width: Likewise.
    """

    def covered(low: Tensor, high: Tensor, count: int) -> Tensor:
        first = torch.arange(count, device=low.device, dtype=low.dtype)
        return (torch.minimum(high * count, first + 1) - torch.maximum(low * count, first)).clamp(0, 1)

    across = covered(boxes[..., 0, None], boxes[..., 2, None], width)
    down = covered(boxes[..., 1, None], boxes[..., 3, None], height)
    return (down[..., :, None] * across[..., None, :]).amax(-3)


def add_boxes(base: VideoBase, *, phrase: str = "a car", max_boxes: int = 30, seed: int = 0) -> BoxBase:
    """An image model that reads boxes, to be trained to; ``base`` stays as it is.

    Args:
        base: The image model, without temporal layers.
        phrase: As in `BoxBase`.
        max_boxes: As in `BoxBase`.
        seed: Of the new weights.

    Raises:
        ValueError: As `gated` and `BoxBase`.
    """
    twin = copy.copy(base)
    twin.unet = gated(base.unet, seed=seed)
    if isinstance(base, LabelBase):
        twin.ldm = dataclasses.replace(base.ldm, unet=twin.unet)
    elif hasattr(base, "pipeline"):
        twin.pipeline = copy.copy(base.pipeline)
        twin.pipeline.unet = twin.unet
    return BoxBase(twin, phrase=phrase, max_boxes=max_boxes)


def load_boxes(base: VideoBase, folder: Path | str) -> BoxBase:
    """The image model with what `BoxBase.save_pretrained` wrote; ``base`` stays as it is.

    Args:
        base: The image model that was trained to read boxes.
        folder: Of the weights.

    Raises:
        ValueError: If the folder does not hold such weights, or they are for another model.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if config.pop("_class_name", None) != "BoxBase":
        raise ValueError(
            f"load_boxes: expected a folder with a config.json of class BoxBase, got {folder}; write one with "
            "BoxBase.save_pretrained"
        )
    loaded = add_boxes(base, **config)
    own, weights = box_parameters(loaded.unet), load_file(folder / WEIGHTS)
    wrong = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if wrong:
        raise ValueError(
            f"load_boxes: expected weights for this {type(base.unet).__name__}, got others, such as {wrong[0]!r} in "
            f"{folder}; take the image model that they were trained on"
        )
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    return loaded


def load_shipped_boxes() -> BoxBase:
    """The driving image model that comes with the package, told where cars are."""
    return load_boxes(LabelBase(load_shipped()), SHIPPED_BOXES)


@torch.no_grad()
def sample_boxes(
    base: BoxBase,
    conditioning: Conditioning,
    boxes: Sequence[Float[Tensor, "_ 4"]],
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
        base: Of `load_shipped_boxes`, `load_boxes`, or around a GLIGEN pipeline.
        conditioning: One row an image, of ``base.conditioning``.
        boxes: Of each image: left, top, right and bottom as shares of width and height.
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
    sampler = Sampler(base.scheduler, num_inference_steps)
    nothing, parts = base.no_conditioning(len(boxes)), []
    device = base.unet.device
    for first in range(0, len(boxes), batch_size):
        part = slice(first, first + batch_size)
        given, free = (
            on_device({name: value[part] for name, value in rows.items()}, device) for rows in (told, nothing)
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
        latents = denoise(model, sampler, sampler.start(start))
        parts.append(base.decode(latents.squeeze(2)).cpu())
    return torch.cat(parts)
