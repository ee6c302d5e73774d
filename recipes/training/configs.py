"""Settings of a run: a typed dataclass with defaults, a file that changes some of them, flags that change others."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import json
import sys
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

Config = TypeVar("Config")

_HELP = """
Two options beside those below: --config FILE (.yaml, .toml or .json; options given as flags override it) and
--print-config (print the settings that a run would have, as YAML, and stop).
"""

_COLUMNS = 80
_EXAMPLE = "temporal-layers "  # formatters take the indent off examples that are all there is below the first line


def help_text(description: str) -> str:
    """What a command is for, from the docstring of its module: prose wrapped, indented lines such as commands kept."""
    parts: list[str] = []
    for kind, lines in itertools.groupby(inspect.cleandoc(description).split("\n"), _kind):
        if kind == "prose":
            parts += textwrap.wrap(" ".join(lines), _COLUMNS)
        else:
            parts += [f"    {line}" if line.startswith(_EXAMPLE) else line for line in lines]
    return "\n".join(parts)


def _kind(line: str) -> str:
    if not line:
        return "gap"
    return "as it is" if line.startswith((" ", _EXAMPLE)) else "prose"


def from_words(cls: type[Config], words: Sequence[str] | None, *, prog: str, description: str, **given: Any) -> Config:
    """Settings from the words of a command line alone, without files.

    Args:
        cls: Dataclass of the settings.
        words: Words of the command line; those of the process if None.
        prog: Name of the command.
        description: What it is for, with examples as indented lines. tyro would run these together, so it is printed
            in front of what tyro prints.
        **given: Further arguments of ``tyro.cli``.

    Raises:
        SystemExit: As :func:`parse`.
    """
    words = list(sys.argv[1:] if words is None else words)
    if "-h" in words or "--help" in words:
        print(help_text(description), end="\n\n")
    try:
        return tyro.cli(cls, args=words, prog=prog, description="", **given)
    except ValueError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def parse(
    cls: type[Config], arguments: Sequence[str] | None = None, *, prog: str, description: str | None = None
) -> Config:
    """The settings that a command line asks for.

    Args:
        cls: Dataclass of the settings, all of which have defaults.
        arguments: Words of the command line; those of the process if None.
        prog: Name of the command.
        description: First part of the help text.

    Raises:
        SystemExit: With code 0 after ``--help`` and ``--print-config``, with code 2 after a message if a file or a
            flag says something that the settings do not allow.
    """
    words, path, shown = _taken_out(list(sys.argv[1:] if arguments is None else arguments), prog)
    try:
        default = cls() if path is None else merged(cls(), read(path), where=str(path))
    except ValueError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    found = from_words(cls, words, prog=prog, description=(description or "") + _HELP, default=default)
    if shown:
        print(dumped(found), end="")
        raise SystemExit(0)
    return found


def _taken_out(words: list[str], prog: str) -> tuple[list[str], Path | None, bool]:
    """The words without ``--config`` and ``--print-config``, and what those said."""
    rest, path, shown = [], None, False
    while words:
        word = words.pop(0)
        if word in ("--print-config", "--print_config"):
            shown = True
        elif word == "--config" and words:
            path = Path(words.pop(0))
        elif word.startswith("--config="):
            path = Path(word.removeprefix("--config="))
        elif word == "--config":
            print(f"{prog}: --config: expected a file behind it, got nothing", file=sys.stderr)
            raise SystemExit(2)
        else:
            rest.append(word)
    return rest, path, shown


def read(path: Path | str) -> dict[str, Any]:
    """The mapping in a file of settings.

    Raises:
        ValueError: If the file cannot be read, is of an unknown kind, or holds no mapping.
    """
    path = Path(path)
    readers = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads, ".toml": tomllib.loads}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a file of settings ending in {', '.join(readers)}, got {path.suffix!r}")
    try:
        values = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: expected a readable file of settings, got: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: expected names with values, got {type(values).__name__}")
    return dict(values)


def dumped(config: Any) -> str:
    """Settings as YAML, which `read` and `merged` turn into equal ones."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(value: Any) -> Any:
    """Settings as mappings, lists, numbers, strings and None."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def merged(config: Config, values: Any, *, where: str) -> Config:
    """Settings with some values replaced; what is not named keeps its value, also inside nested settings.

    Args:
        config: Instance of a dataclass.
        values: Names to values, as read from a file.
        where: What to call the source of the values in an error.

    Raises:
        ValueError: If a name is unknown, or a value is not of the type of its field or refused by the settings.
    """
    changes = _changes(type(config), values, config, where)
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _changes(cls: type, values: Any, config: Any, where: str) -> dict[str, Any]:
    """Values by the name of their field, each as the type of its field; nested ones change those of ``config``."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected names with values, got {values!r}")
    types = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(names)}"
            raise ValueError(f"{where}: unknown setting {name!r}{hint}")
    return {
        name: _converted(types[name], value, getattr(config, name, None), f"{where}: {name}")
        for name, value in values.items()
    }


def _built(cls: type, values: Any, where: str) -> Any:
    """Settings from values alone."""
    changes = _changes(cls, values, None, where)
    try:
        return cls(**changes)
    except (TypeError, ValueError) as error:  # the first if a value without a default is missing
        raise ValueError(f"{where}: {error}") from error


def _converted(kind: Any, value: Any, current: Any, where: str) -> Any:
    """``value`` as the type of a field, whose value so far is ``current``."""
    origin = get_origin(kind)
    if origin in (UnionType, Union):
        if value is None and NoneType in get_args(kind):
            return None
        options = [option for option in get_args(kind) if option is not NoneType]
        for option in options[:-1]:
            try:
                return _converted(option, value, current, where)
            except ValueError:
                continue
        return _converted(options[-1], value, current, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where}: expected one of {', '.join(map(repr, get_args(kind)))}, got {value!r}")
        return value
    if origin is tuple:
        return _tuple(kind, value, where)
    if dataclasses.is_dataclass(kind):
        return merged(current, value, where=where) if isinstance(current, kind) else _built(kind, value, where)
    return _scalar(kind, value, where)


def _tuple(kind: Any, value: Any, where: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: expected a list, got {value!r}")
    items = get_args(kind)
    if items[-1] is Ellipsis:
        items = items[:1] * len(value)
    if len(items) != len(value):
        raise ValueError(f"{where}: expected a list of {len(items)}, got {value!r}")
    pairs = enumerate(zip(items, value, strict=True))
    return tuple(_converted(item, entry, None, f"{where}[{i}]") for i, (item, entry) in pairs)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4, without a point, as a string
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path"}
    raise ValueError(f"{where}: expected {names.get(kind, kind)}, got {value!r}")
