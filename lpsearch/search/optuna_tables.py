"""What Optuna's interface cannot do to its own tables, done past it; nothing else reads or writes them directly."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import TrialState
from sqlalchemy import Connection, ScalarSelect, column, delete, func, insert, select, table, update

__all__ = [
    "TABLE_NAMES",
    "TrialRow",
    "count_trials",
    "delete_study_attribute",
    "list_trials",
    "read_attributes",
    "record_attributes",
    "record_params",
    "rename_study",
]

_studies = table("studies", column("study_id"), column("study_name"))
_study_attributes = table("study_system_attributes", column("study_id"), column("key"))
_trials = table("trials", column("trial_id"), column("number"), column("study_id"), column("state"))
_params = table(
    "trial_params", column("trial_id"), column("param_name"), column("param_value"), column("distribution_json")
)
_attributes = table("trial_user_attributes", column("trial_id"), column("key"), column("value_json"))

TABLE_NAMES = frozenset({_studies.name, _trials.name})
"""Tables by which a database of Optuna's is known."""


@dataclass(frozen=True)
class TrialRow:
    """A trial without its parameters, values and attributes.

    Attributes:
        trial_id: its key.
        number: in its study.
        state: what became of it.
    """

    trial_id: int
    number: int
    state: TrialState


def rename_study(connection: Connection, name: str, new_name: str) -> None:
    """Rename a study, if there is one of this name."""
    connection.execute(update(_studies).where(_studies.c.study_name == name).values(study_name=new_name))


def delete_study_attribute(connection: Connection, study_name: str, key: str) -> None:
    """Delete a system attribute of a study, if it has it."""
    own = _study_attributes.c
    connection.execute(delete(_study_attributes).where(own.study_id == _find_study(study_name), own.key == key))


def record_params(
    connection: Connection,
    study_name: str,
    trial: int,
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
) -> None:
    """Note all parameters of a running trial that has none yet; Optuna notes each in a transaction of its own.

    Args:
        connection: to the database, in a transaction.
        study_name: name of the study.
        trial: number of the trial.
        params: values by name.
        distributions: what each value is from.
    """
    trial_id = _find_trial_id(connection, study_name, trial)
    rows = [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": distributions[name].to_internal_repr(value),
            "distribution_json": distribution_to_json(distributions[name]),
        }
        for name, value in params.items()
    ]
    if rows:
        connection.execute(insert(_params), rows)


def record_attributes(connection: Connection, study_name: str, trial: int, attributes: Mapping[str, Any]) -> None:
    """Note user attributes of a running trial that has none of them yet; Optuna notes each in its own transaction.

    Args:
        connection: to the database, in a transaction.
        study_name: name of the study.
        trial: number of the trial.
        attributes: JSON values by name.
    """
    trial_id = _find_trial_id(connection, study_name, trial)
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
    if rows:
        connection.execute(insert(_attributes), rows)


def count_trials(connection: Connection, study_name: str) -> dict[str, int]:
    """Return how many trials a study has in each state; Optuna reads each of them to count them."""
    own = _trials.c
    query = select(own.state, func.count()).where(own.study_id == _find_study(study_name)).group_by(own.state)
    return {str(state): count for state, count in connection.execute(query)}


def list_trials(connection: Connection, study_name: str, *, first: int) -> list[TrialRow]:
    """Return the trials of a study from a number on, by number; Optuna reads all that is known of each.

    Args:
        connection: to the database, in a transaction.
        study_name: name of the study.
        first: the least number.
    """
    own = _trials.c
    query = select(own.trial_id, own.number, own.state).where(
        own.study_id == _find_study(study_name), own.number >= first
    )
    rows = connection.execute(query.order_by(own.number))
    return [TrialRow(row.trial_id, row.number, TrialState[row.state]) for row in rows]


def read_attributes(
    connection: Connection, trial_ids: Collection[int], names: Collection[str]
) -> dict[int, dict[str, Any]]:
    """Return some user attributes of some trials, by key of the trial and name; what a trial lacks is left out.

    Args:
        connection: to the database, in a transaction.
        trial_ids: keys of the trials.
        names: names of the attributes.
    """
    own = _attributes.c
    query = select(own.trial_id, own.key, own.value_json).where(own.trial_id.in_(trial_ids), own.key.in_(names))
    found: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in trial_ids}
    for row in connection.execute(query):
        found[row.trial_id][row.key] = json.loads(row.value_json)
    return found


def _find_trial_id(connection: Connection, study_name: str, trial: int) -> int:
    """Return the key of a trial by its number."""
    query = select(_trials.c.trial_id).where(_trials.c.study_id == _find_study(study_name), _trials.c.number == trial)
    return int(connection.execute(query).scalar_one())


def _find_study(name: str) -> ScalarSelect[Any]:
    return select(_studies.c.study_id).where(_studies.c.study_name == name).scalar_subquery()
