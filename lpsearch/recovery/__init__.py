"""Winning back what a plan loses: closed-form refits, distilling, and the directory that holds what they changed."""

from __future__ import annotations

from lpsearch.recovery.directory import apply_recovery, load_recovered_weights, read_recovery, save_recovered
from lpsearch.recovery.evaluator import RefitEvaluator
from lpsearch.recovery.refit import Refit, Refitter, swapped_weights

__all__ = [
    "Refit",
    "RefitEvaluator",
    "Refitter",
    "apply_recovery",
    "load_recovered_weights",
    "read_recovery",
    "save_recovered",
    "swapped_weights",
]
