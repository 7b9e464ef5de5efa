"""The search itself: one coordinator that asks for plans, has them evaluated, keeps what it learns and resumes.

Every slot of the pool has a plan to evaluate, and the next plan is asked for ahead, so that a device hardly waits. A
slot that is free gets that plan at once; only then is the finished trial told and another one asked for. No slot
waits for another. Where there are many, several plans wait in the pool, since more slots become free while one plan is
chosen. With one slot a sampler sees one trial pending whenever it is asked, which never depends on how long an
evaluation takes, so a search is repeatable.

A plan is evaluated rung by rung: on few windows first, on more only while it may still be on the front
(:mod:`lpsearch.search.racing`). Its trial is told once, after its own rungs; a plan that the final front turns out to
need whole gets its other windows at the end, in the store's own tables.

Losses go into these tables before the next evaluation begins, and a plan is never evaluated on a window twice. A
process that dies at any moment therefore loses at most the rung it was in. Only the coordinator's thread touches the
database, and Ctrl-C ends it only while it waits for an evaluation.

On a database server several coordinators may search a study at once. Each claims a plan before it evaluates it
(:mod:`lpsearch.search.claims`), learns what the others finished whenever it asks, and takes over the plans of those
that are gone. The search ends when none of them has a plan at work.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass

from lpsearch.errors import ConfigError, StudyError
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search.claims import POLL_S, ClaimLostError
from lpsearch.search.interrupts import let_interrupts_through
from lpsearch.search.pool import Pool
from lpsearch.search.racing import Racing
from lpsearch.search.results import EvaluationUpdate, StudyResult, TrialUpdate
from lpsearch.search.storage_url import is_connection_lost
from lpsearch.search.trials import Job, Trials

__all__ = ["Coordinator", "InFlight"]

logger = logging.getLogger(__name__)

InFlight = dict[tuple[Plan, tuple[int, ...]], "Future[WindowLosses]"]
"""Evaluations that are under way, by plan and windows."""

SLOTS_PER_PLAN_AHEAD = 8
"""Slots for each plan that waits in the pool, so that none of them idles while the coordinator fits its model."""

NEW_SLOTS_AFTER_S = 0.5
"""Seconds between two looks at how many slots the pool has, while none of its evaluations ends."""


@dataclass(frozen=True)
class _Evaluation:
    """What a slot is at work on.

    Attributes:
        job: the plan.
        window_indices: windows of one rung; empty where the plan needs no more.
        future: their losses; None where there are none.
    """

    job: Job
    window_indices: list[int]
    future: Future[WindowLosses] | None


class Coordinator:
    """The loop of one run; see :func:`lpsearch.search.run_study`.

    Args:
        pool: evaluates the plans.
        trials: says which plan is next, and takes what is learned.
        racing: keeps the losses, and says which windows a plan needs.
        timeout_s: seconds after which no further trial begins.
        on_trial: called after every trial that this run finishes.
        on_evaluation: called as every evaluation of a plan on some windows begins.
        in_flight: evaluations that began before the database was lost, and are taken up again; changed in place.
    """

    def __init__(
        self,
        *,
        pool: Pool,
        trials: Trials,
        racing: Racing,
        timeout_s: float,
        on_trial: Callable[[TrialUpdate], None] | None,
        on_evaluation: Callable[[EvaluationUpdate], None] | None,
        in_flight: InFlight | None = None,
    ) -> None:
        self._pool = pool
        self._trials = trials
        self._racing = racing
        self._timeout_s = timeout_s
        self._on_trial = on_trial
        self._on_evaluation = on_evaluation
        self._began_at = time.monotonic()
        self._has_begun = False
        self._in_flight = {} if in_flight is None else in_flight
        self._num_new = 0
        self._has_baseline = False
        self._untold: list[Job] = []
        self._num_new_tokens = 0

    def run(self, enqueue: Sequence[Plan]) -> StudyResult:
        """Finish trials until the budget, the timeout or the end of the space."""
        trials, space = self._trials, self._trials.space
        trials.line_up(enqueue, num_windows=self._pool.num_windows)
        try:
            # In one slot it comes first of all, so that the first plans race too; in several it would idle the others.
            # Where other coordinators search too, one of them may evaluate it, and this one would not be told.
            is_shared = trials.store.claims.owner is not None
            is_known = Plan.baseline(space.num_layers) in trials.finished
            if self._pool.num_slots == 1 or trials.budget == 1 or is_known or is_shared:
                self._evaluate_baseline()
            self._search()
            timed_out = len(trials.finished) < trials.budget and self._is_late()
            self._complete_front()
        except BaseException as error:
            if isinstance(error, StudyError) and is_connection_lost(error):
                raise  # the plans stay this coordinator's while its lease lasts
            # Ctrl-C included. If the database itself fails, the next run finds these trials running and fails them.
            with suppress(StudyError):
                for job in tuple(trials.running):
                    trials.drop(job)
            raise
        results = tuple(trials.list_finished())
        is_exhausted = len(trials.list_valid()) == space.count_plans()
        return StudyResult(
            results=results,
            front=tuple(trials.build_front()),
            exact=is_exhausted and all(result.state != "stopped" for result in results),
            num_resumed=trials.num_resumed,
            num_new=self._num_new,
            num_new_tokens=self._num_new_tokens,
            timed_out=timed_out,
            elapsed_s=self._get_elapsed_s(),
        )

    def _search(self) -> None:
        """Evaluate what is asked for until the study needs no more and no other coordinator has a plan at work."""
        while True:
            self._evaluate(self._ask, self._tell, self._trials.drop)
            # Where none of them was at work at the last ask, it saw everything.
            if self._is_late() or not self._trials.are_others_at_work:
                return
            with let_interrupts_through():
                time.sleep(POLL_S)

    def _evaluate(
        self, find_job: Callable[[], Job | None], finish: Callable[[Job], None], leave: Callable[[Job], None]
    ) -> None:
        """Keep every slot at work until there is no job left.

        Args:
            find_job: returns the next plan to evaluate, None when there is none; called while the slots work.
            finish: called with every plan that needs no more windows, while the plan after it is evaluated.
            leave: called with every plan that another coordinator took over.
        """
        slots: list[_Evaluation] = []
        following = find_job()
        while following is not None or slots:
            num_ahead = self._pool.num_slots // SLOTS_PER_PLAN_AHEAD
            limit = self._pool.num_slots + num_ahead
            with let_interrupts_through():  # nothing need wait: a search may find one ended at every turn
                ended = _find_ended(slots)
            if ended is None and following is not None and len(slots) < limit:
                slots += self._begin(following)
                following = find_job()
                continue
            if ended is None:
                _wait_for_any(slots)
                continue  # there may be more slots by now
            slots.remove(ended)
            try:
                next_rung = self._keep(ended)
                if next_rung is not None:
                    slots.append(next_rung)
                    continue
                if following is not None and len(slots) < limit:
                    slots += self._begin(following)
                    following = None
                finish(ended.job)
            except ClaimLostError as error:
                logger.warning("%s", error)
                leave(ended.job)
            # Where plans wait in the pool, all that has ended is told first, and the next one is chosen by it.
            if following is None and (not num_ahead or _find_ended(slots) is None):
                following = find_job()

    # ---- Trials ------------------------------------------------------------------------------------------------------

    def _ask(self) -> Job | None:
        return None if self._is_late() else self._trials.ask()

    def _tell(self, job: Job) -> None:
        """Tell what is known of a plan; what is evaluated before the unmodified model waits, since it is relative."""
        if job.plan == Plan.baseline(job.plan.num_layers):
            self._check_baseline()
        if not self._has_baseline:
            self._untold.append(job)
            return
        untold, self._untold = self._untold, []
        for ended in (job, *untold):
            self._tell_now(ended)

    def _tell_now(self, job: Job) -> None:
        trials = self._trials
        result = trials.tell(job, state=self._racing.get_state(job.plan), loss=self._racing.compute_loss(job.plan))
        self._num_new += 1
        if self._on_trial is not None:
            self._on_trial(
                TrialUpdate(
                    result=result,
                    num_finished=len(trials.finished),
                    num_new=self._num_new,
                    budget=trials.budget,
                    front=trials.build_front(),
                    proxy_tokens=sum(found.proxy_tokens for found in trials.finished.values()),
                    elapsed_s=self._get_elapsed_s(),
                )
            )

    def _is_late(self) -> bool:
        """Say whether no further trial may begin; the first one of a study always may."""
        return (self._has_begun or bool(self._trials.finished)) and self._get_elapsed_s() >= self._timeout_s

    def _get_elapsed_s(self) -> float:
        return time.monotonic() - self._began_at

    # ---- Evaluating --------------------------------------------------------------------------------------------------

    def _begin(self, job: Job) -> list[_Evaluation]:
        """Begin with a plan; none where it is too late for another trial, which is dropped."""
        if job.trial is not None:
            if self._is_late():
                self._trials.drop(job)
                return []
            self._has_begun = True
        return [self._begin_rung(job)]

    def _begin_rung(self, job: Job) -> _Evaluation:
        """Begin the next evaluation of a plan, if it needs one."""
        rival = (
            None
            if job.trial is None or job.plan == Plan.baseline(job.plan.num_layers)
            else self._trials.find_rival(job.plan)
        )
        window_indices = self._racing.find_next_windows(job.plan, rival=rival)
        if not window_indices:
            return _Evaluation(job, [], None)
        key = (job.plan, tuple(window_indices))
        if key not in self._in_flight:
            self._in_flight[key] = self._pool.submit(job.plan, window_indices)
        future = self._in_flight[key]
        if self._on_evaluation is not None:
            self._on_evaluation(
                EvaluationUpdate(
                    plan=job.plan,
                    origin=job.origin,
                    num_windows=len(window_indices),
                    num_finished=len(self._trials.finished),
                    budget=self._trials.budget,
                    front=self._trials.build_front(),
                )
            )
        return _Evaluation(job, window_indices, future)

    def _keep(self, ended: _Evaluation) -> _Evaluation | None:
        """Keep the losses of an evaluation, and begin the plan's next one; None where it needs no more."""
        if ended.future is None:
            return None
        losses = ended.future.result()
        self._racing.keep(ended.job.plan, ended.window_indices, losses)
        del self._in_flight[ended.job.plan, tuple(ended.window_indices)]
        self._num_new_tokens += losses.tokens_per_window * len(ended.window_indices)
        following = self._begin_rung(ended.job)
        return None if following.future is None else following

    def _evaluate_baseline(self) -> None:
        """Evaluate the unmodified model on all windows; every other loss is relative to it."""
        self._evaluate_whole([Job(Plan.baseline(self._trials.space.num_layers), "baseline")])
        self._check_baseline()

    def _check_baseline(self) -> None:
        """Refuse an unmodified model that nothing can be compared with.

        Raises:
            StudyError: if its loss is not finite.
            ConfigError: if the metric was not measured.
        """
        loss = self._racing.compute_loss(Plan.baseline(self._trials.space.num_layers))
        if not math.isfinite(loss.nll):
            raise StudyError(
                f"{self._trials.store.where}: the unmodified model's loss is not finite, so nothing can be compared "
                "with it; check the model's weights, or begin again with --fresh and --dtype float32"
            )
        if self._trials.metric == "kl" and not math.isfinite(loss.kl_nats_per_token or 0.0):
            raise ConfigError("metric kl needs an evaluator that measures KL to the unmodified model")
        self._has_baseline = True

    def _complete_front(self) -> None:
        """Evaluate on all windows what looks as if it were on the front, until all of the front was.

        An enumeration gives them to every plan, also to those that a smaller budget had stopped.
        """
        trials = self._trials
        while True:
            trials.reload()
            candidates = trials.list_valid() if trials.enumerates else trials.build_front(include_partial=True)
            stopped = [Job(result.plan, "front") for result in candidates if result.state == "stopped"]
            if not stopped:
                return
            self._evaluate_whole(stopped)

    def _evaluate_whole(self, jobs: Sequence[Job]) -> None:
        """Evaluate plans on all windows, and refresh the results of those that are finished."""
        waiting = list(jobs)

        def find_job() -> Job | None:
            job = next((job for job in waiting if self._trials.claim(job.plan)), None)
            if job is not None:
                waiting.remove(job)
                self._racing.forget(job.plan)
            return job

        def refresh(job: Job) -> None:
            self._trials.give_back(job.plan)
            if job.plan in self._trials.finished:
                state, loss = self._racing.get_state(job.plan), self._racing.compute_loss(job.plan)
                self._trials.refresh(job.plan, state=state, loss=loss)

        while True:
            self._evaluate(find_job, refresh, waiting.append)
            if not waiting:
                return
            with let_interrupts_through():  # another coordinator has claimed what is left
                time.sleep(POLL_S)


def _find_ended(slots: Sequence[_Evaluation]) -> _Evaluation | None:
    """Return an evaluation that has ended, the oldest of several; None if there is none."""
    return next((evaluation for evaluation in slots if evaluation.future is None or evaluation.future.done()), None)


def _wait_for_any(slots: Sequence[_Evaluation]) -> None:
    """Wait until one of the evaluations has ended, but not for long."""
    futures = [evaluation.future for evaluation in slots if evaluation.future is not None]
    with let_interrupts_through():
        wait(futures, timeout=NEW_SLOTS_AFTER_S, return_when=FIRST_COMPLETED)
