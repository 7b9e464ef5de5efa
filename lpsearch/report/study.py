"""What a report shows of a study, read from its database and its directory; evaluates nothing."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from lpsearch.errors import ConfigError, StudyVersionError, UsageError
from lpsearch.evaluation.losses import PairedDelta, compute_paired_delta
from lpsearch.latency.model import LatencyModel
from lpsearch.latency.profile import LatencyProfile, parse_recorded_profile
from lpsearch.plan import Plan
from lpsearch.report.progress import ProgressStep, find_reference_cost, trace_progress
from lpsearch.search import JoinSpace, StudyStore, TrialResult, build_front, read_results
from lpsearch.search.front import Objective
from lpsearch.search.pairset import fit_surrogate
from lpsearch.search.results import Metric, set_latency
from lpsearch.wording import name_count

__all__ = ["FrontPoint", "JoinEffects", "StudyReport", "build_report", "count_joins", "load_report", "name_row"]

logger = logging.getLogger(__name__)

FRONT_SCHEMA_VERSION = 1
"""Version of ``front.json`` that is read."""

_NEEDED_SETTINGS = ("num_layers", "max_group", "metric", "objective")


@dataclass(frozen=True)
class FrontPoint:
    """A plan of the front.

    Attributes:
        record: the plan and its losses on the proxy windows; its latency is that of the study's latency model.
        heldout: its loss on the held-out windows against the unmodified model's; None where it is not known yet.
        plan_file: its plan file relative to the study's directory; None where it has not been written yet.
        speedup: estimated time of the unmodified model over that of the plan; None with latency off.
    """

    record: TrialResult
    heldout: PairedDelta | None
    plan_file: str | None
    speedup: float | None

    def get_loss(self, metric: Metric) -> float:
        """Return the held-out loss, or that on the proxy windows where there is none, in nats per token."""
        return self.record.get_cost(metric) if self.heldout is None else self.heldout.delta


@dataclass(frozen=True)
class JoinEffects:
    """What joins cost, alone and together, in nats per token.

    Attributes:
        measured: for each join, the loss of the plan that has it alone; None where that was not evaluated.
        measured_se: standard errors of these over windows.
        expected: for each join, what the surrogate expects it to cost alone.
        interactions: [i][j] what it expects joins i and j to cost together beyond the sum of each alone; None where i
            is j, or no plan of the space has exactly these two.
    """

    measured: tuple[float | None, ...]
    measured_se: tuple[float | None, ...]
    expected: tuple[float, ...]
    interactions: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class StudyReport:
    """Everything that a report shows of a study.

    Attributes:
        name: of the study.
        directory: where its plan files are, as commands are to name it.
        settings: what it was begun with.
        records: every finished plan in the order of the trials; latencies are those of ``latency_model``.
        front: the baseline, then the plans that no other beats, fewest joins first.
        windows_front: for each number of joins the contiguous window of least loss, where the study tried such windows.
        effects: of the joins; None before a plan with a join is finished.
        latency_model: estimates of time; None with latency off.
        is_exact: every plan of the space was evaluated.
        is_current: the plan files are those of this front, so that no search is under way or was interrupted.
    """

    name: str
    directory: str
    settings: Mapping[str, Any]
    records: tuple[TrialResult, ...]
    front: tuple[FrontPoint, ...]
    windows_front: tuple[TrialResult, ...]
    effects: JoinEffects | None
    latency_model: LatencyModel | None
    is_exact: bool
    is_current: bool

    @property
    def metric(self) -> Metric:
        """The loss that was searched."""
        metric: Metric = self.settings["metric"]
        return metric

    @property
    def objective(self) -> Objective:
        """What was traded against the loss."""
        objective: Objective = self.settings["objective"]
        return objective

    @property
    def baseline(self) -> TrialResult:
        """The unmodified model."""
        return self.front[0].record

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.baseline.plan.num_layers

    @property
    def has_latency(self) -> bool:
        """Whether times are known."""
        return self.baseline.latency_ms is not None

    @property
    def proxy_tokens(self) -> int:
        """Tokens behind the losses of all finished plans."""
        return sum(record.proxy_tokens for record in self.records)

    @cached_property
    def reference_cost(self) -> float:
        """Loss up to which the hypervolume counts."""
        return find_reference_cost([point.record for point in self.front], self.metric)

    @cached_property
    def progress(self) -> tuple[ProgressStep, ...]:
        """What was known after every trial."""
        return trace_progress(
            self.records, metric=self.metric, objective=self.objective, reference_cost=self.reference_cost
        )


def load_report(store: StudyStore, directory: Path) -> StudyReport:
    """Read what there is of a study, finished or not.

    Args:
        store: its database.
        directory: its directory, with ``front.json`` and the plan files where they are written.

    Raises:
        UsageError: if the database holds no such study, or no plan of it is finished.
        StudyVersionError: if another version wrote the study.
        StudyError: if the database fails.
    """
    settings = store.load_settings()
    if settings is None:
        raise UsageError(f"{store.where}: holds no study {store.study_name!r}; begin it with `lpsearch optimize`")
    missing = [name for name in _NEEDED_SETTINGS if name not in settings]
    if missing:
        raise _build_version_error(store, f"its record has no {', '.join(missing)}")
    records = _load_finished(store)
    profile = parse_recorded_profile(store.load_latency_profile())
    front_file = _load_front_file(directory, store.study_name)
    return build_report(store, directory, settings, records, profile, front_file)


def build_report(
    store: StudyStore,
    directory: Path,
    settings: Mapping[str, Any],
    records: Sequence[TrialResult],
    profile: LatencyProfile | None,
    front_file: Mapping[str, Any] | None,
) -> StudyReport:
    """Put together what was read of a study; see :func:`load_report` for what raises.

    Args:
        store: its database, for the held-out losses.
        directory: its directory.
        settings: what it was begun with.
        records: its finished plans, the baseline among them.
        profile: its latency profile.
        front_file: the content of its ``front.json``.
    """
    metric: Metric = settings["metric"]
    latency_model = None if profile is None else LatencyModel(profile)
    if latency_model is not None:
        baseline_ms = _estimate_latency_ms(latency_model, Plan.baseline(int(settings["num_layers"])))
        records = [
            set_latency(record, _estimate_latency_ms(latency_model, record.plan), baseline_ms) for record in records
        ]
    front = build_front(records, metric=metric, objective=settings["objective"])
    plan_files = {_key(point["groups"]): str(point["plan"]) for point in (front_file or {}).get("front", ())}
    points = []
    for record in front:
        plan_file = plan_files.get(_key(record.plan.groups))
        is_written = plan_file is not None and (directory / plan_file).is_file()
        points.append(
            FrontPoint(
                record=record,
                heldout=_load_heldout(store, record.plan, metric),
                plan_file=plan_file if is_written else None,
                speedup=record.speedup,
            )
        )
    space = JoinSpace(int(settings["num_layers"]), int(settings["max_group"]), tuple(settings.get("freeze", ())))
    return StudyReport(
        name=store.study_name,
        directory=str(directory),
        settings=settings,
        records=tuple(records),
        front=tuple(points),
        windows_front=_find_windows(records, space, metric),
        effects=_estimate_effects(records, space, metric),
        latency_model=latency_model,
        is_exact=bool((front_file or {}).get("exact", False)),
        is_current=all(point.plan_file is not None for point in points)
        and (front_file or {}).get("trials") == len(records),
    )


def count_joins(record: TrialResult) -> str:
    """Say how many joins a plan has."""
    return name_count(record.num_joins, "join")


def name_row(report: StudyReport, record: TrialResult) -> str:
    """Name a plan of the front by its joins, and by its trial where several have as many."""
    alike = sum(point.record.num_joins == record.num_joins for point in report.front)
    return str(record.num_joins) if alike == 1 else f"{record.num_joins} (trial {record.trial})"


def _load_finished(store: StudyStore) -> list[TrialResult]:
    with store.translate_errors():
        has_trials = store.study_name in optuna.get_all_study_names(store.optuna_storage)
    records = read_results(store) if has_trials else []
    if not any(record.num_joins == 0 for record in records):
        raise UsageError(
            f"{store.where}: no plan of the study {store.study_name!r} is finished yet; "
            "run `lpsearch optimize` on, or wait for its first trial"
        )
    return records


def _load_front_file(directory: Path, study_name: str) -> dict[str, Any] | None:
    """Return the content of ``front.json``; None where it is not written yet, not readable or of another study."""
    path = directory / "front.json"
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be read (%s); the report names no plan files", path, error)
        return None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != FRONT_SCHEMA_VERSION:
        raise StudyVersionError(
            f"{path}: schema_version is {version!r}, this lpsearch reads {FRONT_SCHEMA_VERSION}; run the same "
            "`lpsearch optimize` again to rewrite it, or use the version that wrote it"
        )
    try:
        for point in document["front"]:
            _key(point["groups"]), str(point["plan"])
    except (KeyError, TypeError) as error:
        logger.warning("%s: not the front of a study (%r); the report names no plan files", path, error)
        return None
    assert isinstance(document, dict)
    named = document.get("study", study_name)
    if named != study_name:
        logger.warning("%s: of the study %r, not %r; the report names no plan files", path, named, study_name)
        return None
    return document


def _build_version_error(store: StudyStore, what: str) -> StudyVersionError:
    return StudyVersionError(
        f"{store.where}: the study {store.study_name!r} was written by another version of lpsearch: {what}; "
        "read it with that version, or search again with --fresh, which moves it aside"
    )


def _load_heldout(store: StudyStore, plan: Plan, metric: Metric) -> PairedDelta | None:
    """Return a plan's held-out loss against the baseline's, where both are known and finite on the same windows."""
    base_indices, base = store.load_known_losses(Plan.baseline(plan.num_layers), split="heldout")
    window_indices, losses = store.load_known_losses(plan, split="heldout")
    if not window_indices or window_indices != base_indices:
        return None
    if metric == "kl":
        if losses.kl_nats_per_token is None:
            return None
        values, base_values = losses.kl_nats_per_token, (0.0,) * len(window_indices)
    else:
        values, base_values = losses.nll_nats_per_token, base.nll_nats_per_token
    if not all(map(math.isfinite, (*values, *base_values))):
        return None
    return compute_paired_delta(values, base_values)


def _estimate_latency_ms(latency_model: LatencyModel, plan: Plan) -> float | None:
    """Return a plan's time; None for a group larger than those measured, e.g. of an enqueued plan."""
    try:
        return latency_model.estimate_latency_ms(plan)
    except ConfigError:
        return None


def _find_windows(records: Sequence[TrialResult], space: JoinSpace, metric: Metric) -> tuple[TrialResult, ...]:
    """Return the best contiguous window of each number of joins, if the study set out to try such windows.

    A search that meets a window by chance is no comparison with the published method.
    """
    windows = [record for record in records if _is_window(record.plan, space) and is_complete(record)]
    if not any(record.origin in ("window", "enqueued") for record in windows):
        return ()
    best: dict[int, TrialResult] = {}
    for record in sorted(windows, key=lambda record: record.get_cost(metric)):
        best.setdefault(record.num_joins, record)
    return tuple(best[num_joins] for num_joins in sorted(best) if math.isfinite(best[num_joins].get_cost(metric)))


def is_complete(record: TrialResult) -> bool:
    """Say whether a plan has losses on all windows, as the baseline has."""
    return record.state == "complete"


def _is_window(plan: Plan, space: JoinSpace) -> bool:
    joins = plan.joins
    return len(joins) > 0 and joins == space.repair(range(joins[0], joins[-1] + 1))


def _estimate_effects(records: Sequence[TrialResult], space: JoinSpace, metric: Metric) -> JoinEffects | None:
    num_joins = space.num_join_positions
    surrogate = fit_surrogate(records, num_joins=num_joins, metric=metric)
    if surrogate is None:
        return None
    single = {record.plan.joins[0]: record for record in records if record.num_joins == 1}
    single = {join: record for join, record in single.items() if math.isfinite(record.get_cost(metric))}
    alone = surrogate.estimate_mean(np.eye(num_joins, dtype=bool))
    pairs = [
        (first, second)
        for first in range(num_joins)
        for second in range(first + 1, num_joins)
        if space.is_valid((first, second))
    ]
    interactions: list[list[float | None]] = [[None] * num_joins for _ in range(num_joins)]
    if pairs:
        together = surrogate.estimate_mean(np.array([np.isin(np.arange(num_joins), pair) for pair in pairs]))
        for (first, second), value in zip(pairs, together, strict=True):
            interactions[first][second] = interactions[second][first] = float(value - alone[first] - alone[second])
    return JoinEffects(
        measured=tuple(single[i].get_cost(metric) if i in single else None for i in range(num_joins)),
        measured_se=tuple(single[i].get_cost_se(metric) if i in single else None for i in range(num_joins)),
        expected=tuple(float(value) for value in alone),
        interactions=tuple(tuple(row) for row in interactions),
    )


def _key(groups: Any) -> str:
    return json.dumps([list(group) for group in groups])
