"""Imports run one way, kernels -> temporal_layers -> adapters -> recipes, and importing the package stays light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ["kernels", "temporal_layers", "adapters", "recipes", "benchmarks"]

# The benchmarks lie beside the kernels, whose results they hold, but measure them against everything to their right.
BENCHMARKS = ROOT / "kernels" / "benchmarks"

# Beyond the standard library. What is not named here may be imported in any layer that pyproject.toml serves.
HEAVY = {"accelerate", "av", "diffusers", "matplotlib", "peft", "rich", "transformers", "triton", "tyro", "xformers"}
ALLOWED_HEAVY = {
    "kernels": {"triton", "xformers"},
    "temporal_layers": set(),
    "adapters": {"accelerate", "diffusers", "xformers"},
    "recipes": HEAVY - {"triton", "xformers"},
    "benchmarks": {"diffusers", "matplotlib", "xformers"},
}


def sources():
    """Yields (layer, dotted module name, is a package, path) for every source file of the library."""
    for layer in LAYERS[:-1]:
        prefix = ["temporal_layers"] if layer == "temporal_layers" else ["temporal_layers", layer]
        for path in sorted(walk(ROOT / layer)):
            parts = list(path.relative_to(ROOT / layer).with_suffix("").parts)
            package = parts[-1] == "__init__"
            place = "benchmarks" if path.is_relative_to(BENCHMARKS) else layer
            yield place, ".".join(prefix + (parts[:-1] if package else parts)), package, path


def walk(folder):
    """Python files below a folder, without following the links inside temporal_layers/."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink() and entry.name != "__pycache__":
            yield from walk(entry)
        elif entry.suffix == ".py":
            yield entry


def imported_names(source, module, package):
    """Returns the dotted names that a source imports, absolute, wherever in the file the import stands.

    ``from a import b`` gives ``a.b``: whether ``b`` is a module or a name in one makes no difference to its layer.
    """
    parents = module.split(".") if package else module.split(".")[:-1]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names += [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            if function in ("import_module", "__import__"):
                names.append(node.args[0].value)
    return names


def layer_of(name):
    """The layer that a dotted name belongs to, or None outside the library."""
    first, *rest = name.split(".")
    if first != "temporal_layers":
        return None
    if rest[:2] == ["kernels", "benchmarks"]:
        return "benchmarks"
    return rest[0] if rest and rest[0] in LAYERS else "temporal_layers"


def violations(source, layer, module, package=False):
    """Returns what a source file imports against the rules of its layer."""
    found = []
    for name in imported_names(source, module, package):
        first, target = name.split(".")[0], layer_of(name)
        if target and LAYERS.index(target) > LAYERS.index(layer):
            found.append(f"{module} imports {name}: {layer} may not import {target}")
        if first in ("kernels", "adapters", "recipes"):
            found.append(f"{module} imports {name}: say temporal_layers.{name}, the bare name is another project's")
        if first in HEAVY - ALLOWED_HEAVY[layer]:
            found.append(f"{module} imports {name}: not in {layer}")
    return found


def test_imports_run_one_way():
    modules = list(sources())
    assert {layer for layer, *_ in modules} == set(LAYERS)
    found = [
        line
        for layer, module, package, path in modules
        for line in violations(path.read_text(encoding="utf-8"), layer, module, package)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "layer", "module", "package"),
    [
        ("import temporal_layers.adapters", "temporal_layers", "temporal_layers.blend", False),
        ("from temporal_layers.recipes.cli import main", "adapters", "temporal_layers.adapters.inject", False),
        ("from temporal_layers import recipes", "adapters", "temporal_layers.adapters.inject", False),
        ("from . import adapters", "temporal_layers", "temporal_layers", True),
        ("from .adapters import inject", "temporal_layers", "temporal_layers.blend", False),
        ("from ..blend import AlphaBlend", "kernels", "temporal_layers.kernels.checks", False),
        ("from ...blend import AlphaBlend", "kernels", "temporal_layers.kernels.group_norm", True),
        ("def f():\n    from ..adapters import inject", "kernels", "temporal_layers.kernels.checks", False),
        ("if TYPE_CHECKING:\n    import temporal_layers", "kernels", "temporal_layers.kernels.checks", False),
        ("importlib.import_module('temporal_layers.adapters')", "kernels", "temporal_layers.kernels.checks", False),
        ("import kernels.dispatch", "adapters", "temporal_layers.adapters.inject", False),
        ("from adapters import inject", "recipes", "temporal_layers.recipes.cli", False),
        ("from .benchmarks import cases", "kernels", "temporal_layers.kernels.testing", False),
        ("import temporal_layers.kernels.benchmarks", "recipes", "temporal_layers.recipes.cli", False),
        ("import triton.language as tl", "temporal_layers", "temporal_layers.blend", False),
        ("try:\n    import diffusers\nexcept ImportError:\n    pass", "kernels", "temporal_layers.kernels.x", False),
    ],
)
def test_a_wrong_import_is_found(source, layer, module, package):
    assert violations(source, layer, module, package)


@pytest.mark.parametrize(
    ("source", "layer", "module", "package"),
    [
        ("import torch\nfrom .checks import check", "kernels", "temporal_layers.kernels.dispatch", False),
        ("from ..checks import check", "kernels", "temporal_layers.kernels.group_norm", True),
        ("from .kernels.group_norm import group_norm", "temporal_layers", "temporal_layers.functional", False),
        ("from temporal_layers import AlphaBlend", "adapters", "temporal_layers.adapters.inject", False),
        ("from ..adapters import inject", "recipes", "temporal_layers.recipes.cli", False),
        ("import diffusers", "adapters", "temporal_layers.adapters.inject", False),
    ],
)
def test_a_right_import_passes(source, layer, module, package):
    assert violations(source, layer, module, package) == []


def loaded_by(statement, after="pass"):
    """Names of the modules that a statement adds to a fresh interpreter in which another one has run before."""
    lines = [after, "import json, sys", "before = set(sys.modules)", statement]
    code = "\n".join([*lines, "print(json.dumps(sorted(set(sys.modules) - before)))"])
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_the_package_alone_loads_nothing():
    loaded = loaded_by("import temporal_layers; assert 'TemporalAttention' in dir(temporal_layers)")
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"temporal_layers"}
    assert "torch" in loaded_by("from temporal_layers import TemporalAttention")


def test_import_is_light():
    loaded = loaded_by("import temporal_layers, temporal_layers.functional")
    assert {"torch", "temporal_layers.functional", "temporal_layers.kernels.group_norm"} <= loaded
    assert not loaded & {"kernels", "adapters", "recipes"}  # the same files under a second name
    assert not loaded & (HEAVY | {"temporal_layers.adapters", "temporal_layers.recipes"})


def test_adapters_add_little_to_diffusers():
    diffusers = "from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel"
    loaded = loaded_by("import temporal_layers.adapters", after=diffusers)
    assert "temporal_layers.adapters" in loaded
    assert not loaded & (HEAVY | {"kernels", "adapters", "recipes", "temporal_layers.recipes"})
