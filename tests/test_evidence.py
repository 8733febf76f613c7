"""Every claim has a script, a page, a picture and a record of one run."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "evidence"
PAGES = ROOT / "docs" / "evidence"
NAMES = sorted(path.stem for path in SCRIPTS.glob("[!_]*.py"))
LISTED = runpy.run_path(str(SCRIPTS / "__main__.py"), run_name="evidence")["SCRIPTS"]


def test_all_scripts_are_run_together():
    assert sorted(LISTED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_page_and_record_are_of_one_run(name):
    record = json.loads((PAGES / f"{name}.json").read_text())
    page = (PAGES / f"{name}.md").read_text()
    for key in ("title", "claim", "source", "number", "finding", "circumstances"):
        assert record[key] in page, key
    assert f"**Did it hold here? {record['held'].title()}: " in page
    assert f"]({name}.png)" in page
    assert (PAGES / f"{name}.png").stat().st_size > 10_000
    assert re.search(r"\d+ seeds, \d+ s on .*\d{4}-\d\d-\d\d, normjax .*, jax ", page)


def test_the_table_has_the_numbers_of_the_pages():
    table = (PAGES / "index.md").read_text()
    for name in NAMES:
        record = json.loads((PAGES / f"{name}.json").read_text())
        assert f"| {record['held']} | {record['number']} |" in table
