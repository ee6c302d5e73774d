"""Files of personalisation: a folder of images in, a tuned image model or its low-rank change out."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn

from temporal_layers.recipes.bases import LabelBase, PipelineBase, VideoBase
from temporal_layers.recipes.stages.loras import LORA_FILE, load_lora
from temporal_layers.recipes.stages.personal import image_model, text_parts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_images(folder: Path | str, size: tuple[int, int]) -> Float[Tensor, "images 3 height width"]:
    """The images of a folder in the order of their names, cropped in the middle to the shape of ``size``, and resized.

    Args:
        folder: With files of Pillow's formats; others are passed over.
        size: Height and width.

    Raises:
        ValueError: If there is no image.
    """
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"load_images: folder: expected images ({', '.join(SUFFIXES)}), got {folder} without any")
    height, width = size
    images = []
    for path in paths:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image)  # phones write which side is up beside the pixels
            images.append(as_frame(ImageOps.fit(turned.convert("RGB"), (width, height), Image.Resampling.LANCZOS)))
    return torch.stack(images)


def as_frame(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """Values in [0, 1] of an image."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_image(frame: Float[Tensor, "3 height width"]) -> Image.Image:
    """The image of a frame in [0, 1]."""
    return Image.fromarray((frame * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def save_personal(base: VideoBase, folder: Path | str, *, lora: str | None = None) -> Path:
    """Write a tuned image model, without temporal layers, as `load_base` and diffusers load it; or its LoRA alone.

    Args:
        base: The label model, or a pipeline of diffusers.
        folder: Gets the folder ``model``, or with ``lora`` the folder ``lora`` for `load_personal_lora`, in which the
            file of a pipeline is one for diffusers' ``load_lora_weights`` as well.
        lora: Name of the LoRA in UNet and text encoders.

    Returns:
        The folder that was written.

    Raises:
        ValueError: If the base is neither.
    """
    if not isinstance(base, LabelBase | PipelineBase):
        raise ValueError(
            f"save_personal: base: expected a LabelBase or a PipelineBase, got {type(base).__name__}; save the parts "
            "of your own, with image_model(base.unet) for the UNet"
        )
    if lora is not None:
        return _save_lora(base, Path(folder) / "lora", lora)
    target, unet = Path(folder) / "model", image_model(base.unet)
    if isinstance(base, LabelBase):
        dataclasses.replace(base.ldm, unet=unet).save_pretrained(target)
        return target
    pipeline = copy.copy(base.pipeline)
    pipeline.unet = unet
    pipeline.save_pretrained(target)
    return target


def _save_lora(base: LabelBase | PipelineBase, target: Path, name: str) -> Path:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    if isinstance(base, LabelBase):
        base.unet.save_lora_adapter(target, adapter_name=name, weight_name=LORA_FILE)
        base.ldm.conditioner.save_pretrained(target / "conditioner")
        (target / "labels.json").write_text(json.dumps(base.ldm.labels) + "\n")
        return target
    layers = {"unet_lora_layers": get_peft_model_state_dict(base.unet, adapter_name=name)}
    for part, module in text_parts(base).items():
        if name in getattr(module, "peft_config", {}):
            state = get_peft_model_state_dict(module, adapter_name=name)
            layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state)
    type(base.pipeline).save_lora_weights(target, weight_name=LORA_FILE, **layers)
    return target


def load_personal_lora(base: LabelBase | PipelineBase, folder: Path | str, *, name: str = "dreambooth") -> None:
    """Put a LoRA that `save_personal` wrote into the image model of ``base``, with or without temporal layers in it.

    LoRAs that are there stay as strong as they are; `set_lora_strengths` changes that, in the UNet.

    Args:
        base: What the LoRA was trained on, untuned.
        folder: The folder ``lora`` of a run.
        name: For the LoRA in UNet and text encoders.
    """
    folder = Path(folder)
    if isinstance(base, LabelBase):
        load_lora(base.unet, folder, name, prefix=None)
        conditioner = type(base.ldm.conditioner).from_pretrained(folder / "conditioner")
        base.ldm.conditioner = conditioner.to(base.ldm.device).eval()
        base.ldm.labels = tuple(json.loads((folder / "labels.json").read_text()))
        return
    state = load_file(folder / LORA_FILE)
    load_lora(base.unet, dict(state), name, prefix="unet")
    for part, module in text_parts(base).items():
        own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
        if own:
            _load_into_text(module, own, name)


def _load_into_text(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    # Not by the model's own load_adapter, which refuses versions of PEFT that do all that is needed here.
    from diffusers.utils import convert_state_dict_to_peft
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    state = convert_state_dict_to_peft(state)
    targets = sorted({key.rpartition(".lora_")[0] for key in state})
    rank = next(value.shape[0] for key, value in state.items() if "lora_A" in key)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), module, name)
    set_peft_model_state_dict(module, state, name)
    module.eval().requires_grad_(False)
