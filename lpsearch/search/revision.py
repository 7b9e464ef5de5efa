"""Telling cheaply whether anything of a study changed, for those who look at it while it runs."""

from __future__ import annotations

import hashlib
import json

from sqlalchemy import func, select

from lpsearch.search import database as db
from lpsearch.search.store import StudyStore

__all__ = ["read_revision"]


def read_revision(store: StudyStore) -> str:
    """Return a text that changes whenever a study has a new trial, loss, latency profile or front.

    Args:
        store: its database; a few queries that count are all that it is asked.

    Raises:
        StudyError: if the database fails.
    """
    own, studies, trials = db.studies_table, db.optuna_studies_table, db.optuna_trials_table
    plans, evaluations = db.plans_table, db.evaluations_table
    profiles, fronts = db.latency_profiles_table, db.fronts_table
    own_id = select(own.c.id).where(own.c.name == store.study_name).scalar_subquery()
    optuna_id = select(studies.c.study_id).where(studies.c.study_name == store.study_name).scalar_subquery()
    queries = (
        select(own.c.settings).where(own.c.id == own_id),
        select(trials.c.state, func.count()).where(trials.c.study_id == optuna_id).group_by(trials.c.state),
        select(func.count()).select_from(evaluations.join(plans)).where(plans.c.study_id == own_id),
        select(func.max(profiles.c.id)).where(profiles.c.study_id == own_id),
        select(fronts.c.updated_at).where(fronts.c.study_id == own_id),
    )
    with store.translate_errors(), store.optuna_storage.engine.connect() as connection:
        found = [sorted(map(str, connection.execute(query))) for query in queries]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
