"""The wheel holds the tree, by way of a source distribution as well, and works without the checkout."""

import re
import subprocess
import sys
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
