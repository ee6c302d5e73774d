"""Settings from files and flags: what is said wins over what is not, and nonsense is refused before a run begins."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from temporal_layers.recipes.training.configs import dumped, merged, parse, plain, read


@dataclass(frozen=True, kw_only=True)
class Rate:
    steps: int
    lr: float
    schedule: Literal["flat", "cosine"] = "flat"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"Rate: expected steps of at least 1, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run.

    Attributes:
        out: Where to.
        rate: How fast.
    """

    out: Path = Path("runs")
    rate: Rate = Rate(steps=10, lr=1e-3)
    other: Rate | None = None
    size: tuple[int, int] = (64, 96)
    words: tuple[str, ...] = ()
    text: str | None = None
    switch: bool = False
    limit: int | float = 0


def parsed(*words):
    return parse(Run, words, prog="run", description="Runs.")


def write(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = write(tmp_path, "a.yaml", "out: there\nrate:\n  lr: 1e-4\n  steps: 5\nsize: [8, 16]\nwords: [a, b]\n")
    assert parsed() == Run()
    found = parsed("--config", path, "--rate.steps", "7", "--switch")
    assert found == Run(out=Path("there"), rate=Rate(steps=7, lr=1e-4), size=(8, 16), words=("a", "b"), switch=True)
    assert parsed(f"--config={path}").rate == Rate(steps=5, lr=1e-4)


def test_all_kinds_of_files_say_the_same(tmp_path):
    toml = write(tmp_path, "a.toml", 'out = "x"\n[rate]\nlr = 0.5\n')
    as_json = write(tmp_path, "a.json", json.dumps({"out": "x", "rate": {"lr": 0.5}}))
    as_yaml = write(tmp_path, "a.yml", "out: x\nrate: {lr: 0.5}\n")
    assert parsed("--config", toml) == parsed("--config", as_json) == parsed("--config", as_yaml)
    assert parsed("--config", toml) == Run(out=Path("x"), rate=Rate(steps=10, lr=0.5))


runs = st.builds(
    Run,
    out=st.sampled_from([Path("a"), Path("b/c")]),
    rate=st.builds(Rate, steps=st.integers(1, 9), lr=st.floats(1e-6, 1), schedule=st.sampled_from(["flat", "cosine"])),
    size=st.tuples(st.integers(), st.integers()),
    words=st.lists(st.text(max_size=3), max_size=2).map(tuple),
    text=st.none() | st.text(max_size=3),
    switch=st.booleans(),
    limit=st.integers(0, 5) | st.floats(0, 1),
)


@given(runs)
def test_what_is_dumped_reads_as_the_same_settings(run):
    again = merged(Run(), yaml.safe_load(dumped(run)), where="file")
    assert again == run and json.dumps(plain(run))


def test_print_config_prints_what_would_be_run_and_stops(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--print-config", "--rate.lr", "0.25")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert merged(Run(), yaml.safe_load(printed), where="printed") == Run(rate=Rate(steps=10, lr=0.25))
    assert parsed("--config", write(tmp_path, "again.yaml", printed)).rate.lr == 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rat: 1", r"a\.yaml: unknown setting 'rat'; did you mean 'rate'\?"),
        ("zzz: 1", r"a\.yaml: unknown setting 'zzz'; expected one of out, rate, "),
        ("rate: {lr: fast}", r"a\.yaml: rate: lr: expected a number, got 'fast'"),
        ("rate: {lr: true}", r"a\.yaml: rate: lr: expected a number, got True"),
        ("rate: {steps: 1.5}", r"a\.yaml: rate: steps: expected a whole number, got 1\.5"),
        ("rate: {steps: 0}", r"a\.yaml: rate: Rate: expected steps of at least 1, got 0"),
        ("rate: {schedule: up}", r"schedule: expected one of 'flat', 'cosine', got 'up'"),
        ("rate: 3", r"rate: expected names with values, got 3"),
        ("size: [1]", r"size: expected a list of 2, got \[1\]"),
        ("size: 1", r"size: expected a list, got 1"),
        ("words: [1]", r"words\[0\]: expected a string, got 1"),
        ("out: 1", r"out: expected a path, got 1"),
        ("switch: 1", r"switch: expected true or false, got 1"),
        ("- 1", r"expected names with values, got list"),
        ("a: [", r"expected a readable file of settings, got: "),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path, capsys, text, message):
    path = write(tmp_path, "a.yaml", text)
    with pytest.raises(SystemExit) as stop:
        parsed("--config", path)
    assert stop.value.code == 2
    with pytest.raises(ValueError, match=message):
        merged(Run(), read(path), where=path)
    assert capsys.readouterr().err.startswith("run: ")


def test_files_that_are_missing_or_of_an_unknown_kind_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"none\.yaml: expected a readable file of settings, got: .*No such file"):
        read(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"expected a file of settings ending in \.yaml, .*got '\.txt'"):
        read(tmp_path / "a.txt")
    with pytest.raises(SystemExit) as stop:
        parsed("--config")
    assert stop.value.code == 2 and "expected a file behind it" in capsys.readouterr().err


def test_flags_that_the_settings_refuse_end_with_a_message(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--rate.steps", "0")
    assert stop.value.code == 2 and "expected steps of at least 1" in capsys.readouterr().err.replace("\n", " ")


def test_help_names_the_two_options(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--config FILE" in text and "--print-config" in text and "--rate.lr" in text


def test_optional_settings_can_be_given_and_taken_away():
    with pytest.raises(ValueError, match=r"file: other: unknown setting 'step'; did you mean 'steps'"):
        merged(Run(), {"other": {"step": 1}}, where="file")
    with pytest.raises(ValueError, match=r"file: other: .*missing 1 required keyword-only argument: 'lr'"):
        merged(Run(), {"other": {"steps": 1}}, where="file")
    assert merged(Run(), {"other": {"steps": 1, "lr": 1}}, where="file").other == Rate(steps=1, lr=1.0)
    given = dataclasses.replace(Run(), other=Rate(steps=1, lr=1.0))
    assert merged(given, {"other": {"lr": 2.0}}, where="file").other == Rate(steps=1, lr=2.0)
    assert merged(given, {"other": None}, where="file").other is None
