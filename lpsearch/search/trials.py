"""The trials of a study: which plan comes next, what is told of it, and how an interrupted search is resumed."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from lpsearch.evaluation.losses import Metric
from lpsearch.kinds import TextKind
from lpsearch.plan import Plan
from lpsearch.search.claims import POLL_S, ClaimLostError
from lpsearch.search.front import Objective, build_front, find_rival
from lpsearch.search.losses import choose_variant
from lpsearch.search.others import Others
from lpsearch.search.results import Loss, State, TrialResult, Variant, build_attributes, read_results, set_latency
from lpsearch.search.samplers import build_sampler
from lpsearch.search.samplers.sampler import PlanSampler
from lpsearch.search.settings import open_study, record_settings
from lpsearch.search.space import PlanSpace
from lpsearch.search.store import StudyStore

__all__ = ["Job", "Trials", "ask_trial"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A plan to evaluate.

    Attributes:
        plan: the plan.
        origin: what proposed it.
        trial: what Optuna handed out for it, asked but not told; None for a plan that gets all windows, whatever its
            rival: the baseline, or one of the final front.
    """

    plan: Plan
    origin: str
    trial: optuna.Trial | None = None


@dataclass(frozen=True)
class _Queued:
    """A plan that is evaluated before the sampler is asked for one.

    Attributes:
        plan: the plan.
        origin: what proposed it.
        system_attributes: what a sampler of Optuna's noted on the trial that is repeated.
    """

    plan: Plan
    origin: str
    system_attributes: Mapping[str, Any] = field(default_factory=dict)


def ask_trial(
    study: optuna.Study, space: PlanSpace, store: StudyStore, *, is_waiting: bool, owner: str | None = None
) -> tuple[optuna.Trial, Plan]:
    """Ask for the next trial, and note its parameters, its plan and what proposed it.

    Optuna notes them one by one, each in a transaction of its own, which takes longer than choosing them. The samplers
    of this package choose all of them together, and here they are noted together. Noted before the work, they tell a
    later process what this one was doing.

    Args:
        study: the study, with its sampler.
        space: the plans.
        store: the study's database.
        is_waiting: a trial waits in the study, whose parameters are fixed; it is handed out first.
        owner: the coordinator that asks, noted on the trial; None where a study has one at a time.

    Returns:
        The trial, which is running, and the plan that it stands for.
    """
    if is_waiting:
        trial = study.ask(dict(space.distributions))
        return trial, space.build_plan(trial.params)
    trial = _begin_sampled(study) if owner is None else _create_trial(study, {"owner": owner})
    params = trial.relative_params
    plan = space.build_plan(params)
    origins = getattr(study.sampler, "origins", {})
    attributes = {"origin": origins[trial.number], "groups": plan.key} if trial.number in origins else {}
    store.record_trial(trial.number, params=params, distributions=space.distributions, attributes=attributes)
    return trial, plan


def _begin_sampled(study: optuna.Study) -> optuna.Trial:
    """Ask for a trial where none waits, as ``study.ask`` does; that first reads the trials to see whether one does."""
    study._thread_local.cached_all_trials = None
    return optuna.Trial(study, study._storage.create_new_trial(study._study_id))


def _create_trial(
    study: optuna.Study,
    user_attributes: Mapping[str, Any],
    *,
    params: Mapping[str, Any] | None = None,
    distributions: Mapping[str, BaseDistribution] | None = None,
    system_attributes: Mapping[str, Any] | None = None,
) -> optuna.Trial:
    """Create a running trial with all that is known of it in one transaction, so that it never lacks any of it."""
    template = optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params=dict(params or {}),
        distributions=dict(distributions or {}),
        user_attrs=dict(user_attributes),
        system_attrs=dict(system_attributes or {}),
    )
    study._thread_local.cached_all_trials = None  # as Study.ask does
    return optuna.Trial(study, study._storage.create_new_trial(study._study_id, template_trial=template))


def _tell_values(study: optuna.Study, trial: optuna.Trial, values: Sequence[float]) -> None:
    """Finish a trial as ``study.tell`` does, which reads all of its parameters twice, for the sampler and its caller.

    Raises:
        UpdateFinishedTrialError: if the trial is finished.
    """
    if type(study.sampler).after_trial is not PlanSampler.after_trial or not all(map(math.isfinite, values)):
        study.tell(trial, list(values))
        return
    study._thread_local.cached_all_trials = None
    study._storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, list(values))


class Trials:
    """Asks and tells; see :func:`lpsearch.search.run_study` for the arguments. Its caller holds the study's lock.

    Attributes:
        space: the plans to search.
        store: the study's database.
        budget: distinct finished plans at which the study ends; less than was asked for if the space is smaller.
        enumerates: every plan of the space is evaluated.
        finished: results by plan.
        running: what was asked for but not told, in the order of the trials.
        num_resumed: plans that were finished before this run.
    """

    def __init__(
        self,
        *,
        store: StudyStore,
        space: PlanSpace,
        budget: int,
        sampler: str,
        seed: int,
        metric: Metric,
        objective: Objective,
        estimate_latency_ms: Callable[[Plan], float] | None,
        kinds: Sequence[TextKind],
        worst_case: bool,
        variant: Variant,
    ) -> None:
        """Open the study and read what it has finished."""
        self.space = space
        self.store = store
        self.metric: Metric = metric
        self._objective: Objective = objective
        self._estimate_latency_ms = estimate_latency_ms
        self._budget = budget
        self._variant = variant
        record_settings(
            store, space, metric, objective, sampler, seed, kinds=kinds, worst_case=worst_case, variant=variant
        )
        with store.translate_errors():
            self._study = open_study(store, metric, objective)
            self._sampler = build_sampler(
                sampler,
                space=space,
                budget=budget,
                seed=seed,
                metric=metric,
                estimate_latency_ms=estimate_latency_ms if objective == "latency" else None,
                read_results=lambda study: self.list_finished(),
                read_pending=self.list_pending,
            )
            self._study.sampler = self._sampler
        results = read_results(store, estimate_latency_ms=estimate_latency_ms)
        self.finished = {result.plan: result for result in results}
        self.num_resumed = len(self.finished)
        self._front: list[TrialResult] | None = None  # of what is finished; None where it is to be built anew
        self.running: list[Job] = []
        self.budget = min(budget, space.count_plans())
        self.enumerates = space.count_plans() <= budget
        self._queue: deque[_Queued] = deque()
        self._num_waiting = 0
        self._others = Others(store, self._study)
        self._seen_trials = {result.trial for result in results}

    def list_finished(self) -> list[TrialResult]:
        """Return the finished plans in the order of the trials."""
        return sorted(self.finished.values(), key=lambda result: result.trial)

    def list_pending(self) -> list[Plan]:
        """Return the plans that were asked for but not told, in the order of the trials, and then those of others."""
        others = self._others.running.values()
        return [*(job.plan for job in self.running), *(plan for plan in others if plan is not None)]

    def list_valid(self) -> list[TrialResult]:
        """Return the finished plans of the space; a former run's may have been larger, before a layer was frozen."""
        return [result for result in self.list_finished() if result.plan in self.space]

    def build_front(self, *, include_partial: bool = False) -> list[TrialResult]:
        """Return the front by now; see :func:`lpsearch.search.build_front`."""
        if include_partial:
            return self._build_front(self.list_valid(), include_partial=True)
        if self._front is None:
            self._front = self._build_front(self.list_valid())
        return list(self._front)

    def _build_front(self, results: Sequence[TrialResult], *, include_partial: bool = False) -> list[TrialResult]:
        return build_front(results, metric=self.metric, objective=self._objective, include_partial=include_partial)

    def find_rival(self, plan: Plan) -> Plan | None:
        """Return the plan that a new one has to beat; see :func:`lpsearch.search.front.find_rival`."""
        rival = find_rival(
            self.build_front(),
            depth=plan.depth,
            latency_ms=None if self._estimate_latency_ms is None else self._estimate_latency_ms(plan),
            metric=self.metric,
            objective=self._objective,
        )
        return None if rival is None else rival.plan

    # ---- Resuming ----------------------------------------------------------------------------------------------------

    def line_up(self, enqueue: Sequence[Plan], *, num_windows: int) -> None:
        """Line up what comes before the sampler: baseline, plans that a killed run left, enqueued, or the whole space.

        Args:
            enqueue: plans to evaluate first.
            num_windows: windows that make a plan complete.
        """
        self._queue.append(_Queued(Plan.baseline(self.space.num_layers), "baseline"))
        self._queue.extend(self._recover_orphans(num_windows))
        self._queue.extend(_Queued(plan, "enqueued") for plan in enqueue)
        if self.enumerates:
            self._queue.extend(_Queued(plan, "enumeration") for plan in self.space.enumerate_plans())
        with self.store.translate_errors():
            self._num_waiting = len(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _recover_orphans(self, num_windows: int) -> Iterator[_Queued]:
        """Fail the trials that a dead process left running, and yield the plans that were asked for but not told.

        Taking them up again keeps their work, and has an interrupted search go on as if it had never stopped.
        """
        orphans: dict[Plan, _Queued] = {}
        with self.store.translate_errors():
            trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.FAIL))
            live = self._others.list_live_ids()  # after the trials, since who begins one has joined before
            for trial in trials:
                if trial.state == TrialState.RUNNING:
                    if trial.user_attrs.get("owner") in live:
                        continue
                    self._fail_orphan(trial)
                queued = _read_queued(trial)
                if queued is not None:
                    orphans[queued.plan] = queued
        evaluated = self.store.losses.list_evaluated(num_windows=num_windows, split="proxy", variant=self._variant)
        for plan in dict.fromkeys([*evaluated, *orphans]):
            if plan in self.space:  # layers may have been frozen since
                yield orphans.get(plan, _Queued(plan, "enqueued"))

    def _fail_orphan(self, trial: FrozenTrial) -> None:
        """Fail a trial that a dead process left running, unless another coordinator does."""
        logger.info("trial %d was left running by a process that ended; its plan is next", trial.number)
        with suppress(UpdateFinishedTrialError):
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    # ---- Other coordinators ------------------------------------------------------------------------------------------

    def follow_others(self) -> None:
        """Take note of what other coordinators finished and run, and line up the plans of those that are gone."""
        own = {job.trial.number for job in self.running if job.trial is not None}
        news = self._others.look(own=own, known=self._seen_trials)
        if news.finished:
            for result in read_results(self.store, estimate_latency_ms=self._estimate_latency_ms, trials=news.finished):
                self.finished.setdefault(result.plan, result)
            self._front = None
            self._seen_trials.update(trial.number for trial in news.finished)
        for trial in news.orphans:
            queued = _read_queued(trial)
            with self.store.translate_errors():
                self._fail_orphan(trial)
            if queued is not None and queued.plan in self.space:
                self._queue.appendleft(queued)

    def reload(self) -> None:
        """Read the results of all coordinators, with what they learned of plans after their trials."""
        if self.store.claims.owner is not None:
            results = read_results(self.store, estimate_latency_ms=self._estimate_latency_ms)
            self.finished = {result.plan: result for result in results}
            self._front = None

    @property
    def are_others_at_work(self) -> bool:
        """Whether another coordinator ran a trial when :meth:`follow_others` last looked."""
        return bool(self._others.running)

    def claim(self, plan: Plan) -> bool:
        """Claim a plan, which no other coordinator then evaluates; False if one has it."""
        return self.store.claims.take(self._name_subject(plan))

    def give_back(self, plan: Plan) -> None:
        """Give back the claim on a plan."""
        self.store.claims.give_back(self._name_subject(plan))

    def _name_subject(self, plan: Plan) -> str:
        return self.store.losses.name_subject(plan, split="proxy", variant=choose_variant(plan, self._variant))

    # ---- Asking and telling ------------------------------------------------------------------------------------------

    def ask(self) -> Job | None:
        """Ask for a plan that is neither finished nor running; None when the study needs no more."""
        while True:
            self.follow_others()
            taken = {*self.finished, *self.list_pending()}
            if len(taken) >= self._budget:
                return None
            while self._queue and self._queue[0].plan in taken:
                self._queue.popleft()
            if not self._queue and not self._num_waiting and self.enumerates:
                return None
            if not self._num_waiting and self._queue and not self.claim(self._queue[0].plan):
                time.sleep(POLL_S * random.random())  # another coordinator is about to begin with it, or to end
                continue
            try:
                with self.store.translate_errors():
                    job = self._begin_trial(taken)
            except UpdateFinishedTrialError:  # another coordinator took this one for lost, and failed its trial
                self.running.pop()
                continue
            if job.plan not in taken and self.claim(job.plan) and self._may_evaluate(job):
                return job
            self.drop(job)  # a waiting trial can repeat a plan, and another coordinator propose the same

    def _begin_trial(self, taken: Collection[Plan]) -> Job:
        """Begin a trial: one that waits in the study, or of the plan that is next in line, or of the sampler's."""
        owner = self.store.claims.owner
        # Optuna hands out waiting trials first: those of a run that was killed between enqueueing and asking.
        if self._queue and not self._num_waiting:
            queued = self._queue.popleft()
            trial = _create_trial(
                self._study,
                {"origin": queued.origin, "groups": queued.plan.key, **({} if owner is None else {"owner": owner})},
                params=self.space.build_params(queued.plan),
                distributions=self.space.distributions,
                system_attributes=queued.system_attributes,
            )
            job = Job(queued.plan, queued.origin, trial)
            self.running.append(job)
            return job
        is_waiting = bool(self._num_waiting)
        self._num_waiting -= is_waiting
        trial, plan = ask_trial(self._study, self.space, self.store, is_waiting=is_waiting, owner=owner)
        noted = self._sampler.origins.get(trial.number)
        origin = noted or trial.user_attrs.get("origin", "enqueued")
        job = Job(plan, origin, trial)
        self.running.append(job)
        if plan not in taken and noted is None:
            # Noted before the work, so that a later process knows what this one was doing.
            attributes = {"origin": origin, "groups": plan.key}
            missing = {key: attributes[key] for key in attributes if key not in trial.user_attrs}
            self.store.record_trial(trial.number, attributes=missing)
        return job

    def _may_evaluate(self, job: Job) -> bool:
        """Look once more at what the others did before the plan was claimed: it may be finished, or one too many.

        Of trials that began at once, those of the lowest numbers fill the budget.
        """
        self.follow_others()
        assert job.trial is not None
        number = job.trial.number
        num_earlier = len(self.finished) + len(self.running) - 1 + sum(other < number for other in self._others.running)
        return self.store.claims.owner is None or (job.plan not in self.finished and num_earlier < self._budget)

    def tell(self, job: Job, *, state: State, loss: Loss) -> TrialResult:
        """Tell the values of an evaluated plan, and return its result.

        Raises:
            ClaimLostError: if another coordinator took the plan over.
            StudyError: if the database fails.
        """
        assert job.trial is not None
        variant = choose_variant(job.plan, self._variant)
        result = TrialResult(job.plan, variant, job.trial.number, job.origin, state, loss)
        if self._estimate_latency_ms is not None:
            baseline_ms = self._estimate_latency_ms(Plan.baseline(self.space.num_layers))
            result = set_latency(result, self._estimate_latency_ms(job.plan), baseline_ms)
        saving = result.depth_reduction if self._objective == "depth" else result.latency_ms
        cost = loss.get_told_value(self.metric)
        assert saving is not None
        with self.store.claims.finish(self._name_subject(job.plan)), self.store.translate_errors():
            attributes = build_attributes(result)
            del attributes["groups"]  # noted when it was asked for
            self.store.record_trial(job.trial.number, attributes=attributes)
            try:
                _tell_values(self._study, job.trial, [saving, cost])
            except UpdateFinishedTrialError:
                raise ClaimLostError(f"{self.store.where}: another process failed trial {result.trial}") from None
        self.running.remove(job)
        self.finished[job.plan] = result
        self._seen_trials.add(result.trial)
        if self._front and job.plan in self.space:
            # A plan that is beaten once stays so, and so does what it beats.
            self._front = self._build_front([*self._front, result])
        else:
            self._front = None
        return result

    def refresh(self, plan: Plan, *, state: State, loss: Loss) -> None:
        """Replace what is known of a finished plan that got more windows."""
        self.finished[plan] = dataclasses.replace(self.finished[plan], state=state, loss=loss)
        self._front = None

    def drop(self, job: Job) -> None:
        """Fail a trial that is not to be evaluated."""
        assert job.trial is not None
        with self.store.translate_errors(), suppress(UpdateFinishedTrialError):
            self._study.tell(job.trial, state=TrialState.FAIL, skip_if_finished=True)
        self.give_back(job.plan)
        self.running.remove(job)


def _read_queued(trial: FrozenTrial) -> _Queued | None:
    """Return the plan of a trial that was not told, to be evaluated by another; None if it had chosen none."""
    groups = trial.user_attrs.get("groups")
    if groups is None:
        return None
    # What a sampler of Optuna's noted on the trial belongs to the plan; its parameters stand for themselves.
    noted = {name: value for name, value in trial.system_attrs.items() if name != "fixed_params"}
    return _Queued(Plan.from_key(groups), trial.user_attrs.get("origin", "enqueued"), noted)
