"""A coordinator that evaluates for ever, for a test to kill."""

from __future__ import annotations

import sys
from pathlib import Path

from lpsearch.plan import Plan
from tests.search.workers.pools import make_worker_pool
from tests.search.workers.scripted import NUM_LAYERS, make_builder

if __name__ == "__main__":
    with make_worker_pool("local", make_builder(Path(sys.argv[1]), {1: "wait"}), num_workers=1) as pool:
        pool.submit(Plan.from_joins(NUM_LAYERS, (1,)), [0]).result()
