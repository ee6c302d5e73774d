"""Make a clip of a subject that the image model was taught by `temporal-layers train dreambooth`.

The temporal layers are those of the untuned model, and go on reading the text encoder that they know.

    temporal-layers sample dream orange --personal runs/dreambooth --out orange.mp4
    temporal-layers sample dream "a sks car at night" --personal runs/dreambooth --adapter my-motion
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from temporal_layers.recipes.bases import load_base
from temporal_layers.recipes.pipelines.video_ldm import VideoLDMPipeline
from temporal_layers.recipes.sample.options import image_model, parts, ready
from temporal_layers.recipes.sample.video import VideoSampleConfig, sample_video
from temporal_layers.recipes.stages.personal_files import load_personal_lora
from temporal_layers.recipes.stages.video import SHIPPED_ADAPTER
from temporal_layers.recipes.training.configs import parse


@dataclass(frozen=True, kw_only=True)
class DreamSampleConfig(VideoSampleConfig):
    """A clip of a subject.

    Attributes:
        personal: Folder of the run that taught it.
        adapter: Temporal layers for the image model; the shipped ones, for the shipped model, if empty.
        model: The untuned image model; that which the run began with if empty.
    """

    personal: Path = Path("runs/dreambooth")


def load_dream(config: DreamSampleConfig) -> VideoLDMPipeline:
    """The tuned image model under the untouched temporal layers.

    Raises:
        ValueError: If the folder is not that of a run, or the model has no temporal layers.
    """
    index = config.personal / "config.json"
    if not index.is_file():
        raise ValueError(
            f"--personal: expected the folder of a run of `temporal-layers train dreambooth`, got {config.personal}"
        )
    name = config.model or json.loads(index.read_text()).get("model", "")
    original, tuned = load_base(name), config.personal / "model"
    if tuned.is_dir():
        base = load_base(tuned)
    elif (config.personal / "lora").is_dir():
        base = load_base(name)
        load_personal_lora(base, config.personal / "lora")
    else:
        raise ValueError(
            f"--personal: expected model/ or lora/ in {config.personal}, got neither; the training has not ended"
        )
    if config.unet:
        raise ValueError(f"--unet: expected none, since the subject's model has its own, got {config.unet}")
    image = image_model(base)
    layers = {"adapter": SHIPPED_ADAPTER, **parts(config, image)} if not name else parts(config, image)
    pipeline = VideoLDMPipeline.from_image_pipeline(image, temporal_text=image_model(original), **layers)
    return ready(pipeline, config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse(DreamSampleConfig, arguments, prog="temporal-layers sample dream", description=__doc__)
    return sample_video("sample dream", config, load_dream(config))


if __name__ == "__main__":
    sys.exit(main())
