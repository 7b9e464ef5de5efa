"""Which plan of a front to take within limits: the one rule of ``lpsearch plan pick``, the report and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Candidate", "pick_candidate"]


@dataclass(frozen=True)
class Candidate:
    """What counts of a plan of a front.

    Attributes:
        num_joins: its joins; 0 is the unmodified model.
        loss: by the metric of the search, in nats per token: held out where that is known.
        speedup: estimated time of the unmodified model over that of the plan; None with latency off.
    """

    num_joins: int
    loss: float
    speedup: float | None


def pick_candidate(
    candidates: Sequence[Candidate],
    *,
    objective: Literal["depth", "latency"],
    max_loss: float | None = None,
    min_speedup: float | None = None,
) -> int | None:
    """Pick the plan that saves most within a loss, or without such a limit the one of least loss.

    The unmodified model saves nothing, so it is picked only where no plan with a join meets the limits.

    Args:
        candidates: the plans of a front.
        objective: what is saved: joins, or estimated time.
        max_loss: largest loss, in nats per token.
        min_speedup: smallest speed-up.

    Returns:
        The place of the plan among the candidates; None where none meets the limits.
    """
    meeting = [
        index
        for index, candidate in enumerate(candidates)
        if (max_loss is None or candidate.loss <= max_loss)
        and (min_speedup is None or (candidate.speedup is not None and candidate.speedup >= min_speedup))
    ]
    meeting = [index for index in meeting if candidates[index].num_joins > 0] or meeting

    def rank(index: int) -> tuple[float, float]:
        candidate = candidates[index]
        saving = candidate.num_joins if objective == "depth" else candidate.speedup or 0.0
        return (0.0 if max_loss is None else saving, -candidate.loss)

    return max(meeting, key=rank, default=None)
