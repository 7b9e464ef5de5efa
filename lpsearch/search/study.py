"""The search itself: one coordinator that asks for plans, evaluates them, keeps what it learns and resumes.

Losses go into the store's own tables before the trial is told, and a plan is never evaluated on a window twice. A
process that dies at any moment therefore loses at most the evaluation it was in.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import get_args

import optuna
from optuna.trial import TrialState

from lpsearch.errors import ConfigError, PlanError, StudyError
from lpsearch.evaluation.losses import PlanEvaluator, WindowLosses, compute_paired_delta
from lpsearch.plan import Plan
from lpsearch.search.evaluations import evaluate_stored_plan
from lpsearch.search.front import Objective, build_front
from lpsearch.search.opening import open_study, read_finished, record_settings
from lpsearch.search.records import Metric, PlanRecord, build_attributes
from lpsearch.search.samplers import build_sampler
from lpsearch.search.space import JoinSpace
from lpsearch.search.store import StudyStore

__all__ = ["StudyResult", "TrialUpdate", "run_study"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialUpdate:
    """Progress after one finished trial.

    Attributes:
        record: the plan that just finished.
        num_finished: distinct finished plans of the study so far.
        num_new: those of them that this run finished.
        budget: distinct finished plans at which the study ends; less than was asked for if the space is smaller.
        front: the best front so far, the baseline first.
        elapsed_s: seconds since this run began.
    """

    record: PlanRecord
    num_finished: int
    num_new: int
    budget: int
    front: Sequence[PlanRecord]
    elapsed_s: float


@dataclass(frozen=True)
class StudyResult:
    """What a study knows when a run ends.

    Attributes:
        records: every finished plan, in the order of the trials, the baseline included.
        front: the baseline, then every plan that no other beats, fewest joins first.
        exact: every plan of the space is finished, so the front is the best there is on the proxy.
        num_resumed: plans that were finished before this run.
        num_new: plans that this run finished.
        num_new_tokens: tokens that this run evaluated.
        timed_out: the run ended by ``timeout_s`` before the budget.
        elapsed_s: seconds that this run took.
    """

    records: tuple[PlanRecord, ...]
    front: tuple[PlanRecord, ...]
    exact: bool
    num_resumed: int
    num_new: int
    num_new_tokens: int
    timed_out: bool
    elapsed_s: float

    @property
    def baseline(self) -> PlanRecord:
        """The unmodified model."""
        return self.front[0]


def run_study(
    *,
    evaluator: PlanEvaluator,
    space: JoinSpace,
    budget: int,
    store: StudyStore,
    sampler: str = "pairset",
    seed: int = 0,
    metric: Metric = "nll",
    objective: Objective = "depth",
    estimate_latency_ms: Callable[[Plan], float] | None = None,
    enqueue: Sequence[Plan] = (),
    timeout_s: float | None = None,
    on_trial: Callable[[TrialUpdate], None] | None = None,
) -> StudyResult:
    """Search a space of plans until the study has ``budget`` distinct finished plans; begun studies are resumed.

    The baseline comes first, then ``enqueue``, then what the sampler proposes. A space no larger than the budget is
    enumerated. A plan whose loss is not finite is finished like any other, with an infinite perplexity: it is never
    proposed again and never on the front.

    Args:
        evaluator: evaluates plans on the proxy windows.
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
        on_trial: called after every trial that this run finishes.

    Raises:
        ConfigError: for a budget below 1, an unknown name, or ``latency`` without an estimate.
        PlanError: for an enqueued plan outside the space.
        ResumeError: if the study was begun with another space, metric or objective.
        StudyError: if the database fails, another process runs the study, or the baseline's loss is not finite.
    """
    _check_arguments(space, budget, metric, objective, estimate_latency_ms, enqueue)
    with store.hold_lock():
        coordinator = _Coordinator(
            evaluator=evaluator,
            space=space,
            budget=budget,
            store=store,
            sampler=sampler,
            seed=seed,
            metric=metric,
            objective=objective,
            estimate_latency_ms=estimate_latency_ms,
            on_trial=on_trial,
        )
        return coordinator.run(enqueue, timeout_s)


class _Coordinator:
    """The one process that asks, evaluates and tells."""

    def __init__(
        self,
        *,
        evaluator: PlanEvaluator,
        space: JoinSpace,
        budget: int,
        store: StudyStore,
        sampler: str,
        seed: int,
        metric: Metric,
        objective: Objective,
        estimate_latency_ms: Callable[[Plan], float] | None,
        on_trial: Callable[[TrialUpdate], None] | None,
    ) -> None:
        self._evaluator = evaluator
        self._space = space
        self._budget = budget
        self._store = store
        self._metric: Metric = metric
        self._objective: Objective = objective
        self._estimate_latency_ms = estimate_latency_ms
        self._on_trial = on_trial
        self._began_at = time.monotonic()
        self._num_new_tokens = 0
        record_settings(store, space, metric, objective, sampler, seed)
        with store.translate_errors():
            self._study = open_study(store, metric, objective)
            self._study.sampler = build_sampler(
                sampler,
                space=space,
                budget=budget,
                seed=seed,
                metric=metric,
                num_trials=len(self._study.get_trials(deepcopy=False)),
            )
            self._finished = read_finished(self._study)
        self._num_resumed = len(self._finished)
        self._enumerates = space.count_plans() <= budget
        self._base_losses: WindowLosses | None = None

    def run(self, enqueue: Sequence[Plan], timeout_s: float | None) -> StudyResult:
        """Finish trials until the budget, the timeout or the end of the space."""
        queue = self._build_queue(enqueue)
        num_waiting = self._count_trials(TrialState.WAITING)
        timed_out = False
        while len(self._finished) < self._budget:
            if self._finished and timeout_s is not None and self._get_elapsed_s() >= timeout_s:
                timed_out = True
                break
            while queue and queue[0][0] in self._finished:
                queue.popleft()
            if not queue and not num_waiting and self._enumerates:
                break
            # Optuna hands out waiting trials first: those of a run that was killed between enqueueing and asking.
            if num_waiting:
                num_waiting -= 1
            elif queue:
                self._enqueue(*queue[0])
            self._run_trial()
        records = tuple(sorted(self._finished.values(), key=lambda record: record.trial))
        return StudyResult(
            records=records,
            front=tuple(self._build_front()),
            exact=sum(self._space.is_valid(record.plan.joins) for record in records) == self._space.count_plans(),
            num_resumed=self._num_resumed,
            num_new=len(records) - self._num_resumed,
            num_new_tokens=self._num_new_tokens,
            timed_out=timed_out,
            elapsed_s=self._get_elapsed_s(),
        )

    def _build_queue(self, enqueue: Sequence[Plan]) -> deque[tuple[Plan, str]]:
        """List what comes before the sampler: baseline, plans that a killed run left, enqueued, or the whole space."""
        queue = deque([(Plan.baseline(self._space.num_layers), "baseline")])
        queue.extend(self._recover_orphans())
        queue.extend((plan, "enqueued") for plan in enqueue)
        if self._enumerates:
            queue.extend((plan, "enumeration") for plan in self._space.enumerate_plans())
        return queue

    def _recover_orphans(self) -> Iterator[tuple[Plan, str]]:
        """Fail the trials that a dead process left running, and yield the plans whose work would be lost."""
        origins: dict[str, str] = {}
        orphans: dict[Plan, None] = {}
        with self._store.translate_errors():
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.FAIL)):
                groups = trial.user_attrs.get("groups")
                if groups is not None:
                    origins[groups] = trial.user_attrs.get("origin", "enqueued")
                if trial.state == TrialState.RUNNING:
                    logger.info("trial %d was left running by a process that ended; its plan is next", trial.number)
                    if groups is not None:
                        orphans[Plan.from_groups(json.loads(groups))] = None
                    self._study.tell(trial.number, state=TrialState.FAIL)
        evaluated = self._store.list_evaluated_plans(num_windows=self._evaluator.num_windows, split="proxy")
        for plan in dict.fromkeys([*evaluated, *orphans]):
            yield plan, origins.get(plan.to_groups_json(), "enqueued")

    def _enqueue(self, plan: Plan, origin: str) -> None:
        with self._store.translate_errors():
            self._study.enqueue_trial(self._space.build_params(plan), user_attrs={"origin": origin})

    def _run_trial(self) -> None:
        """Ask for a plan, evaluate it and tell its values; a trial that does not get that far fails."""
        with self._store.translate_errors():
            trial = self._study.ask(dict(self._space.distributions))
        with self._fail_on_error(trial):
            plan = self._space.build_plan(trial.params)
            if plan in self._finished:  # only a waiting trial can repeat a plan
                with self._store.translate_errors():
                    self._study.tell(trial, state=TrialState.FAIL)
                return
            with self._store.translate_errors():
                # Noted before the work, so that a later process knows what this one was doing.
                trial.set_user_attr("groups", plan.to_groups_json())
                attributes = self._store.optuna_storage.get_trial(trial._trial_id).user_attrs
            record = self._evaluate(plan, trial.number, attributes.get("origin", "enqueued"))
            with self._store.translate_errors():
                for name, value in build_attributes(record).items():
                    trial.set_user_attr(name, value)
                self._study.tell(trial, self._build_values(record))
        self._finished[plan] = record
        if self._on_trial is not None:
            self._on_trial(
                TrialUpdate(
                    record=record,
                    num_finished=len(self._finished),
                    num_new=len(self._finished) - self._num_resumed,
                    budget=min(self._budget, self._space.count_plans()),
                    front=self._build_front(),
                    elapsed_s=self._get_elapsed_s(),
                )
            )

    @contextmanager
    def _fail_on_error(self, trial: optuna.Trial) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Ctrl-C included. If the database itself fails, the next run finds the trial running and fails it then.
            with suppress(StudyError), self._store.translate_errors():
                self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise

    def _evaluate(self, plan: Plan, trial_number: int, origin: str) -> PlanRecord:
        base = self._get_base_losses()
        losses = self._evaluate_stored(plan)
        delta, delta_se = _compute_delta(losses.nll_nats_per_token, base.nll_nats_per_token)
        kl, kl_se = None, None
        if losses.kl_nats_per_token is not None:
            kl, kl_se = _compute_delta(losses.kl_nats_per_token, [0.0] * len(losses.kl_nats_per_token))
        elif self._metric == "kl":
            kl = math.nan  # measured, and finite on no window
        num_windows = len(losses.nll_nats_per_token)
        return PlanRecord(
            plan=plan,
            trial=trial_number,
            nll=math.fsum(losses.nll_nats_per_token) / num_windows,
            delta_nll=delta,
            delta_nll_se=delta_se,
            kl_nats_per_token=kl,
            kl_se=kl_se,
            latency_ms=None if self._estimate_latency_ms is None else self._estimate_latency_ms(plan),
            proxy_tokens=num_windows * losses.tokens_per_window,
            origin=origin,
        )

    def _get_base_losses(self) -> WindowLosses:
        if self._base_losses is None:
            losses = self._evaluate_stored(Plan.baseline(self._space.num_layers))
            if not all(map(math.isfinite, losses.nll_nats_per_token)):
                raise StudyError(
                    f"{self._store.where}: the unmodified model's loss is not finite, so nothing can be compared with "
                    "it; check the model's weights, or try --dtype float32"
                )
            if self._metric == "kl" and losses.kl_nats_per_token is None:
                raise ConfigError("metric kl needs an evaluator that measures KL to the unmodified model")
            self._base_losses = losses
        return self._base_losses

    def _evaluate_stored(self, plan: Plan) -> WindowLosses:
        evaluation = evaluate_stored_plan(self._store, self._evaluator, plan)
        self._num_new_tokens += evaluation.num_new_tokens
        return evaluation.losses

    def _build_values(self, record: PlanRecord) -> list[float]:
        saving = record.depth_reduction if self._objective == "depth" else record.latency_ms
        loss = record.perplexity if self._metric == "nll" else record.get_cost("kl")
        assert saving is not None
        return [saving, loss]

    def _build_front(self) -> list[PlanRecord]:
        # A study may hold plans of a former run whose space was larger, e.g. before a layer was frozen.
        records = [record for record in self._finished.values() if self._space.is_valid(record.plan.joins)]
        return build_front(records, metric=self._metric, objective=self._objective)

    def _count_trials(self, state: TrialState) -> int:
        with self._store.translate_errors():
            return len(self._study.get_trials(deepcopy=False, states=(state,)))

    def _get_elapsed_s(self) -> float:
        return time.monotonic() - self._began_at


def _check_arguments(
    space: JoinSpace,
    budget: int,
    metric: Metric,
    objective: Objective,
    estimate_latency_ms: Callable[[Plan], float] | None,
    enqueue: Sequence[Plan],
) -> None:
    if budget < 1:
        raise ConfigError(f"budget is {budget}; it counts finished plans, the baseline included, so at least 1")
    if metric not in get_args(Metric):
        raise ConfigError(f"metric {metric!r} is unknown; choose one of {', '.join(get_args(Metric))}")
    if objective not in get_args(Objective):
        raise ConfigError(f"objective {objective!r} is unknown; choose one of {', '.join(get_args(Objective))}")
    if objective == "latency" and estimate_latency_ms is None:
        raise ConfigError("objective latency needs a latency estimate; pass estimate_latency_ms")
    for plan in enqueue:
        if plan.num_layers != space.num_layers:
            raise PlanError(
                f"an enqueued plan has {plan.num_layers} layers, the model {space.num_layers}; enqueue plans of it only"
            )
        if not space.is_valid(plan.joins):
            raise PlanError(
                f"an enqueued plan is outside the space: groups have at most {space.max_group} layers and leave "
                f"layers {list(space.frozen_layers)} alone, got {plan.to_groups_json()}; "
                "raise --max-group, freeze fewer layers or enqueue another plan"
            )


def _compute_delta(losses: Sequence[float], base_losses: Sequence[float]) -> tuple[float, float | None]:
    if not all(map(math.isfinite, losses)):
        return math.nan, None
    paired = compute_paired_delta(losses, base_losses)
    return paired.delta, paired.standard_error
