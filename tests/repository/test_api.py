"""The public surface: every name in `__all__` exists, stands in order and says what it is."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import temporal_layers

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = ["temporal_layers", "temporal_layers.functional", "temporal_layers.adapters"]
FOLDERS = {"temporal_layers": ROOT / "temporal_layers"} | {
    f"temporal_layers.{name}": ROOT / name for name in ("kernels", "adapters", "recipes")
}

# Shapes and dtypes in signatures are comments to Python; this run has them checked at every call.
CHECKED_RUN = """
import jaxtyping
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

with jaxtyping.install_import_hook("temporal_layers", "beartype.beartype"):
    import temporal_layers
    from temporal_layers.adapters import TemporalConfig, inject

unet = UNet2DConditionModel(
    block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, attention_head_dim=4,
)
inject(unet)
unet(torch.randn(2, 4, 3, 8, 6), torch.tensor(7), torch.randn(2, 5, 16)).sample.sum().backward()
vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
inject(vae, TemporalConfig.for_decoder())
vae.decode(torch.randn(1, 4, 3, 8, 6)).sample.sum().backward()
try:
    temporal_layers.fold_frames(torch.randn(3))
except jaxtyping.TypeCheckError:
    print("checked")
"""


def modules_with_all():
    """Dotted names of all modules that declare `__all__`, links inside temporal_layers/ not followed."""
    for prefix, folder in FOLDERS.items():
        for path in sorted(folder.glob("*.py")) + sorted(folder.glob("[!_]*/*.py")):
            if path.parent.is_symlink() or "\n__all__ = " not in path.read_text(encoding="utf-8"):
                continue
            parts = [part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__"]
            yield ".".join([prefix, *parts])


def documented(owner, name, value):
    """Whether a public object has words of its own: what it inherits or a dataclass writes for it does not count."""
    if not (inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, property)):
        return True  # constants are explained where they stand
    text = inspect.getdoc(value) if owner is None else value.__doc__
    return bool(text) and not text.startswith(f"{name}(")


def undocumented(name, value):
    """Names of a public object and of its public methods that lack a docstring."""
    missing = [] if documented(None, name, value) else [name]
    if not inspect.isclass(value) or not value.__module__.startswith("temporal_layers"):
        return missing
    for method, member in vars(value).items():
        member = getattr(member, "__func__", member)  # class and static methods
        inherited = any(hasattr(base, method) for base in value.__mro__[1:])
        if method.startswith("_") or (inherited and method != "forward"):
            continue  # an override keeps the contract of its base; `forward` has none until a module writes one
        if not documented(value, method, member):
            missing.append(f"{name}.{method}")
    return missing


def in_order(names):
    """Sorts as ruff does (RUF022): CONSTANTS, then Classes, then functions."""
    return sorted(names, key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_declare_what_is_public(name):
    assert name in list(modules_with_all())


@pytest.mark.parametrize("name", list(modules_with_all()))
def test_public_names(name):
    module = importlib.import_module(name)
    assert inspect.getdoc(module)
    assert module.__all__ == in_order(module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [entry for entry in module.__all__ if not hasattr(module, entry)] == []
    assert [line for entry in module.__all__ for line in undocumented(entry, getattr(module, entry))] == []


def test_names_that_are_loaded_late_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "temporal_layers" / "__init__.py").read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in checked.body for alias in node.names}
    assert seen == {name: f"temporal_layers.{home}" for name, home in temporal_layers._HOMES.items()}
    assert sorted(seen) == sorted(temporal_layers.__all__)
    assert set(temporal_layers.__all__) <= set(dir(temporal_layers))
    with pytest.raises(AttributeError, match=r"module 'temporal_layers' has no attribute 'TemporalAttentoin'"):
        temporal_layers.TemporalAttentoin  # noqa: B018


def test_annotations_tell_the_truth():
    result = subprocess.run([sys.executable, "-c", CHECKED_RUN], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "checked\n"


def test_a_missing_docstring_is_found():
    class Bare:
        def method(self):
            pass

    class Module(Bare):
        """Has words."""

        def method(self):
            pass

        def forward(self):
            pass

        def other(self):
            """Has words."""

    Bare.__module__ = Module.__module__ = "temporal_layers.example"
    assert undocumented("Bare", Bare) == ["Bare", "Bare.method"]
    assert undocumented("Module", Module) == ["Module.forward"]
