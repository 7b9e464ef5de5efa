"""What a study is begun with, what may not change when it is resumed, and how a command line names it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection

from lpsearch.errors import ResumeError
from lpsearch.kinds import TextKind, describe_kinds
from lpsearch.search.front import Objective
from lpsearch.search.kinds import read_kinds, write_kinds
from lpsearch.search.results import RAW, Metric, Variant
from lpsearch.search.space import PlanSpace
from lpsearch.search.storage_url import find_sqlite_path
from lpsearch.search.store import StudyStore

__all__ = [
    "FIXED_SETTINGS",
    "compare_settings",
    "complete_settings",
    "has_own_database",
    "list_study_options",
    "open_study",
    "record_settings",
]

logger = logging.getLogger(__name__)

FIXED_SETTINGS = (
    "model",
    "fingerprint",
    "num_layers",
    "data",
    "heldout",
    "windows",
    "seq_len",
    "dtype",
    "metric",
    "objective",
    "max_group",
    "allow",
    "worst_case",
    "recover",
    "workload",
)
"""Settings that define what a trial's values mean: changing one would mix values that cannot be compared."""


def complete_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a study was begun with; of a study from before a setting was known, that it was off."""
    return {"worst_case": False, "recover": "off", "workload": [], "allow": ["joins"], **recorded}


def compare_settings(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Refuse to resume a study with settings that would make its trials incomparable.

    Only names that both sides have are compared, so an option that was not given can be left out of ``requested``. A
    different sampler is allowed and logged: the values stay comparable, but not the search.

    Args:
        recorded: settings that the study was begun with, JSON values.
        requested: settings of this run.

    Raises:
        ResumeError: with every difference, both values, and how to mend it.
    """
    differences = [
        f"--{name.replace('_', '-')} was {_show(recorded[name])}, now {_show(requested[name])}"
        for name in FIXED_SETTINGS
        if name in recorded and name in requested and _show(recorded[name]) != _show(requested[name])
    ]
    if differences:
        raise ResumeError(
            f"the study was begun with other settings: {'; '.join(differences)}. Repeat the command with the recorded "
            "values to resume it, add --fresh to move the old study aside, or name another directory with --out"
        )
    begun_with, now = recorded.get("sampler"), requested.get("sampler")
    if begun_with is not None and now is not None and begun_with != now:
        logger.warning("the study was begun with the sampler %s and goes on with %s", begun_with, now)


def record_settings(
    store: StudyStore,
    space: PlanSpace,
    metric: Metric,
    objective: Objective,
    sampler: str,
    seed: int,
    *,
    kinds: Sequence[TextKind] = (),
    worst_case: bool = False,
    variant: Variant = RAW,
) -> None:
    """Begin the study, or check that this run may continue it; what the caller recorded stays.

    Raises:
        ResumeError: if it may not.
    """
    requested = {
        "num_layers": space.num_layers,
        "max_group": space.max_group,
        "allow": list(space.allow),
        "metric": metric,
        "objective": objective,
        "sampler": sampler,
        "seed": seed,
        "worst_case": worst_case,
        "recover": "off" if variant == RAW else variant,
        **write_kinds({"proxy": kinds}),
    }
    recorded = store.load_settings() or {}
    if "num_layers" in recorded:
        recorded = complete_settings(recorded)
        _compare_kinds(read_kinds(recorded, "proxy"), kinds)
    compare_settings(recorded, requested)
    if not requested.keys() <= recorded.keys():
        store.save_settings({**requested, **recorded})


def _compare_kinds(begun_with: Sequence[TextKind], now: Sequence[TextKind]) -> None:
    shown = [describe_kinds(kinds) if len(kinds) > 1 else "one kind of text" for kinds in (begun_with, now)]
    if shown[0] != shown[1]:
        raise ResumeError(f"the study was begun with {shown[0]}, now {shown[1]}; its losses belong to the former")


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


def has_own_database(store: StudyStore, directory: Path) -> bool:
    """Say whether a study's database is ``study.db`` in its directory.

    Args:
        store: the database.
        directory: directory of the study.
    """
    path = find_sqlite_path(store.url)
    return path is not None and path.resolve() == (directory / "study.db").resolve()


def list_study_options(store: StudyStore, directory: Path) -> list[str]:
    """Return what a command needs besides the directory of a study to find it, one word each, not quoted.

    Args:
        store: its database.
        directory: its directory.

    Returns:
        Nothing where ``study.db`` in the directory is the database; else ``--storage`` with the URL, whose secrets are
        masked, and ``--study``, since others may be in it too.
    """
    if has_own_database(store, directory):
        return []
    path = find_sqlite_path(store.url)
    shown = store.where if path is None else str(store.url)
    return ["--storage", shown, "--study", store.study_name]


def _show(value: Any) -> str:
    """Write a value as compact JSON, which also makes tuples and lists equal."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
