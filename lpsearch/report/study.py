"""What a report shows of a study, read from its database and its directory; evaluates nothing."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lpsearch.config import Metric, Objective
from lpsearch.errors import ConfigError, StudyError, StudyVersionError, UsageError
from lpsearch.front_file import FRONT_NAME, FrontFile, FrontPoint, load_front_file
from lpsearch.latency.mix import parse_mix
from lpsearch.latency.model import LatencyModel
from lpsearch.latency.profile import parse_recorded_profile
from lpsearch.plan import Plan
from lpsearch.report.effects import ChoiceEffects, estimate_effects
from lpsearch.report.progress import ProgressStep, find_reference_cost, trace_progress
from lpsearch.search import PlanSpace, StudyStore, TrialResult, build_front, read_results
from lpsearch.search.losses import read_variant
from lpsearch.search.results import RAW, list_untouched
from lpsearch.wording import name_count

__all__ = ["StudyReport", "describe_cache", "load_report", "name_row"]

logger = logging.getLogger(__name__)

_NEEDED_SETTINGS = ("num_layers", "max_group", "metric", "objective")


@dataclass(frozen=True)
class StudyReport:
    """Everything that a report shows of a study.

    Attributes:
        name: of the study.
        directory: where its plan files are, as commands are to name it.
        settings: what it was begun with.
        results: every finished plan in the order of the trials; times are those of ``latency_model``, and a plan file
            is named where it is there.
        front: the baseline, then the plans that no other beats, those that save least first; none changes a layer that
            the latest run of the search froze.
        blocks: for each number of joins the block of least loss, where the study tried blocks.
        effects: of joins and drops; None before a plan with one is finished.
        latency_model: estimates of time; None with latency off.
        is_exact: every plan of the space was evaluated.
        is_current: the plan files are those of this front, so that no search is under way or was interrupted.
    """

    name: str
    directory: str
    settings: Mapping[str, Any]
    results: tuple[TrialResult, ...]
    front: tuple[TrialResult, ...]
    blocks: tuple[TrialResult, ...]
    effects: ChoiceEffects | None
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
    def is_repaired(self) -> bool:
        """Whether losses are those after a refit of each plan's weights."""
        return read_variant(self.settings) != RAW

    @cached_property
    def untouched(self) -> tuple[TrialResult, ...]:
        """The plans of the front with their losses without repair; empty where there was none, or not yet known."""
        return tuple(list_untouched(self.front))

    @cached_property
    def has_drops(self) -> bool:
        """Whether any plan drops branches."""
        return any(result.num_dropped for result in self.results)

    @cached_property
    def row_title(self) -> str:
        """What the names of the front's plans say; see :func:`name_row`."""
        return "plan" if any(result.num_dropped for result in self.front) else "joins"

    @property
    def is_worst_case(self) -> bool:
        """Whether plans were compared by their worst kind of text."""
        return self.baseline.loss.is_worst_case

    @property
    def has_kinds(self) -> bool:
        """Whether losses are known on several kinds of text."""
        return any(loss is not None and loss.by_kind for loss in (self.baseline.loss, self.baseline.heldout))

    @property
    def baseline(self) -> TrialResult:
        """The unmodified model."""
        return self.front[0]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.baseline.plan.num_layers

    @property
    def has_latency(self) -> bool:
        """Whether times are known."""
        return self.baseline.latency_ms is not None

    @property
    def latency_error(self) -> float | None:
        """Mean relative error of the latency model on depths that it was not fitted to; None where not known."""
        return None if self.latency_model is None else self.latency_model.mean_error

    @property
    def speedup_margin(self) -> float | None:
        """By what share a speed-up may be off; None with latency off."""
        return None if self.latency_model is None else self.latency_model.speedup_margin

    def estimate_kv_bytes_per_token(self, plan: Plan) -> int | None:
        """Return the bytes of a plan's KV cache a token; None where that is not known."""
        return None if self.latency_model is None else self.latency_model.estimate_kv_bytes_per_token(plan)

    @property
    def proxy_tokens(self) -> int:
        """Tokens behind the losses of all finished plans."""
        return sum(result.proxy_tokens for result in self.results)

    @cached_property
    def reference_cost(self) -> float:
        """Loss up to which the hypervolume counts."""
        return find_reference_cost(self.front, self.metric)

    @cached_property
    def progress(self) -> tuple[ProgressStep, ...]:
        """What was known after every trial."""
        return trace_progress(
            self.results, metric=self.metric, objective=self.objective, reference_cost=self.reference_cost
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
        raise StudyVersionError(
            f"{store.where}: the study {store.study_name!r} was written by another version of lpsearch: its record has "
            f"no {', '.join(missing)}; read it with that version, or search again with `lpsearch optimize --fresh`, "
            "which moves it aside"
        )
    profile = parse_recorded_profile(store.load_latency_profile())
    mix = parse_mix(settings.get("workload") or ())
    latency_model = None if profile is None else LatencyModel.from_mix(profile, mix, name=store.where)
    results = _read_finished(store, latency_model)
    file = _load_front_file(directory, store.study_name)
    results = [_name_plan_file(result, directory, file) for result in results]
    metric: Metric = settings["metric"]
    frozen = None if file is None else file.freeze  # by the latest run, which need not be what the study records
    space = PlanSpace(
        int(settings["num_layers"]),
        int(settings["max_group"]),
        tuple(settings.get("freeze", ()) if frozen is None else frozen),
        tuple(settings.get("allow", ("joins",))),
    )
    valid = [result for result in results if frozen is None or result.plan in space]
    front = build_front(valid, metric=metric, objective=settings["objective"])
    is_written = file is not None and all(result.plan_file is not None for result in front)
    return StudyReport(
        name=store.study_name,
        directory=str(directory),
        settings=settings,
        results=tuple(results),
        front=tuple(front),
        blocks=_find_blocks(results, space, metric),
        effects=estimate_effects(results, space, metric),
        latency_model=latency_model,
        is_exact=file is not None and file.exact,
        is_current=is_written and file is not None and file.finished and file.trials == len(results),
    )


def name_row(report: StudyReport, result: TrialResult) -> str:
    """Name a plan of the front by its joins and drops, and by its trial where several have as many of both."""
    alike = sum(_count_choices(other) == _count_choices(result) for other in report.front)
    if report.row_title == "joins":
        name = str(result.num_joins)
    else:
        joins, drops = _count_choices(result)
        counts = [name_count(joins, "join")] * bool(joins) + [name_count(drops, "drop")] * bool(drops)
        name = ", ".join(counts) or "unmodified"
    return name if alike == 1 else f"{name} (trial {result.trial})"


def describe_cache(report: StudyReport, result: TrialResult) -> str:
    """Write the size of a plan's KV cache, e.g. ``10,240 bytes a token, 11.1% less``; empty where it is not known."""
    cached, whole = map(report.estimate_kv_bytes_per_token, (result.plan, report.baseline.plan))
    if cached is None or not whole:
        return ""
    return f"{cached:,} bytes a token" + (f", {1 - cached / whole:.1%} less" if cached != whole else "")


def _count_choices(result: TrialResult) -> tuple[int, int]:
    return result.num_joins, result.num_dropped


def _read_finished(store: StudyStore, latency_model: LatencyModel | None) -> list[TrialResult]:
    """Read the finished plans, the baseline among them, with times by the latency model.

    Raises:
        UsageError: if there are none yet.
    """

    def estimate(plan: Plan) -> float | None:
        assert latency_model is not None
        try:
            return latency_model.estimate_latency_ms(plan)
        except ConfigError:  # a larger group than those measured, of an enqueued plan
            return None

    known = None if latency_model is None else estimate
    results = read_results(store, estimate_latency_ms=known) if store.has_trials() else []
    if not any(result.is_baseline for result in results):
        raise UsageError(
            f"{store.where}: no plan of the study {store.study_name!r} is finished yet; "
            "run `lpsearch optimize` again, or wait for its first trial"
        )
    return results


def _load_front_file(directory: Path, study_name: str) -> FrontFile | None:
    """Return the content of ``front.json``; None where it is not written yet, not readable or of another study."""
    try:
        file = load_front_file(directory)
    except StudyVersionError:
        raise
    except StudyError as error:
        logger.warning("%s; the report names no plan files", error)
        return None
    if file is not None and file.study != study_name:
        logger.warning(
            "%s: of the study %r, not %r; the report names no plan files",
            directory / FRONT_NAME,
            file.study,
            study_name,
        )
        return None
    return file


def _name_plan_file(result: TrialResult, directory: Path, file: FrontFile | None) -> TrialResult:
    """Name the plan file of a result where it is there."""
    key = result.plan.key
    names = () if file is None else (point.plan for point in file.front if _read_key(point) == key)
    return dataclasses.replace(result, plan_file=next((name for name in names if (directory / name).is_file()), None))


def _read_key(point: FrontPoint) -> str:
    return Plan.from_groups(point.groups, dropped=point.dropped).key


def _find_blocks(results: Sequence[TrialResult], space: PlanSpace, metric: Metric) -> tuple[TrialResult, ...]:
    """Return the best block of each number of joins, if the study set out to try blocks.

    A search that meets a block by chance is no comparison with the published method.
    """
    blocks = [result for result in results if result.state == "complete" and _is_block(result.plan, space)]
    if not any(result.origin in ("window", "enqueued") for result in blocks):
        return ()
    best: dict[int, TrialResult] = {}
    for result in sorted(blocks, key=lambda result: result.get_cost(metric)):
        best.setdefault(result.num_joins, result)
    return tuple(best[num_joins] for num_joins in sorted(best))


def _is_block(plan: Plan, space: PlanSpace) -> bool:
    joins = plan.joins
    return len(joins) > 0 and not plan.num_dropped and joins == space.repair(range(joins[0], joins[-1] + 1))
