"""What the other coordinators of a study do, read from its database.

A search looks twice for each of its trials. So it reads numbers and states, and the rest only of trials that are news:
a trial has a parameter for each choice of a plan, and all that Optuna would read of it takes far longer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from lpsearch.plan import Plan
from lpsearch.search import optuna_tables
from lpsearch.search.store import StudyStore

__all__ = ["News", "Others"]

_ENDED = {TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED}


@dataclass(frozen=True)
class News:
    """What became of trials that this coordinator does not run.

    Attributes:
        finished: trials that another coordinator finished.
        orphans: running trials whose coordinator is gone.
    """

    finished: list[FrozenTrial]
    orphans: list[FrozenTrial]


class Others:
    """The coordinators beside this one; none where a study has one at a time.

    Attributes:
        running: the plans of their running trials by number; None where one is not chosen yet.

    Args:
        store: the study's database.
        study: the study.
    """

    def __init__(self, store: StudyStore, study: optuna.Study) -> None:
        self._store = store
        self._study = study
        self._first = 0  # all trials before it have ended, and are known
        self.running: dict[int, Plan | None] = {}

    def look(self, *, own: Collection[int], known: Collection[int]) -> News:
        """See what the others run and what became of their trials.

        Args:
            own: numbers of the trials that this coordinator runs.
            known: numbers of the finished trials whose results it has.

        Raises:
            StudyError: if the database fails.
        """
        self.running = {}
        if self._store.claims.owner is None:
            return News([], [])
        with self._store.begin_transaction() as connection:
            rows = optuna_tables.list_trials(connection, self._store.study_name, first=self._first)
            at_work = [row for row in rows if row.state == TrialState.RUNNING and row.number not in own]
            attributes = (
                optuna_tables.read_attributes(connection, [row.trial_id for row in at_work], ("groups", "owner"))
                if at_work
                else {}
            )
        live = self.list_live_ids() if at_work else set()  # after the trials, since who begins one has joined before
        orphans = []
        for row in at_work:
            noted = attributes[row.trial_id]
            if noted.get("owner") in live:
                self.running[row.number] = Plan.from_key(noted["groups"]) if "groups" in noted else None
            else:
                orphans.append(row)
        finished = [row for row in rows if row.state == TrialState.COMPLETE and row.number not in known]
        new = {row.number for row in finished}
        for row in rows:
            if row.state not in _ENDED or row.number in new:
                break
            self._first = row.number + 1
        return News([self._read(row) for row in finished], [self._read(row) for row in orphans])

    def list_live_ids(self) -> set[str]:
        """Return the ids of the other coordinators that live."""
        owner = self._store.claims.owner
        return set() if owner is None else self._store.list_live_ids() - {owner}

    def _read(self, row: optuna_tables.TrialRow) -> FrozenTrial:
        with self._store.translate_errors():
            return self._study._storage.get_trial(row.trial_id)
