"""Sets up this repository and runs what is in it: python3 dev.py COMMAND [arguments of the command].

The first call makes an environment in .venv; later calls start at once, until pyproject.toml or constraints.txt change.
With --here right before or after the command, the Python that runs this file is used instead of .venv. A torch that is
already in the environment and new enough is never replaced.
"""

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

MINIMUM = (3, 11)
if sys.version_info < MINIMUM:  # stands above everything that an older Python cannot read
    newer = [name for name in ("python3.14", "python3.13", "python3.12", "python3.11") if shutil.which(name)]
    sys.exit(
        "dev.py needs Python 3.11 or newer, and this is {}.{} ({}). {}".format(
            *sys.version_info[:2],
            sys.executable,
            f"Try: {newer[0]} dev.py" if newer else "Install a newer one, then run dev.py with it.",
        )
    )

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
LOCK = ROOT / ".venv.lock"
COMMANDS = {}
PIP_TO_UV = {"find-links": "UV_FIND_LINKS", "index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_EXTRA_INDEX_URL"}

VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""

PROBE = """
import torch, temporal_layers
if torch.cuda.is_available():
    device = torch.cuda.get_device_name()
elif torch.backends.mps.is_available():
    device = "the Apple GPU"
else:
    device = "the CPU (no GPU found)"
print(f"torch {torch.__version__} on {device}")
"""


class SetupError(Exception):
    """The environment cannot be made; the text tells the user what to do."""


class Environment(NamedTuple):
    """A Python installation that this repository is, or will be, installed in."""

    prefix: Path
    python: Path

    @property
    def name(self) -> str:
        """How messages call it: relative where it lies in the repository."""
        return str(self.prefix.relative_to(ROOT) if self.prefix.is_relative_to(ROOT) else self.prefix)

    @property
    def stamp(self) -> Path:
        """Holds the fingerprint of the last set-up that went through."""
        return self.prefix / ".dev-stamp"

    @property
    def unfinished(self) -> Path:
        """Exists from the birth of an environment made here until its first set-up has gone through."""
        return self.prefix / ".dev-unfinished"

    def fingerprint(self) -> str:
        """Hash of everything a set-up depends on: requirements, place of the checkout, Python."""
        configuration = self.prefix / "pyvenv.cfg"  # names the Python of a virtual environment
        python = configuration.read_bytes() if configuration.exists() else sys.version.encode()
        parts = [(ROOT / "pyproject.toml").read_bytes(), (ROOT / "constraints.txt").read_bytes(), bytes(ROOT), python]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def ready(self) -> bool:
        """Whether the last set-up went through and nothing it depends on has changed."""
        return self.python.exists() and self.stamp.exists() and self.stamp.read_text() == self.fingerprint()

    def run(self, *arguments: str, cwd: Path | None = None, **variables: str) -> int:
        """Runs this environment's Python and returns its exit status (128 + n after signal n, as in a shell)."""
        # -P: the checkout's own folders must not be importable by their bare names (`kernels` is another project).
        status = subprocess.call([str(self.python), "-P", *arguments], cwd=cwd, env={**os.environ, **variables})
        return status if status >= 0 else 128 - status

    def ask(self, code: str, *arguments: str) -> subprocess.CompletedProcess:
        """Runs a snippet in this environment's Python and captures what it prints."""
        command = [str(self.python), "-P", "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def command(function):
    """Makes a function `name(here, arguments) -> exit status` a command; its docstring is the help for it."""
    COMMANDS[function.__name__] = function
    return function


@command
def demo(here, arguments):
    """Trains temporal layers on the shipped image model; shows before and after."""
    return prepare(here).run("-m", "temporal_layers.recipes.cli", "demo", *arguments)


@command
def test(here, arguments):
    """Runs the tests; after --interpret or --compile, the kernels' tests in that way. The rest goes to pytest."""
    mode, *rest = arguments if arguments[:1] in (["--interpret"], ["--compile"]) else (None, *arguments)
    # One thread per worker: two workers share the cores, and reductions come out in the same order everywhere.
    variables = {"OMP_NUM_THREADS": "1"}
    if mode == "--interpret":
        variables["TRITON_INTERPRET"] = "1"  # triton reads it once, when it is imported: a process is in one mode
        rest = ["tests/kernels", *rest]
    elif mode == "--compile":
        rest = ["-m", "slow or not slow", "tests/aot", *rest]
    return prepare(here).run("-m", "pytest", "-n", "2", *rest, cwd=ROOT, **variables)


@command
def bench(here, arguments):
    """Measures operators and layers against their peers, on the GPU if there is one; bench --model: whole UNets."""
    whole = arguments[:1] == ["--model"]
    module, rest = ("recipes.model_bench", arguments[1:]) if whole else ("kernels.benchmarks", arguments)
    # One thread, as the CPU's figures are stated for; a GPU is driven by one anyway.
    environment = prepare(here)
    return environment.run("-m", f"temporal_layers.{module}", *rest, OMP_NUM_THREADS="1")


@command
def resources(here, arguments):
    """Compiles the fused kernels for three GPUs, none of which is needed; renews the table of what they take."""
    if arguments:
        raise SetupError(f"resources takes no arguments, not: {' '.join(arguments)}")
    return prepare(here).run(str(ROOT / "tests" / "aot" / "resources.py"), OMP_NUM_THREADS="1")


@command
def docs(here, arguments):
    """Builds the documentation into docs/_build, without network; warnings are errors."""
    if arguments:
        raise SetupError(f"docs takes no arguments, not: {' '.join(arguments)}")
    environment = prepare(here)
    failed = environment.run(str(ROOT / "docs" / "performance.py")) or environment.run(
        "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "docs", "docs/_build", cwd=ROOT
    )
    if not failed:
        say("Look at docs/_build/index.html")
    return failed


@command
def lint(here, arguments):
    """Checks style and layout of the code. With --fix, mends what can be mended."""
    if arguments not in ([], ["--fix"]):
        raise SetupError(f"lint takes --fix or nothing, not: {' '.join(arguments)}")
    environment = prepare(here)
    style = environment.run("-m", "ruff", "check", *arguments, ".", cwd=ROOT)
    layout = environment.run("-m", "ruff", "format", *([] if arguments else ["--check"]), ".", cwd=ROOT)
    return style or layout


@command
def setup(here, arguments):
    """Makes or refreshes the environment and tells what is in it."""
    if arguments:
        raise SetupError(f"setup takes no arguments, not: {' '.join(arguments)}")
    environment = chosen(here)
    if environment.ready():
        say(f"{environment.name} is up to date: {described(environment)}")
    else:
        prepare(here)
    return 0


@command
def clean(here, arguments):
    """Removes the environment, builds and caches. Results of runs stay."""
    if here or arguments:
        raise SetupError("clean takes no arguments, and never touches an environment other than .venv")
    if Path(sys.prefix).resolve() == VENV:
        raise SetupError("clean would remove the Python that runs it: leave the environment (deactivate) and try again")
    remove(VENV)
    made = ("build", "dist", "docs/_build", ".pytest_cache", ".ruff_cache", ".hypothesis")
    targets = [LOCK, *(ROOT / name for name in made)]
    for folder, children, _ in os.walk(ROOT):  # os.walk does not enter links
        children[:] = [child for child in children if child != ".git"]
        targets += [Path(folder, child) for child in children if child == "__pycache__" or child.endswith(".egg-info")]
    for target in targets:
        remove(target)
    return 0


def prepare(here):
    """Returns an environment in which the repository and all its tools are installed, installing what is missing."""
    environment = chosen(here)
    if environment.ready():
        return environment
    check_links()
    with one_at_a_time():
        if environment.ready():  # another dev.py did it meanwhile
            return environment
        if not here:
            make(environment)
        environment.stamp.unlink(missing_ok=True)
        install(environment, fetch_uv=not here)
        found = described(environment)
        environment.stamp.write_text(environment.fingerprint())
        environment.unfinished.unlink(missing_ok=True)
        say(f"Ready: {found}")
    return environment


def chosen(here):
    """The environment to use, whether or not it exists yet: the one that runs this file, or the one in .venv."""
    if here:
        return Environment(Path(sys.prefix), Path(sys.executable))
    return Environment(VENV, VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def check_links():
    """Tells users of systems without symbolic links what else would show as a missing module."""
    links = [f"temporal_layers/{name}" for name in ("adapters", "kernels", "recipes")]
    lost = [link for link in links if not (ROOT / link).is_dir()]
    if lost:
        raise SetupError(
            f"{', '.join(lost)} should be links to folders, but this checkout lost them (git writes plain files where\n"
            "links are off). On Windows, switch on developer mode; then run, here:\n"
            "    git config core.symlinks true\n"
            f"    git checkout -- {' '.join(lost)}"
        )


def described(environment):
    """The torch build and the device it finds: proof, too, that the environment works."""
    probe = environment.ask(PROBE)
    if probe.returncode:
        way_out = "run python3 dev.py clean and try again" if environment.prefix == VENV else "repair it"
        raise SetupError(f"{environment.name} is damaged ({way_out}). It says:\n{probe.stderr.strip()}")
    return probe.stdout.strip()


def make(environment):
    """Makes the virtual environment, unless a whole one is there."""
    if environment.unfinished.exists():
        say(f"The last set-up of {environment.name} was cut short: starting over")
    elif environment.python.exists():
        return
    remove(environment.prefix)  # what is left of one, or one whose Python is gone
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"this Python ({sys.executable}) cannot make virtual environments. On Debian and Ubuntu:\n"
            "    sudo apt install python3-venv\n"
            "or activate an environment of your own and put --here after the command."
        )
    say(f"Making {environment.name} with Python {sys.version.split()[0]}")
    environment.prefix.mkdir()
    environment.unfinished.touch()  # before anything that can be interrupted
    if subprocess.call([sys.executable, "-m", "venv", str(environment.prefix)]):
        raise SetupError(f"{sys.executable} -m venv failed (see above)")


def install(environment, fetch_uv):
    """Installs the repository in editable form with the extra `dev`: by uv where that works, by pip otherwise."""
    constraints = environment.prefix / ".dev-constraints.txt"
    constraints.write_text("\n".join(constraint_lines(environment)) + "\n")
    quiet = [] if sys.stderr.isatty() else ["--quiet"]  # a terminal gets the installer's progress bars
    wanted = [*quiet, "-c", str(constraints), "-e", f"{ROOT}[dev]"]
    uv = find_uv(environment, fetch_uv)
    if uv:
        say("Installing with uv (a minute; a CUDA build of torch is 2.5 GB to download)")
        target = ["pip", "install", "--python", str(environment.python)]
        if not subprocess.call([*uv, *target, *wanted], env={**uv_settings(environment), **os.environ}):
            return
        say("uv could not do it (see above): trying pip")
    else:
        say("Installing with pip (a few minutes; a CUDA build of torch is 2.5 GB to download)")
    if environment.run("-m", "pip", "install", *wanted):
        raise SetupError(f"the installation in {environment.name} failed (see above); nothing else was changed")


def find_uv(environment, fetch):
    """Returns the command that starts uv, fetching uv into the environment if it may, or None."""
    inside = [str(environment.python), "-m", "uv"]
    for candidate in (["uv"], inside):
        with contextlib.suppress(OSError):
            # Asking for the version tells a working uv from the shim that a version manager leaves behind.
            if not subprocess.run([*candidate, "--version"], capture_output=True, check=False).returncode:
                return candidate
    if fetch:
        say("Fetching uv, the fast installer")
        if not environment.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"):
            return inside
    return None


def uv_settings(environment):
    """Translates pip's settings (files and variables) on where packages come from: uv reads neither."""
    listing = subprocess.run(
        [str(environment.python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    settings = {}
    for scope in ("global", "install", ":env:"):  # the later ones win, as in pip
        for line in listing.stdout.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{scope}.") and name[len(scope) + 1 :] in PIP_TO_UV:
                places = ast.literal_eval(value).split()
                variable = PIP_TO_UV[name[len(scope) + 1 :]]
                settings[variable] = ("," if variable == "UV_FIND_LINKS" else " ").join(places)
    if "UV_EXTRA_INDEX_URL" in settings:
        settings["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip's rule: the best version of all indexes
    return settings


def constraint_lines(environment):
    """Returns the lines of constraints.txt, giving way to a torch that is already there and new enough."""
    import tomllib

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {line.partition("==")[0]: line for line in lines}
    versions = environment.ask(VERSIONS, *pins)
    found = json.loads(versions.stdout) if versions.returncode == 0 else {}
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = next(line.partition(">=")[2] for line in requirements if line.startswith("torch>="))
    if "torch" not in found or release(found["torch"]) < release(lowest):
        return lines
    if release(found["torch"]) != release(pins["torch"].partition("==")[2]):
        say(f"Keeping torch {found['torch']}, which is already in {environment.name} ({pins['torch']} is what we test)")
    return [f"{name}=={found[name]}" if name in found else line for name, line in pins.items()]


def release(version):
    """The numbers of a version, without local or pre-release parts: '2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(int(number) for number in re.match(r"[\d.]*\d", version)[0].split("."))


@contextlib.contextmanager
def one_at_a_time():
    """Lets one dev.py at a time set up: a second one would take the first one's unfinished work for a wreck."""
    # sqlite3 has the only lock in the standard library that is the same on every system and ends with its process.
    with contextlib.closing(sqlite3.connect(LOCK, timeout=0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            say("Another dev.py is setting up: waiting for it")
            connection.execute("PRAGMA busy_timeout = 3600000")  # milliseconds
            connection.execute("BEGIN EXCLUSIVE")
        yield


def remove(target):
    """Deletes a file, a link or a folder with all it holds; says so."""
    if not target.exists() and not target.is_symlink():
        return
    say(f"Removing {target.relative_to(ROOT)}")
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink()


def say(text):
    print(f"dev.py: {text}", flush=True)


def main(arguments):
    """Runs the command that the arguments name and returns its exit status."""
    here = "--here" in arguments[:2]
    if here:
        arguments = [argument for index, argument in enumerate(arguments) if index > 1 or argument != "--here"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__, *(f"    {name:<9} {function.__doc__}" for name, function in COMMANDS.items()), sep="\n")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"dev.py: unknown command {name!r}; there are: {', '.join(sorted(COMMANDS))}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](here, rest)
    except SetupError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
