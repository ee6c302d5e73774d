"""What the pages in docs/ say works: their Python runs, links lead somewhere, and what is generated is up to date."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from temporal_layers.adapters.registry import HOSTS, MODELS
from temporal_layers.recipes.evidence.comparisons import arm_table, comparison_table
from temporal_layers.recipes.evidence.jobs import COMPARISONS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
REFERENCE = {
    "temporal_layers": "temporal_layers",
    "temporal_layers.functional": "functional",
    "temporal_layers.adapters": "adapters",
    "temporal_layers.adapters.convert": "convert",
}


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
    found = (page.parent / target).resolve()
    assert found.exists()
    assert found.is_relative_to(DOCS), "a page of the site cannot link to what the site does not have"


@pytest.mark.parametrize("target", sorted(set(links(ROOT / "CONTRIBUTING.md"))))
def test_links_of_the_contributors_page_lead_somewhere(target):
    assert (ROOT / target).resolve().is_relative_to(DOCS) and (ROOT / target).exists()


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_names_all_that_is_public(name):
    text = (DOCS / "reference" / f"{REFERENCE[name]}.rst").read_text(encoding="utf-8")
    shown = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(importlib.import_module(name).__all__)


def test_the_page_of_performance_is_what_its_script_makes():
    spec = importlib.util.spec_from_file_location("performance", DOCS / "performance.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    files = script.page()
    assert len(files) >= 2
    drawings = {f"assets/{path.name}" for path in (DOCS / "assets").glob("performance-*.svg")}
    assert drawings == set(files) - {"performance.md"}
    stale = [name for name, text in files.items() if (DOCS / name).read_text(encoding="utf-8") != text]
    assert stale == [], "run: python3 dev.py docs"


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-P", "-m", "sphinx", "--quiet", "--fail-on-warning", str(DOCS), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    fetched = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?:https?:)?//|<link\b[^>]*\bhref=["'](?:https?:)?//"""
        r"""|url\(["']?(?:https?:)?//|@import"""
    )
    files = [*pages, *tmp_path.rglob("*.css")]
    assert [file.name for file in files if fetched.search(file.read_text(encoding="utf-8"))] == []
    figures = (tmp_path / "method.html").read_text(encoding="utf-8").count('<svg class="figure"')
    assert figures == 4  # in the page, where the theme colours them


def test_the_page_on_models_names_every_registered_model():
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    assert [name for name in MODELS if f"`{name}`" not in text] == []


def test_the_page_of_results_shows_what_was_measured():
    document = json.loads((DOCS / "assets" / "results.json").read_text(encoding="utf-8"))
    results = {arm: {int(seed): numbers for seed, numbers in rows.items()} for arm, rows in document["results"].items()}
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    for table in (comparison_table(COMPARISONS, results), arm_table(results)):
        assert table in page
    assert f"{document['core_minutes']} core minutes" in page
