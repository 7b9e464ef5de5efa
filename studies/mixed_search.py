"""Search every join and drop of a real model, and compare with the best that much longer runs find.

``pairset`` with few evaluations (``--budget``) over all choices stands beside as many of the ``evolution`` and
``random`` samplers, of a greedy search, and of two separate searches by ``pairset``, over joins and over drops, with
half each. The reference is the least loss that any run of ``--long-budget`` evaluations finds: random plans, the greedy
search, and evolution for each share of the time on its own. Every plan is evaluated on the same windows, so there is no
noise, and what one run measured is not measured again for another.

The greedy search adds the choice of least loss for the time that it saves. It is lazy (Minoux, Accelerated greedy
algorithms, 1978): choices are measured again only while an older, lower price stands before them. When it has passed
the largest share, it exchanges choices of the best plans at the shares for others, at random, as long as it may.

Times are made up as in ``mixed_regret.py``; ``--join-saving`` is what joining two branches saves of one.

    python studies/mixed_search.py --model smollm2-135m --data windows.npz --windows 8 --seq-len 256 --device cuda
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.commands.loading import describe_device, resolve_device
from lpsearch.config import Allowed
from lpsearch.errors import ConfigError, LpsearchError
from lpsearch.models import load_model, resolve_source
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, TrialResult
from lpsearch.search.samplers.baselines import EvolutionProposer
from lpsearch.search.samplers.mixed import MixedProposer
from lpsearch.search.samplers.pairset import PairsetProposer
from lpsearch.search.samplers.sampler import Proposer
from lpsearch.search.samplers.time_levels import TimeLevels
from studies.drop_search import build_result
from studies.mixed_regret import estimate_time
from studies.plan_batches import PlanBatchEvaluator
from studies.windows_file import get_windows

__all__ = ["METHODS", "Landscape", "Run"]

METHODS = ("pairset", "evolution", "greedy", "random", "separate")
LONG_METHODS = ("evolution by share", "greedy", "random")

EVERYTHING: tuple[Allowed, ...] = ("joins", "drop-attention", "drop-mlp")
DROPS: tuple[Allowed, ...] = ("drop-attention", "drop-mlp")

BATCH_PLANS = 32
"""Plans that methods which need no result in between have evaluated at once."""

LAZY_PLANS = 8
"""Choices whose price the greedy search measures again at once."""

MAX_SWITCHES = 3
MAX_REDRAWS = 400
ROUNDING = 1e-9
SLACK = 0.02
"""Largest part of the time that a mutated plan saves beyond its share."""


class Landscape:
    """The losses and times of plans, each measured once.

    Args:
        evaluator: holds the windows.
        join_saving: as in :func:`studies.mixed_regret.estimate_time`.

    Attributes:
        losses: by plan, what it loses against the unmodified model in nats per token.
    """

    def __init__(self, evaluator: PlanBatchEvaluator, *, num_layers: int, join_saving: float) -> None:
        self._evaluator = evaluator
        baseline = Plan.baseline(num_layers)
        self.num_layers = num_layers
        self.estimate_time = partial(estimate_time, join_saving=join_saving)
        self._base_time = self.estimate_time(baseline)
        self._layers_time = self._base_time - self.estimate_time(
            baseline.drop({"attention": range(num_layers), "mlp": range(num_layers)})
        )
        self._shares: dict[Plan, float] = {}
        self._base_nll = self._measure([baseline])[0]
        self.losses = {baseline: 0.0}

    def measure(self, plans: Sequence[Plan]) -> None:
        """Have plans in ``losses``."""
        missing = [plan for plan in dict.fromkeys(plans) if plan not in self.losses]
        for start in range(0, len(missing), BATCH_PLANS):
            part = missing[start : start + BATCH_PLANS]
            self.losses |= {plan: nll - self._base_nll for plan, nll in zip(part, self._measure(part), strict=True)}

    def get_share(self, plan: Plan) -> float:
        """Return what a plan saves of the time of all layers."""
        if plan not in self._shares:
            self._shares[plan] = (self._base_time - self.estimate_time(plan)) / self._layers_time
        return self._shares[plan]

    def _measure(self, plans: list[Plan]) -> list[float]:
        nll: list[float] = self._evaluator.evaluate(plans, range(self._evaluator.num_windows)).nll.mean(axis=1).tolist()
        return [value if value == value else float("inf") for value in nll]


class Run:
    """One run of a method: the plans that it evaluated, in order, up to a budget.

    Args:
        landscape: what it searches.
        budget: distinct plans, the baseline included.
    """

    def __init__(self, landscape: Landscape, budget: int) -> None:
        self.landscape = landscape
        self.plans: dict[Plan, None] = {}
        self._known: list[tuple[float, float, Plan]] = []  # share, loss
        self._budget = budget
        self.evaluate([Plan.baseline(landscape.num_layers)])

    @property
    def room(self) -> int:
        """Evaluations that are left."""
        return self._budget - len(self.plans)

    def evaluate(self, plans: Sequence[Plan]) -> None:
        """Evaluate those plans that are new to this run, as far as its budget goes."""
        new = [plan for plan in dict.fromkeys(plans) if plan not in self.plans][: self.room]
        self.landscape.measure(new)
        self.plans |= dict.fromkeys(new)
        self._known += [(self.landscape.get_share(plan), self.landscape.losses[plan], plan) for plan in new]

    def find_best(self, share: float) -> Plan | None:
        """Return the plan of least loss among those that save at least so much; None without one."""
        enough = (known for known in self._known if known[0] >= share - ROUNDING)
        return min(enough, key=itemgetter(1), default=(0.0, 0.0, None))[2]

    def find_losses(self, shares: Sequence[float]) -> list[float]:
        """Return the least loss of plans that save at least each share; infinite without one."""
        best = [self.find_best(share) for share in shares]
        return [float("inf") if plan is None else self.landscape.losses[plan] for plan in best]

    def list_results(self) -> list[TrialResult]:
        """Return the plans as a proposer takes them."""
        return [build_result(plan, nll=self.landscape.losses[plan], trial=i) for i, plan in enumerate(self.plans)]


def propose_all(run: Run, proposer: Proposer) -> None:
    """Evaluate what a proposer proposes, one plan after the other."""
    results = run.list_results()
    while run.room:
        proposal = proposer.propose(results, ())
        if proposal is None:
            return
        run.evaluate([proposal.plan])
        results.append(build_result(proposal.plan, nll=run.landscape.losses[proposal.plan], trial=len(results)))


def draw_random(run: Run, space: PlanSpace, seed: int) -> None:
    """Evaluate random plans, the levels of time in turn."""
    rng = random.Random(seed)
    levels = TimeLevels(space, run.landscape.estimate_time)
    counts = levels.count_plans()
    while run.room:
        before = run.room
        plans = [levels.draw_plan(level, rng) for level, count in enumerate(counts) if count]
        run.evaluate(plans)
        if run.room == before and len(run.plans) >= sum(counts):
            return


def search_greedily(run: Run, space: PlanSpace, shares: Sequence[float], seed: int) -> None:
    """Add choices by their lazy prices, then exchange some of the best plans' choices while there is room."""
    landscape = run.landscape
    plan = Plan.baseline(landscape.num_layers)
    prices = dict.fromkeys(range(len(space.choices)), -float("inf"))  # of each choice, when it was last measured
    while run.room and landscape.get_share(plan) < max(shares) and prices:
        extended = {place: added for place in prices if (added := _add(space, plan, place)) is not None}
        prices = {place: prices[place] for place in extended}
        fresh: set[int] = set()
        while run.room and prices:
            order = sorted(prices, key=prices.__getitem__)
            if order[0] in fresh:
                break
            stale = [place for place in order if place not in fresh][:LAZY_PLANS]
            run.evaluate([extended[place] for place in stale])
            for place in stale:
                prices[place] = _price(run, plan, extended[place])
            fresh.update(stale)
        if prices and order[0] in fresh and extended[order[0]] in run.plans:
            plan = extended[order[0]]
            del prices[order[0]]
    rng = random.Random(seed)
    idle = 0
    while run.room and idle < MAX_REDRAWS:
        before = run.room
        for share in shares:
            best = run.find_best(share)
            if best is not None:
                run.evaluate(list(_mutate(best, space, landscape, share, rng, count=LAZY_PLANS, switches=1)))
        idle = idle + 1 if run.room == before else 0


def _add(space: PlanSpace, plan: Plan, place: int) -> Plan | None:
    """Return a plan with one choice more; None where that is no plan of the space."""
    bits = list(space.encode(plan))
    bits[place] = True
    added = space.decode(bits)
    return added if list(space.encode(added)) == bits else None


def _price(run: Run, plan: Plan, extended: Plan) -> float:
    """Return the loss that a choice adds for what it saves; infinite where it saves nothing or was not evaluated."""
    landscape = run.landscape
    saved = landscape.get_share(extended) - landscape.get_share(plan)
    if extended not in run.plans or saved <= 0:
        return float("inf")
    added = landscape.losses[extended] - landscape.losses[plan]
    # what lowers the loss is best where it lowers it most, however little it saves
    return added / saved if added > 0 else added


def evolve_by_share(run: Run, space: PlanSpace, shares: Sequence[float], seed: int) -> None:
    """Evolve the plans of each share on its own, with EvoPress's numbers: 64 random plans, then 32 offspring."""
    landscape = run.landscape
    levels = TimeLevels(space, landscape.estimate_time)
    counts = levels.count_plans()
    rng = random.Random(seed)
    for index, share in enumerate(shares):
        part = run.room // (len(shares) - index)
        end = run.room - part
        run.evaluate(_draw_saving(levels, counts, landscape, share, rng)[:part])
        idle = 0
        while run.room > end and idle < MAX_REDRAWS:
            best, before = run.find_best(share), run.room
            if best is None:
                break
            offspring = _mutate(best, space, landscape, share, rng, count=BATCH_PLANS, switches=MAX_SWITCHES)
            run.evaluate(list(offspring)[: run.room - end])
            idle = idle + 1 if run.room == before else 0


def _draw_saving(
    levels: TimeLevels, counts: Sequence[int], landscape: Landscape, share: float, rng: random.Random
) -> list[Plan]:
    """Draw 64 plans that save a share of the time and little more."""
    plans: dict[Plan, None] = {}
    for _ in range(64 * MAX_REDRAWS):
        level = rng.choice([level for level, count in enumerate(counts) if count])
        plan = levels.draw_plan(level, rng)
        if share - ROUNDING <= landscape.get_share(plan) <= share + 2 * SLACK:
            plans.setdefault(plan)
        if len(plans) == 2 * BATCH_PLANS:
            break
    return list(plans)


def _mutate(
    plan: Plan,
    space: PlanSpace,
    landscape: Landscape,
    share: float,
    rng: random.Random,
    *,
    count: int,
    switches: int,
) -> Iterator[Plan]:
    """Yield plans that exchange one to ``switches`` choices, mostly one, and still save a share and little more."""
    highest = max(share + SLACK, landscape.get_share(plan) + ROUNDING)
    for _ in range(count):
        for _ in range(MAX_REDRAWS):
            bits = list(space.encode(plan))
            for _ in range(min(rng.randint(1, switches), rng.randint(1, switches))):
                for is_made in rng.choice([(True, False), (True, False), (True, False, False), (True, True, False)]):
                    places = [place for place, bit in enumerate(bits) if bit == is_made]
                    if places:
                        bits[rng.choice(places)] = not is_made
            mutated = space.decode(bits)
            if mutated != plan and share - ROUNDING <= landscape.get_share(mutated) <= highest:
                yield mutated
                break


def run_method(method: str, landscape: Landscape, *, budget: int, shares: Sequence[float], seed: int) -> Run:
    """Run a method and return what it evaluated.

    Args:
        method: one of ``METHODS`` or ``LONG_METHODS``.
        landscape: the losses and times.
        budget: evaluations, the baseline included.
        shares: of the time of all layers, which the greedy search and ``evolution by share`` aim at.
        seed: decides every draw.
    """
    space = PlanSpace(landscape.num_layers, allow=EVERYTHING)
    run = Run(landscape, budget)
    estimate = landscape.estimate_time
    if method == "pairset":
        propose_all(run, MixedProposer(space=space, budget=budget, seed=seed, estimate_latency_ms=estimate))
    elif method == "evolution":
        propose_all(run, EvolutionProposer(space=space, seed=seed, levels=TimeLevels(space, estimate)))
    elif method == "random":
        draw_random(run, space, seed)
    elif method == "greedy":
        search_greedily(run, space, shares, seed)
    elif method == "separate":
        half = Run(landscape, budget // 2)
        joins = PlanSpace(landscape.num_layers)
        propose_all(half, PairsetProposer(space=joins, budget=budget // 2, seed=seed, estimate_latency_ms=estimate))
        run.evaluate(list(half.plans))
        rest = Run(landscape, run.room + 1)
        drops = PlanSpace(landscape.num_layers, allow=DROPS)
        propose_all(rest, MixedProposer(space=drops, budget=run.room + 1, seed=seed, estimate_latency_ms=estimate))
        run.evaluate(list(rest.plans))
    else:
        evolve_by_share(run, space, shares, seed)
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, print the table and the JSON lines, and return the exit code."""
    options = _build_parser().parse_args(arguments)
    try:
        print(json.dumps(_run(options)))
    except LpsearchError as error:
        print(f"mixed_search: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    try:
        shares = [float(part) for part in options.shares.split(",")]
    except ValueError:
        raise ConfigError(f"--shares {options.shares}: give numbers with commas between") from None
    if not all(0 < share < 1 for share in shares) or not 0 <= options.join_saving <= 1:
        raise ConfigError("--shares must be between 0 and 1, --join-saving from 0 to 1")
    if min(options.budget, options.seeds) < 1 or options.long_budget < 0:
        raise ConfigError("--budget and --seeds must be at least 1, --long-budget at least 0")
    began_at = time.monotonic()
    device = resolve_device(options.device)
    loaded = load_model(resolve_source(options.model), device=device, dtype=getattr(torch, options.dtype))
    windows = get_windows(options.data, loaded, num_windows=options.windows, seq_len=options.seq_len)
    landscape = Landscape(
        PlanBatchEvaluator(loaded.model, windows),
        num_layers=loaded.identity.num_layers,
        join_saving=options.join_saving,
    )
    print(f"{'method':<20} {'plans':>6} " + " ".join(f"{share:>8.0%}" for share in shares))
    found: list[tuple[str, int, Run]] = []
    methods = [(method, options.budget) for method in METHODS]
    methods += [(method, options.long_budget) for method in LONG_METHODS if options.long_budget]
    for method, budget in methods:
        for seed in range(options.seeds if budget == options.budget else 1):
            run = run_method(method, landscape, budget=budget, shares=shares, seed=seed)
            found.append((method, seed, run))
            losses = run.find_losses(shares)
            print(f"{method:<20} {len(run.plans):>6} " + " ".join(f"{loss:>8.4f}" for loss in losses), flush=True)
            print(f"{method}: {time.monotonic() - began_at:.0f} s", file=sys.stderr, flush=True)
    best = [min(run.find_losses([share])[0] for *_, run in found) for share in shares]
    for method, seed, run in found:
        print(json.dumps(_describe(method, seed, run, shares, best)))
    return {
        "model": loaded.identity.id,
        "data": windows.spec,
        "windows": windows.num_windows,
        "seq_len": windows.seq_len,
        "choices": len(PlanSpace(landscape.num_layers, allow=EVERYTHING).choices),
        "join_saving": options.join_saving,
        "shares": shares,
        "best": best,
        "elapsed_s": time.monotonic() - began_at,
        "dtype": options.dtype,
        "device": describe_device(device),
        "torch": torch.__version__,
    }


def _describe(method: str, seed: int, run: Run, shares: Sequence[float], best: Sequence[float]) -> dict[str, Any]:
    losses = run.find_losses(shares)
    plans = [run.find_best(share) for share in shares]
    finite: Callable[[float], float | None] = lambda value: value if value < float("inf") else None  # noqa: E731
    return {
        "method": method,
        "evaluations": len(run.plans),
        "seed": seed,
        "loss": [finite(loss) for loss in losses],
        "above_best": [finite(loss - least) for loss, least in zip(losses, best, strict=True)],
        "plans": [None if plan is None else plan.key for plan in plans],
    }


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Search every join and drop of a model by several methods.")
    parser.add_argument("--model", required=True, help="alias, hub id, directory or .gguf file")
    parser.add_argument("--data", required=True, help="as for lpsearch optimize, or a windows file")
    parser.add_argument("--windows", type=int, help="number of windows; needed for a text")
    parser.add_argument("--seq-len", type=int, help="tokens in a window; needed for a text")
    parser.add_argument("--budget", type=int, default=300, help="evaluations of every method")
    parser.add_argument("--long-budget", type=int, default=5000, help="evaluations of the reference's runs; 0 for none")
    parser.add_argument("--shares", default="0.05,0.1,0.15,0.2", help="of the layers' time, to compare plans at")
    parser.add_argument("--join-saving", type=float, default=0.25, help="what joining two branches saves of one")
    parser.add_argument("--seeds", type=int, default=1, help="runs of every method of few evaluations")
    parser.add_argument("--device", default="auto", help="torch device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    return parser


if __name__ == "__main__":
    sys.exit(main())
