"""Ranks that fail, in a module that imports no models: new processes import what their function is in."""

from __future__ import annotations

import os
import time

from lpsearch.latency.ranks.parallel import ProcessGroupRanks


def fail_on_second_rank(group, error):
    if ProcessGroupRanks(group).rank == 1:
        raise error
    time.sleep(600)


def die_on_second_rank(group):
    if ProcessGroupRanks(group).rank == 1:
        os._exit(7)
    time.sleep(600)
