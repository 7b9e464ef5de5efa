"""Simulate a search on many workers: how well they are used, and what it costs in regret beside one worker.

The coordinator is the real one, with its sampler and a database. Evaluations take simulated time: the clock moves by
what the coordinator needs, and, when it waits, to the end of the next evaluation. Efficiency is the time that workers
evaluate over the time that they are there, from the first ask to the end of the last evaluation. What is lacking is
lost until every worker has begun, between two of its evaluations, and after its last one: at the end workers idle even
if the coordinator takes no time, since an evaluation is not divided. The losses come from an exhaustive table, or from
a cost of 32 layers whose cheapest plans are known: additive, with interactions of joins at most four apart, under a
curve that bends upwards. Regret is the mean over the numbers of joins, up to a third of the layers, of the best loss
found minus the least.

    python studies/many_workers.py --workers 1,64 --evaluations 1000 --seeds 3
    python studies/many_workers.py --workers 1,64 --evaluations 200 --seeds 5 --table TABLE.npz
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, coordinator, run_study
from lpsearch.search.samplers.dynamic_program import build_group_costs, solve_dynamic_program
from studies.tables import load_table

FloatArray = NDArray[np.float64]

BASE_NLL = 3.0
REACH = 4
"""Largest distance of joins that interact in the synthetic cost; the dynamic program is exact for it."""


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        space: the plans.
        get_nll: loss of a plan.
        least_nll: (max_joins,) the least loss of a plan with at least so many joins, from 1.
        missing_nll: what counts where no plan of so many joins was found.
    """

    space: PlanSpace
    get_nll: Callable[[Plan], float]
    least_nll: FloatArray
    missing_nll: float


def build_synthetic(num_layers: int, *, seed: int = 0) -> Problem:
    """Build a cost over pairs of layers whose cheapest plans are known exactly.

    Args:
        num_layers: layers of the model.
        seed: of the cost.
    """
    num_joins = num_layers - 1
    rng = np.random.default_rng(seed)
    places = np.linspace(0, 1, num_joins)
    joins = 0.03 + 0.3 * (np.exp(-12 * places) + np.exp(-12 * (1 - places))) + rng.gamma(1.0, 0.02, num_joins)
    bands = np.zeros((REACH, num_joins))
    for distance in range(1, REACH + 1):
        size = np.sqrt(joins[: num_joins - distance] * joins[distance:])
        bands[distance - 1, : num_joins - distance] = size * rng.normal(0.15, 0.3, num_joins - distance) / distance
    space = PlanSpace(num_layers)

    def bend(total: float) -> float:
        return BASE_NLL + total + 0.3 * total**2

    def get_nll(plan: Plan) -> float:
        made = plan.joins
        total = float(joins[list(made)].sum())
        for first in made:
            for second in made:
                if 0 < second - first <= REACH:
                    total += float(bands[second - first - 1, first])
        return bend(max(total, 0.0))

    max_joins = num_layers // 3
    cheapest = solve_dynamic_program(
        build_group_costs(joins[None], max_group=2),
        free_joins=space.free_joins,
        max_saving=num_layers // 2,
        product_costs=bands[None],
    )
    least = np.array([bend(cost) for cost in cheapest.cost[0]])
    least = np.minimum.accumulate(least[::-1])[::-1][1 : max_joins + 1]
    return Problem(space, get_nll, least, missing_nll=BASE_NLL + 5.0)


def read_table(path: Path) -> Problem:
    """Read the losses of all plans of a real model."""
    table = load_table(path, frozen_layers=())

    def get_nll(plan: Plan) -> float:
        return table.get_nll(sum(1 << i for i in plan.joins))

    return Problem(table.space, get_nll, table.least_nll, table.missing_nll)


@dataclass
class SimulatedPool(AbstractContextManager["SimulatedPool"]):
    """Workers whose evaluations take simulated time; they begin in the order in which they were submitted.

    Attributes:
        problem: gives the losses.
        num_slots: workers.
        seconds: duration of an evaluation.
        read_clock: clock by which the coordinator's own time is measured.
        now_s: simulated time.
        coordinator_s: how much of it the coordinator took while it did not wait.
        plans: evaluated, in the order in which they ended.
        worker_begins_s: for each worker, when its evaluations began.
    """

    problem: Problem
    num_slots: int
    seconds: float
    read_clock: Callable[[], float]
    num_windows: int = 1
    now_s: float = 0.0
    coordinator_s: float = 0.0
    plans: list[Plan] = field(default_factory=list)
    worker_begins_s: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin at zero."""
        self._ends_at: dict[Future[WindowLosses], tuple[float, Plan]] = {}
        self.worker_begins_s = [[] for _ in range(self.num_slots)]
        self._free = [(0.0, worker) for worker in range(self.num_slots)]
        self._read_at = self.read_clock()

    def submit(self, plan: Plan, window_indices: Sequence[int]) -> Future[WindowLosses]:
        """Begin an evaluation as soon as a worker is free."""
        self.charge()
        future: Future[WindowLosses] = Future()
        free_at, worker = heapq.heappop(self._free)
        begins_at = max(free_at, self.now_s)
        self.worker_begins_s[worker].append(begins_at)
        self._ends_at[future] = (begins_at + self.seconds, plan)
        heapq.heappush(self._free, (begins_at + self.seconds, worker))
        return future

    def charge(self) -> None:
        """Move the clock by what the coordinator took since it was last looked at."""
        read_at = self.read_clock()
        self.now_s += read_at - self._read_at
        self.coordinator_s += read_at - self._read_at
        self._read_at = read_at

    def find_ended(self, evaluations: Sequence[Any]) -> Any:
        """Return the evaluation that ended first, if one has."""
        for evaluation in evaluations:
            if evaluation.future is None or evaluation.future.done():
                return evaluation
        self.charge()
        if not evaluations:
            return None
        first = min(evaluations, key=lambda evaluation: self._ends_at[evaluation.future][0])
        ends_at, plan = self._ends_at[first.future]
        if ends_at > self.now_s:
            return None
        del self._ends_at[first.future]
        self.plans.append(plan)
        first.future.set_result(WindowLosses((self.problem.get_nll(plan),), None, 1))
        return first

    def wait(self, evaluations: Sequence[Any]) -> None:
        """Move the clock to the end of an evaluation."""
        self.charge()
        self.now_s = max(self.now_s, min(self._ends_at[evaluation.future][0] for evaluation in evaluations))

    def split_idle_s(self) -> dict[str, float]:
        """Return the seconds that workers idled before their first evaluation, between two, and after the last."""
        idle = {"before": 0.0, "between": 0.0, "after": 0.0}
        for begins in self.worker_begins_s:
            idle["before"] += begins[0] if begins else 0.0
            idle["between"] += sum(after - before - self.seconds for before, after in pairwise(begins))
            idle["after"] += self.now_s - (begins[-1] + self.seconds if begins else 0.0)
        return idle

    def close(self) -> None:
        """Hold nothing."""

    def __exit__(self, *error: object) -> None:
        """Hold nothing."""


@contextmanager
def _simulated_waits(pool: SimulatedPool) -> Iterator[None]:
    real = coordinator._find_ended, coordinator._wait_for_any
    coordinator._find_ended, coordinator._wait_for_any = pool.find_ended, pool.wait
    try:
        yield
    finally:
        coordinator._find_ended, coordinator._wait_for_any = real


def simulate(
    problem: Problem,
    *,
    num_workers: int,
    evaluations: int,
    seconds: float,
    sampler: str,
    seed: int,
    read_clock: Callable[[], float],
) -> SimulatedPool:
    """Run one study in a temporary database, every plan evaluated whole."""
    with tempfile.TemporaryDirectory(prefix="lpsearch-workers-") as directory:
        url = f"sqlite:///{Path(directory) / 'study.db'}"
        with StudyStore(url, study_name="simulated") as store:
            pool = SimulatedPool(problem, num_workers, seconds, read_clock)
            with _simulated_waits(pool):
                run_study(pool=pool, space=problem.space, budget=evaluations, store=store, sampler=sampler, seed=seed)
            pool.charge()
    return pool


def compute_regret(problem: Problem, plans: Sequence[Plan]) -> float:
    """Return the mean regret of the front of some evaluated plans, in nats per token."""
    found = np.full(len(problem.least_nll), np.inf)
    for plan in plans:
        reached = found[: plan.num_joins]
        np.minimum(reached, problem.get_nll(plan), out=reached)
    found = np.where(np.isfinite(found), found, problem.missing_nll)
    return float((found - problem.least_nll).mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate each number of workers, and print its rows and its JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,64", help="numbers of workers, with commas between")
    parser.add_argument("--evaluations", type=int, default=1000, help="of a study, the baseline included")
    parser.add_argument("--checkpoints", default="", help="evaluations after which the regret is reported as well")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of an evaluation")
    parser.add_argument("--layers", type=int, default=32, help="of the synthetic cost")
    parser.add_argument(
        "--table", type=Path, help="losses of all plans of a real model, in place of the synthetic cost"
    )
    parser.add_argument("--sampler", default="pairset")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a machine that is not idle")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    problem = build_synthetic(options.layers) if options.table is None else read_table(options.table)
    checkpoints = [int(part) for part in options.checkpoints.split(",") if part] + [options.evaluations]
    heads = f"{'workers':>7} {'efficiency':>10} {'before':>7} {'between':>7} {'after':>7} {'ms/trial':>8}"
    print(f"{heads}  mean regret after {checkpoints}")
    lines = []
    for num_workers in map(int, options.workers.split(",")):
        pools = [
            simulate(
                problem,
                num_workers=num_workers,
                evaluations=options.evaluations,
                seconds=options.seconds,
                sampler=options.sampler,
                seed=seed,
                read_clock=time.perf_counter if options.clock == "wall" else time.thread_time,
            )
            for seed in range(options.seeds)
        ]
        regrets = [
            statistics.fmean(compute_regret(problem, pool.plans[:checkpoint]) for pool in pools)
            for checkpoint in checkpoints
        ]
        efficiency = statistics.fmean(len(pool.plans) * options.seconds / (num_workers * pool.now_s) for pool in pools)
        idle = {
            name: statistics.fmean(pool.split_idle_s()[name] / (num_workers * pool.now_s) for pool in pools)
            for name in ("before", "between", "after")
        }
        trial_ms = statistics.fmean(1e3 * pool.coordinator_s / len(pool.plans) for pool in pools)
        shown = " ".join(f"{regret:.5f}" for regret in regrets)
        lost = " ".join(f"{share:7.3f}" for share in idle.values())
        print(f"{num_workers:7d} {efficiency:10.3f} {lost} {trial_ms:8.1f}  {shown}", flush=True)
        lines.append(
            {
                "workers": num_workers,
                "evaluations": options.evaluations,
                "seconds": options.seconds,
                "seeds": options.seeds,
                "sampler": options.sampler,
                "problem": "synthetic" if options.table is None else options.table.name,
                "clock": options.clock,
                "efficiency": efficiency,
                "idle_shares": idle,
                "coordinator_ms_per_trial": trial_ms,
                "mean_regret_nats": dict(zip(map(str, checkpoints), regrets, strict=True)),
            }
        )
    for line in lines:
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
