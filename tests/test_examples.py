"""The examples in the documentation of the Python interface run."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


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
