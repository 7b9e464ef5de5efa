"""The stamp of a study changes with everything that is recorded, and only then."""

from __future__ import annotations

from pathlib import Path

from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, run_study
from tests.search.evaluators import SyntheticEvaluator


def test_every_change_shows_in_the_stamp(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with StudyStore(url, study_name="a") as store, StudyStore(url, study_name="b") as other:

        def search(budget: int) -> None:
            evaluator = SyntheticEvaluator(6, num_windows=4)
            run_study(evaluator=evaluator, space=PlanSpace(6), budget=budget, store=store)

        losses = WindowLosses(nll_nats_per_token=(1.0,), kl_nats_per_token=None, tokens_per_window=3)
        steps = [
            lambda: store.save_settings({"model": "m"}),
            lambda: search(1),
            lambda: search(2),
            lambda: store.losses.record(Plan.baseline(6), [0], losses, split="heldout"),
            lambda: store.save_latency_profile({}),
            lambda: store.save_front({"front": []}),
            lambda: store.save_front({"front": [1]}),
        ]
        seen = [store.read_stamp()]
        for step in steps:
            step()
            seen.append(store.read_stamp())
            assert store.read_stamp() == seen[-1]
        assert len({*seen}) == len(seen)
        other.save_settings({"model": "m"})
        other.losses.record(Plan.baseline(6), [0], losses, split="proxy")
        assert store.read_stamp() == seen[-1], "another study in the same database is no change"
