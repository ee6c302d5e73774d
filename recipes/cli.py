"""The command ``temporal-layers``: one subcommand a job, each loaded only when it is called."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence

COMMANDS = {
    "demo": ("demo", "train temporal layers on a small image model, look at the result"),
    "inspect": ("inspect_model", "show what would be injected where, without loading weights"),
    "evaluate": ("evaluation.command", "measure how good generated videos are, by a protocol"),
    "report": ("report.command", "one HTML file about a training: clips, curves, numbers"),
    "results": ("evidence.command", "measure in small what each stage of the paper is for"),
    "data check": ("data.check", "look at every video; say which cannot be read, and why"),
    "data cache": ("data.cache_command", "encode clips and captions once, for training from disk"),
    "train image": ("stages.image", "train the image model on single frames"),
    "train video": ("stages.video", "train temporal layers with the image model frozen"),
    "train predict": ("stages.predict", "train temporal layers that continue a clip"),
    "train interpolate": ("stages.interpolate", "train temporal layers that make frames between frames"),
    "train decoder": ("stages.decoder", "train temporal layers in an autoencoder's decoder"),
    "train upscale": ("stages.upscale", "train temporal layers in an upscaler of frames"),
    "train boxes": ("stages.boxes", "teach the image model to put things where boxes say"),
    "train dreambooth": ("stages.dreambooth", "teach the image model a subject, beside temporal layers"),
    "train motion-lora": ("stages.motion_lora", "teach temporal layers a motion from a few clips"),
    "train features": ("evaluation.features_stage", "train the small video network behind offline metrics"),
    "train embedded": ("stages.embedded", "list the models that come with the package; make them"),
    "sample text": ("sample.text", "a clip of a text"),
    "sample label": ("sample.label", "a clip of a label"),
    "sample predict": ("sample.predict", "continue a start frame, to any length"),
    "sample interpolate": ("sample.interpolate", "three frames between every two of a clip"),
    "sample decode": ("sample.decode", "frames of latents, through a decoder with temporal layers"),
    "sample upscale": ("sample.upscale", "make the frames of a clip larger"),
    "sample cascade": ("sample.cascade", "all stages one after the other: a long, large clip"),
    "sample dream": ("sample.dream", "a clip of a subject that the image model was taught"),
}
"""Name to the module with its ``main`` and to what it is for; names of two words are grouped by their first."""

FAILED, MISUSED, INTERRUPTED, UNREAD = 1, 2, 130, 141
"""Exit codes beside 0, of every command; the last two are what a shell makes of SIGINT and SIGPIPE."""


def usage() -> str:
    """The help text: every command on one screen of 80 x 24."""
    groups: dict[str, list[str]] = {}
    for name in COMMANDS:
        first, *rest = name.split()
        groups.setdefault(first, []).extend(rest)
    lines = ["usage: temporal-layers COMMAND [OPTIONS]", ""]
    lines += [f"  {name:<10} {COMMANDS[name][1]}" for name in groups if name in COMMANDS]
    for name, members in groups.items():
        if members:
            words = textwrap.wrap(" ".join(members), 64)
            lines += ["", f"  {name:<10} {words[0]}", *(f"{'':<13}{line}" for line in words[1:])]
    return "\n".join(
        [
            *lines,
            "",
            "temporal-layers train --help says what each of a group is for, and",
            "temporal-layers train video --help what the options of a command are.",
            "Exit codes: 0 done, 1 failed with a message, 2 wrong usage, 130 after Ctrl-C.",
        ]
    )


def group_usage(group: str) -> str:
    """The help text of the commands that begin with one word."""
    members = [name for name in COMMANDS if name.split()[0] == group]
    width = max(map(len, members))
    lines = [f"usage: temporal-layers {group} COMMAND [OPTIONS]", ""]
    lines += [f"  {name:<{width}}  {COMMANDS[name][1]}" for name in members]
    return "\n".join([*lines, "", f"temporal-layers {members[0]} --help lists the options of a command."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: Words behind the program's name; those of the process if None.

    Returns:
        Exit code: 0; 1 if the job failed with a message; 2 for an unknown command; 130 after Ctrl-C; 141 if nobody
        reads the output any more.

    Raises:
        SystemExit: With code 2 after a message if the options are not those of the command, 0 after its help.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if name is not None:
        try:
            return _run(name, words[len(name.split()) :])
        except KeyboardInterrupt:  # a traceback would bury what the job has said about going on
            print(f"\ntemporal-layers {name}: stopped", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # whoever read the output, such as `head`, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still wants to write when it ends
            return UNREAD
    asks = words[-1:] in ([], ["-h"], ["--help"])
    if asks and len(words) <= 1:
        print(usage())
        return 0
    if words[0] in {known.split()[0] for known in COMMANDS} and len(words) <= 1 + asks:
        print(group_usage(words[0]))
        return 0
    print(f"temporal-layers: {_unknown(words)}", file=sys.stderr)
    return MISUSED


def _run(name: str, words: list[str]) -> int:
    module, _ = COMMANDS[name]
    try:
        job = importlib.import_module(f"temporal_layers.recipes.{module}")
    except ModuleNotFoundError as error:
        print(
            f"temporal-layers {name}: expected the package {error.name!r}, got none; "
            'install what the recipes need with: pip install "temporal-layers[train]"',
            file=sys.stderr,
        )
        return FAILED
    try:
        return job.main(words)
    except BrokenPipeError:  # an OSError, and not a fault
        raise
    except (ValueError, OSError) as error:  # says who expected what, or which file: a traceback would only bury it
        print(f"temporal-layers {name}: {error}", file=sys.stderr)
        return FAILED


def _unknown(words: list[str]) -> str:
    """What to say to somebody whose command does not exist."""
    group = words[0] if words[0] in {name.split()[0] for name in COMMANDS} else ""
    given = " ".join(words[:2] if group else words[:1])
    close = difflib.get_close_matches(given, [name for name in COMMANDS if name.startswith(group)], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"see {' '.join(['temporal-layers', *group.split(), '--help'])}"
    return f"unknown command {given!r}; {hint}"


if __name__ == "__main__":
    sys.exit(main())
