"""A Bayesian linear model of a plan's loss: join costs, products of joins, and powers of their number.

    delta(x) = sum_i b_i x_i + sum_{i<j} u_i u_j (g + G_ij + E_ij) x_i x_j + (powers of the count) + misfit

x_i says whether join i is set. b_i has the measured cost of the join alone as its prior mean. Joins that are costly
alone also disturb each other more, so products are scaled by u_i u_j, where u_i^2 is the cost of join i. On that scale
interactions share a mean g, vary smoothly over both layers (G: a neighbour's interaction is much the same), and have a
part of their own (E), larger for joins at most ``NEAR_JOINS`` apart. Where plans also drop branches, a join and a drop
within it have a mean of their own for each kind of drop, and a larger E: a join costs what its second layer lacks of
the first, so it often costs next to nothing beside a drop. The misfit grows with the loss, so that ruined
plans, whose loss saturates, hardly count; a loss on some of the windows has its sampling error beside it. The strengths
of the parts are those of most evidence (Rasmussen and Williams, Gaussian Processes for Machine Learning, sections 2.2
and 5.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from lpsearch.search.samplers.dynamic_program import PlanCosts

__all__ = ["ChoiceLayout", "Strengths", "Surrogate"]

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

SMOOTH_STRENGTHS = (0.1, 0.25, 0.5)
"""Standard deviations of G to choose from."""

OWN_STRENGTHS = (0.1, 0.3, 0.6)
"""Standard deviations of E at the smallest distance to choose from."""

MISFIT_STRENGTHS = (0.02, 0.05, 0.1)
"""Misfits to choose from, relative to a small loss."""

SINGLE_MISFIT = 0.01
"""Misfit of the single joins, which the join costs are there to explain."""

COUNT_STRENGTHS = (0.3, 0.1, 0.01)
"""Standard deviations of g and of the coefficients of the pairs and triples of joins, on the typical cost's scale."""

MEASURED_STRENGTH = 0.05
"""Standard deviation of b_i relative to the cost of join i where it was measured alone."""

UNMEASURED_STRENGTH = 1.0
"""The same where it is only interpolated."""

LENGTH_LAYERS = 3.0
"""Distance in layers over which G loses its correlation."""

NEAR_JOINS = 4
"""Largest distance of joins whose own interaction E is large."""

NEAR_FADE_JOINS = 4.0
"""Distance over which the variance of E falls by e among near joins."""

KIND_CORRELATION = 0.5
"""Correlation of G between choices of two kinds at one place."""

WITHIN_STRENGTH = 0.5
"""Standard deviation of the mean of the products of a join and a drop within it, for each kind of drop."""

WITHIN_VARIANCE = 2.0
"""Variance of E between a join and a drop within it, relative to that at the smallest distance."""

FAR_VARIANCE = 0.05
"""Variance of E between joins far apart, relative to that at the smallest distance."""

SATURATION_NATS = 5.0
"""Loss from which the misfit grows with its square."""

COST_RANGE = (0.1, 10.0)
"""Costs outside this range of their median count as its ends on the scale u."""


@dataclass(frozen=True)
class Strengths:
    """Standard deviations of G and E, and the misfit relative to a small loss."""

    smooth: float
    own: float
    misfit: float


@dataclass(frozen=True)
class ChoiceLayout:
    """Where choices of several kinds stand.

    Attributes:
        positions: (choices,) in layers; a join stands between its two.
        kinds: (choices,) numbers of the kinds.
        within: for each kind of drop (choices, choices) the pairs of a join and a drop of one of its layers, both ways.
    """

    positions: FloatArray
    kinds: NDArray[np.int64]
    within: tuple[BoolArray, ...] = ()


@dataclass(frozen=True)
class _Covariances:
    """Prior covariances between plans, one array for each part of the model; G and E at strength 1."""

    fixed: FloatArray
    smooth: FloatArray
    own: FloatArray

    def combine(self, strengths: Strengths) -> FloatArray:
        return self.fixed + strengths.smooth**2 * self.smooth + strengths.own**2 * self.own


class Surrogate:
    """The posterior after some plans were evaluated; a pure function of its arguments.

    Args:
        joined: (plans, num_joins) which joins each evaluated plan sets.
        delta_nll: (plans,) finite losses in nats per token.
        sampling_error: (plans,) their standard errors; 0 where a loss is exact.
        join_means: (num_joins,) prior means of the join costs.
        measured: (num_joins,) whether that mean was measured on the join alone.
        layout: where choices of several kinds stand; None for joins, in order. Else every choice counts as a join here.
        strengths: of the parts of the model; None chooses those of most evidence, which takes most of the time of a
            fit to several hundred plans.

    Attributes:
        strengths: of the parts of the model.
    """

    def __init__(
        self,
        *,
        joined: BoolArray,
        delta_nll: FloatArray,
        sampling_error: FloatArray,
        join_means: FloatArray,
        measured: BoolArray,
        layout: ChoiceLayout | None = None,
        strengths: Strengths | None = None,
    ) -> None:
        """Fit; see the class."""
        num_joins = len(join_means)
        self._joined = joined.astype(np.float64)
        self._delta_nll = delta_nll
        self._sampling_error = sampling_error
        self._join_means = join_means
        self._typical_cost = max(float(np.median(np.abs(join_means))), 1e-6)
        low, high = (factor * self._typical_cost for factor in COST_RANGE)
        self._least_loss = low
        self._scale = np.sqrt(np.clip(join_means, low, high))
        strength = np.where(measured, MEASURED_STRENGTH, UNMEASURED_STRENGTH)
        self._join_variance = (strength * np.maximum(np.abs(join_means), low)) ** 2
        single = np.flatnonzero(joined.sum(axis=1) == 1)
        np.add.at(self._join_variance, joined[single].argmax(axis=1), sampling_error[single] ** 2)
        self._layout = layout
        self._explained: dict[bytes, FloatArray] = {}  # by a plan's joins
        positions = np.arange(num_joins) if layout is None else layout.positions
        distance = np.abs(np.subtract.outer(positions, positions))
        self._smoothing = np.exp(-distance / LENGTH_LAYERS)
        if layout is not None:
            self._smoothing *= np.where(np.equal.outer(layout.kinds, layout.kinds), 1.0, KIND_CORRELATION)
            distance = np.maximum(distance, 1) * (1 - np.eye(num_joins))
        near = np.exp(-(distance - 1) / NEAR_FADE_JOINS) * (distance <= NEAR_JOINS)
        self._own_variance = np.where(distance > 0, np.maximum(near, FAR_VARIANCE), 0.0)
        self._within = () if layout is None else layout.within
        for pairs in self._within:
            self._own_variance[pairs] = WITHIN_VARIANCE
        self._near = list(self._list_near())

        self._residual = delta_nll - self._joined @ join_means
        covariances = self._compute_covariances(self._joined, self._joined)
        self.strengths, self._factor = (
            self._choose_strengths(covariances)
            if strengths is None
            else self._weigh_strengths(strengths, covariances)[1:]
        )
        self._dual = cho_solve((self._factor, True), self._residual, check_finite=False)
        self._mean_costs, self._mean_count = self._project(self._dual[None])

    def estimate_mean(self, joined: BoolArray) -> FloatArray:
        """Return the (plans,) posterior means of (plans, num_joins) plans in nats per token."""
        flags = joined.astype(np.float64)
        costs = self.mean_costs.evaluate(flags)[0]
        return np.asarray(costs + self._compute_count_features(flags)[:, 1:3] @ self._mean_count[0, 1:3])

    def estimate_standard_deviation(
        self, joined: BoolArray, mean: FloatArray, *, believed: BoolArray | None = None
    ) -> FloatArray:
        """Return the (plans,) standard deviations of losses yet to be measured, the misfit included.

        Args:
            joined: (plans, num_joins) plans.
            mean: (plans,) their posterior means.
            believed: (others, num_joins) plans that are taken to be measured at their means, which changes no mean.
        """
        flags = joined.astype(np.float64)
        explained = self._explain(flags)
        prior = self._compute_variances(flags).combine(self.strengths)
        variance = prior - (explained**2).sum(axis=0)
        if believed is not None and len(believed):
            others = believed.astype(np.float64)
            others_explained = self._explain(others)
            covariance = self._compute_covariances(others, others).combine(self.strengths)
            covariance -= others_explained.T @ others_explained
            misfit = self.strengths.misfit * np.maximum(self.estimate_mean(believed), self._least_loss)
            covariance[np.diag_indices_from(covariance)] += np.maximum(misfit, 1e-3 * self._least_loss) ** 2
            factor, _ = cho_factor(covariance, lower=True, overwrite_a=True, check_finite=False)
            cross = self._compute_covariances(flags, others).combine(self.strengths) - explained.T @ others_explained
            variance -= (solve_triangular(factor, cross.T, lower=True, check_finite=False) ** 2).sum(axis=0)
        # without the saturation's share, which would promise the front a windfall from ruined plans
        misfit = self.strengths.misfit * np.maximum(mean, self._least_loss)
        return np.asarray(np.sqrt(np.maximum(variance, 0.0) + misfit**2))

    def _explain(self, flags: FloatArray) -> FloatArray:
        """Return (observations, plans) whitened covariances of plans with what was observed.

        They are kept, since while many plans are pending a fit is asked again and again for much the same ones.
        """
        keys = [row.tobytes() for row in flags]
        new = [place for place, key in enumerate(keys) if key not in self._explained]
        if new:
            cross = self._compute_covariances(flags[new], self._joined).combine(self.strengths)
            solved = solve_triangular(self._factor, cross.T, lower=True, check_finite=False)
            for column, place in enumerate(new):
                self._explained[keys[place]] = solved[:, column]
        return np.array([self._explained[key] for key in keys]).reshape(len(keys), len(self._joined)).T

    @cached_property
    def mean_costs(self) -> PlanCosts:
        """The posterior mean, as a batch of one."""
        return self._complete(self._mean_costs, self._mean_count)

    def draw_costs(self, num_draws: int, rng: np.random.Generator) -> PlanCosts:
        """Draw from the posterior: prior draws, each corrected by what it leaves unexplained (Matheron's rule).

        Args:
            num_draws: size of the batch.
            rng: source of the draws.
        """
        num_joins = len(self._join_means)
        join = rng.standard_normal((num_draws, num_joins)) * np.sqrt(self._join_variance)
        noise = rng.standard_normal((2, num_draws, num_joins, num_joins))
        noise = (noise + noise.swapaxes(2, 3)) / np.sqrt(2)
        root = np.linalg.cholesky(self._smoothing)
        products = self.strengths.smooth * (root @ noise[0] @ root.T)
        products += self.strengths.own * np.sqrt(self._own_variance) * noise[1]
        prior = PlanCosts(join, products * self._product_scale)
        count = rng.standard_normal((num_draws, 3 + len(self._within)))
        value = prior.evaluate(self._joined) + count @ self._compute_count_features(self._joined).T
        value += rng.standard_normal(value.shape) * self._compute_noise(self.strengths.misfit)
        dual = cho_solve((self._factor, True), (self._residual - value).T, check_finite=False).T
        update, count_update = self._project(dual)
        corrected = PlanCosts(prior.join_costs + update.join_costs, prior.product_costs + update.product_costs)
        return self._complete(corrected, count + count_update)

    def compute_log_evidence(self, strengths: Strengths) -> float:
        """Return the log evidence of strengths but for a constant."""
        return self._weigh_strengths(strengths, self._compute_covariances(self._joined, self._joined))[0]

    @cached_property
    def _product_scale(self) -> FloatArray:
        """(num_joins, num_joins) u_i u_j, zero on the diagonal."""
        scale = np.outer(self._scale, self._scale)
        np.fill_diagonal(scale, 0.0)
        return scale

    def _choose_strengths(self, covariances: _Covariances) -> tuple[Strengths, FloatArray]:
        """Return the strengths of most evidence and the Cholesky factor of the observations' covariance.

        Climbs over the grid of strengths from its middle, one step on one axis at a time: the evidence has one peak
        where there is much of it, and is flat where there is little.
        """
        axes = (SMOOTH_STRENGTHS, OWN_STRENGTHS, MISFIT_STRENGTHS)
        weighed: dict[tuple[int, ...], tuple[float, Strengths, FloatArray]] = {}
        place: tuple[int, ...] = tuple(len(axis) // 2 for axis in axes)
        while True:
            around = [place, *_list_neighbours(place, [len(axis) for axis in axes])]
            for point in around:
                if point not in weighed:
                    strengths = Strengths(*(axis[index] for axis, index in zip(axes, point, strict=True)))
                    weighed[point] = self._weigh_strengths(strengths, covariances)
            best = max(around, key=lambda point: weighed[point][0])
            if best == place:
                return weighed[best][1:]
            place = best

    def _weigh_strengths(self, strengths: Strengths, covariances: _Covariances) -> tuple[float, Strengths, FloatArray]:
        """Return the log evidence of strengths but for a constant, the strengths, and the Cholesky factor."""
        covariance = covariances.combine(strengths)
        covariance[np.diag_indices_from(covariance)] += self._compute_noise(strengths.misfit) ** 2
        factor, _ = cho_factor(covariance, lower=True, overwrite_a=True, check_finite=False)
        whitened = solve_triangular(factor, self._residual, lower=True, check_finite=False)
        evidence = -0.5 * float(whitened @ whitened) - float(np.log(np.diag(factor)).sum())
        return evidence, strengths, factor

    def _compute_noise(self, misfit: float) -> FloatArray:
        """Return (observations,) standard deviations of misfit and sampling error together."""
        single = self._joined.sum(axis=1) <= 1
        loss = np.maximum(self._delta_nll, self._least_loss)
        noise = np.where(single, SINGLE_MISFIT, misfit) * loss * (1 + loss / SATURATION_NATS)
        return np.asarray(np.hypot(noise, self._sampling_error))

    def _compute_count_features(self, joined: FloatArray) -> FloatArray:
        """Return (plans, features), each by its strength.

        They are the sum of u_i u_j x_i x_j, the pairs and the triples of joins, and for each kind of drop that sum over
        the drops within joins.
        """
        scaled = joined * self._scale
        total = 0.5 * (scaled.sum(axis=1) ** 2 - (scaled**2).sum(axis=1))
        count = joined.sum(axis=1)
        pairs = count * (count - 1) / 2
        triples = pairs * (count - 2) / 3
        typical = self._typical_cost
        features = np.stack([total, typical * pairs, typical * triples], axis=1) * COUNT_STRENGTHS
        within = [0.5 * WITHIN_STRENGTH * ((scaled @ pairs) * scaled).sum(axis=1) for pairs in self._within]
        return np.column_stack([features, *within])

    def _compute_covariances(self, left: FloatArray, right: FloatArray) -> _Covariances:
        """Return the (left, right) prior covariances of two lists of plans.

        For G, the covariance of two sums over pairs is half the square of u'Ru less the terms of equal joins.
        """
        fixed = (left * self._join_variance) @ right.T
        fixed += self._compute_count_features(left) @ self._compute_count_features(right).T
        left_scaled, right_scaled = left * self._scale, right * self._scale
        left_square, right_square = left_scaled**2, right_scaled**2
        left_smooth, right_smooth = left_scaled @ self._smoothing, right_scaled @ self._smoothing
        smooth = (left_smooth @ right_scaled.T) ** 2
        smooth -= left_smooth**2 @ right_square.T + left_square @ (right_smooth**2).T
        smooth += left_square @ self._smoothing**2 @ right_square.T
        own = FAR_VARIANCE * 0.5 * ((left_square @ right.T) ** 2 - left_square**2 @ right.T)
        for first, second, variance in self._near:
            near = left_square[:, first] * left_square[:, second]
            own += (variance - FAR_VARIANCE) * near @ (right[:, first] * right[:, second]).T
        return _Covariances(fixed, 0.5 * smooth, own)

    def _compute_variances(self, joined: FloatArray) -> _Covariances:
        """Return the (plans,) diagonals of :meth:`_compute_covariances` of a list of plans with itself."""
        fixed = joined @ self._join_variance + (self._compute_count_features(joined) ** 2).sum(axis=1)
        scaled = joined * self._scale
        square = scaled**2
        smoothed = scaled @ self._smoothing
        smooth = (smoothed * scaled).sum(axis=1) ** 2 - 2 * (smoothed**2 * square).sum(axis=1)
        smooth += ((square @ self._smoothing**2) * square).sum(axis=1)
        own = FAR_VARIANCE * 0.5 * (square.sum(axis=1) ** 2 - (square**2).sum(axis=1))
        for first, second, variance in self._near:
            near = square[:, first] * square[:, second]
            if self._layout is None:
                own += (variance - FAR_VARIANCE) * near.sum(axis=1)
            else:
                own += (near * (variance - FAR_VARIANCE)).sum(axis=1)
        return _Covariances(fixed, 0.5 * smooth, own)

    def _list_near(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yield the near pairs, by where their first and second stand, and the variances of E."""
        if self._layout is not None:
            first, second = np.nonzero(np.triu(self._own_variance > FAR_VARIANCE))
            yield first, second, self._own_variance[first, second]
            return
        for distance in range(1, min(NEAR_JOINS, len(self._join_means) - 1) + 1):
            yield slice(None, -distance), slice(distance, None), float(self._own_variance[0, distance])

    def _project(self, dual: FloatArray) -> tuple[PlanCosts, FloatArray]:
        """Return the coefficients that (batch, observations) dual weights stand for, and those of the counts."""
        join = dual @ self._joined * self._join_variance
        count = dual @ self._compute_count_features(self._joined)
        scaled_sum = self._product_scale * (self._joined.T @ (dual[:, :, None] * self._joined))
        smooth = self.strengths.smooth**2 * (self._smoothing @ scaled_sum @ self._smoothing)
        own = self.strengths.own**2 * self._own_variance * scaled_sum
        return PlanCosts(join, self._product_scale * (smooth + own)), count

    def _complete(self, costs: PlanCosts, count: FloatArray) -> PlanCosts:
        """Add the prior means of the joins and the interactions' common mean."""
        common = COUNT_STRENGTHS[0] * count[:, :1, None] * self._product_scale
        for place, pairs in enumerate(self._within):
            common = common + WITHIN_STRENGTH * count[:, 3 + place, None, None] * self._product_scale * pairs
        return PlanCosts(costs.join_costs + self._join_means, costs.product_costs + common)


def _list_neighbours(place: tuple[int, ...], lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the points of a grid that are one step away on one axis."""
    for axis, step in product(range(len(place)), (-1, 1)):
        index = place[axis] + step
        if 0 <= index < lengths[axis]:
            yield (*place[:axis], index, *place[axis + 1 :])
