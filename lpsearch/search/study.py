"""Running a search: what may be asked for, and the lock; the coordinator does the rest."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import get_args

from lpsearch.errors import ConfigError, StudyError
from lpsearch.evaluation.losses import RAW, Metric, PlanEvaluator, Variant
from lpsearch.kinds import TextKind
from lpsearch.plan import Plan
from lpsearch.search.coordinator import Coordinator, InFlight
from lpsearch.search.front import Objective
from lpsearch.search.interrupts import hold_back_interrupts, let_interrupts_through
from lpsearch.search.pool import Pool, ThreadPool
from lpsearch.search.racing import Racing
from lpsearch.search.results import EvaluationUpdate, StudyResult, TrialUpdate
from lpsearch.search.space import PlanSpace
from lpsearch.search.storage_url import is_connection_lost
from lpsearch.search.store import StudyStore
from lpsearch.search.trials import Trials

__all__ = ["run_study"]

logger = logging.getLogger(__name__)

OUTAGE_S = 300
"""How long a database server may be away in the middle of a search."""

RETRY_S = 0.5


def run_study(
    *,
    evaluator: PlanEvaluator | None = None,
    pool: Pool | None = None,
    space: PlanSpace,
    budget: int,
    store: StudyStore,
    sampler: str = "pairset",
    seed: int = 0,
    metric: Metric = "nll",
    objective: Objective = "depth",
    estimate_latency_ms: Callable[[Plan], float] | None = None,
    enqueue: Sequence[Plan] = (),
    timeout_s: float | None = None,
    staged: bool = True,
    kinds: Sequence[TextKind] = (),
    worst_case: bool = False,
    variant: Variant = RAW,
    on_trial: Callable[[TrialUpdate], None] | None = None,
    on_evaluation: Callable[[EvaluationUpdate], None] | None = None,
) -> StudyResult:
    """Search a space of plans until the study has ``budget`` distinct finished plans; begun studies are resumed.

    The baseline comes first, then ``enqueue``, then what the sampler proposes. A space no larger than the budget is
    enumerated. A plan whose loss is not finite is finished like any other, with an infinite perplexity: it is never
    proposed again and never on the front. On a database server several processes may search a study at once: each
    evaluates other plans, and the budget counts those of all.

    Args:
        evaluator: evaluates plans on the proxy windows, in a thread of its own, so that the device works while the
            caller's thread does the books.
        pool: evaluates them in the place of an ``evaluator``; it stays open.
        space: the plans to search.
        budget: distinct finished plans of the study in total, the baseline and earlier runs included.
        store: the study's database.
        sampler: name of the search method.
        seed: decides every draw.
        metric: loss that is searched, ``nll`` or ``kl``; the evaluator measures it.
        objective: what is traded against the loss, ``depth`` or ``latency``.
        estimate_latency_ms: latency of a plan in ms, noted on every trial; None with latency off.
        enqueue: plans to evaluate first.
        timeout_s: seconds after which no further trial begins; the baseline always does.
        staged: evaluate a plan on few windows first, and on all of them only while it may be on the front. With fewer
            than 8 windows, and where the space is enumerated, every plan is evaluated on all of them.
        kinds: the kinds of text whose windows are interleaved (:mod:`lpsearch.kinds`); none or one where all are alike.
            The cost of a plan is the weighted mean over them.
        worst_case: the cost of a plan is that of its worst kind.
        variant: what the evaluator does to the weights of every plan but the unmodified model before it measures;
            losses are kept under it.
        on_trial: called after every trial that this run finishes.
        on_evaluation: called as every evaluation of a plan on some windows begins.

    Raises:
        ConfigError: for a budget below 1, an unknown name, ``latency`` without an estimate, or anything but one of
            ``evaluator`` and ``pool``, or windows that are not as many of every kind.
        PlanError: for an enqueued plan outside the space.
        ResumeError: if the study was begun with another space, metric or objective, or other kinds of text.
        StudyError: if the database fails, another process runs the study, or the baseline's loss is not finite.
    """
    if (evaluator is None) == (pool is None):
        raise ConfigError("plans are evaluated by an evaluator or a pool of them; pass one of the two")
    if budget < 1:
        raise ConfigError(f"budget is {budget}; it counts finished plans, the baseline included, so at least 1")
    if metric not in get_args(Metric):
        raise ConfigError(f"metric {metric!r} is unknown; choose one of {', '.join(get_args(Metric))}")
    if objective not in get_args(Objective):
        raise ConfigError(f"objective {objective!r} is unknown; choose one of {', '.join(get_args(Objective))}")
    if objective == "latency" and estimate_latency_ms is None:
        raise ConfigError("objective latency needs a latency estimate; pass estimate_latency_ms")
    for plan in enqueue:
        space.check_plan(plan, where="an enqueued plan")
    with store.hold_lock(), ExitStack() as stack:
        if pool is None:
            assert evaluator is not None
            pool = stack.enter_context(ThreadPool(evaluator))
        if kinds and pool.num_windows % len(kinds):
            raise ConfigError(f"{pool.num_windows} windows are not as many of each of {len(kinds)} kinds of text")
        search = _Search(
            pool=pool,
            store=store,
            build_trials=lambda: Trials(
                store=store,
                space=space,
                budget=budget,
                sampler=sampler,
                seed=seed,
                metric=metric,
                objective=objective,
                estimate_latency_ms=estimate_latency_ms,
                kinds=kinds,
                worst_case=worst_case,
                variant=variant,
            ),
            build_racing=lambda trials: Racing(
                store,
                num_windows=pool.num_windows,
                metric=metric,
                # An enumeration ends with a front that is exact, not one that is most likely right.
                staged=staged and not trials.enumerates,
                kinds=kinds,
                worst_case=worst_case,
                variant=variant,
            ),
            timeout_s=math.inf if timeout_s is None else timeout_s,
            on_trial=on_trial,
            on_evaluation=on_evaluation,
        )
        with hold_back_interrupts():
            return search.run(enqueue)


class _Search:
    """Runs the coordinator, and again where a database server was away: as a second process would go on.

    Args:
        pool: evaluates the plans.
        store: the study's database.
        build_trials: reads the trials of the study.
        build_racing: builds what keeps losses.
        timeout_s: seconds after which no further trial begins.
        on_trial: called after every trial that this run finishes.
        on_evaluation: called as every evaluation begins.
    """

    def __init__(
        self,
        *,
        pool: Pool,
        store: StudyStore,
        build_trials: Callable[[], Trials],
        build_racing: Callable[[Trials], Racing],
        timeout_s: float,
        on_trial: Callable[[TrialUpdate], None] | None,
        on_evaluation: Callable[[EvaluationUpdate], None] | None,
    ) -> None:
        self._pool = pool
        self._store = store
        self._build_trials = build_trials
        self._build_racing = build_racing
        self._timeout_s = timeout_s
        self._on_trial = on_trial
        self._on_evaluation = on_evaluation
        self._num_new = 0
        self._away_since: float | None = None

    def run(self, enqueue: Sequence[Plan]) -> StudyResult:
        """Finish trials until the budget, the timeout or the end of the space."""
        began_at = time.monotonic()
        num_resumed: int | None = None
        in_flight: InFlight = {}
        while True:
            try:
                self._store.lock.wait_for_turn()
                trials = self._build_trials()
                self._store.lock.announce(trials.budget)
                self._store.lock.end_turn()
                num_resumed = trials.num_resumed if num_resumed is None else num_resumed
                result = Coordinator(
                    pool=self._pool,
                    trials=trials,
                    racing=self._build_racing(trials),
                    timeout_s=max(0.0, self._timeout_s - (time.monotonic() - began_at)),
                    on_trial=self._count_trial,
                    on_evaluation=self._on_evaluation,
                    in_flight=in_flight,
                ).run(enqueue)
            except StudyError as error:
                if num_resumed is None or not is_connection_lost(error):
                    raise
                self._wait_for_database(error)
                continue
            elapsed_s = time.monotonic() - began_at
            return dataclasses.replace(result, num_resumed=num_resumed, num_new=self._num_new, elapsed_s=elapsed_s)

    def _count_trial(self, update: TrialUpdate) -> None:
        self._num_new += 1
        self._away_since = None
        if self._on_trial is not None:
            self._on_trial(dataclasses.replace(update, num_new=self._num_new))

    def _wait_for_database(self, error: StudyError) -> None:
        """Wait until the database answers again.

        Raises:
            StudyError: if it does not, or is lost again and again, for some minutes.
        """
        logger.warning("%s", error)
        logger.warning("waiting up to %d s for the database to come back", OUTAGE_S)
        if self._away_since is None:
            self._away_since = time.monotonic()
        while time.monotonic() < self._away_since + OUTAGE_S:
            with let_interrupts_through():
                time.sleep(RETRY_S)
            try:
                self._store.list_studies()
            except StudyError:
                continue
            return
        raise error
