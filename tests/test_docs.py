"""Documentation: every example runs, and every guarantee and edge case has a test."""

import ast
import doctest
import re
from functools import cache
from pathlib import Path

import pytest

import normjax
import normjax.linen
import normjax.nnx
import normjax.surgery

ROOT = Path(__file__).parents[1]
MODULES = (normjax, normjax.linen, normjax.nnx, normjax.surgery)
PUBLIC = {f"{m.__name__}.{n}": getattr(m, n) for m in MODULES for n in m.__all__}
FUNCTIONS = {name: f for name, f in PUBLIC.items() if not isinstance(f, type)}


def slug(text):
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def section(doc, title):
    """The indented text under a heading of a docstring."""
    match = re.search(rf"^( *){title}:\n((?:\1 +.*\n|\n)*)", doc + "\n", re.MULTILINE)
    return match.group(2) if match else ""


def guarantees(doc):
    return re.findall(r"^ {8}(\w[^:\n]*):", section(doc, "Guarantees"), re.MULTILINE)


def edge_cases(doc):
    table = re.findall(r"^ {8}(\S.{33,35}?) {2,}\S", section(doc, "Edge cases"), re.MULTILINE)
    return [row.strip() for row in table if not row.startswith("=")]


@cache
def names_of_tests():
    """All test functions of the suite."""
    found = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        found |= {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    return frozenset(found)


def missing_tests(name, doc, known):
    wanted = [f"test_{name}_guarantee_{slug(g)}" for g in guarantees(doc)]
    wanted += [f"test_{name}_edge_{slug(e)}" for e in edge_cases(doc)]
    return [w for w in wanted if w not in known]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_guarantee_and_edge_case_has_a_test_of_its_name(name):
    doc = FUNCTIONS[name].__doc__
    assert guarantees(doc), "a public function documents its guarantees"
    assert not missing_tests(FUNCTIONS[name].__name__, doc, names_of_tests())


def test_a_missing_test_would_be_found():
    doc = normjax.batch_norm.__doc__
    assert len(guarantees(doc)) == 7
    assert len(edge_cases(doc)) == 11
    assert len(missing_tests("batch_norm", doc, set())) == 18
    assert missing_tests("batch_norm", doc, names_of_tests() - {"test_batch_norm_edge_momentum_1"})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_have_their_sections_in_order(name):
    doc = FUNCTIONS[name].__doc__
    sections = ["Args", "Returns", "Guarantees", "Edge cases", "Raises", "References", "Example"]
    places = [doc.find(f"    {s}:\n") for s in sections]
    assert all(p > 0 for s, p in zip(sections, places, strict=True) if s != "Edge cases")
    found = [p for p in places if p > 0]
    assert found == sorted(found)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_examples_run(name):
    module = __import__(PUBLIC[name].__module__, fromlist=["x"])
    tests = [
        t
        for t in doctest.DocTestFinder(recurse=True).find(PUBLIC[name], name, module)
        if t.examples
    ]
    needs_none = (
        "normjax.Moments",
        "normjax.NormChoice",
        "normjax.SpectralStats",
        "normjax.linen.ImmutableBatchStatsError",
        "normjax.linen.MissingStatsError",
        "normjax.nnx.BatchMoments",
        "normjax.surgery.FoldReport",
        "normjax.surgery.Finding",
        "normjax.surgery.NormReport",
        "normjax.surgery.Report",
        "normjax.surgery.SeriousFindingError",
    )
    assert tests or name in needs_none
    for test in tests:
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        assert runner.run(test).failed == 0


PAGES = [
    "README.md",
    *sorted(
        str(page.relative_to(ROOT))
        for page in (ROOT / "docs").rglob("*.md")
        if not {"_build", "generated"} & set(page.parts)
    ),
]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(TEXTS[page])])
def test_the_code_of_a_page_runs(page, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    # A page about another library says in its first line which one it imports.
    for library in re.findall(r"\A<!-- needs: (\w+) -->", TEXTS[page]):
        pytest.importorskip(library)
    namespace = {}
    for block in blocks(TEXTS[page]):
        exec(compile(block, page, "exec"), namespace)


def broken_links(page, text):
    """Relative links to files that are not there, and to headings that a page does not have."""
    found = []
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^):]+)\)", prose):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (heading and heading not in headings(target)):
            found.append(link)
    return found


def headings(page):
    """The anchors of a page, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_exist(page):
    assert not broken_links(page, TEXTS[page])


def test_a_broken_link_would_be_found():
    text = "[a](docs/nowhere.md) [b](#no-such-heading) [c](README.md#use) [d](https://jax.dev)"
    assert broken_links("README.md", text) == ["docs/nowhere.md", "#no-such-heading"]


@pytest.mark.parametrize("page", ["functions", "linen", "nnx", "surgery"])
def test_every_public_name_is_on_a_page_of_the_reference(page):
    module = normjax if page == "functions" else getattr(normjax, page)
    listed = re.findall(r"^   (\w+)$", TEXTS[f"docs/api/{page}.md"], re.MULTILINE)
    # `move`, the old name of update_stats, is described there and kept until 1.0.
    assert sorted(listed) == sorted(set(module.__all__) - {"move"})
