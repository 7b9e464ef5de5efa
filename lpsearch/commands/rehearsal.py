"""A study without a model: the real search on a made-up landscape of losses, to count what it would evaluate.

Sampler, racing, database and prefix cache are those of a study; hidden states are counted, not kept. How many windows
racing spares depends on how much plans differ, and on how much what a plan costs differs between windows. Nobody knows
either before, so the landscape is like what was measured of small models: joins cost most at both ends, and all the
less the more layers there are; what a plan costs scatters over windows as the square root of its cost, and less where
windows are long. The count is a guess between the least and the most.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.engine import URL

from lpsearch.config import Metric, Objective
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.evaluation.prefix_tree import PrefixTree
from lpsearch.evaluation.rungs import split_by_rung
from lpsearch.kinds import TextKind
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, run_study

__all__ = ["CountedWork", "RehearsedStudy", "rehearse_study"]

_BASE_NLL = 3.0
_JOIN_NATS = 0.085
"""What a join in the middle of a model of 30 layers costs, in nats per token; it falls with the square of the number of
layers. Measured medians: 0.10 of SmolLM2-135M (30 layers), 0.35 of Gemma 3 270M (18)."""

_FIRST_FACTOR = 100.0
_LAST_FACTOR = 5.0
"""The first and the last join cost so many times more, 8.2 and 1.8 nats of SmolLM2-135M, and those beside them less."""

_BRANCH_SHARE = 0.6
"""What leaving out an attention or an MLP costs relative to a join."""

_SCATTER_NATS = {"nll": 0.1, "kl": 0.02}
"""Standard deviation over windows of 512 tokens of a plan that costs 1 nat per token. Measured: 0.08 to 0.14 of
SmolLM2-135M and 0.07 of Gemma 3 270M in negative log-likelihood. A divergence has less, since it is a mean over the
vocabulary: 0.02 to 0.03 of random weights; of real ones it was not measured."""

_SCATTER_TOKENS = 512


@dataclass(frozen=True)
class CountedWork:
    """What some evaluations run.

    Attributes:
        windows: windows, each counted once for every plan.
        layers: layers on windows that the prefix cache leaves to be run.
        layers_asked: those that would run without it.
        held_bytes: most that the cache held.
    """

    windows: int
    layers: int
    layers_asked: int
    held_bytes: int


@dataclass(frozen=True)
class RehearsedStudy:
    """What a study would do.

    Attributes:
        num_plans: finished plans, the baseline included.
        proxy: the search's evaluations.
        heldout: those of its front on the held-out windows.
        num_front: plans on the front.
        books_s: seconds of a processor that sampler and database take here, mostly while the device works.
    """

    num_plans: int
    proxy: CountedWork
    heldout: CountedWork
    num_front: int
    books_s: float


class _CountingEvaluator:
    """Has losses by formula, and counts what a :class:`~lpsearch.evaluation.ModelEvaluator` would run for them."""

    def __init__(
        self,
        num_layers: int,
        *,
        num_windows: int,
        num_kinds: int,
        seq_len: int,
        metric: Metric,
        batch_size: int,
        state_bytes: int,
        cache_bytes: int,
        seed: int,
    ) -> None:
        self.num_windows = num_windows
        self._num_kinds = num_kinds
        self._batch_size = batch_size
        self._state_bytes = state_bytes
        self._tree: PrefixTree[bool] = PrefixTree(budget_bytes=cache_bytes)
        self._held_bytes = self._windows = self._layers = self._layers_asked = 0
        rng = np.random.default_rng(seed)
        layers = np.arange(num_layers)
        ends = _FIRST_FACTOR * np.exp(-1.5 * layers) + _LAST_FACTOR * np.exp(-(num_layers - 1 - layers) / 1.5)
        costs = _JOIN_NATS * (30 / num_layers) ** 2 * (1 + ends)
        self._joins = costs[: num_layers - 1] * rng.gamma(5.0, 0.2, num_layers - 1)
        self._attention, self._mlp = _BRANCH_SHARE * costs * rng.gamma(5.0, 0.2, (2, num_layers))
        scatter = _SCATTER_NATS[metric] * math.sqrt(_SCATTER_TOKENS / seq_len)
        self._scatter = scatter * rng.normal(size=(num_windows, 3, num_layers))
        self._windows_nll = _BASE_NLL + 0.2 * rng.normal(size=num_windows)
        self.evaluating_s = 0.0

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        """Return losses, and count."""
        started = time.process_time()
        groups = plan.running_groups
        for rung in split_by_rung(window_indices, self.num_windows, self._num_kinds):
            for start in range(0, len(rung), self._batch_size):
                batch = rung[start : start + self._batch_size]
                nbytes = len(batch) * self._state_bytes
                with self._tree.visit(tuple(batch), groups, state_bytes=nbytes) as visit:
                    skipped = 0 if visit.resume is None else visit.resume.num_layers
                    for boundary in visit.keep:
                        self._tree.hold(boundary, True, nbytes=nbytes)
                self._windows += len(batch)
                self._layers += (plan.num_layers - skipped) * len(batch)
                self._layers_asked += plan.num_layers * len(batch)
        self._held_bytes = max(self._held_bytes, self._tree.held_bytes)
        costs = self._compute_costs(plan, window_indices)
        nll = tuple(map(float, self._windows_nll[list(window_indices)] + costs))
        self.evaluating_s += time.process_time() - started
        return WindowLosses(nll, tuple(map(float, np.abs(costs))), 1)

    def count(self) -> CountedWork:
        """Return what was counted."""
        return CountedWork(self._windows, self._layers, self._layers_asked, self._held_bytes)

    def _compute_costs(self, plan: Plan, window_indices: Sequence[int]) -> NDArray[np.float64]:
        """Return what a plan costs on each window, in nats per token."""
        scatter = self._scatter[list(window_indices)]
        dropped = plan.dropped
        parts = ((self._joins, plan.joins), (self._attention, dropped["attention"]), (self._mlp, dropped["mlp"]))
        total = np.zeros(len(window_indices))
        for kind, (costs, chosen) in enumerate(parts):
            layers = list(chosen)
            total += (costs[layers] + np.sqrt(costs[layers]) * scatter[:, kind, layers]).sum(axis=1)
        num_changes = plan.num_joins + plan.num_dropped
        return total * (1 + 0.02 * num_changes)  # together they cost more than alone


def rehearse_study(
    space: PlanSpace,
    *,
    budget: int,
    num_windows: int,
    kinds: Sequence[TextKind],
    sampler: str,
    seed: int,
    metric: Metric,
    objective: Objective,
    staged: bool,
    seq_len: int,
    batch_size: int,
    state_bytes: int,
    cache_bytes: int,
) -> RehearsedStudy:
    """Run a study without a model, in a database that is deleted.

    Args:
        space: the plans.
        budget: finished plans.
        num_windows: windows of all kinds together.
        kinds: the kinds of text.
        sampler: name of the search method.
        seed: decides every draw.
        metric: the loss that is searched.
        objective: what is traded against it; time is taken to be depth.
        staged: let plans race.
        seq_len: tokens in a window.
        batch_size: windows that run together.
        state_bytes: of the hidden states of one window.
        cache_bytes: most that the prefix cache may hold.
    """

    def build_evaluator() -> _CountingEvaluator:
        return _CountingEvaluator(
            space.num_layers,
            num_windows=num_windows,
            num_kinds=max(1, len(kinds)),
            seq_len=seq_len,
            metric=metric,
            batch_size=batch_size,
            state_bytes=state_bytes,
            cache_bytes=cache_bytes,
            seed=0,
        )

    evaluator, heldout = build_evaluator(), build_evaluator()
    with tempfile.TemporaryDirectory(prefix="lpsearch-dry-run-") as directory:
        url = URL.create("sqlite", database=str(Path(directory) / "study.db"))
        started = time.process_time()
        with StudyStore(url, study_name="dry-run") as store:
            result = run_study(
                evaluator=evaluator,
                space=space,
                budget=budget,
                store=store,
                sampler=sampler,
                seed=seed,
                metric=metric,
                objective=objective,
                estimate_latency_ms=lambda plan: 1.0 + plan.depth,
                staged=staged,
                kinds=tuple(kinds) if len(kinds) > 1 else (),
            )
        books_s = time.process_time() - started - evaluator.evaluating_s
    for found in result.front:
        heldout.evaluate_windows(found.plan, range(num_windows))
    return RehearsedStudy(
        num_plans=len(result.results),
        proxy=evaluator.count(),
        heldout=heldout.count(),
        num_front=len(result.front),
        books_s=books_s,
    )
