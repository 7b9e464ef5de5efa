"""The gallery: pages that share the library of their figures, and that the documentation has and lists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lpsearch.config import OptimizeConfig
from lpsearch.report import build_html
from studies.gallery import ENTRIES, PAGES, PLOTLY_NAME, SETTINGS, Entry, write_page
from tests.report.conftest import search_formula
from tests.report.pages import parse

MAX_BYTES = 400_000
"""Of a page; the library alone has twelve times as many."""


def test_a_page_is_the_report_without_the_library(tmp_path: Path) -> None:
    study = search_formula(tmp_path, latency=False, data=str(tmp_path / "a text.txt"))
    page = tmp_path / "page.html"
    report = write_page(tmp_path, page)
    assert report.results == study.results
    written, whole = page.read_text(encoding="utf-8"), build_html(report)
    assert "a text.txt" in written
    assert str(tmp_path) not in written
    assert f'<script src="{PLOTLY_NAME}"></script>' in written
    assert len(written.encode()) < MAX_BYTES < len(whole.encode())
    assert parse(written).data == parse(whole).data
    assert parse(written).text.split() == parse(whole).text.split()
    outside = [reference for reference in parse(written).references if not reference.startswith(("#", "data:"))]
    assert outside == [PLOTLY_NAME]


def test_every_page_is_listed_and_small_and_names_no_machine() -> None:
    pages = {path.name for path in PAGES.glob("*.html")}
    assert pages
    assert pages <= {f"{entry.name}.html" for entry in ENTRIES}
    listed = re.findall(r"\]\(([\w.-]+\.html)\)", (PAGES / "index.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(pages)
    for name in pages:
        text = (PAGES / name).read_text(encoding="utf-8")
        assert len(text.encode()) < MAX_BYTES
        assert f'<script src="{PLOTLY_NAME}"></script>' in text
        assert not re.search(r"/(tmp|home|root|work)/", text)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_study_takes_options_that_there_are(entry: Entry) -> None:
    words = SETTINGS + entry.options
    options = zip(words[::2], words[1::2], strict=True)
    fields: dict[str, Any] = {name.removeprefix("--").replace("-", "_"): value for name, value in options}
    if "allow" in fields:
        fields["allow"] = tuple(fields["allow"].split(","))
    OptimizeConfig.model_validate({"model": entry.model, "budget": entry.budget, **fields})
