"""The command ``temporal-layers``: one subcommand a job, each loaded only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "data cache": ("data.cache_command", "encode clips and captions once, for training from disk"),
    "data check": ("data.check", "look at every video of a data set; say which cannot be read, and why"),
    "demo": ("demo", "train temporal layers on a small image model and look at the result"),
    "evaluate": ("evaluation.command", "measure how good generated videos are, by a named protocol"),
    "inspect": ("inspect_model", "show what would be injected where, without loading weights"),
    "report": ("report.command", "one HTML file about a training: clips, curves, numbers, attention, settings"),
    "results": ("evidence.command", "measure what each stage is for, with small models and several seeds"),
    "sample cascade": ("sample.cascade", "key frames, interpolation twice, decoding, upscaling: a long, large clip"),
    "sample decode": ("sample.decode", "frames of latents, through a decoder with temporal layers"),
    "sample dream": ("sample.dream", "a clip of a subject that the image model was taught"),
    "sample interpolate": ("sample.interpolate", "three frames between every two of a clip"),
    "sample label": ("sample.label", "a clip of a label"),
    "sample predict": ("sample.predict", "continue a start frame, to any length"),
    "sample text": ("sample.text", "a clip of a text"),
    "sample upscale": ("sample.upscale", "make the frames of a clip larger"),
    "train boxes": ("stages.boxes", "teach the image model to put things where boxes say"),
    "train decoder": ("stages.decoder", "train a video decoder: temporal layers in the autoencoder's decoder"),
    "train dreambooth": ("stages.dreambooth", "teach the image model a subject; temporal layers stay as they are"),
    "train features": ("evaluation.features_stage", "train the small video network behind the offline metrics"),
    "train embedded": ("stages.embedded", "list the models that come with the package, and make them again"),
    "train image": ("stages.image", "train the image model on single frames: autoencoder, then UNet"),
    "train interpolate": ("stages.interpolate", "train temporal layers that make frames between frames"),
    "train motion-lora": ("stages.motion_lora", "teach temporal layers a motion from a few clips"),
    "train predict": ("stages.predict", "train temporal layers that continue a clip"),
    "train upscale": ("stages.upscale", "train temporal layers in an upscaler of frames"),
    "train video": ("stages.video", "train temporal layers with the image model frozen"),
}


def usage() -> str:
    """The help text."""
    lines = ["usage: temporal-layers COMMAND [OPTIONS]", ""]
    lines += [f"  {name:<17}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join([*lines, "", "temporal-layers COMMAND --help lists the options of a command."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: Words behind the program's name; those of the process if None.

    Returns:
        Exit code: 0; 1 if the job failed with a message; 2 for an unknown command.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for name, (module, _) in COMMANDS.items():
        count = len(name.split())
        if words[:count] == name.split():
            try:
                job = importlib.import_module(f"temporal_layers.recipes.{module}")
            except ModuleNotFoundError as error:
                print(
                    f"temporal-layers {name}: expected the package {error.name!r}, got none; "
                    'install what the recipes need with: pip install "temporal-layers[train]"',
                    file=sys.stderr,
                )
                return 1
            try:
                return job.main(words[count:])
            except ValueError as error:  # says who expected what: a traceback would only bury it
                print(f"temporal-layers {name}: {error}", file=sys.stderr)
                return 1
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    print(f"temporal-layers: unknown command {' '.join(words)!r}\n\n{usage()}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
