"""Opening the Optuna study of a store: its settings and its objectives."""

from __future__ import annotations

import warnings

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection

from lpsearch.errors import ResumeError
from lpsearch.search.front import Objective
from lpsearch.search.results import Metric
from lpsearch.search.settings import compare_settings
from lpsearch.search.space import JoinSpace
from lpsearch.search.store import StudyStore

__all__ = ["open_study", "record_settings"]


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
