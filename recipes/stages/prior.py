"""Images that a model makes of a class before it is tuned, to be reminded of in training; kept in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from temporal_layers.recipes.bases import VideoBase
from temporal_layers.recipes.sampling.clips import sample_clips
from temporal_layers.recipes.stages.personal import Prompt, as_image_model, ask
from temporal_layers.recipes.stages.personal_files import as_frame, to_image
from temporal_layers.recipes.training.files import replace_text
from temporal_layers.recipes.training.streams import generator_at


@torch.no_grad()
def prior_images(
    base: VideoBase,
    prompt: Prompt,
    count: int,
    folder: Path,
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int = 0,
    batch_size: int = 8,
    origin: str = "",
) -> Float[Tensor, "count 3 height width"]:
    """Images of a class by the image model of ``base``; those that the folder has already are not made again.

    Image ``i`` depends on the model, the prompt, the seed and ``i`` alone, so a larger count later adds to the folder,
    and so does a run after one that was stopped.

    Args:
        base: The image model; temporal layers in it are bypassed.
        prompt: How to ask for the class.
        count: Images.
        folder: Where they are kept, as PNG, which is also how they come back: of 256 values a channel.
        num_inference_steps: Sampling steps.
        guidance_scale: Classifier-free guidance.
        seed: Of the noise.
        batch_size: Images at a time.
        origin: Which model it is, to be noted with the images.

    Raises:
        ValueError: If the folder holds images made in another way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "origin": origin,
        "prompt": prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "frame_size": list(base.frame_size),
    }
    note = folder / "prior.json"
    if note.is_file() and (found := json.loads(note.read_text())) != made:
        raise ValueError(
            f"prior_images: folder: expected images made with {made}, got {folder} with images made with {found}; "
            "delete it or name another"
        )
    replace_text(note, json.dumps(made, indent=2) + "\n")
    paths = [folder / f"{index:05}.png" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    with as_image_model(base.unet):
        for first in range(0, len(missing), batch_size):
            some = missing[first : first + batch_size]
            noise = torch.stack(
                [torch.randn(base.latent_shape, generator=generator_at(seed, index, "prior")) for index in some]
            )
            images = sample_clips(
                base,
                ask(base, [prompt] * len(some)),
                noise.unsqueeze(2),
                frame_by_frame=True,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                batch_size=batch_size,
            )
            for index, image in zip(some, images.squeeze(2), strict=True):
                _write(paths[index], to_image(image))
    return torch.stack([as_frame(Image.open(path)) for path in paths])


def _write(path: Path, image: Image.Image) -> None:
    temporary = path.with_name(f".{path.name}.part")  # a run that is stopped leaves no half image
    image.save(temporary, format="png")
    temporary.replace(path)
