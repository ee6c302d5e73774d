"""The commands that the pages show: each exists, and its settings are ones that the stage takes."""

import re
import shlex
from pathlib import Path

import pytest

from temporal_layers.recipes import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "recipes" / "weights").glob("*/README.md"))
STAGE = r"temporal_layers\.recipes\.stages\.(\w+)"


def commands():
    """Shell words of every command line with our command in a code block, by page."""
    for page in PAGES:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        for block in (text for language, text in blocks if language in ("", "sh", "bash")):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(STAGE, r"temporal-layers train \1", line)
                found = re.search(r"(?:temporal-layers|temporal_layers\.recipes\.cli) +(.*)", line)
                if found:
                    words = shlex.split(found.group(1).split(">")[0], comments=True)
                    yield str(page.relative_to(ROOT)), tuple(words)


SHOWN = sorted(set(commands()))


def test_pages_show_commands():
    assert len(SHOWN) >= 5


@pytest.mark.parametrize(
    ("page", "words"), SHOWN, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_shown_commands_are_understood(page, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "video.yaml").write_text("seed: 1")
    names = [name for name in cli.COMMANDS if words[: len(name.split())] == tuple(name.split())]
    assert names or words[0].startswith("-"), f"{page}: no command {words}"
    if names and names[0].startswith(("train", "results")) and "STAGE" not in words:
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, "--print-config"])
        assert stop.value.code == 0, capsys.readouterr().err
