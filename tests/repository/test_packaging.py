"""The wheel holds the tree, by way of a source distribution as well, and works without the checkout."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import temporal_layers

ROOT = Path(__file__).resolve().parents[2]
LINKED = ["kernels", "adapters", "recipes"]
BUILD = "from setuptools import build_meta; import sys; print(build_meta.build_{}(sys.argv[1]))"


def tree():
    """Files that users must get: (name in the wheel, path in the checkout)."""
    for folder in ["temporal_layers", *LINKED]:
        for path in sorted(files(ROOT / folder)):
            name = path.relative_to(ROOT).as_posix()
            yield (name if folder == "temporal_layers" else f"temporal_layers/{name}", path)


def files(folder):
    """Files below a folder, without following links and without what Python leaves behind."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            if entry.name != "__pycache__":
                yield from files(entry)
        elif not entry.is_symlink():
            yield entry


def copy_of_the_tree(target):
    """Copies what a build reads, links left out: building in the checkout would leave stale files for the next one."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (target / name).write_bytes((ROOT / name).read_bytes())
    for _, path in tree():
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return target


def build(kind, source, target):
    """Builds a `wheel` or an `sdist` from a source folder and returns the file."""
    target.mkdir()
    command = [sys.executable, "-c", BUILD.format(kind), str(target)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target / result.stdout.splitlines()[-1]


def contents(wheel):
    """Maps the wheel's names to bytes, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    (folder / "source").mkdir()
    return build("wheel", copy_of_the_tree(folder / "source"), folder / "wheel")


def test_wheel_is_the_tree(wheel):
    expected = {name: path.read_bytes() for name, path in tree()}
    found = contents(wheel)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert "temporal_layers/py.typed" in found


def test_source_distribution_gives_the_same_wheel(wheel, tmp_path):
    (tmp_path / "source").mkdir()
    sdist = build("sdist", copy_of_the_tree(tmp_path / "source"), tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    assert contents(again) == contents(wheel)


def test_wheel_works_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import temporal_layers, temporal_layers.functional, temporal_layers.adapters as adapters\n"
        "from temporal_layers.kernels import group_norm\n"
        "print(*(module.__file__ for module in (temporal_layers, adapters, group_norm)), sep='\\n')"
    )
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    places = [Path(line).resolve() for line in result.stdout.splitlines()]
    assert len(places) == 3
    assert all(place.is_relative_to(tmp_path.resolve()) for place in places), places


# Stands in for a download: the quick start begins with a model of Stable Diffusion's kind.
TINY = """
import torch
from diffusers import UNet2DConditionModel

sizes = dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16)
sizes |= dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4)
sizes |= dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
UNet2DConditionModel.from_pretrained = lambda *names: UNet2DConditionModel(**sizes)
noise_BCFHW, timestep, text = torch.randn(2, 4, 3, 8, 8), torch.tensor(7), torch.randn(2, 5, 16)
"""


class Stranger:
    """A fresh environment with the wheel and its dependencies, outside the checkout and without a network."""

    def __init__(self, wheel, folder):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.bin, self.folder = folder / "venv" / scripts, folder / "elsewhere"
        self.folder.mkdir()
        names = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
        self.packages = Path(sysconfig.get_path("purelib", scheme="venv", vars=names))
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True)
        # The dependencies are those of the running environment. Its own .pth files, among them that of the editable
        # installation of this checkout, are not read from there.
        (self.packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def run(self, *command):
        """What a command prints; it has to end well."""
        hidden = {"PYTHONPATH", "VIRTUAL_ENV"}
        variables = {name: value for name, value in os.environ.items() if name not in hidden}
        program, *words = command
        result = subprocess.run(
            [self.bin / program, *words],
            cwd=self.folder,
            env={**variables, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def python(self, code):
        """Runs code, and holds that all of the library came from the wheel."""
        places = "[m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'temporal_layers' and m.__file__]"
        (self.folder / "code.py").write_text(f"{code}\nimport json, sys\nprint(json.dumps({places}))\n", "utf-8")
        found = json.loads(self.run("python", "-W", "error::DeprecationWarning", "code.py").splitlines()[-1])
        assert found and all(Path(place).is_relative_to(self.packages) for place in found)


@pytest.fixture(scope="module")
def stranger(wheel, tmp_path_factory):
    return Stranger(wheel, tmp_path_factory.mktemp("stranger"))


def snippets(page):
    """The Python of a page of this repository, in one piece."""
    found = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found
    return "\n".join(found)


@pytest.mark.slow
def test_a_stranger_can_use_the_command_line(stranger):
    assert stranger.run("temporal-layers", "--help").startswith("usage: temporal-layers COMMAND")
    model = stranger.packages / "temporal_layers" / "recipes" / "weights" / "driving" / "unet"
    (found,) = json.loads(stranger.run("temporal-layers", "inspect", model, "--json")).values()
    assert found["sites"]
    assert "day clear" in stranger.run("temporal-layers", "sample", "label", "list")
    few = ["--num-frames", "4", "--steps", "2", "--out", "clip.mp4"]
    assert stranger.run("temporal-layers", "sample", "label", "day clear", *few) == "clip.mp4\n"
    stranger.python(
        "from temporal_layers.recipes.data.video_io import read_video\n"
        "assert read_video('clip.mp4').frames.shape == (3, 4, 64, 96)"
    )


@pytest.mark.slow
def test_a_stranger_can_run_the_demo(stranger):
    quick = "--num-clips 2 --num-frames 4 --spare-frames 0 --samples 2 --sampling-steps 2 --optim.steps 2"
    text = stranger.run("temporal-layers", "demo", *quick.split(), "--optim.batch-size", "1")
    assert "report.html" in text
    made = {path.name for path in (stranger.folder / "demo").iterdir()}
    assert {"adapter", "before.mp4", "after.mp4", "report.html"} <= made


@pytest.mark.slow
def test_a_stranger_can_run_what_the_pages_show(stranger):
    stranger.python(TINY + snippets(ROOT / "README.md") + "\nassert video.shape == (2, 4, 3, 8, 8)")
    stranger.python(snippets(ROOT / "docs" / "tutorial.md"))


def test_version_is_the_same_everywhere(wheel):
    assert wheel.name.startswith(f"temporal_layers-{temporal_layers.__version__}-")


@pytest.mark.parametrize("name", LINKED)
def test_links_resolve(name):
    link = ROOT / "temporal_layers" / name
    assert link.is_symlink(), f"{link} must be a link to ../{name}; git checks links out with core.symlinks=true"
    assert link.readlink() == Path("..", name)  # relative: the checkout may lie anywhere
    assert link.resolve() == ROOT / name


def test_kernels_has_no_init():
    # With one, a checkout on sys.path would stand in for the `kernels` package that diffusers asks for.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_tests_are_no_packages():
    assert [path for path in (ROOT / "tests").rglob("__init__.py")] == []


def test_declared_dependencies_are_the_imported_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {requirement_name(line) for line in project["dependencies"]}
    others = [line for name, lines in extras.items() if name != "dev" for line in lines]
    optional = {requirement_name(line) for line in others}
    imported = set()
    for name, path in tree():
        if name.endswith(".py"):
            imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    assert {"torch", "diffusers"} <= imported
    third_party = imported - set(sys.stdlib_module_names) - {"temporal_layers"}
    assert sorted(third_party - declared - optional) == [], "imported, but not declared in pyproject.toml"
    assert sorted(declared - third_party) == [], "declared in pyproject.toml, but never imported"


def requirement_name(line):
    """Import name of a requirement: 'huggingface-hub>=0.34' -> 'huggingface_hub'."""
    name = re.match(r"[\w-]+", line)[0]
    return {"pillow": "PIL", "pyyaml": "yaml"}.get(name, name.replace("-", "_"))
