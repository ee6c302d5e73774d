"""Make a clip of a text, with an image model that reads text and temporal layers for it.

temporal-layers sample text "a road at night" --model my-model --adapter my-motion
temporal-layers sample text "a road at night" --model my-pipeline --out night.webp --num-frames 16
temporal-layers sample text "snow" --model my-pipeline --video summer.mp4 --strength 0.6   # out of another clip
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from temporal_layers.recipes.sample.video import VideoSampleConfig, load_video, sample_video
from temporal_layers.recipes.training.configs import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse(VideoSampleConfig, arguments, prog="temporal-layers sample text", description=__doc__)
    pipeline = load_video(config)
    if pipeline.text_encoder is None:
        raise ValueError(
            "--model: expected one that reads text, got one without a text encoder; the model that comes with the "
            "package knows labels: temporal-layers sample label"
        )
    return sample_video("sample text", config, pipeline)


if __name__ == "__main__":
    sys.exit(main())
