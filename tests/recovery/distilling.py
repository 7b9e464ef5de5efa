"""What tests of distilling share: text, a plan and settings for a tiny model."""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsearch.data import Windows
from lpsearch.plan import Plan
from lpsearch.recovery.distill import DistillSettings
from lpsearch.recovery.mixture import Mixture
from tests.tiny_models import VOCAB_SIZE

__all__ = ["PLAN", "SEQ_LEN", "build_settings", "build_training", "build_validation", "build_windows"]

PLAN = Plan.from_groups([[0], [1, 2], [3, 4], [5]])
SEQ_LEN = 16


def build_windows(num_windows: int, seed: int, *, vocab_size: int = VOCAB_SIZE) -> Windows:
    tokens = np.random.default_rng(seed).integers(3, vocab_size, (num_windows, SEQ_LEN))
    return Windows(tokens.astype(np.int32), f"random:{seed}")


def build_training() -> Mixture:
    return Mixture({"a": build_windows(24, 0), "b": build_windows(24, 1)})


def build_validation() -> dict[str, Windows]:
    return {"a": build_windows(5, 2), "b": build_windows(4, 3)}


def build_settings(**changes: Any) -> DistillSettings:
    """Build settings of 12 steps of 8 windows, in micro batches of 3, evaluated every fourth step."""
    values = {
        "num_tokens": 12 * 8 * SEQ_LEN,
        "tokens_per_step": 8 * SEQ_LEN,
        "micro_batch": 3,
        "learning_rate": 3e-3,
        "evaluate_every": 4,
    }
    return DistillSettings(**values | changes)
