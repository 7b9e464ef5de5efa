"""The search itself: one coordinator that asks for plans, has them evaluated, keeps what it learns and resumes.

While a plan is evaluated, the coordinator tells the trial before it and asks for the trial after it, so that the
device hardly waits. A sampler therefore sees one trial pending whenever it is asked; that never depends on which of
the two was quicker, so a search is repeatable.

A plan is evaluated in stages: on few windows first, on more only while it may still be on the front
(:mod:`lpsearch.search.racing`). Its trial is told once, after its own stages; a plan that the final front turns out to
need whole gets its other windows at the end, in the store's own tables.

Losses go into these tables before the next evaluation begins, and a plan is never evaluated on a window twice. A
process that dies at any moment therefore loses at most the stage it was in. Only the coordinator's thread touches the
database.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass

import optuna
from optuna.trial import TrialState

from lpsearch.errors import ConfigError, StudyError
from lpsearch.evaluation.losses import PlanEvaluator, WindowLosses
from lpsearch.plan import Plan
from lpsearch.search.asking import ask_trial
from lpsearch.search.front import Objective, build_front, find_rival
from lpsearch.search.opening import open_study, record_settings
from lpsearch.search.outcome import EvaluationUpdate, StudyResult, TrialUpdate
from lpsearch.search.racing import Racing
from lpsearch.search.results import RAW, Metric, TrialResult, build_attributes, read_results, set_latency
from lpsearch.search.samplers import build_sampler
from lpsearch.search.space import JoinSpace
from lpsearch.search.store import StudyStore

__all__ = ["Coordinator"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """A trial between its ask and its tell.

    Attributes:
        trial: what Optuna handed out.
        plan: what it stands for.
        origin: what proposed it.
    """

    trial: optuna.Trial
    plan: Plan
    origin: str


@dataclass(frozen=True)
class _Stage:
    """An evaluation that runs.

    Attributes:
        plan: the plan.
        origin: what proposed it.
        window_indices: windows of one rung.
        future: their losses.
    """

    plan: Plan
    origin: str
    window_indices: list[int]
    future: Future[WindowLosses]


class Coordinator:
    """The one process that asks and tells; see :func:`lpsearch.search.run_study` for the arguments.

    Args:
        executor: runs the evaluations. One is submitted at a time.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        evaluator: PlanEvaluator,
        space: JoinSpace,
        budget: int,
        store: StudyStore,
        sampler: str,
        seed: int,
        metric: Metric,
        objective: Objective,
        estimate_latency_ms: Callable[[Plan], float] | None,
        staged: bool,
        on_trial: Callable[[TrialUpdate], None] | None,
        on_evaluation: Callable[[EvaluationUpdate], None] | None,
    ) -> None:
        """Open the study and read what it has finished."""
        self._executor = executor
        self._evaluator = evaluator
        self._space = space
        self._budget = budget
        self._store = store
        self._metric: Metric = metric
        self._objective: Objective = objective
        self._estimate_latency_ms = estimate_latency_ms
        self._on_trial = on_trial
        self._on_evaluation = on_evaluation
        self._began_at = time.monotonic()
        self._num_new_tokens = 0
        record_settings(store, space, metric, objective, sampler, seed)
        with store.translate_errors():
            self._study = open_study(store, metric, objective)
            self._sampler = build_sampler(
                sampler,
                space=space,
                budget=budget,
                seed=seed,
                metric=metric,
                num_trials=len(self._study.get_trials(deepcopy=False)),
                estimate_latency_ms=estimate_latency_ms if objective == "latency" else None,
                read_results=lambda study: self._list_finished(),
            )
            self._study.sampler = self._sampler
        results = read_results(store, estimate_latency_ms=estimate_latency_ms)
        self._finished = {result.plan: result for result in results}
        self._num_resumed = len(self._finished)
        self._enumerates = space.count_plans() <= budget
        # An enumeration ends with a front that is exact, not one that is most likely right.
        self._racing = Racing(
            store, num_windows=evaluator.num_windows, metric=metric, staged=staged and not self._enumerates
        )
        self._open_trials: list[optuna.Trial] = []
        self._queue: deque[tuple[Plan, str]] = deque()
        self._num_waiting = 0

    def run(self, enqueue: Sequence[Plan], timeout_s: float | None) -> StudyResult:
        """Finish trials until the budget, the timeout or the end of the space."""
        self._queue = self._build_queue(enqueue)
        self._num_waiting = self._count_trials(TrialState.WAITING)
        try:
            self._evaluate_baseline()
            timed_out = self._run_trials(math.inf if timeout_s is None else timeout_s)
            self._settle_front()
        except BaseException:
            # Ctrl-C included. If the database itself fails, the next run finds these trials running and fails them.
            with suppress(StudyError):
                for trial in tuple(self._open_trials):
                    self._fail(trial)
            raise
        results = tuple(self._list_finished())
        is_whole = all(result.state != "stopped" for result in results)
        is_exhausted = sum(self._space.is_valid(result.plan.joins) for result in results) == self._space.count_plans()
        return StudyResult(
            results=results,
            front=tuple(self._build_front()),
            exact=is_exhausted and is_whole,
            num_resumed=self._num_resumed,
            num_new=len(results) - self._num_resumed,
            num_new_tokens=self._num_new_tokens,
            timed_out=timed_out,
            elapsed_s=self._get_elapsed_s(),
        )

    def _run_trials(self, timeout_s: float) -> bool:
        """Run the trials, each asked for and told while a neighbour is evaluated; return whether time ran out."""
        running: _Job | None = None
        stage: _Stage | None = None
        while True:
            following = None if self._is_late(timeout_s, running) else self._ask(running)
            while stage is not None:
                self._finish_stage(stage)
                stage = self._begin_stage(stage.plan, stage.origin)
            if following is not None and self._is_late(timeout_s, running):
                self._fail(following.trial)
                following = None
            if following is not None:
                stage = self._begin_stage(following.plan, following.origin)
            if running is not None:
                self._tell(running)
            if following is None:
                return len(self._finished) < self._get_reachable() and self._is_late(timeout_s, running)
            running = following

    def _is_late(self, timeout_s: float, running: _Job | None) -> bool:
        """Say whether no further trial may begin; the first one of a study always may."""
        return (running is not None or bool(self._finished)) and self._get_elapsed_s() >= timeout_s

    def _get_reachable(self) -> int:
        """Return the number of finished plans at which the study ends."""
        return min(self._budget, self._space.count_plans())

    # ---- Asking ------------------------------------------------------------------------------------------------------

    def _build_queue(self, enqueue: Sequence[Plan]) -> deque[tuple[Plan, str]]:
        """List what comes before the sampler: baseline, plans that a killed run left, enqueued, or the whole space."""
        queue = deque([(Plan.baseline(self._space.num_layers), "baseline")])
        queue.extend(self._recover_orphans())
        queue.extend((plan, "enqueued") for plan in enqueue)
        if self._enumerates:
            queue.extend((plan, "enumeration") for plan in self._space.enumerate_plans())
        return queue

    def _recover_orphans(self) -> Iterator[tuple[Plan, str]]:
        """Fail the trials that a dead process left running, and yield the plans that were asked for but not told.

        Taking them up again keeps their work, and has an interrupted search go on as if it had never stopped.
        """
        origins: dict[str, str] = {}
        orphans: dict[Plan, None] = {}
        with self._store.translate_errors():
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.FAIL)):
                groups = trial.user_attrs.get("groups")
                if groups is not None:
                    origins[groups] = trial.user_attrs.get("origin", "enqueued")
                    orphans[Plan.from_groups(json.loads(groups))] = None
                if trial.state == TrialState.RUNNING:
                    logger.info("trial %d was left running by a process that ended; its plan is next", trial.number)
                    self._study.tell(trial.number, state=TrialState.FAIL)
        evaluated = self._store.list_evaluated_plans(num_windows=self._evaluator.num_windows, split="proxy")
        for plan in dict.fromkeys([*evaluated, *orphans]):
            if self._space.is_valid(plan.joins):  # layers may have been frozen since
                yield plan, origins.get(plan.to_groups_json(), "enqueued")

    def _ask(self, running: _Job | None) -> _Job | None:
        """Ask for a plan that is neither finished nor running; None when the study needs no more."""
        taken = {*self._finished} if running is None else {*self._finished, running.plan}
        while len(taken) < self._budget:
            while self._queue and self._queue[0][0] in taken:
                self._queue.popleft()
            if not self._queue and not self._num_waiting and self._enumerates:
                return None
            # Optuna hands out waiting trials first: those of a run that was killed between enqueueing and asking.
            is_waiting = bool(self._num_waiting or self._queue)
            if self._num_waiting:
                self._num_waiting -= 1
            elif self._queue:
                plan, origin = self._queue[0]
                with self._store.translate_errors():
                    self._study.enqueue_trial(self._space.build_params(plan), user_attrs={"origin": origin})
            with self._store.translate_errors():
                trial, plan = ask_trial(self._study, self._space, self._store, is_waiting=is_waiting)
            self._open_trials.append(trial)
            if plan not in taken:
                return self._open_job(trial, plan)
            self._fail(trial)  # only a waiting trial can repeat a plan
        return None

    def _open_job(self, trial: optuna.Trial, plan: Plan) -> _Job:
        with self._store.translate_errors():
            # Noted before the work, so that a later process knows what this one was doing.
            trial.set_user_attr("groups", plan.to_groups_json())
            origin = self._sampler.origins.get(trial.number)
            if origin is None:  # it was enqueued
                return _Job(trial, plan, trial.user_attrs.get("origin", "enqueued"))
            trial.set_user_attr("origin", origin)
        return _Job(trial, plan, origin)

    # ---- Evaluating --------------------------------------------------------------------------------------------------

    def _begin_stage(self, plan: Plan, origin: str, *, is_whole: bool = False) -> _Stage | None:
        """Begin the next evaluation of a plan; None where it needs no more.

        Args:
            plan: the plan.
            origin: what proposed it.
            is_whole: evaluate it on all windows, whatever its rival.
        """
        rival = None if is_whole or not plan.num_joins else self._find_rival(plan)
        window_indices = self._racing.find_next_windows(plan, rival=rival)
        if not window_indices:
            return None
        future = self._executor.submit(self._evaluator.evaluate_windows, plan, window_indices)
        if self._on_evaluation is not None:
            self._on_evaluation(
                EvaluationUpdate(
                    plan=plan,
                    origin=origin,
                    num_windows=len(window_indices),
                    num_finished=len(self._finished),
                    budget=self._get_reachable(),
                    front=self._build_front(),
                )
            )
        return _Stage(plan, origin, window_indices, future)

    def _finish_stage(self, stage: _Stage) -> None:
        losses = stage.future.result()
        self._racing.keep(stage.plan, stage.window_indices, losses)
        self._num_new_tokens += losses.tokens_per_window * len(stage.window_indices)

    def _evaluate_whole(self, plan: Plan, origin: str) -> None:
        stage = self._begin_stage(plan, origin, is_whole=True)
        while stage is not None:
            self._finish_stage(stage)
            stage = self._begin_stage(plan, origin, is_whole=True)

    def _find_rival(self, plan: Plan) -> Plan | None:
        rival = find_rival(
            self._build_front(),
            depth=plan.depth,
            latency_ms=None if self._estimate_latency_ms is None else self._estimate_latency_ms(plan),
            metric=self._metric,
            objective=self._objective,
        )
        return None if rival is None else rival.plan

    def _evaluate_baseline(self) -> None:
        """Evaluate the unmodified model on all windows; every other loss is relative to it."""
        plan = Plan.baseline(self._space.num_layers)
        self._evaluate_whole(plan, "baseline")
        loss = self._racing.compute_loss(plan)
        if not math.isfinite(loss.nll):
            raise StudyError(
                f"{self._store.where}: the unmodified model's loss is not finite, so nothing can be compared with "
                "it; check the model's weights, or try --dtype float32"
            )
        if self._metric == "kl" and not math.isfinite(loss.kl_nats_per_token or 0.0):
            raise ConfigError("metric kl needs an evaluator that measures KL to the unmodified model")

    def _settle_front(self) -> None:
        """Evaluate on all windows what looks as if it were on the front, until all of the front was.

        An enumeration gives them to every plan, also to those that a smaller budget had stopped.
        """
        while True:
            candidates = self._list_valid()
            if not self._enumerates:
                candidates = build_front(
                    candidates, metric=self._metric, objective=self._objective, include_partial=True
                )
            stopped = [result for result in candidates if result.state == "stopped"]
            if not stopped:
                return
            for result in stopped:
                self._evaluate_whole(result.plan, "front")
                self._finished[result.plan] = dataclasses.replace(
                    result, state=self._racing.get_state(result.plan), loss=self._racing.compute_loss(result.plan)
                )

    # ---- Telling -----------------------------------------------------------------------------------------------------

    def _tell(self, job: _Job) -> None:
        """Tell the values of an evaluated plan."""
        result = self._build_result(job)
        with self._store.translate_errors():
            for name, value in build_attributes(result).items():
                job.trial.set_user_attr(name, value)
            self._study.tell(job.trial, self._build_values(result))
        self._open_trials.remove(job.trial)
        self._finished[job.plan] = result
        if self._on_trial is not None:
            self._on_trial(
                TrialUpdate(
                    result=result,
                    num_finished=len(self._finished),
                    num_new=len(self._finished) - self._num_resumed,
                    budget=self._get_reachable(),
                    front=self._build_front(),
                    elapsed_s=self._get_elapsed_s(),
                )
            )

    def _fail(self, trial: optuna.Trial) -> None:
        with self._store.translate_errors():
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        self._open_trials.remove(trial)

    def _build_result(self, job: _Job) -> TrialResult:
        result = TrialResult(
            plan=job.plan,
            variant=RAW,
            trial=job.trial.number,
            origin=job.origin,
            state=self._racing.get_state(job.plan),
            loss=self._racing.compute_loss(job.plan),
        )
        if self._estimate_latency_ms is None:
            return result
        baseline_ms = self._estimate_latency_ms(Plan.baseline(self._space.num_layers))
        return set_latency(result, self._estimate_latency_ms(job.plan), baseline_ms)

    def _build_values(self, result: TrialResult) -> list[float]:
        saving = result.depth_reduction if self._objective == "depth" else result.latency_ms
        loss = result.perplexity if self._metric == "nll" else result.get_cost("kl")
        assert saving is not None
        return [saving, loss]

    def _build_front(self) -> list[TrialResult]:
        return build_front(self._list_valid(), metric=self._metric, objective=self._objective)

    def _list_finished(self) -> list[TrialResult]:
        """Return the finished plans in the order of the trials."""
        return sorted(self._finished.values(), key=lambda result: result.trial)

    def _list_valid(self) -> list[TrialResult]:
        """Return the finished plans of the space; a former run's may have been larger, before a layer was frozen."""
        return [result for result in self._list_finished() if self._space.is_valid(result.plan.joins)]

    def _count_trials(self, state: TrialState) -> int:
        with self._store.translate_errors():
            return len(self._study.get_trials(deepcopy=False, states=(state,)))

    def _get_elapsed_s(self) -> float:
        return time.monotonic() - self._began_at
