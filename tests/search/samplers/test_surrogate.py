"""The surrogate against the textbook posterior of its features written out one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lpsearch.search.samplers import surrogate as module
from lpsearch.search.samplers.mixed import build_layout
from lpsearch.search.samplers.surrogate import Surrogate
from lpsearch.search.space import PlanSpace
from tests.tolerances import POSTERIOR_DEVIATION, POSTERIOR_MEAN, POSTERIOR_ORDER


def _build(
    seed: int, *, num_plans: int = 40, num_joins: int = 9, sampling_error: float = 0.0
) -> tuple[Surrogate, np.ndarray, np.ndarray, np.ndarray]:
    """Return a surrogate of a random quadratic loss, the plans, their losses and the joins' costs.

    Every third plan, single joins among them, has the sampling error.
    """
    rng = np.random.default_rng(seed)
    cost = 0.05 * rng.lognormal(sigma=0.5, size=num_joins)
    products = np.triu(rng.normal(0.2, 0.3, size=(num_joins, num_joins)), 1) * np.sqrt(np.outer(cost, cost))
    joined = np.concatenate([np.eye(num_joins, dtype=bool), rng.random((num_plans, num_joins)) < 0.4])
    loss = joined @ cost + np.einsum("pi,ij,pj->p", joined, products, joined)
    fitted = Surrogate(
        joined=joined,
        delta_nll=loss,
        sampling_error=_spread_error(joined, sampling_error),
        join_means=cost,
        measured=np.ones(num_joins, dtype=bool),
    )
    return fitted, joined, loss, cost


def _spread_error(joined: np.ndarray, sampling_error: float) -> np.ndarray:
    num_plans, num_joins = joined.shape
    is_repeated = (joined.sum(axis=1) == 1) & (np.arange(num_plans) >= num_joins)  # a study holds no plan twice
    return np.where((np.arange(num_plans) % 3 == 0) & ~is_repeated, sampling_error, 0.0)


def _compute_prior(
    joined: np.ndarray, cost: np.ndarray, smooth: float, own: float, single_error: np.ndarray
) -> np.ndarray:
    """Sum the prior covariance of two plans over joins and over pairs of pairs of joins."""
    num_joins = len(cost)
    typical = float(np.median(cost))
    pairs = [(i, j) for i in range(num_joins) for j in range(i + 1, num_joins)]
    features = np.array([[plan[i] * plan[j] * np.sqrt(cost[i] * cost[j]) for i, j in pairs] for plan in joined])

    def correlate(i: int, j: int) -> float:
        return float(np.exp(-abs(i - j) / module.LENGTH_LAYERS))

    interaction = np.zeros((len(pairs), len(pairs)))
    for row, (i, j) in enumerate(pairs):
        for column, (k, m) in enumerate(pairs):
            same = correlate(i, k) * correlate(j, m) + correlate(i, m) * correlate(j, k)
            interaction[row, column] = smooth**2 * same
        near = np.exp(-(j - i - 1) / module.NEAR_FADE_JOINS) if j - i <= module.NEAR_JOINS else 0.0
        interaction[row, row] += own**2 * max(near, module.FAR_VARIANCE)
    count = joined.sum(axis=1).astype(float)
    powers = np.stack(
        [features.sum(axis=1), typical * count * (count - 1) / 2, typical * count * (count - 1) * (count - 2) / 6],
        axis=1,
    ) * np.array(module.COUNT_STRENGTHS)
    linear = (joined * ((module.MEASURED_STRENGTH * cost) ** 2 + single_error**2)) @ joined.T
    return features @ interaction @ features.T + powers @ powers.T + linear


@pytest.mark.parametrize("sampling_error", [0.0, 0.02])
def test_posterior_equals_the_textbook_formula(sampling_error: float) -> None:
    fitted, joined, loss, cost = _build(0, sampling_error=sampling_error)
    error = _spread_error(joined, sampling_error)
    rng = np.random.default_rng(1)
    unseen = rng.random((6, len(cost))) < 0.5
    everything = np.concatenate([joined, unseen]).astype(float)
    chosen = fitted.strengths
    prior = _compute_prior(everything, cost, chosen.smooth, chosen.own, error[: len(cost)])
    seen = len(joined)
    noise = np.where(joined.sum(axis=1) <= 1, module.SINGLE_MISFIT, chosen.misfit)
    value = np.maximum(loss, module.COST_RANGE[0] * np.median(cost))
    noise = np.sqrt((noise * value * (1 + value / module.SATURATION_NATS)) ** 2 + error**2)
    gain = np.linalg.solve(prior[:seen, :seen] + np.diag(noise**2), prior[:seen, seen:]).T
    mean = unseen @ cost + gain @ (loss - joined @ cost)
    variance = np.diag(prior[seen:, seen:] - gain @ prior[:seen, seen:])
    np.testing.assert_allclose(fitted.estimate_mean(unseen), mean, rtol=POSTERIOR_MEAN)
    misfit = chosen.misfit * mean
    np.testing.assert_allclose(
        fitted.estimate_standard_deviation(unseen, mean), np.sqrt(variance + misfit**2), rtol=POSTERIOR_DEVIATION
    )


def _compute_mixed_prior(made: np.ndarray, cost: np.ndarray, space: PlanSpace, smooth: float, own: float) -> np.ndarray:
    """The same for choices of several kinds: of two plans, over choices and over pairs of pairs of choices."""
    choices = space.choices
    typical = float(np.median(cost))
    pairs = list(itertools.combinations(range(len(choices)), 2))
    features = np.array([[plan[i] * plan[j] * np.sqrt(cost[i] * cost[j]) for i, j in pairs] for plan in made])

    def measure(i: int, j: int) -> float:
        return abs(float(np.mean(choices[i].layers)) - float(np.mean(choices[j].layers)))

    def correlate(i: int, j: int) -> float:
        same_kind = choices[i].kind == choices[j].kind
        return float(np.exp(-measure(i, j) / module.LENGTH_LAYERS)) * (1.0 if same_kind else module.KIND_CORRELATION)

    def find_drop_within(i: int, j: int) -> str | None:
        """Of a join and a drop of one of its layers, the kind of the drop."""
        for join, drop in ((choices[i], choices[j]), (choices[j], choices[i])):
            if join.kind == "join" and drop.kind != "join" and drop.layers[0] in join.layers:
                return drop.kind
        return None

    interaction = np.zeros((len(pairs), len(pairs)))
    for row, (i, j) in enumerate(pairs):
        for column, (k, m) in enumerate(pairs):
            same = correlate(i, k) * correlate(j, m) + correlate(i, m) * correlate(j, k)
            interaction[row, column] = smooth**2 * same
        distance = max(1.0, measure(i, j))
        near = np.exp(-(distance - 1) / module.NEAR_FADE_JOINS) if distance <= module.NEAR_JOINS else 0.0
        variance = module.WITHIN_VARIANCE if find_drop_within(i, j) else max(near, module.FAR_VARIANCE)
        interaction[row, row] += own**2 * variance
    for kind in ("drop_attention", "drop_mlp"):
        shared = np.array([find_drop_within(i, j) == kind for i, j in pairs], dtype=float)
        interaction += module.WITHIN_STRENGTH**2 * np.outer(shared, shared)
    count = made.sum(axis=1).astype(float)
    powers = np.stack(
        [features.sum(axis=1), typical * count * (count - 1) / 2, typical * count * (count - 1) * (count - 2) / 6],
        axis=1,
    ) * np.array(module.COUNT_STRENGTHS)
    linear = (made * (module.MEASURED_STRENGTH * cost) ** 2) @ made.T
    return features @ interaction @ features.T + powers @ powers.T + linear


def test_posterior_of_joins_and_drops_equals_the_textbook_formula() -> None:
    space = PlanSpace(4, allow=("joins", "drop-attention", "drop-mlp"))
    rng = np.random.default_rng(5)
    num_choices = len(space.choices)
    cost = 0.05 * rng.lognormal(sigma=0.5, size=num_choices)
    products = np.triu(rng.normal(-0.2, 0.4, size=(num_choices, num_choices)), 1) * np.sqrt(np.outer(cost, cost))
    plans = np.array([space.encode(plan) for plan in space.enumerate_plans()])[1:]
    loss = plans @ cost + np.einsum("pi,ij,pj->p", plans, products, plans)
    others = rng.choice(np.arange(num_choices, len(plans)), 50, replace=False)
    seen = np.concatenate([np.arange(num_choices), others[:40]])
    assert (plans[:num_choices].sum(axis=1) == 1).all()
    fitted = Surrogate(
        joined=plans[seen],
        delta_nll=loss[seen],
        sampling_error=np.zeros(len(seen)),
        join_means=cost,
        measured=np.ones(num_choices, dtype=bool),
        layout=build_layout(space),
    )
    chosen = fitted.strengths
    everything = plans[np.concatenate([seen, others[40:]])].astype(float)
    prior = _compute_mixed_prior(everything, cost, space, chosen.smooth, chosen.own)
    count = len(seen)
    noise = np.where(plans[seen].sum(axis=1) <= 1, module.SINGLE_MISFIT, chosen.misfit)
    value = np.maximum(loss[seen], module.COST_RANGE[0] * np.median(cost))
    noise = noise * value * (1 + value / module.SATURATION_NATS)
    gain = np.linalg.solve(prior[:count, :count] + np.diag(noise**2), prior[:count, count:]).T
    unseen = plans[others[40:]]
    mean = unseen @ cost + gain @ (loss[seen] - plans[seen] @ cost)
    variance = np.diag(prior[count:, count:] - gain @ prior[:count, count:])
    np.testing.assert_allclose(fitted.estimate_mean(unseen), mean, rtol=POSTERIOR_MEAN)
    np.testing.assert_allclose(
        fitted.estimate_standard_deviation(unseen, mean),
        np.sqrt(variance + (chosen.misfit * np.maximum(mean, module.COST_RANGE[0] * np.median(cost))) ** 2),
        rtol=POSTERIOR_DEVIATION,
    )
    draws = fitted.draw_costs(4000, np.random.default_rng(0))
    spread = draws.product_costs.std(axis=0).max()
    np.testing.assert_allclose(
        draws.product_costs.mean(axis=0), fitted.mean_costs.product_costs[0], atol=5 * spread / np.sqrt(4000)
    )


@pytest.mark.parametrize("seed", range(6))
def test_climbing_finds_the_strengths_of_most_evidence(seed: int) -> None:
    fitted, _, _, _ = _build(seed)
    grid = itertools.product(module.SMOOTH_STRENGTHS, module.OWN_STRENGTHS, module.MISFIT_STRENGTHS)
    assert fitted.strengths == max(itertools.starmap(module.Strengths, grid), key=fitted.compute_log_evidence)


def test_learns_interactions() -> None:
    """Unseen plans are predicted far better than by adding up the joins."""
    fitted, _, _, cost = _build(2, num_plans=120)
    _, unseen, loss, _ = _build(2, num_plans=160)
    unseen, loss = unseen[-40:], loss[-40:]
    error = np.abs(fitted.estimate_mean(unseen) - loss).mean()
    assert error < 0.15 * np.abs(unseen @ cost - loss).mean()


def test_does_not_depend_on_the_order_of_observations() -> None:
    fitted, joined, loss, cost = _build(3, sampling_error=0.01)
    order = np.random.default_rng(0).permutation(len(loss))
    shuffled = Surrogate(
        joined=joined[order],
        delta_nll=loss[order],
        sampling_error=_spread_error(joined, 0.01)[order],
        join_means=cost,
        measured=np.ones(len(cost), dtype=bool),
    )
    np.testing.assert_allclose(shuffled.estimate_mean(joined), fitted.estimate_mean(joined), rtol=POSTERIOR_ORDER)


def test_draws_have_the_posterior_mean() -> None:
    fitted, _, _, cost = _build(4)
    plans = (np.random.default_rng(1).random((5, len(cost))) < 0.5).astype(float)
    draws = fitted.draw_costs(20_000, np.random.default_rng(2)).evaluate(plans)
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - fitted.mean_costs.evaluate(plans)[0]) < 5 * error).all()
    assert (draws.std(axis=0) > 0).all()


@pytest.mark.parametrize("num_joins", [1, 2])
def test_tiny_models(num_joins: int) -> None:
    joined = np.eye(num_joins, dtype=bool)
    cost = np.linspace(0.1, 0.2, num_joins)
    fitted = Surrogate(
        joined=joined,
        delta_nll=cost,
        sampling_error=np.zeros(num_joins),
        join_means=cost,
        measured=np.ones(num_joins, dtype=bool),
    )
    np.testing.assert_allclose(fitted.estimate_mean(joined), cost, rtol=POSTERIOR_MEAN)


def test_negative_and_zero_costs_are_fitted() -> None:
    """A join may help by chance, and every join may cost nothing."""
    joined = np.eye(5, dtype=bool)
    for cost in (np.zeros(5), np.array([-0.1, 0.2, -0.05, 0.1, 0.0])):
        measured = np.ones(5, dtype=bool)
        fitted = Surrogate(
            joined=joined, delta_nll=cost, sampling_error=np.zeros(5), join_means=cost, measured=measured
        )
        mean = fitted.estimate_mean(joined)
        np.testing.assert_allclose(mean, cost, atol=POSTERIOR_MEAN)
        assert np.isfinite(fitted.estimate_standard_deviation(joined, mean)).all()
