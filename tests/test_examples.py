"""The examples in the documentation run: those of docstrings, and the Python on the pages."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"^<!-- examples: (packaged|network) -->$", re.MULTILINE)
"""A page whose examples need more than lpsearch itself says so, by the marker that its test gets."""


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lpsearch.transform.apply", "apply_plan"),
        ("lpsearch.transform.fuse", "fuse_plan"),
        ("lpsearch.export.checkpoint", "export_checkpoint"),
    ],
)
def test_examples_run(module: str, name: str) -> None:
    function = getattr(import_module(module), name)
    [example] = doctest.DocTestFinder(recurse=False).find(function, name=name, globs={})
    outcome = doctest.DocTestRunner().run(example)
    assert outcome.attempted >= 5
    assert outcome.failed == 0


def _list_pages() -> Iterator[object]:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        needs = NEEDS.findall(text)
        # README's are sketches unless it says what they need.
        if PYTHON_BLOCK.search(text) and (needs or path.name != "README.md"):
            marks = [getattr(pytest.mark, name) for name in needs]
            yield pytest.param(path, id=str(path.relative_to(ROOT)), marks=marks)


@pytest.mark.parametrize("page", list(_list_pages()))
def test_the_python_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    # The blocks of a page are one script; blank lines in place of the text keep the page's line numbers in a traceback.
    script, end = "", 0
    for block in PYTHON_BLOCK.finditer(text):
        script += "\n" * text.count("\n", end, block.start(1)) + block[1]
        end = block.end(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, str(page), "exec"), {"__name__": "__main__"})
