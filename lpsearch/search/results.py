"""Finished plans as everything else sees them: one frozen result a plan, read by one join over the study's database."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import optuna
from optuna.trial import FrozenTrial, TrialState

from lpsearch.config import Split
from lpsearch.errors import StudyError, StudyVersionError
from lpsearch.evaluation.losses import RAW, Metric, PlanLosses, Variant
from lpsearch.front_file import is_plan_name
from lpsearch.plan import Plan
from lpsearch.search.cost import KindLoss, Loss, compute_loss, compute_perplexity
from lpsearch.search.kinds import read_kinds
from lpsearch.search.losses import State, StoredPlan, choose_variant, finite_or_none, read_variant
from lpsearch.search.store import StudyStore

__all__ = [
    "RAW",
    "EvaluationUpdate",
    "KindLoss",
    "Loss",
    "Metric",
    "State",
    "StudyResult",
    "TrialResult",
    "TrialUpdate",
    "Variant",
    "build_attributes",
    "compute_loss",
    "compute_perplexity",
    "finite_or_none",
    "list_untouched",
    "read_results",
    "set_latency",
]


@dataclass(frozen=True)
class TrialResult:
    """One finished plan of a study.

    Attributes:
        plan: what was evaluated.
        variant: what was done to the weights before.
        trial: number of the Optuna trial.
        origin: what proposed the plan: baseline, enqueued, enumeration, scan, programme, surrogate, random ...
        state: whether its loss is that of all proxy windows.
        loss: on the proxy windows that it was evaluated on by now, also after its trial was told.
        heldout: on the held-out windows; None until it was checked.
        latency_ms: estimated time per output token; None with latency off.
        speedup: estimated time of the unmodified model over that of the plan; None with latency off.
        untouched: on all proxy windows without what was done to the weights; None where that was not measured.
        untouched_heldout: the same on the held-out windows.
        plan_file: its plan file relative to the study's directory; None unless it is on the front that was written.
    """

    plan: Plan
    variant: Variant
    trial: int
    origin: str
    state: State
    loss: Loss
    heldout: Loss | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    untouched: Loss | None = None
    untouched_heldout: Loss | None = None
    plan_file: str | None = None

    @property
    def num_joins(self) -> int:
        """Number of joins of the plan."""
        return self.plan.num_joins

    @property
    def num_dropped(self) -> int:
        """Number of branches that the plan drops."""
        return self.plan.num_dropped

    @property
    def is_baseline(self) -> bool:
        """Whether the plan changes nothing."""
        return not self.plan.num_joins and not self.plan.num_dropped

    @property
    def depth_reduction(self) -> float:
        """Share of the depth that the plan removes."""
        return self.plan.depth_reduction

    @property
    def perplexity(self) -> float:
        """``exp(nll)``; infinite where the loss was not finite."""
        return self.loss.perplexity

    @property
    def proxy_tokens(self) -> int:
        """Tokens behind ``loss``."""
        return self.loss.num_tokens

    def get_cost(self, metric: Metric) -> float:
        """Return :meth:`Loss.get_cost` on the proxy windows."""
        return self.loss.get_cost(metric)

    def get_cost_se(self, metric: Metric) -> float | None:
        """Return :meth:`Loss.get_cost_se` on the proxy windows."""
        return self.loss.get_cost_se(metric)

    def get_heldout(self, metric: Metric) -> Loss | None:
        """Return the held-out loss; None where it is not known, or not finite."""
        return self.heldout if self.heldout is not None and math.isfinite(self.heldout.get_cost(metric)) else None

    def get_untouched(self, metric: Metric) -> Loss | None:
        """Return the loss without repair as a user is told it: held out where both are known."""
        known = self.untouched if self.get_heldout(metric) is None else self.untouched_heldout or self.untouched
        return known if known is not None and math.isfinite(known.get_cost(metric)) else None

    def get_reported_cost(self, metric: Metric) -> float:
        """Return the cost that a user is told: held out where that is known."""
        return (self.get_heldout(metric) or self.loss).get_cost(metric)


@dataclass(frozen=True)
class EvaluationUpdate:
    """What begins to be evaluated, and what is known by then.

    The trial before it may be evaluated but not finished, since the two overlap.

    Attributes:
        plan: the plan.
        origin: what proposed it; ``front`` where a plan of the final front gets the windows that it lacks.
        num_windows: windows that it is evaluated on now.
        num_finished: distinct finished plans of the study so far.
        budget: distinct finished plans at which the study ends; less than was asked for if the space is smaller.
        front: the best front so far, the baseline first; empty before the baseline is finished.
    """

    plan: Plan
    origin: str
    num_windows: int
    num_finished: int
    budget: int
    front: Sequence[TrialResult]


@dataclass(frozen=True)
class TrialUpdate:
    """Progress after one finished trial.

    Attributes:
        result: the plan that just finished.
        num_finished: distinct finished plans of the study so far.
        num_new: those of them that this run finished.
        budget: distinct finished plans at which the study ends; less than was asked for if the space is smaller.
        front: the best front so far, the baseline first.
        proxy_tokens: tokens behind the losses of all finished plans.
        elapsed_s: seconds since this run began.
    """

    result: TrialResult
    num_finished: int
    num_new: int
    budget: int
    front: Sequence[TrialResult]
    proxy_tokens: int
    elapsed_s: float


@dataclass(frozen=True)
class StudyResult:
    """What a study knows when a run ends.

    Attributes:
        results: every finished plan, in the order of the trials, the baseline included.
        front: the baseline, then every plan that no other beats, fewest joins first.
        exact: every plan of the space is finished, so the front is the best there is on the proxy.
        num_resumed: plans that were finished before this run.
        num_new: plans that this run finished.
        num_new_tokens: tokens that this run evaluated.
        timed_out: the run ended by ``timeout_s`` before the budget.
        elapsed_s: seconds that this run took.
    """

    results: tuple[TrialResult, ...]
    front: tuple[TrialResult, ...]
    exact: bool
    num_resumed: int
    num_new: int
    num_new_tokens: int
    timed_out: bool
    elapsed_s: float

    @property
    def baseline(self) -> TrialResult:
        """The unmodified model."""
        return self.front[0]

    @property
    def proxy_tokens(self) -> int:
        """Tokens behind the losses of all finished plans, earlier runs included."""
        return sum(result.proxy_tokens for result in self.results)

    @property
    def share_evaluated(self) -> float:
        """``proxy_tokens`` relative to evaluating every plan on all windows."""
        return self.proxy_tokens / (len(self.results) * self.baseline.proxy_tokens)


def set_latency(result: TrialResult, latency_ms: float | None, baseline_ms: float | None) -> TrialResult:
    """Return a result with its time and speed-up.

    Args:
        result: of a plan.
        latency_ms: estimated time per output token of the plan; None where it is not known.
        baseline_ms: that of the unmodified model.
    """
    speedup = None if latency_ms is None or baseline_ms is None else baseline_ms / latency_ms
    return dataclasses.replace(result, latency_ms=latency_ms, speedup=speedup)


def list_untouched(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the plans whose losses without repair are known, with these; none in a study without repair."""
    return [
        dataclasses.replace(
            result, variant=RAW, state="complete", loss=result.untouched, heldout=result.untouched_heldout
        )
        for result in results
        if result.untouched is not None
    ]


def read_results(
    store: StudyStore,
    *,
    estimate_latency_ms: Callable[[Plan], float | None] | None = None,
    trials: Sequence[FrozenTrial] | None = None,
) -> list[TrialResult]:
    """Return every finished plan of a study in the order of the trials, each once.

    Args:
        store: its database.
        estimate_latency_ms: time of a plan by the study's latest latency profile; None takes what stands on the trials.
        trials: finished trials whose results are wanted; None reads all of the study.

    Raises:
        StudyError: if there is no such study, its database fails, or it holds no finite loss of the unmodified model.
        StudyVersionError: if a trial lacks what this version reads.
    """
    only = None if trials is None else [trial.user_attrs["groups"] for trial in trials if "groups" in trial.user_attrs]
    if trials is None:
        with store.translate_errors():
            try:
                study = optuna.load_study(study_name=store.study_name, storage=store.optuna_storage)
            except KeyError:
                raise StudyError(f"{store.where}: holds no study {store.study_name!r}") from None
            trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not trials:
        return []
    reader = _ResultReader(store, store.load_settings() or {}, only=only)
    results: dict[Plan, TrialResult] = {}
    for trial in trials:
        try:
            result = reader.read(trial)
        except (KeyError, TypeError, ValueError) as error:
            raise StudyVersionError(
                f"{store.where}: the study {store.study_name!r} was written by another version of lpsearch: "
                f"a trial lacks what this version reads ({error!r}); "
                "read it with that version, or search again with `lpsearch optimize --fresh`, which moves it aside"
            ) from error
        results.setdefault(result.plan, result)
    _check_baseline(results, store)
    if estimate_latency_ms is None:
        latencies = {plan: result.latency_ms for plan, result in results.items()}
    else:
        latencies = {plan: estimate_latency_ms(plan) for plan in results}
    baseline = Plan.baseline(next(iter(results)).num_layers)
    baseline_ms = latencies.get(baseline)
    if baseline_ms is None and only is not None and estimate_latency_ms is not None:
        baseline_ms = estimate_latency_ms(baseline)
    return [set_latency(result, latencies[plan], baseline_ms) for plan, result in results.items()]


def _check_baseline(results: Mapping[Plan, TrialResult], store: StudyStore) -> None:
    """Refuse a study whose unmodified model has no finite loss, since every other loss is relative to it."""
    for result in results.values():
        is_baseline = result.plan == Plan.baseline(result.plan.num_layers)
        if is_baseline and not math.isfinite(result.loss.nll):
            raise StudyError(
                f"{store.where}: trial {result.trial}, the unmodified model, has no finite loss in the study "
                f"{store.study_name!r}, so nothing can be compared with it; restore a copy, or begin a new study with "
                "`lpsearch optimize --fresh`, which moves it aside"
            )


class _ResultReader:
    """Joins Optuna's trials with what the study's own tables know of their plans, or of some of them."""

    def __init__(self, store: StudyStore, settings: Mapping[str, Any], *, only: Sequence[str] | None) -> None:
        self._metric: Metric = settings.get("metric", "nll")
        self._worst_case = bool(settings.get("worst_case", False))
        self._kinds = {split: read_kinds(settings, split) for split in get_args(Split)}
        self._variant = read_variant(settings)
        plans = None
        if only is not None:
            plans = {Plan.from_key(key) for key in only}
            plans |= {Plan.baseline(plan.num_layers) for plan in plans}
        self._raw_plans = store.losses.load_plans(only=plans)
        self._plans = (
            self._raw_plans if self._variant == RAW else store.losses.load_plans(variant=self._variant, only=plans)
        )
        self._plan_files = {
            _read_key(point): point["plan"]
            for point in (store.load_front() or {}).get("front", ())
            if is_plan_name(point["plan"])  # a database may come from anybody, and the file is read
        }

    def read(self, trial: FrozenTrial) -> TrialResult:
        """Read the result of a finished trial, with the time that was noted on it."""
        key = trial.user_attrs["groups"]
        plan = Plan.from_key(key)
        variant = choose_variant(plan, self._variant)
        base = self._raw_plans[Plan.baseline(plan.num_layers).key]
        raw = self._raw_plans.get(key) if self._variant != RAW else None
        stored = self._raw_plans[key] if variant == RAW else self._plans[key]
        loss = self._compute_loss(stored, base, "proxy")
        if stored.state is None or loss is None:
            raise ValueError(f"trial {trial.number} was told before its plan was evaluated")
        heldout = self._compute_loss(stored, base, "heldout")
        return TrialResult(
            plan=plan,
            variant=variant,
            trial=trial.number,
            origin=trial.user_attrs["origin"],
            state=stored.state,
            loss=loss,
            heldout=heldout,
            latency_ms=trial.user_attrs.get("latency_ms"),
            untouched=None if raw is None or raw.state != "complete" else self._compute_loss(raw, base, "proxy"),
            untouched_heldout=None if raw is None else self._compute_loss(raw, base, "heldout"),
            plan_file=self._plan_files.get(key),
        )

    def _compute_loss(self, stored: StoredPlan, base: StoredPlan, split: Split) -> Loss | None:
        """Return the loss of a plan; None where it has none, or not yet on all held-out windows."""
        if split not in stored.windows or split not in base.windows:
            return None
        num_windows = len(base.windows[split][0])
        losses, base_losses = (PlanLosses.build(num_windows, *known.windows[split]) for known in (stored, base))
        if split == "heldout" and not losses.seen.all():
            return None
        return compute_loss(
            losses, base_losses, metric=self._metric, kinds=self._kinds[split], worst_case=self._worst_case
        )


def _read_key(point: Mapping[str, Any]) -> str:
    """Return the key of the plan of a point of the front."""
    return Plan.from_groups(point["groups"], dropped=point.get("dropped")).key


def build_attributes(result: TrialResult) -> dict[str, Any]:
    """Return the user attributes of a result's trial, besides ``origin``; JSON has null for what is not finite."""
    loss = result.loss
    attributes: dict[str, Any] = {
        "groups": result.plan.key,
        "num_joins": result.num_joins,
        **({"num_dropped": result.num_dropped} if result.num_dropped else {}),
        "nll": finite_or_none(loss.nll),
        "delta_nll": finite_or_none(loss.delta_nll),
        "delta_nll_se": finite_or_none(loss.delta_nll_se),
        "proxy_tokens": loss.num_tokens,
    }
    if loss.kl_nats_per_token is not None:
        attributes["kl_nats_per_token"] = finite_or_none(loss.kl_nats_per_token)
        attributes["kl_se"] = finite_or_none(loss.kl_se)
    if loss.by_kind:
        by_kind = {part.kind.spec: finite_or_none(part.loss.delta_nll) for part in loss.by_kind}
        attributes["delta_nll_by_kind"] = json.dumps(by_kind)
    if result.latency_ms is not None:
        attributes["latency_ms"] = result.latency_ms
    return attributes
