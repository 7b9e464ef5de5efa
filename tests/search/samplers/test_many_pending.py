"""Proposals while many plans are pending: all different, near the serial ones, and serial ones unchanged."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from lpsearch.search import PlanSpace
from lpsearch.search.results import RAW, Loss, TrialResult
from lpsearch.search.samplers import evaluated as arrays
from lpsearch.search.samplers import mixed
from lpsearch.search.samplers.fits import STRENGTHS_GROWTH
from lpsearch.search.samplers.mixed import MixedProposer
from lpsearch.search.samplers.pairset import PairsetProposer
from lpsearch.search.samplers.surrogate import Surrogate
from tests.search.samplers.test_mixed import estimate_latency_ms

NUM_LAYERS = 12
SPACE = PlanSpace(NUM_LAYERS)
COSTS = np.random.default_rng(5).gamma(1.0, 0.1, NUM_LAYERS - 1)
MIXED = PlanSpace(8, allow=("joins", "drop-attention", "drop-mlp"))
MIXED_COSTS = np.random.default_rng(6).gamma(1.0, 0.1, len(MIXED.choices))
SPACES = pytest.mark.parametrize("space", [SPACE, MIXED], ids=["joins", "joins and drops"])


def build_result(plan, trial=0):
    if plan.num_layers == NUM_LAYERS:
        total = float(COSTS[list(plan.joins)].sum())
    else:
        total = float(MIXED_COSTS @ np.array(MIXED.encode(plan), dtype=float))
    delta = total + 0.3 * total**2
    loss = Loss(
        nll=3 + delta,
        delta_nll=delta,
        delta_nll_se=0.0,
        kl_nats_per_token=None,
        kl_se=None,
        num_windows=1,
        num_tokens=1,
    )
    return TrialResult(plan, RAW, trial, "scan", "complete", loss)


def build_proposer(space, budget=400):
    if space is MIXED:
        return MixedProposer(space=space, budget=budget, seed=0, estimate_latency_ms=estimate_latency_ms)
    return PairsetProposer(space=space, budget=budget, seed=0)


def list_scanned(space):
    """Return the results of the baseline and of every choice alone, in the order of their proposals."""
    proposer, results = build_proposer(space), []
    while (proposal := proposer.propose(results, ())).origin in ("baseline", "scan"):
        results.append(build_result(proposal.plan, len(results)))
    assert len(results) == 1 + len(space.choices)
    return results


def patch_surrogate(monkeypatch, surrogate):
    for module in (arrays, mixed):
        monkeypatch.setattr(module, "Surrogate", surrogate)


def test_proposals_without_any_result_are_different_valid_plans():
    proposer = PairsetProposer(space=SPACE, budget=200, seed=0)
    pending = []
    for _ in range(64):
        proposal = proposer.propose([], pending)
        assert proposal is not None
        assert proposal.plan in SPACE
        assert proposal.plan not in pending
        pending.append(proposal.plan)
    assert max(plan.num_joins for plan in pending) > 2, "not only the first plans of an enumeration"


@SPACES
def test_one_fit_serves_many_proposals_and_is_renewed_after_some_results(space, monkeypatch):
    fits = []

    class Counting(Surrogate):
        def __init__(self, **arguments):
            fits.append(len(arguments["delta_nll"]))
            super().__init__(**arguments)

    results, pending = list_scanned(space), []
    patch_surrogate(monkeypatch, Counting)
    proposer = build_proposer(space)
    while len(pending) < 24:
        pending.append(proposer.propose(results, pending).plan)
    assert len(set(pending)) == 24
    num_fits = len(fits)
    assert num_fits < 24, "the first few have no fit to share"
    for _ in range(6):  # 23 pending let a fit do for one more result
        results.append(build_result(pending.pop(0), len(results)))
        pending.append(proposer.propose(results, pending).plan)
    assert len(fits) - num_fits == 3, "one for every two results"
    assert len({*pending, *(result.plan for result in results)}) == len(pending) + len(results)


@SPACES
def test_strengths_serve_for_several_fits_and_are_chosen_anew_as_results_grow(space, monkeypatch):
    chosen_at = []

    class Noting(Surrogate):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            if arguments["strengths"] is None:
                chosen_at.append(len(results))
            else:
                kept.append((self, arguments))

    kept: list[tuple[Surrogate, dict]] = []
    results, pending = list_scanned(space), []
    patch_surrogate(monkeypatch, Noting)
    proposer = build_proposer(space)
    while len(pending) < 24:
        pending.append(proposer.propose(results, pending).plan)
    chosen_at.clear()
    for _ in range(40):
        results.append(build_result(pending.pop(0), len(results)))
        pending.append(proposer.propose(results, pending).plan)
    assert all(later >= STRENGTHS_GROWTH * former for former, later in pairwise(chosen_at))
    assert len(kept) > 5
    # With the strengths that it would choose itself, a fit is the same.
    for surrogate, arguments in kept:
        anew = Surrogate(**{**arguments, "strengths": None})
        if anew.strengths == surrogate.strengths:
            joined = arguments["joined"][-5:]
            np.testing.assert_array_equal(surrogate.estimate_mean(joined), anew.estimate_mean(joined))
    results, pending = results[: 2 * len(results) // 3], pending[:3]
    chosen_at.clear()
    proposer.propose(results, pending)
    assert chosen_at == [len(results)], "with few pending nothing is kept"


@SPACES
@pytest.mark.parametrize("num_pending", [0, 1, 7])
def test_with_few_pending_a_proposal_depends_on_nothing_before(space, num_pending):
    results, pending = list_scanned(space), []
    used = build_proposer(space)
    for _ in range(20):
        fresh = build_proposer(space).propose(results, pending)
        assert used.propose(results, pending) == fresh
        pending.append(fresh.plan)
        if len(pending) > num_pending:
            results.append(build_result(pending.pop(0), len(results)))


def test_what_is_believed_lowers_the_deviation_as_a_measurement_at_the_mean_would():
    rng = np.random.default_rng(1)
    plans = [plan for plan in SPACE.enumerate_plans() if 2 <= plan.num_joins <= 4]
    chosen = [plans[place] for place in rng.choice(len(plans), 30, replace=False)]
    joined = arrays.stack_joins((plan.joins for plan in chosen), NUM_LAYERS - 1)
    singles = np.eye(NUM_LAYERS - 1, dtype=bool)

    def fit(observed, losses):
        return Surrogate(
            joined=observed,
            delta_nll=losses,
            sampling_error=np.zeros(len(losses)),
            join_means=COSTS,
            measured=np.ones(NUM_LAYERS - 1, dtype=bool),
        )

    surrogate = fit(singles, COSTS)
    believed, asked = joined[:5], joined[5:]
    mean = surrogate.estimate_mean(asked)
    got = surrogate.estimate_standard_deviation(asked, mean, believed=believed)
    # the slow way: the posterior covariance of all of them, then conditioned on the believed ones
    everything = np.concatenate([asked, believed]).astype(float)
    prior = surrogate._compute_covariances(everything, everything).combine(surrogate.strengths)
    explained = surrogate._explain(everything)
    posterior = prior - explained.T @ explained
    noise = surrogate.strengths.misfit * np.maximum(surrogate.estimate_mean(believed), surrogate._least_loss)
    count = len(asked)
    gain = posterior[:count, count:] @ np.linalg.inv(posterior[count:, count:] + np.diag(noise**2))
    variance = np.diag(posterior[:count, :count] - gain @ posterior[count:, :count])
    misfit = surrogate.strengths.misfit * np.maximum(mean, surrogate._least_loss)
    assert got == pytest.approx(np.sqrt(np.maximum(variance, 0) + misfit**2), rel=1e-6)
    assert (got <= surrogate.estimate_standard_deviation(asked, mean)).all()
    assert (got < surrogate.estimate_standard_deviation(asked, mean)).any()


def test_what_is_left_out_of_a_fit_is_the_worst_of_every_number_of_joins(monkeypatch):
    monkeypatch.setattr(arrays, "MAX_OBSERVATIONS", 40)
    results = [build_result(plan, trial) for trial, plan in enumerate(SPACE.enumerate_plans())]
    evaluated = arrays.Evaluated.from_results(results, NUM_LAYERS - 1, "nll")
    fitted = evaluated.choose_fitted()
    assert len(fitted) == len(set(fitted.tolist())) == 40
    counts = evaluated.joined.sum(axis=1)
    assert (counts[fitted] == 1).sum() == NUM_LAYERS - 1, "every single join stays"
    for count in range(2, 7):
        kept = set(fitted[counts[fitted] == count].tolist())
        left_out = set(np.flatnonzero(counts == count).tolist()) - kept
        assert kept
        if left_out:
            assert max(evaluated.delta_nll[list(kept)]) <= min(evaluated.delta_nll[list(left_out)])
