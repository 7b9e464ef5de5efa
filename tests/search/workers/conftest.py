"""A real Ray on this machine's CPUs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Start Ray with room for four workers, whatever the CPUs, and stop it."""
    ray = pytest.importorskip("ray", reason="Ray is not installed; `pip install 'lpsearch[ray]'`")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def pool_kind(request: pytest.FixtureRequest) -> str:
    """Return a kind of pool, with Ray running where it needs that."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param
