"""Files that the sampling commands begin with: images, clips, latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from temporal_layers.recipes.data.video_io import VideoClip, read_video
from temporal_layers.recipes.stages.personal_files import SUFFIXES, load_images

LATENTS = "latents"


def read_frames(paths: Sequence[Path]) -> list[Image.Image]:
    """Image files.

    Raises:
        ValueError: If one cannot be read.
    """
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(ImageOps.exif_transpose(image).convert("RGB"))
        except OSError as error:
            raise ValueError(f"{path}: expected an image file, got: {error}") from error
    return images


def read_clip(path: Path, size: tuple[int, int] | None = None, *, num_frames: int | None = None) -> VideoClip:
    """A clip: a video file, or a folder of images in the order of their names, at 10 frames per second.

    Args:
        path: Of the file or the folder.
        size: Height and width that frames are brought to; their own if None.
        num_frames: The first ones of it; all if None.

    Raises:
        ValueError: If it cannot be read.
    """
    if not path.is_dir():
        return read_video(path, size=size, num_frames=num_frames)
    if size is None:
        first = next((file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES), None)
        size = (1, 1) if first is None else read_frames([first])[0].size[::-1]
    return VideoClip(load_images(path, size)[:num_frames].transpose(0, 1), 10.0)


def save_latents(path: Path, latents: Float[Tensor, "clips c frames h w"], fps: float) -> None:
    """Write latents of unit scale for ``temporal-layers sample decode``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({LATENTS: latents.contiguous().cpu()}, path, {"fps": str(fps)})


def read_latents(path: Path) -> tuple[Float[Tensor, "clips c frames h w"], float | None]:
    """Latents of clips, and their frames per second if the file says so.

    Raises:
        ValueError: If the file holds none.
    """
    from safetensors import safe_open

    try:
        found = load_file(path)
        with safe_open(path, "pt") as file:
            fps = (file.metadata() or {}).get("fps")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected a .safetensors file of latents, got: {error}") from error
    latents = found.get(LATENTS)
    if latents is None or latents.ndim != 5:
        got = {name: tuple(value.shape) for name, value in found.items()}
        raise ValueError(f"{path}: expected {LATENTS!r} (clips, channels, frames, height, width), got {got}")
    return latents, None if fps is None else float(fps)
