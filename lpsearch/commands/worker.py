"""``lpsearch worker``: one more coordinator of a study on a database server, on any machine that can reach it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lpsearch.commands.console import Answer, adopt_optuna_log
from lpsearch.commands.options import DeviceOption, TrustOption
from lpsearch.config import OptimizeConfig, ResolvedConfig
from lpsearch.errors import ConfigError, StudyError, UsageError
from lpsearch.wording import name_count

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lpsearch.latency import LatencyModel
    from lpsearch.search import StudyResult, StudyStore

__all__ = ["worker"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Joined:
    """A study that this process has joined.

    Attributes:
        store: its database.
        config: what the study was begun with, and the options of this process.
    """

    store: StudyStore
    config: ResolvedConfig


def worker(
    storage: Annotated[str, typer.Option(help="database URL of a server, as optimize was given it", metavar="URL")],
    study: Annotated[str | None, typer.Option(help="name of the study; default: the only one")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="where the model is on this machine; default: where it was when the study was begun"),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="distinct finished plans in total; default: that of the processes that search", min=1),
    ] = None,
    device: DeviceOption = "auto",
    timeout: Annotated[
        float | None, typer.Option(help="seconds after which no further trial starts", metavar="SECONDS")
    ] = None,
    trust_remote_code: TrustOption = False,
) -> Answer:
    """Evaluate plans of a study that another machine searches, with a model and a device of this one."""
    if timeout is not None and timeout <= 0:
        raise UsageError(f"--timeout: {timeout} is no number of seconds above 0")
    adopt_optuna_log()
    options = {"device": device, "timeout": timeout, "trust_remote_code": trust_remote_code, "storage": storage}
    with _join(storage, study, budget, {name: value for name, value in options.items() if value is not None}) as joined:
        result = _search(joined, model)
        store = joined.store
        document = {
            "study": store.study_name,
            "storage": store.where,
            "trials": len(result.results),
            "evaluated": result.num_new,
            "timed_out": result.timed_out,
        }
    shown = f"{name_count(result.num_new, 'plan')} of {len(result.results)} evaluated here"
    return Answer(document, f"{store.study_name} in {store.where}: {shown}")


@contextmanager
def _join(storage: str, study: str | None, budget: int | None, options: dict[str, object]) -> Iterator[_Joined]:
    """Open a study on a server, and join the processes that search it.

    Raises:
        UsageError: if there is no such study, nobody tells up to how many trials it is searched, or the database is
            SQLite, which has one coordinator.
    """
    from lpsearch.search import StudyStore
    from lpsearch.search.storage_url import parse_storage_url

    url = parse_storage_url(storage)
    if url.get_backend_name() == "sqlite":
        raise UsageError(
            "--storage: a SQLite file is written by one process at a time; search with a PostgreSQL or MySQL URL to "
            "have several, e.g. postgresql://user:password@host/database"
        )
    with StudyStore(url, study_name=study or "") as store:
        held = store.list_studies()
        if study is None and len(held) == 1:
            store.study_name = held[0]
        elif study is None or study not in held:
            known = f"it holds {', '.join(map(repr, held))}; choose one with --study" if held else "it holds none"
            raise UsageError(f"{store.where}: which study is meant is not known: {known}")
        with store.hold_lock():
            store.lock.wait_for_turn()  # what begins the study may be at it still
            store.lock.end_turn()
            recorded = store.load_settings()
            if recorded is None or "source" not in recorded:
                raise UsageError(f"{store.where}: the study {store.study_name!r} was not begun by `lpsearch optimize`")
            if budget is None:
                budgets = [member.budget for member in store.lock.list_searching() if member.budget is not None]
                if not budgets:
                    raise UsageError(
                        f"{store.where}: no process searches {store.study_name!r}, so how many plans it is to have is "
                        "not known; start `lpsearch optimize` first, or give --budget"
                    )
                budget = max(budgets)
            values = OptimizeConfig.model_validate({"model": recorded["model"], "budget": budget, **options})
            yield _Joined(store, ResolvedConfig(values, frozenset()))


def _search(joined: _Joined, model: str | None) -> StudyResult:
    """Evaluate plans until the study needs no more."""
    from lpsearch.commands.checks import read_num_layers
    from lpsearch.commands.evaluators import Evaluators, choose_search_variant
    from lpsearch.commands.loading import describe_device, load_for_search, resolve_device
    from lpsearch.commands.progress import show_search
    from lpsearch.commands.studies import follow_record, resume_study
    from lpsearch.models import resolve_source
    from lpsearch.models.sources import ModelSource
    from lpsearch.search import PlanSpace, run_study

    store = joined.store
    recorded = store.load_settings() or {}
    values, source = follow_record(recorded, joined.config, ModelSource.from_dict(recorded["source"]))
    if model is not None:
        source = resolve_source(model)

    def build_space(num_layers: int) -> PlanSpace:
        return PlanSpace(num_layers, values.max_group, values.freeze, values.allow)

    def check_config(config: PretrainedConfig) -> None:
        build_space(read_num_layers(config))

    loaded = load_for_search(
        source,
        device=resolve_device(values.device),
        dtype=values.dtype,
        trust_remote_code=values.trust_remote_code,
        check=check_config,
    )
    windows, calibration = resume_study(store, recorded, loaded)
    evaluators = Evaluators(loaded.model, windows, metric=values.metric, calibration=calibration)
    latency_model = _load_latency_model(store, values)
    with show_search() as progress:
        return run_study(
            evaluator=evaluators.list_named(device_name=describe_device(loaded.model.device))["proxy"],
            space=build_space(loaded.identity.num_layers),
            budget=values.budget,
            store=store,
            sampler=values.sampler,
            seed=values.seed,
            metric=values.metric,
            objective=values.objective,
            estimate_latency_ms=None if latency_model is None else latency_model.estimate_latency_ms,
            timeout_s=values.timeout,
            staged=values.staged,
            kinds=windows["proxy"].kinds,
            worst_case=values.worst_case,
            variant=choose_search_variant(calibration),
            on_trial=progress.on_trial,
            on_evaluation=progress.on_evaluation,
        )


def _load_latency_model(store: StudyStore, values: OptimizeConfig) -> LatencyModel | None:
    """Return the latency model that the study has recorded: the worker's device may be another than the target.

    Raises:
        StudyError: if there is none, where latency is the objective.
    """
    from lpsearch.latency import LatencyModel
    from lpsearch.latency.mix import parse_mix
    from lpsearch.latency.profile import parse_recorded_profile

    profile = parse_recorded_profile(store.load_latency_profile())
    if profile is None:
        if values.objective == "latency":
            raise StudyError(
                f"{store.where}: the study {store.study_name!r} has no latency profile, which `lpsearch optimize` "
                "measures as it begins; start the worker after it"
            )
        return None
    try:
        return LatencyModel.from_mix(profile, parse_mix(values.workload) or {}, name=f"{store.where}: its profile")
    except ConfigError:
        if values.objective == "latency":
            raise
        logger.warning("latency is off: the study's profile lacks a workload")
        return None
