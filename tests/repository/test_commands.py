"""The commands that pages and help texts show: each exists, and its settings are ones that the command takes."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from temporal_layers.recipes import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "recipes" / "weights").glob("*/README.md"))
STAGE = r"temporal_layers\.recipes\.stages\.(\w+)"


def texts():
    """Code blocks of the pages and examples in the help texts, each with the name of its file."""
    for page in PAGES:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        for block in (text for language, text in blocks if language in ("", "sh", "bash")):
            yield str(page.relative_to(ROOT)), block
    for module, _ in cli.COMMANDS.values():
        file = ROOT / "recipes" / f"{module.replace('.', '/')}.py"
        lines = ast.get_docstring(ast.parse(file.read_text("utf-8"))).replace("\\\n", " ").splitlines()
        yield str(file.relative_to(ROOT)), "\n".join(line for line in lines if re.match(" *temporal-layers ", line))


def commands():
    """Shell words of every command line with our command, by file."""
    for name, text in texts():
        for line in text.replace("\\\n", " ").splitlines():
            line = re.sub(STAGE, r"temporal-layers train \1", line)
            found = re.search(r"(?:temporal-layers|temporal_layers\.recipes\.cli) +(.*)", line)
            if found:
                yield name, tuple(shlex.split(found.group(1).split(">")[0], comments=True))


SHOWN = sorted(set(commands()))


def test_pages_show_commands():
    assert len(SHOWN) >= 5


@pytest.mark.parametrize(
    ("page", "words"), SHOWN, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_shown_commands_are_understood(page, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "video.yaml").write_text("seed: 1")
    name = next((name for name in cli.COMMANDS if words[: len(name.split())] == tuple(name.split())), "")
    if not name and "STAGE" not in words:
        assert cli.main(words) == 0, f"{page}: no command {words}"  # help of all, or of a group
    if name.startswith(("train", "results", "sample", "data cache")):
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, "--print-config"])
        assert stop.value.code == 0, capsys.readouterr().err
