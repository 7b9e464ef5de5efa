"""The trials of a study: which plan comes next, what is told of it, and how an interrupted search is resumed."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import TrialState

from lpsearch.evaluation.losses import Metric
from lpsearch.kinds import TextKind
from lpsearch.plan import Plan
from lpsearch.search.front import Objective, build_front, find_rival
from lpsearch.search.losses import choose_variant
from lpsearch.search.results import Loss, State, TrialResult, Variant, build_attributes, read_results, set_latency
from lpsearch.search.samplers import build_sampler
from lpsearch.search.settings import open_study, record_settings
from lpsearch.search.space import PlanSpace
from lpsearch.search.storage_url import find_sqlite_path
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


def ask_trial(
    study: optuna.Study, space: PlanSpace, store: StudyStore, *, is_waiting: bool
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

    Returns:
        The trial, which is running, and the plan that it stands for.
    """
    if is_waiting:
        trial = study.ask(dict(space.distributions))
        return trial, space.build_plan(trial.params)
    trial = _begin_trial(study)
    params = trial.relative_params
    plan = space.build_plan(params)
    origins = getattr(study.sampler, "origins", {})
    attributes = {"origin": origins[trial.number], "groups": plan.key} if trial.number in origins else {}
    store.record_trial(trial.number, params=params, distributions=space.distributions, attributes=attributes)
    return trial, plan


def _begin_trial(study: optuna.Study) -> optuna.Trial:
    """Ask for a trial where none waits, as ``study.ask`` does; that first reads the trials to see whether one does."""
    study._thread_local.cached_all_trials = None
    return optuna.Trial(study, study._storage.create_new_trial(study._study_id))


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
                num_trials=len(self._study.get_trials(deepcopy=False)),
                estimate_latency_ms=estimate_latency_ms if objective == "latency" else None,
                read_results=lambda study: self.list_finished(),
                # Nobody else asks for plans of a SQLite file.
                read_pending=None if find_sqlite_path(store.url) is None else self.list_running,
            )
            self._study.sampler = self._sampler
        results = read_results(store, estimate_latency_ms=estimate_latency_ms)
        self.finished = {result.plan: result for result in results}
        self.num_resumed = len(self.finished)
        self._front: list[TrialResult] | None = None  # of what is finished; None where it is to be built anew
        self.running: list[Job] = []
        self.budget = min(budget, space.count_plans())
        self.enumerates = space.count_plans() <= budget
        self._queue: deque[tuple[Plan, str]] = deque()
        self._num_waiting = 0

    def list_finished(self) -> list[TrialResult]:
        """Return the finished plans in the order of the trials."""
        return sorted(self.finished.values(), key=lambda result: result.trial)

    def list_running(self) -> list[Plan]:
        """Return the plans that were asked for but not told, in the order of the trials."""
        return [job.plan for job in self.running]

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

    def _is_taken(self, plan: Plan, running: Collection[Plan]) -> bool:
        return plan in self.finished or plan in running

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
        self._queue.append((Plan.baseline(self.space.num_layers), "baseline"))
        self._queue.extend(self._recover_orphans(num_windows))
        self._queue.extend((plan, "enqueued") for plan in enqueue)
        if self.enumerates:
            self._queue.extend((plan, "enumeration") for plan in self.space.enumerate_plans())
        with self.store.translate_errors():
            self._num_waiting = len(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _recover_orphans(self, num_windows: int) -> Iterator[tuple[Plan, str]]:
        """Fail the trials that a dead process left running, and yield the plans that were asked for but not told.

        Taking them up again keeps their work, and has an interrupted search go on as if it had never stopped.
        """
        origins: dict[str, str] = {}
        orphans: dict[Plan, None] = {}
        with self.store.translate_errors():
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.FAIL)):
                groups = trial.user_attrs.get("groups")
                if groups is not None:
                    origins[groups] = trial.user_attrs.get("origin", "enqueued")
                    orphans[Plan.from_key(groups)] = None
                if trial.state == TrialState.RUNNING:
                    logger.info("trial %d was left running by a process that ended; its plan is next", trial.number)
                    self._study.tell(trial.number, state=TrialState.FAIL)
        evaluated = self.store.losses.list_evaluated(num_windows=num_windows, split="proxy", variant=self._variant)
        for plan in dict.fromkeys([*evaluated, *orphans]):
            if plan in self.space:  # layers may have been frozen since
                yield plan, origins.get(plan.key, "enqueued")

    # ---- Asking and telling ------------------------------------------------------------------------------------------

    def ask(self) -> Job | None:
        """Ask for a plan that is neither finished nor running; None when the study needs no more."""
        running = {job.plan for job in self.running}  # none of them is finished
        while len(self.finished) + len(running) < self._budget:
            while self._queue and self._is_taken(self._queue[0][0], running):
                self._queue.popleft()
            if not self._queue and not self._num_waiting and self.enumerates:
                return None
            # Optuna hands out waiting trials first: those of a run that was killed between enqueueing and asking.
            is_waiting = bool(self._num_waiting or self._queue)
            with self.store.translate_errors():
                if self._num_waiting:
                    self._num_waiting -= 1
                elif self._queue:
                    plan, origin = self._queue[0]
                    self._study.enqueue_trial(self.space.build_params(plan), user_attrs={"origin": origin})
                trial, plan = ask_trial(self._study, self.space, self.store, is_waiting=is_waiting)
                noted = self._sampler.origins.get(trial.number)
                origin = noted or trial.user_attrs.get("origin", "enqueued")
                job = Job(plan, origin, trial)
                self.running.append(job)
                if not self._is_taken(plan, running):
                    if noted is None:
                        known = trial.user_attrs
                        attributes = {"origin": origin, "groups": plan.key}
                        self.store.record_trial(
                            trial.number, attributes={key: attributes[key] for key in attributes if key not in known}
                        )
                    return job
            self.drop(job)  # only a waiting trial can repeat a plan
        return None

    def tell(self, job: Job, *, state: State, loss: Loss) -> TrialResult:
        """Tell the values of an evaluated plan, and return its result."""
        assert job.trial is not None
        variant = choose_variant(job.plan, self._variant)
        result = TrialResult(job.plan, variant, job.trial.number, job.origin, state, loss)
        if self._estimate_latency_ms is not None:
            baseline_ms = self._estimate_latency_ms(Plan.baseline(self.space.num_layers))
            result = set_latency(result, self._estimate_latency_ms(job.plan), baseline_ms)
        saving = result.depth_reduction if self._objective == "depth" else result.latency_ms
        cost = loss.get_told_value(self.metric)
        assert saving is not None
        with self.store.translate_errors():
            attributes = build_attributes(result)
            del attributes["groups"]  # noted when it was asked for
            self.store.record_trial(job.trial.number, attributes=attributes)
            self._study.tell(job.trial, [saving, cost])
        self.running.remove(job)
        self.finished[job.plan] = result
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
        with self.store.translate_errors():
            self._study.tell(job.trial, state=TrialState.FAIL, skip_if_finished=True)
        self.running.remove(job)
