"""Proposals are made in one thread of linear algebra, and nothing else is."""

from __future__ import annotations

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from lpsearch.search import PlanSpace, StudyStore, run_study
from lpsearch.search.samplers.pairset import PairsetProposer
from tests.search.evaluators import SyntheticEvaluator


def count_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_a_proposal_takes_one_thread_and_gives_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    propose = PairsetProposer.propose

    def watch(self, *args):
        seen.update(count_threads())
        return propose(self, *args)

    monkeypatch.setattr(PairsetProposer, "propose", watch)
    evaluator = SyntheticEvaluator(8, num_windows=4)
    with threadpool_limits(limits=2, user_api="blas"), StudyStore("sqlite:///:memory:", study_name="x") as store:
        run_study(evaluator=evaluator, space=PlanSpace(8), budget=12, store=store)
        assert count_threads() == {2}
    assert seen == {1}
