"""``pairset`` in a space of drops on few tokens, then its best plans and their neighbours on more, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpsearch.evaluation.losses import RAW
from lpsearch.plan import Plan
from lpsearch.search import Loss, PlanSpace, TrialResult
from lpsearch.search.samplers.evaluated import Evaluated, list_joins
from lpsearch.search.samplers.mixed import Levels, MixedProposer, build_layout, fit_choices
from lpsearch.search.samplers.surrogate import Surrogate
from studies.plan_batches import PlanBatchEvaluator

__all__ = ["DropSearch", "Found", "build_result"]

BoolArray = NDArray[np.bool_]

FIRST_PLANS = 8
"""Plans of least loss on few tokens that are evaluated on more first."""

BATCH_PLANS = 4
"""Neighbours that are evaluated between two fits."""


@dataclass(frozen=True)
class Found:
    """A plan, and what a method had evaluated when it held it: plans, and the tokens of all of them."""

    plan: Plan
    num_evaluations: int
    num_tokens: int


class DropSearch:
    """One search by KL divergence that several numbers of drops share; see :mod:`studies.evopress`.

    Args:
        evaluator: of the calibration windows.
        space: plans that drop branches.
        levels: what plans are compared by.
        budget: evaluations of :meth:`explore`, the baseline included.
        seed: decides every draw.

    Attributes:
        num_evaluations: plans evaluated by :meth:`explore`.
        num_tokens: tokens of all of them.
    """

    def __init__(
        self, evaluator: PlanBatchEvaluator, space: PlanSpace, levels: Levels, *, budget: int, seed: int
    ) -> None:
        self._evaluator = evaluator
        self._space = space
        self._budget = budget
        self._proposer = MixedProposer(space=space, budget=budget, seed=seed, metric="kl", levels=levels)
        self._levels = levels
        self._windows = np.random.default_rng(seed).permutation(evaluator.num_windows).tolist()
        self._results: dict[Plan, TrialResult] = {}
        self.num_evaluations = 0
        self.num_tokens = 0

    def explore(self, num_windows: int) -> None:
        """Evaluate as many plans as the budget says, each on the same few windows."""
        while len(self._results) < self._budget:
            proposal = self._proposer.propose(list(self._results.values()), ())
            if proposal is None:
                break
            self._results |= self._evaluate([proposal.plan], self._windows[:num_windows], proposal.origin)
        self.num_evaluations = len(self._results)
        self.num_tokens = self.num_evaluations * num_windows * self._evaluator.seq_len

    def refine(self, *, is_enough: Callable[[Plan], bool], num_windows: int, max_tokens: int) -> Found:
        """Evaluate the best plans and their neighbours on more windows, and return the best of them.

        The first are those of least loss so far. Then the surrogate, fitted to all losses by then, orders the plans
        that exchange one branch of the best plan, and the cheapest of every level.

        Args:
            is_enough: says whether a plan drops enough.
            num_windows: windows of each evaluation.
            max_tokens: of the whole search, those of :meth:`explore` included; at least one plan is evaluated.
        """
        # other windows than those that the plans were chosen on, as far as there are others
        windows = self._windows[-num_windows:]
        plan_tokens = num_windows * self._evaluator.seq_len
        room = max(1, (max_tokens - self.num_tokens) // plan_tokens)
        enough = sorted(
            (result for plan, result in self._results.items() if is_enough(plan)),
            key=lambda result: result.get_cost("kl"),
        )
        plans = [result.plan for result in enough[: min(room, FIRST_PLANS)]]
        if not plans:
            raise ValueError("the search has evaluated no plan that drops enough; give it more evaluations")
        finals: dict[Plan, TrialResult] = {}
        while plans:
            finals |= self._evaluate(plans, windows, "final")
            plans = self._list_next(finals, is_enough)[: min(BATCH_PLANS, room - len(finals))]
        best = min(finals.values(), key=lambda result: result.get_cost("kl"))
        return Found(best.plan, self.num_evaluations + len(finals), self.num_tokens + len(finals) * plan_tokens)

    def _evaluate(self, plans: list[Plan], windows: list[int], origin: str) -> dict[Plan, TrialResult]:
        losses = self._evaluator.evaluate(plans, windows)
        num_tokens = len(windows) * self._evaluator.seq_len
        return {
            plan: build_result(plan, nll=nll, kl=kl, origin=origin, num_windows=len(windows), num_tokens=num_tokens)
            for plan, nll, kl in zip(plans, losses.nll.mean(axis=1), losses.kl.mean(axis=1), strict=True)
        }

    def _list_next(self, finals: dict[Plan, TrialResult], is_enough: Callable[[Plan], bool]) -> list[Plan]:
        """Return plans that are yet to be evaluated on more windows, those of least predicted loss first."""
        surrogate = self._fit({**self._results, **finals}.values())
        best = min(finals.values(), key=lambda result: result.get_cost("kl")).plan
        solved = self._levels.solve(surrogate.mean_costs)[0]
        candidates = np.concatenate([self._list_exchanged(best), solved])
        found: dict[Plan, float] = {}
        for made, mean in zip(candidates, surrogate.estimate_mean(candidates), strict=True):
            plan = self._space.decode(made.tolist())
            if plan not in finals and is_enough(plan):
                found[plan] = float(mean)
        return sorted(found, key=lambda plan: found[plan])

    def _list_exchanged(self, plan: Plan) -> BoolArray:
        """Return (plans, choices): every exchange of one choice for another that saves about as much."""
        made = np.array(self._space.encode(plan), dtype=bool)
        leaving, entering = np.nonzero(self._levels.exchangeable & made[:, None] & ~made[None, :])
        exchanged = np.repeat(made[None], len(leaving), axis=0)
        rows = np.arange(len(leaving))
        exchanged[rows, leaving], exchanged[rows, entering] = False, True
        return exchanged

    def _fit(self, results: Iterable[TrialResult]) -> Surrogate:
        evaluated = Evaluated.from_results(
            results,
            len(self._space.choices),
            "kl",
            lambda plan: list_joins(np.array(self._space.encode(plan), dtype=bool)),
        )
        return fit_choices(evaluated, build_layout(self._space))


def build_result(
    plan: Plan,
    *,
    nll: float,
    kl: float | None = None,
    origin: str = "",
    trial: int = 0,
    num_windows: int = 1,
    num_tokens: int = 1,
) -> TrialResult:
    """Build what a proposer reads of a finished plan.

    Args:
        plan: the plan.
        nll: its loss, nats per token; counted from the unmodified model's for a search by it.
        kl: its KL divergence, nats per token, for a search by that.
        origin: what proposed it.
        trial: its number.
        num_windows: windows behind the losses.
        num_tokens: tokens behind them.
    """
    if kl is not None and not np.isfinite(kl):
        kl = math.inf
    loss = Loss(
        nll=nll,
        delta_nll=nll,
        delta_nll_se=None,
        kl_nats_per_token=kl,
        kl_se=None,
        num_windows=num_windows,
        num_tokens=num_tokens,
    )
    return TrialResult(plan, RAW, trial, origin, "complete", loss)
