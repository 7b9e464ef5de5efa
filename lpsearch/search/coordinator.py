"""The search itself: one coordinator that asks for plans, has them evaluated, keeps what it learns and resumes.

Every slot of the pool has a plan to evaluate, and the next plan is asked for ahead, so that a device hardly waits. A
slot that is free gets that plan at once; only then is the finished trial told and another one asked for. No slot
waits for another. With one slot a sampler sees one trial pending whenever it is asked, which never depends on how long
an evaluation takes, so a search is repeatable.

A plan is evaluated rung by rung: on few windows first, on more only while it may still be on the front
(:mod:`lpsearch.search.racing`). Its trial is told once, after its own rungs; a plan that the final front turns out to
need whole gets its other windows at the end, in the store's own tables.

Losses go into these tables before the next evaluation begins, and a plan is never evaluated on a window twice. A
process that dies at any moment therefore loses at most the rung it was in. Only the coordinator's thread touches the
database.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass

from lpsearch.errors import ConfigError, StudyError
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search.pool import Pool
from lpsearch.search.racing import Racing
from lpsearch.search.results import EvaluationUpdate, StudyResult, TrialUpdate
from lpsearch.search.trials import Job, Trials

__all__ = ["Coordinator"]


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
    ) -> None:
        self._pool = pool
        self._trials = trials
        self._racing = racing
        self._timeout_s = timeout_s
        self._on_trial = on_trial
        self._on_evaluation = on_evaluation
        self._began_at = time.monotonic()
        self._has_begun = False
        self._num_new_tokens = 0

    def run(self, enqueue: Sequence[Plan]) -> StudyResult:
        """Finish trials until the budget, the timeout or the end of the space."""
        trials, space = self._trials, self._trials.space
        trials.line_up(enqueue, num_windows=self._pool.num_windows)
        try:
            self._evaluate_baseline()
            self._evaluate(self._ask, self._tell)
            timed_out = len(trials.finished) < trials.budget and self._is_late()
            self._complete_front()
        except BaseException:
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
            num_new=len(results) - trials.num_resumed,
            num_new_tokens=self._num_new_tokens,
            timed_out=timed_out,
            elapsed_s=self._get_elapsed_s(),
        )

    def _evaluate(self, find_job: Callable[[], Job | None], finish: Callable[[Job], None]) -> None:
        """Keep every slot at work until there is no job left.

        Args:
            find_job: returns the next plan to evaluate, None when there is none; called while the slots work.
            finish: called with every plan that needs no more windows, while the plan after it is evaluated.
        """
        slots: list[_Evaluation] = []
        following = find_job()
        while following is not None or slots:
            if following is not None and len(slots) < self._pool.num_slots:
                slots += self._begin(following)
                following = find_job()
                continue
            ended = _wait_for_any(slots)
            slots.remove(ended)
            next_rung = self._keep(ended)
            if next_rung is not None:
                slots.append(next_rung)
                continue
            if following is not None:
                slots += self._begin(following)
            finish(ended.job)
            following = find_job()

    # ---- Trials ------------------------------------------------------------------------------------------------------

    def _ask(self) -> Job | None:
        return None if self._is_late() else self._trials.ask()

    def _tell(self, job: Job) -> None:
        trials = self._trials
        result = trials.tell(job, state=self._racing.get_state(job.plan), loss=self._racing.compute_loss(job.plan))
        if self._on_trial is not None:
            self._on_trial(
                TrialUpdate(
                    result=result,
                    num_finished=len(trials.finished),
                    num_new=len(trials.finished) - trials.num_resumed,
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
        future = self._pool.submit(job.plan, window_indices)
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
        self._num_new_tokens += losses.tokens_per_window * len(ended.window_indices)
        following = self._begin_rung(ended.job)
        return None if following.future is None else following

    def _evaluate_baseline(self) -> None:
        """Evaluate the unmodified model on all windows; every other loss is relative to it."""
        plan = Plan.baseline(self._trials.space.num_layers)
        self._evaluate_whole([Job(plan, "baseline")])
        loss = self._racing.compute_loss(plan)
        if not math.isfinite(loss.nll):
            raise StudyError(
                f"{self._trials.store.where}: the unmodified model's loss is not finite, so nothing can be compared "
                "with it; check the model's weights, or begin again with --fresh and --dtype float32"
            )
        if self._trials.metric == "kl" and not math.isfinite(loss.kl_nats_per_token or 0.0):
            raise ConfigError("metric kl needs an evaluator that measures KL to the unmodified model")

    def _complete_front(self) -> None:
        """Evaluate on all windows what looks as if it were on the front, until all of the front was.

        An enumeration gives them to every plan, also to those that a smaller budget had stopped.
        """
        trials = self._trials
        while True:
            candidates = trials.list_valid() if trials.enumerates else trials.build_front(include_partial=True)
            stopped = [Job(result.plan, "front") for result in candidates if result.state == "stopped"]
            if not stopped:
                return
            self._evaluate_whole(stopped)

    def _evaluate_whole(self, jobs: Sequence[Job]) -> None:
        """Evaluate plans on all windows, and refresh the results of those that are finished."""
        finished = self._trials.finished

        def refresh(job: Job) -> None:
            if job.plan in finished:
                state, loss = self._racing.get_state(job.plan), self._racing.compute_loss(job.plan)
                finished[job.plan] = dataclasses.replace(finished[job.plan], state=state, loss=loss)

        waiting = iter(jobs)
        self._evaluate(lambda: next(waiting, None), refresh)


def _wait_for_any(slots: Sequence[_Evaluation]) -> _Evaluation:
    """Wait until one of the evaluations has ended, and return it; the oldest of several."""
    for evaluation in slots:
        if evaluation.future is None:
            return evaluation
    wait([evaluation.future for evaluation in slots if evaluation.future is not None], return_when=FIRST_COMPLETED)
    return next(evaluation for evaluation in slots if evaluation.future is not None and evaluation.future.done())
