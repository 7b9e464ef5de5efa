"""Running a search: what may be asked for, the lock and the thread; the coordinator does the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from lpsearch.errors import ConfigError, PlanError
from lpsearch.evaluation.losses import PlanEvaluator
from lpsearch.plan import Plan
from lpsearch.search.coordinator import Coordinator
from lpsearch.search.executors import WorkerThread
from lpsearch.search.front import Objective
from lpsearch.search.outcome import EvaluationUpdate, StudyResult, TrialUpdate
from lpsearch.search.results import Metric
from lpsearch.search.space import JoinSpace
from lpsearch.search.store import StudyStore

__all__ = ["run_study"]


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
    staged: bool = True,
    on_trial: Callable[[TrialUpdate], None] | None = None,
    on_evaluation: Callable[[EvaluationUpdate], None] | None = None,
) -> StudyResult:
    """Search a space of plans until the study has ``budget`` distinct finished plans; begun studies are resumed.

    The baseline comes first, then ``enqueue``, then what the sampler proposes. A space no larger than the budget is
    enumerated. A plan whose loss is not finite is finished like any other, with an infinite perplexity: it is never
    proposed again and never on the front.

    Plans are evaluated in a thread of their own, so that the device works while the caller's thread does the books.

    Args:
        evaluator: evaluates plans on the proxy windows; used by one thread at a time, which is not the caller's.
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
        on_trial: called after every trial that this run finishes.
        on_evaluation: called as every evaluation of a plan on some windows begins.

    Raises:
        ConfigError: for a budget below 1, an unknown name, or ``latency`` without an estimate.
        PlanError: for an enqueued plan outside the space.
        ResumeError: if the study was begun with another space, metric or objective.
        StudyError: if the database fails, another process runs the study, or the baseline's loss is not finite.
    """
    _check_arguments(space, budget, metric, objective, estimate_latency_ms, enqueue)
    with store.hold_lock(), WorkerThread() as executor:
        coordinator = Coordinator(
            executor=executor,
            evaluator=evaluator,
            space=space,
            budget=budget,
            store=store,
            sampler=sampler,
            seed=seed,
            metric=metric,
            objective=objective,
            estimate_latency_ms=estimate_latency_ms,
            staged=staged,
            on_trial=on_trial,
            on_evaluation=on_evaluation,
        )
        return coordinator.run(enqueue, timeout_s)


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
