"""Finished plans made by hand."""

from __future__ import annotations

from typing import Any

from lpsearch.plan import Plan
from lpsearch.search import Loss, TrialResult


def build_result(plan: Plan, delta: float, *, trial: int = 0, **fields: Any) -> TrialResult:
    """Return a plan that loses so much on one window of 10 tokens, or what the fields of result and loss say."""
    loss = {
        "nll": 3.0 + delta,
        "delta_nll": delta,
        "delta_nll_se": None,
        "kl_nats_per_token": None,
        "kl_se": None,
        "num_windows": 1,
        "num_tokens": 10,
    }
    loss |= {name: fields.pop(name) for name in loss.keys() & fields.keys()}
    of_trial = {"variant": "raw", "origin": "random", "state": "complete", **fields}
    return TrialResult(plan=plan, trial=trial, loss=Loss(**loss), **of_trial)
