"""Make a clip of a label; by default with the small driving model that comes with the package.

temporal-layers sample label "night rain" --out night.mp4
temporal-layers sample label                            # no label: any scene
temporal-layers sample label list                       # the labels there are
temporal-layers sample label "day snow" --video day.mp4  # out of another clip
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from temporal_layers.recipes.sample.video import VideoSampleConfig, load_video, sample_video
from temporal_layers.recipes.training.configs import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse(VideoSampleConfig, arguments, prog="temporal-layers sample label", description=__doc__)
    pipeline = load_video(config)
    if pipeline.conditioner is None:
        raise ValueError(
            "--model: expected one that knows labels, got one without; for a model of texts there is: temporal-layers "
            "sample text"
        )
    if config.prompt == "list":
        print("\n".join(f"{number:3d}  {name}" for number, name in enumerate(pipeline.config.labels)))
        return 0
    return sample_video("sample label", config, pipeline)


if __name__ == "__main__":
    sys.exit(main())
