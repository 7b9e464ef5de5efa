"""Count the decoder layers that a study runs with a prefix cache, by number of boundaries and by eviction policy.

The plans come from a real study, with its sampler and its Optuna storage. It runs on random landscapes of losses
(additive costs of joins that are larger at both ends, interactions between near joins, a quadratic in their number), or
it ran on a model before. The script replays every request of the study through the evaluator's own tree and through
plain least-recently-used eviction. `clairvoyant` is no policy that could be used: it evicts as the tree does, but it
knows the plans to come.

    python studies/prefix_cache.py --layers 30 --trials 200 --seeds 5
    python studies/prefix_cache.py --replay studies/smollm2-135m/study.db

A ratio is the layers of plain forwards over the layers run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna

from lpsearch.evaluation.losses import WindowLosses
from lpsearch.evaluation.prefix_tree import PrefixTree
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, run_study

Request = tuple[Plan, tuple[int, ...]]
"""A plan and the batch of windows that it was evaluated on."""

BASE_NLL = 3.0
LOOKAHEAD_HALF_LIFE_PLANS = 8


class Landscape:
    """An evaluator that computes losses by formula and records its requests.

    Args:
        num_layers: layers of the model.
        seed: of the random costs.
    """

    num_windows = 1

    def __init__(self, num_layers: int, *, seed: int) -> None:
        rng = np.random.default_rng(seed)
        num_joins = num_layers - 1
        depth = np.linspace(0, 1, num_joins)
        ends = 1.5 * np.exp(-depth / 0.06) + 1.5 * np.exp(-(1 - depth) / 0.06)
        waves = 0.4 * np.sin(2 * np.pi * depth * rng.uniform(0.5, 2) + rng.uniform(0, 6))
        self._costs = np.exp(rng.normal(-3.6, 0.7, num_joins) + ends + waves)
        self._products = np.zeros((num_joins, num_joins))
        for distance, scale in ((1, 0.02), (2, 0.012), (3, 0.008), (4, 0.006)):
            for join in range(num_joins - distance):
                self._products[join, join + distance] = rng.normal(scale, scale)
        self._quadratic = rng.uniform(0.001, 0.003)
        self.requests: list[Request] = []

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        """Return the plan's loss on every window, and record the request."""
        self.requests.append((plan, tuple(window_indices)))
        joins = list(plan.joins)
        delta = (
            self._costs[joins].sum() + self._products[np.ix_(joins, joins)].sum() + self._quadratic * len(joins) ** 2
        )
        return WindowLosses(tuple(BASE_NLL + float(delta) for _ in window_indices), None, 511)


def record_requests(*, num_layers: int, trials: int, sampler: str, max_group: int, seed: int) -> list[Request]:
    """Run a study on a random landscape and return its requests."""
    landscape = Landscape(num_layers, seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{Path(directory) / 'study.db'}"
        with StudyStore(url, study_name="prefix-cache") as store:
            space = PlanSpace(num_layers, max_group)
            run_study(evaluator=landscape, space=space, budget=trials, store=store, sampler=sampler, seed=seed)
    return landscape.requests


def read_requests(path: Path) -> list[Request]:
    """Return the finished plans of a study that ran on a model, in the order of its trials, one batch each."""
    url = f"sqlite:///{path}"
    requests: list[Request] = []
    for name in optuna.get_all_study_names(url):
        trials = optuna.load_study(study_name=name, storage=url).get_trials(deepcopy=False)
        finished = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
        requests += [(Plan.from_groups(json.loads(trial.user_attrs["groups"])), (0,)) for trial in finished]
    return requests


def count_plain(requests: Sequence[Request]) -> int:
    """Count the layers of plain forwards; a layer counts once for each window."""
    return sum(plan.num_layers * len(batch) for plan, batch in requests)


def count_with_tree(requests: Sequence[Request], *, boundaries: float) -> tuple[int, int]:
    """Count the layers that run with the evaluator's own tree, and the boundaries that it holds at the end.

    Args:
        requests: the study.
        boundaries: budget, in hidden states of all windows of the study.
    """
    num_windows = max(len(batch) for _, batch in requests)
    tree: PrefixTree[bool] = PrefixTree(budget_bytes=int(min(boundaries, 1 << 40)) * num_windows)
    layers = 0
    for plan, batch in requests:
        with tree.visit(batch, plan.groups, state_bytes=len(batch)) as visit:
            skipped = 0 if visit.resume is None else visit.resume.num_layers
            for boundary in visit.keep:
                tree.hold(boundary, True, nbytes=len(batch))
        layers += (plan.num_layers - skipped) * len(batch)
    return layers, len(tree)


def _list_prefixes(request: Request) -> dict[tuple[object, ...], int]:
    """Return the number of layers of each prefix of a plan on its batch."""
    plan, batch = request
    return {(batch, *plan.groups[:end]): plan.groups[end - 1][-1] + 1 for end in range(1, plan.depth)}


def count_with_lru(requests: Sequence[Request], *, boundaries: float) -> int:
    """Count the layers that run with eviction of the least recently used boundary; every boundary counts as one."""
    held: OrderedDict[tuple[object, ...], None] = OrderedDict()
    layers = 0
    for request in requests:
        plan, batch = request
        prefixes = _list_prefixes(request)
        skipped = max((size for prefix, size in prefixes.items() if prefix in held), default=0)
        layers += (plan.num_layers - skipped) * len(batch)
        for prefix, size in reversed(prefixes.items()):  # the shortest prefix of a plan is the most recent
            if prefix in held or size > skipped:
                held[prefix] = None
                held.move_to_end(prefix)
        while len(held) > boundaries:
            held.popitem(last=False)
    return layers


def count_with_clairvoyance(requests: Sequence[Request], *, boundaries: float) -> int:
    """Count the layers that run with eviction of the boundary worth least to the plans to come, near ones first."""
    uses: dict[tuple[object, ...], list[int]] = {}
    for index, request in enumerate(requests):
        for prefix in _list_prefixes(request):
            uses.setdefault(prefix, []).append(index)
    held: dict[tuple[object, ...], int] = {}
    layers = 0
    for now, request in enumerate(requests):
        plan, batch = request
        prefixes = _list_prefixes(request)
        skipped = max((size for prefix, size in prefixes.items() if prefix in held), default=0)
        layers += (plan.num_layers - skipped) * len(batch)
        held |= {
            prefix: size
            for prefix, size in prefixes.items()
            if size > skipped and uses[prefix][-1] > now  # no later plan uses the others
        }
        held = {prefix: size for prefix, size in held.items() if uses[prefix][-1] > now}
        chance = {
            prefix: sum(0.5 ** ((use - now) / LOOKAHEAD_HALF_LIFE_PLANS) for use in uses[prefix] if use > now)
            for prefix in held
        }
        while len(held) > boundaries:
            del held[_find_least_useful(held, chance)]
    return layers


def _find_least_useful(
    held: dict[tuple[object, ...], int], chance: dict[tuple[object, ...], float]
) -> tuple[object, ...]:
    worth, span = dict(chance), dict(held)
    for prefix in held:
        above = next((b for end in range(len(prefix) - 1, 1, -1) if (b := prefix[:end]) in held), None)
        if above is not None:
            worth[above] -= chance[prefix]
            span[prefix] -= held[above]
    return min(held, key=lambda prefix: worth[prefix] * span[prefix])


def main() -> None:
    """Replay the studies; print the table, and the same as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sampler", default="pairset")
    parser.add_argument("--max-group", type=int, default=2)
    parser.add_argument("--boundaries", type=float, nargs="+", default=[25, 50, 100, 150, 300, 600, math.inf])
    parser.add_argument("--replay", type=Path, help="study.db of a study on a model, instead of random landscapes")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if arguments.replay is not None:
        studies = [read_requests(arguments.replay)]
    else:
        studies = [
            record_requests(
                num_layers=arguments.layers,
                trials=arguments.trials,
                sampler=arguments.sampler,
                max_group=arguments.max_group,
                seed=seed,
            )
            for seed in range(arguments.seeds)
        ]
    plain = [count_plain(requests) for requests in studies]
    print(f"{len(studies)} studies of {[len(requests) for requests in studies]} evaluations; plain layers {plain}")
    print("layers of plain forwards / layers run: mean (least) over the studies")
    print(f"{'boundaries':>10}  {'lru':>13}  {'expected use':>13}  {'clairvoyant':>13}  {'ms a plan':>9}")
    rows = []
    for boundaries in arguments.boundaries:
        lru = [all_ / count_with_lru(s, boundaries=boundaries) for all_, s in zip(plain, studies, strict=True)]
        future = [
            all_ / count_with_clairvoyance(s, boundaries=boundaries) for all_, s in zip(plain, studies, strict=True)
        ]
        began_at = time.perf_counter()
        counted = [count_with_tree(requests, boundaries=boundaries) for requests in studies]
        tree_ms = 1000 * (time.perf_counter() - began_at) / sum(map(len, studies))
        tree = [all_ / layers for all_, (layers, _) in zip(plain, counted, strict=True)]
        cells = [f"{statistics.mean(ratios):.2f} ({min(ratios):.2f})" for ratios in (lru, tree, future)]
        print(f"{boundaries:>10g}  {cells[0]:>13}  {cells[1]:>13}  {cells[2]:>13}  {tree_ms:>9.2f}", flush=True)
        rows.append(
            {
                "boundaries": None if math.isinf(boundaries) else int(boundaries),
                "held": max(held for _, held in counted),
                "lru": statistics.mean(lru),
                "expected_use": statistics.mean(tree),
                "expected_use_least": min(tree),
                "clairvoyant": statistics.mean(future),
                "tree_ms_per_plan": tree_ms,
            }
        )
    print(json.dumps({"evaluations": [len(requests) for requests in studies], "rows": rows}))


if __name__ == "__main__":
    main()
