"""The process whose children are killed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.nursery import Nursery


@pytest.fixture(scope="package")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Return what runs tasks in children that can be killed at any moment."""
    started = Nursery(tmp_path_factory.mktemp("nursery"))
    yield started
    started.close()
