"""dev.py: what it does when nothing, something or half of something is there. Installers are stood in for."""

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """dev.py as a module, with a small repository of its own and calls to programs recorded in `dev.calls`."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = (tmp_path / "repository").resolve()
    root.mkdir()
    for name in ("adapters", "kernels", "recipes"):
        (root / "temporal_layers" / name).mkdir(parents=True)
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2.7", "einops>=0.8"]\n')
    (root / "constraints.txt").write_text("# why\ntorch==2.13.0\ntriton==3.7.1; platform_system == 'Linux'\n")
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "VENV", root / ".venv")
    monkeypatch.setattr(module, "LOCK", root / ".venv.lock")
    module.calls = []
    module.failing = set()  # a call that contains one of these words fails

    def call(command, **options):
        module.calls.append((command, options))
        if "venv" in command and "-m" in command:
            python = module.chosen(here=False).python
            python.parent.mkdir(parents=True)
            python.touch()
            (module.VENV / "pyvenv.cfg").write_text("version = 3.11.7\n")
        return 7 if module.failing & set(command) else 0

    def run(command, **options):
        module.calls.append((command, options))
        output = {module.VERSIONS: "{}", module.PROBE: "torch 2.13.0 on the CPU"}
        text = next((text for code, text in output.items() if code in command), "")
        return subprocess.CompletedProcess(command, int(bool(module.failing & set(command))), text, "broken")

    monkeypatch.setattr(module.subprocess, "call", call)
    monkeypatch.setattr(module.subprocess, "run", run)
    return module


def programs(dev, *words):
    """The recorded commands that contain all the words."""
    return [command for command, _ in dev.calls if set(words) <= set(command)]


def test_first_call_sets_up_and_second_does_not(dev, capsys):
    assert dev.main(["test", "-k", "blend"]) == 0
    assert programs(dev, "venv")
    (install,) = programs(dev, "install", "-e")
    assert install[:3] == ["uv", "pip", "install"]
    assert install[-1] == f"{dev.ROOT}[dev]"
    assert "Ready: torch 2.13.0 on the CPU" in capsys.readouterr().out
    tests, options = dev.calls[-1]
    assert tests[2:] == ["-m", "pytest", "-n", "2", "-k", "blend"]
    assert options["env"]["OMP_NUM_THREADS"] == "1"
    dev.calls.clear()
    assert dev.main(["demo", "--help"]) == 0
    assert [command[2:] for command, _ in dev.calls] == [["-m", "temporal_layers.recipes.cli", "demo", "--help"]]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "pytest_arguments", "interpreted"),
    [
        (["--interpret", "-k", "norm"], ["tests/kernels", "-k", "norm"], "1"),
        (["--compile", "-x"], ["-m", "slow or not slow", "tests/aot", "-x"], None),
        (["-k", "--compile"], ["-k", "--compile"], None),
    ],
)
def test_modes_of_the_tests(dev, monkeypatch, arguments, pytest_arguments, interpreted):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dev.main(["setup"])
    assert dev.main(["test", *arguments]) == 0
    tests, options = dev.calls[-1]
    assert tests[2:] == ["-m", "pytest", "-n", "2", *pytest_arguments]
    assert options["cwd"] == dev.ROOT
    assert options["env"]["OMP_NUM_THREADS"] == "1"
    assert options["env"].get("TRITON_INTERPRET") == interpreted


def test_benchmarks_and_resources_run_what_they_name(dev):
    dev.main(["setup"])
    dev.main(["bench", "--smoke"])
    command, options = dev.calls[-1]
    assert command[2:] == ["-m", "temporal_layers.kernels.benchmarks", "--smoke"]
    assert options["env"]["OMP_NUM_THREADS"] == "1"
    dev.main(["bench", "--model", "--device", "cpu"])
    assert dev.calls[-1][0][2:] == ["-m", "temporal_layers.recipes.model_bench", "--device", "cpu"]
    dev.main(["resources"])
    assert dev.calls[-1][0][2:] == [str(dev.ROOT / "tests" / "aot" / "resources.py")]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", ".venv/pyvenv.cfg"])
def test_a_change_sets_up_again_in_the_same_environment(dev, name):
    dev.main(["setup"])
    with open(dev.ROOT / name, "a") as file:
        file.write("\n")
    dev.calls.clear()
    dev.main(["setup"])
    assert programs(dev, "install", "-e")
    assert not programs(dev, "venv")


def test_second_setup_tells_what_is_there(dev, capsys):
    dev.main(["setup"])
    capsys.readouterr()
    dev.main(["setup"])
    assert capsys.readouterr().out == "dev.py: .venv is up to date: torch 2.13.0 on the CPU\n"


def test_exit_status_is_passed_on(dev):
    dev.main(["setup"])
    dev.failing = {"pytest"}
    assert dev.main(["test"]) == 7


def test_a_signal_becomes_a_shell_status(dev, monkeypatch):
    dev.main(["setup"])
    monkeypatch.setattr(dev.subprocess, "call", lambda *arguments, **options: -9)
    assert dev.main(["test"]) == 137


def test_pip_takes_over_where_uv_fails(dev, capsys):
    dev.failing = {"uv"}
    assert dev.main(["setup"]) == 0
    assert [command[2:5] for command in programs(dev, "pip", "install")] == [
        ["-m", "pip", "install"],  # of uv itself
        ["-m", "pip", "install"],
    ]
    assert "Installing with pip" in capsys.readouterr().out


def test_failed_installation_leaves_no_stamp_and_starts_over(dev, capsys):
    dev.failing = {"-e"}
    assert dev.main(["setup"]) == 1
    assert "the installation in .venv failed" in capsys.readouterr().err
    environment = dev.chosen(here=False)
    assert not environment.stamp.exists()
    (dev.VENV / "half-installed").touch()
    dev.failing = set()
    assert dev.main(["setup"]) == 0
    assert "cut short: starting over" in capsys.readouterr().out
    assert not (dev.VENV / "half-installed").exists()
    assert environment.ready()


def test_interrupted_installation_starts_over(dev, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(dev, "install", interrupt)
        assert dev.main(["setup"]) == 130
    assert dev.main(["setup"]) == 0
    assert "cut short: starting over" in capsys.readouterr().out


def test_failed_refresh_keeps_the_environment(dev):
    dev.main(["setup"])
    (dev.VENV / "something-of-mine").touch()
    (dev.ROOT / "constraints.txt").write_text("torch==2.13.1\n")
    dev.failing = {"-e"}
    assert dev.main(["setup"]) == 1
    dev.failing = set()
    assert dev.main(["setup"]) == 0
    assert (dev.VENV / "something-of-mine").exists()


def test_environment_without_its_python_is_made_anew(dev):
    dev.main(["setup"])
    dev.chosen(here=False).python.unlink()
    dev.calls.clear()
    assert dev.main(["setup"]) == 0
    assert programs(dev, "venv")


def test_damaged_environment_is_not_called_ready(dev, capsys):
    dev.failing = {dev.PROBE}
    assert dev.main(["setup"]) == 1
    assert "is damaged (run python3 dev.py clean" in capsys.readouterr().err
    assert not dev.chosen(here=False).ready()


def test_python_without_venv(dev, monkeypatch, capsys):
    monkeypatch.setattr(dev.importlib.util, "find_spec", lambda name: None)
    assert dev.main(["setup"]) == 1
    assert "sudo apt install python3-venv" in capsys.readouterr().err
    assert not dev.VENV.exists()


def test_checkout_without_links(dev, capsys):
    link = dev.ROOT / "temporal_layers" / "kernels"
    link.rmdir()
    link.write_text("../kernels")  # what git writes where links are off
    assert dev.main(["setup"]) == 1
    text = capsys.readouterr().err
    assert "temporal_layers/kernels should be links to folders" in text
    assert "git checkout -- temporal_layers/kernels" in text
    assert not dev.calls


@pytest.mark.parametrize("arguments", [["--here", "setup"], ["setup", "--here"]])
def test_here_uses_the_running_python(dev, monkeypatch, tmp_path, arguments):
    monkeypatch.setattr(dev.sys, "prefix", str(tmp_path))
    dev.failing = {"uv"}
    assert dev.main(arguments) == 0
    assert not programs(dev, "venv")
    (install,) = programs(dev, "install")  # one only: no tool is added to an environment of the user's
    assert install[0] == sys.executable
    assert f"{dev.ROOT}[dev]" in install
    assert (tmp_path / ".dev-stamp").exists()


def test_here_further_right_belongs_to_the_tool(dev):
    dev.main(["setup"])
    dev.main(["test", "-k", "--here"])
    assert dev.calls[-1][0][-2:] == ["-k", "--here"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, ["torch==2.13.0", "triton==3.7.1; platform_system == 'Linux'"]),
        ({"torch": "2.6.0"}, ["torch==2.13.0", "triton==3.7.1; platform_system == 'Linux'"]),
        ({"torch": "2.7"}, ["torch==2.7", "triton==3.7.1; platform_system == 'Linux'"]),
        ({"torch": "2.11.0+cu130", "triton": "3.6.0"}, ["torch==2.11.0+cu130", "triton==3.6.0"]),
        ({"torch": "2.15.0a0+git1234"}, ["torch==2.15.0a0+git1234", "triton==3.7.1; platform_system == 'Linux'"]),
        ({"triton": "3.6.0"}, ["torch==2.13.0", "triton==3.7.1; platform_system == 'Linux'"]),
    ],
)
def test_a_torch_that_is_there_is_kept(dev, monkeypatch, found, expected):
    answer = subprocess.CompletedProcess([], 0, json.dumps(found), "")
    monkeypatch.setattr(dev.subprocess, "run", lambda *arguments, **options: answer)
    assert dev.constraint_lines(dev.chosen(here=False)) == expected


def test_pip_settings_reach_uv(dev, monkeypatch):
    listing = (
        "global.find-links='/old'\nglobal.index-url='https://mirror.example/simple'\n"
        "global.extra-index-url='\\nhttps://one.example\\nhttps://two.example'\ninstall.find-links='/older'\n"
        ":env:.find-links='/wheels https://links.example'\n:env:.timeout='180'\n"
    )
    answer = subprocess.CompletedProcess([], 0, listing, "")
    monkeypatch.setattr(dev.subprocess, "run", lambda *arguments, **options: answer)
    assert dev.uv_settings(dev.chosen(here=False)) == {
        "UV_FIND_LINKS": "/wheels,https://links.example",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_EXTRA_INDEX_URL": "https://one.example https://two.example",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_one_set_up_at_a_time(dev):
    order = []

    def second():
        with dev.one_at_a_time():
            order.append("second")

    with dev.one_at_a_time():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.3)
        order.append("first")
    thread.join(timeout=30)
    assert order == ["first", "second"]


def test_lint_checks_and_mends(dev):
    dev.main(["lint"])
    assert [command[4:] for command in programs(dev, "ruff")] == [["check", "."], ["format", "--check", "."]]
    dev.calls.clear()
    dev.main(["lint", "--fix"])
    assert [command[4:] for command in programs(dev, "ruff")] == [["check", "--fix", "."], ["format", "."]]
    dev.failing = {"check"}
    assert dev.main(["lint"]) == 7


def test_docs_renew_a_page_and_build(dev, capsys):
    dev.main(["setup"])
    dev.calls.clear()
    assert dev.main(["docs"]) == 0
    (page, _), (build, options) = dev.calls
    assert page[-1] == str(dev.ROOT / "docs" / "performance.py")
    assert build[2:] == ["-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "docs", "docs/_build"]
    assert options["cwd"] == dev.ROOT
    assert "docs/_build/index.html" in capsys.readouterr().out
    dev.failing = {"sphinx"}
    assert dev.main(["docs"]) == 7
    assert capsys.readouterr().out == ""


def test_clean_removes_what_can_be_made_again(dev, tmp_path):
    dev.main(["setup"])
    outside = tmp_path / "outside"
    kept = [outside / "__pycache__", dev.ROOT / "runs" / "mine", dev.ROOT / "demo"]
    made = ("build", "docs/_build", "a/__pycache__", "x.egg-info")
    gone = [dev.VENV, dev.LOCK, *(dev.ROOT / name for name in made)]
    for folder in [*kept, *gone[2:]]:
        folder.mkdir(parents=True)
    (dev.ROOT / "link").symlink_to(outside, target_is_directory=True)
    assert dev.main(["clean"]) == 0
    assert [path for path in gone if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []


def test_clean_does_not_saw_off_its_branch(dev, monkeypatch, capsys):
    dev.main(["setup"])
    monkeypatch.setattr(dev.sys, "prefix", str(dev.VENV))
    assert dev.main(["clean"]) == 1
    assert "leave the environment" in capsys.readouterr().err
    assert dev.VENV.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["tset"], 2, "unknown command 'tset'; there are: bench, clean, demo, docs, lint, resources, setup, test"),
        (["setup", "now"], 1, "setup takes no arguments, not: now"),
        (["resources", "sm_90"], 1, "resources takes no arguments, not: sm_90"),
        (["docs", "html"], 1, "docs takes no arguments, not: html"),
        (["lint", "src"], 1, "lint takes --fix or nothing, not: src"),
        (["clean", "--here"], 1, "never touches an environment other than .venv"),
    ],
)
def test_misuse_is_explained(dev, capsys, arguments, status, text):
    assert dev.main(arguments) == status
    assert text in capsys.readouterr().err
    assert not dev.calls


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0)])
def test_help_names_every_command(dev, capsys, arguments, status):
    assert dev.main(arguments) == status
    text = capsys.readouterr().out
    assert [name for name, function in dev.COMMANDS.items() if f"{name} " not in text or not function.__doc__] == []


def test_old_python_is_told(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer, and this is 3\.9"):
        exec(compile((ROOT / "dev.py").read_text(), "dev.py", "exec"), {"__name__": "dev", "__file__": "dev.py"})
