"""Opening the Optuna study of a store: its settings, its objectives and what it has finished."""

from __future__ import annotations

import warnings

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import TrialState

from lpsearch.errors import ResumeError, StudyError
from lpsearch.plan import Plan
from lpsearch.search.front import Objective
from lpsearch.search.ledger import Ledger
from lpsearch.search.records import Metric, PlanRecord, read_record
from lpsearch.search.settings import compare_settings
from lpsearch.search.space import JoinSpace
from lpsearch.search.store import StudyStore

__all__ = ["load_records", "open_study", "read_finished", "record_settings"]


def record_settings(
    store: StudyStore, space: JoinSpace, metric: Metric, objective: Objective, sampler: str, seed: int
) -> None:
    """Begin the study, or check that this run may continue it; what the caller recorded stays."""
    requested = {
        "num_layers": space.num_layers,
        "max_group": space.max_group,
        "metric": metric,
        "objective": objective,
        "sampler": sampler,
        "seed": seed,
    }
    recorded = store.load_settings() or {}
    compare_settings(recorded, requested)
    if not requested.keys() <= recorded.keys():
        store.save_settings({**requested, **recorded})


def open_study(store: StudyStore, metric: Metric, objective: Objective) -> optuna.Study:
    """Create or load the Optuna study, with its objectives named.

    Raises:
        ResumeError: if a study of this name has other objectives.
    """
    names = [
        "depth_reduction" if objective == "depth" else "latency_ms",
        "perplexity" if metric == "nll" else "kl_nats_per_token",
    ]
    directions = [
        StudyDirection.MAXIMIZE if objective == "depth" else StudyDirection.MINIMIZE,
        StudyDirection.MINIMIZE,
    ]
    study = optuna.create_study(
        storage=store.optuna_storage, study_name=store.study_name, directions=directions, load_if_exists=True
    )
    if study.directions != directions:
        raise ResumeError(
            f"{store.where}: study {store.study_name!r} has other objectives than {' and '.join(names)}; "
            "it was not made by this command, so choose another --study or --out"
        )
    if study.metric_names != names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(names)
    return study


def read_finished(study: optuna.Study) -> dict[Plan, PlanRecord]:
    """Return the finished plans of a study in the order of the trials, each once."""
    finished: dict[Plan, PlanRecord] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        record = read_record(trial)
        finished.setdefault(record.plan, record)
    return finished


def load_records(store: StudyStore) -> list[PlanRecord]:
    """Return every finished plan of a study in the order of the trials, each once; evaluates nothing.

    A plan that was evaluated on further windows after its trial was told has the values of all of them.

    Raises:
        StudyError: if there is no such study or its database fails.
    """
    with store.translate_errors():
        try:
            study = optuna.load_study(study_name=store.study_name, storage=store.optuna_storage)
        except KeyError:
            raise StudyError(f"{store.where}: holds no study {store.study_name!r}") from None
        records = list(read_finished(study).values())
    if not records:
        return []
    window_indices, _ = store.load_known_losses(Plan.baseline(records[0].plan.num_layers), split="proxy")
    metric = (store.load_settings() or {}).get("metric", "nll")
    ledger = Ledger(store, num_windows=len(window_indices), metric=metric, staged=False)
    return [ledger.refresh(record) for record in records]
