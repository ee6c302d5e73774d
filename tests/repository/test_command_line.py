"""``temporal-layers`` itself: it answers at once, fits a screen, explains misuse, and its exit codes mean something."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from temporal_layers import recipes
from temporal_layers.recipes import cli
from temporal_layers.recipes.training.configs import help_text

ROOT = Path(__file__).resolve().parents[2]
GROUPS = sorted({name.split()[0] for name in cli.COMMANDS if " " in name})


def description(name):
    """The docstring of a command's module, read without loading it."""
    path = ROOT / "recipes" / f"{cli.COMMANDS[name][0].replace('.', '/')}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def job(monkeypatch, tmp_path, body):
    """Makes the command `demo` one with a body of a test's own."""
    (tmp_path / "needy.py").write_text(body)
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path)])
    monkeypatch.setitem(cli.COMMANDS, "demo", ("needy", ""))
    monkeypatch.delitem(sys.modules, "temporal_layers.recipes.needy", raising=False)


def modules_after(code):
    """What a statement prints, and the top-level names of all modules that are loaded then."""
    code = f"{code}; import json, sys; print(json.dumps([*sys.modules]))"
    result = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    text, _, modules = result.stdout.rstrip().rpartition("\n")
    return text, {name.split(".")[0] for name in json.loads(modules)}


def test_help_loads_nothing_heavy():
    text, loaded = modules_after("from temporal_layers.recipes.cli import main; main(['--help'])")
    assert text.startswith("usage: temporal-layers COMMAND")
    _, always = modules_after("pass")
    assert loaded - always - sys.stdlib_module_names == {"temporal_layers"}


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], *([name] for name in GROUPS), ["train", "--help"]])
def test_help_fits_a_screen_and_names_every_command(words, capsys):
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 80
    group = words[0] if words and not words[0].startswith("-") else ""
    shown = " ".join(lines).split()
    assert [name for name in cli.COMMANDS if name.startswith(group) and not set(name.split()) <= set(shown)] == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["dmeo"], "unknown command 'dmeo'; did you mean 'demo'?"),
        (["train", "vidoe", "--seed", "1"], "unknown command 'train vidoe'; did you mean 'train video'?"),
        (["sample", "zzzzzz"], "unknown command 'sample zzzzzz'; see temporal-layers sample --help"),
        (["zzzzzz"], "unknown command 'zzzzzz'; see temporal-layers --help"),
    ],
)
def test_an_unknown_command_is_misuse(words, text, capsys):
    assert cli.main(words) == cli.MISUSED == 2
    assert text in capsys.readouterr().err


def test_options_that_do_not_exist_are_misuse(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", "somewhere", "--no-such-option"])
    assert stop.value.code == cli.MISUSED


def test_a_missing_package_is_named(monkeypatch, tmp_path, capsys):
    job(monkeypatch, tmp_path, "import no_such_package")
    assert cli.main(["demo"]) == cli.FAILED == 1
    assert "expected the package 'no_such_package', got none; install" in capsys.readouterr().err


def test_a_job_that_fails_says_why(monkeypatch, tmp_path, capsys):
    job(monkeypatch, tmp_path, "def main(words): raise ValueError(f'expected none, got {words}')")
    assert cli.main(["demo", "--x"]) == cli.FAILED
    assert capsys.readouterr().err == "temporal-layers demo: expected none, got ['--x']\n"


def test_files_that_cannot_be_written_or_read_are_no_traceback(monkeypatch, tmp_path, capsys):
    job(monkeypatch, tmp_path, "def main(words): open('/nowhere/file', 'w')")
    assert cli.main(["demo"]) == cli.FAILED
    assert capsys.readouterr().err == "temporal-layers demo: [Errno 2] No such file or directory: '/nowhere/file'\n"


def test_ctrl_c_ends_with_one_line(monkeypatch, tmp_path, capsys):
    job(monkeypatch, tmp_path, "def main(words): raise KeyboardInterrupt")
    assert cli.main(["demo"]) == cli.INTERRUPTED == 130
    assert capsys.readouterr().err == "\ntemporal-layers demo: stopped\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of another kind")
def test_a_reader_that_leaves_is_no_error(tmp_path):
    (tmp_path / "endless.py").write_text("def main(words):\n    while True:\n        print('line')\n")
    code = (
        "from temporal_layers import recipes; from temporal_layers.recipes import cli; import sys\n"
        f"recipes.__path__.append({str(tmp_path)!r}); cli.COMMANDS['demo'] = ('endless', '')\n"
        "sys.exit(cli.main(['demo']))"
    )
    command = [sys.executable, "-P", "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(timeout=60) == cli.UNREAD == 141


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_has_examples(name):
    lines = help_text(description(name)).splitlines()
    assert any(line.startswith(f"    temporal-layers {name}") for line in lines)
    assert [line for line in lines if len(line) > 80 and not line.startswith(" ")] == []


def test_help_of_a_command_is_not_run_together(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "video", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert "    temporal-layers train video --out runs/video" in lines
    assert max(map(len, lines)) <= 80
    assert any("--clips.data.path" in line for line in lines)


def test_prose_is_wrapped_and_examples_are_kept():
    text = help_text("A " + "word " * 30 + "end.\n\n    indented   line\nprose\nagain:\n  item\n")
    assert text.splitlines()[1:] == [
        "word " * 13 + "word word end.",
        "",
        "    indented   line",
        "prose again:",
        "  item",
    ]
    assert help_text("What.\n\ntemporal-layers x   # y\n") == "What.\n\n    temporal-layers x   # y"
