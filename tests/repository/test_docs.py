"""What the pages in docs/ say works: their Python runs, block after block, and their links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

from temporal_layers.adapters.registry import HOSTS, MODELS
from temporal_layers.recipes.evidence.comparisons import arm_table, comparison_table
from temporal_layers.recipes.evidence.jobs import COMPARISONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page):
    """The code blocks of a page in Python."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def links(page):
    return re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def registrations():
    """Leaves no class of a page registered."""
    before = dict(HOSTS), dict(MODELS)
    yield
    for entries, old in zip((HOSTS, MODELS), before, strict=True):
        entries.clear()
        entries.update(old)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    for index, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {index + 1}", "exec"), names)


@pytest.mark.parametrize(
    ("page", "target"), [(page, target) for page in PAGES for target in sorted(set(links(page)))],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)  # fmt: skip
def test_links_lead_somewhere(page, target):
    assert (page.parent / target).exists()


def test_the_page_on_models_names_every_registered_model():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert [name for name in MODELS if f"`{name}`" not in text] == []


def test_the_page_of_results_shows_what_was_measured():
    document = json.loads((ROOT / "docs" / "assets" / "results.json").read_text(encoding="utf-8"))
    results = {arm: {int(seed): numbers for seed, numbers in rows.items()} for arm, rows in document["results"].items()}
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for table in (comparison_table(COMPARISONS, results), arm_table(results)):
        assert table in page
    assert f"{document['core_minutes']} core minutes" in page
