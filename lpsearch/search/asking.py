"""Asking Optuna for a plan."""

from __future__ import annotations

import optuna

from lpsearch.plan import Plan
from lpsearch.search.space import JoinSpace
from lpsearch.search.store import StudyStore

__all__ = ["ask_trial"]


def ask_trial(
    study: optuna.Study, space: JoinSpace, store: StudyStore, *, is_waiting: bool
) -> tuple[optuna.Trial, Plan]:
    """Ask for the next trial, and note its joins.

    Optuna notes parameters one by one, each in a transaction of its own, which takes longer than choosing them. The
    samplers of this package choose all joins together, and here they are noted together.

    Args:
        study: the study, with its sampler.
        space: the plans.
        store: the study's database.
        is_waiting: a trial waits in the study, whose parameters are fixed; it is handed out first.

    Returns:
        The trial, which is running, and the plan that it stands for.
    """
    if is_waiting:
        trial = study.ask(dict(space.distributions))
        return trial, space.build_plan(trial.params)
    trial = study.ask()
    params = trial.relative_params
    store.record_params(trial.number, params, space.distributions)
    return trial, space.build_plan(params)
