"""Compare searched fronts of a real model with the published method's blocks, also on text that no search saw.

A block is a contiguous run of pairs. The script runs a study of ``--budget`` plans on the search windows for each of
``--max-groups``. It finds the best block for each number of joins k on the same windows as the paper (arXiv 2502.02790)
does: it evaluates all of them. The winner for k is the plan of least loss with at least k joins, of a study or of the
blocks. The held-out windows then give:

- `spearman`: rank correlation of proxy and held-out delta_nll over a sample of the evaluated plans, with about as many
  plans of each number of joins; `spearman_whole` is that over the sampled plans that the search evaluated on all
  windows, and `spearman_by_joins` is that within each number of joins that has at least 8 plans;
- `optimism`: mean over k = 1 to L // 3 of held-out minus proxy delta_nll of the winners. Another text shifts all plans,
  so `shift` gives the same mean over the sampled plans with as many joins;
- `front_heldout` and `block_heldout`: mean held-out delta_nll of the winners over the same k. The number of evaluations
  that each took is given too.

The windows are files that ``windows_file.py`` wrote.

    python studies/real_fronts.py --model smollm2-135m --search-windows valid.npz --heldout-windows test.npz \
        --out smollm2-135m.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from scipy import stats

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.commands.loading import describe_device, resolve_device
from lpsearch.commands.outputs import check_output_file
from lpsearch.data import Windows
from lpsearch.errors import ConfigError, LpsearchError
from lpsearch.evaluation import ModelEvaluator
from lpsearch.evaluation.losses import compute_paired_delta
from lpsearch.models import LoadedModel, load_model, resolve_source
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyResult, StudyStore, TrialResult, run_study
from lpsearch.search.samplers.baselines import BlockProposer
from studies.windows_file import get_windows

MIN_PLANS_TO_RANK = 8


class DeltaEvaluator:
    """Evaluates plans on all windows, each once, relative to the unmodified model."""

    def __init__(self, loaded: LoadedModel, windows: Windows, *, cache_bytes: int | None) -> None:
        self.evaluator = ModelEvaluator(model=loaded.model, windows=windows, cache_bytes=cache_bytes)
        self._deltas: dict[Plan, float] = {}
        self._base_losses = self._evaluate(Plan.baseline(loaded.identity.num_layers))

    def _evaluate(self, plan: Plan) -> tuple[float, ...]:
        return self.evaluator.evaluate_windows(plan, range(self.evaluator.num_windows)).nll_nats_per_token

    @property
    def baseline_nll(self) -> float:
        """Mean loss of the unmodified model, nats per token."""
        return statistics.fmean(self._base_losses)

    def get_delta_nll(self, plan: Plan) -> float:
        """Return the plan's delta_nll in nats per token; infinite where a loss is not finite."""
        if plan not in self._deltas:
            delta = compute_paired_delta(self._evaluate(plan), self._base_losses).delta
            self._deltas[plan] = delta if math.isfinite(delta) else math.inf
        return self._deltas[plan]


def list_blocks(num_layers: int) -> list[Plan]:
    """Return every block, a contiguous run of pairs, in the order in which the ``window`` sampler proposes them."""
    proposer = BlockProposer(space=PlanSpace(num_layers), seed=0)
    plans: dict[Plan, None] = {}
    while (proposal := proposer.propose((), plans.keys())) is not None and proposal.origin == "window":
        plans[proposal.plan] = None
    return [plan for plan in plans if plan.num_joins > 0]


def find_winners(deltas: Mapping[Plan, float], num_layers: int) -> dict[int, Plan]:
    """Return the plan of least delta_nll with at least k joins, for each k = 1, 2, ... that has any."""
    winners: dict[int, Plan] = {}
    for k in range(1, num_layers):
        plans = [plan for plan in deltas if plan.num_joins >= k]
        if plans:
            winners[k] = min(plans, key=deltas.__getitem__)
    return winners


def sample_records(records: Sequence[TrialResult], count: int, *, seed: int) -> list[TrialResult]:
    """Return up to ``count`` plans with joins, about as many of each number of joins."""
    rng = np.random.default_rng(seed)
    by_joins: dict[int, list[TrialResult]] = defaultdict(list)
    for index in rng.permutation(len(records)):
        record = records[index]
        if record.num_joins > 0 and math.isfinite(record.loss.delta_nll):
            by_joins[record.num_joins].append(record)
    sample: list[TrialResult] = []
    while by_joins and len(sample) < count:
        for num_joins in sorted(by_joins):
            sample.append(by_joins[num_joins].pop())
            if not by_joins[num_joins]:
                del by_joins[num_joins]
    return sample[:count]


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation; None where one side is constant."""
    first, second = np.array(pairs).T
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first, second).statistic)


def compare_sample(sample: Sequence[TrialResult], heldout: DeltaEvaluator, *, whole_tokens: int) -> dict[str, Any]:
    """Compare proxy and held-out delta_nll of sampled plans.

    Args:
        sample: the plans.
        heldout: evaluates them on the held-out windows.
        whole_tokens: proxy tokens of a plan that the search evaluated on all windows.

    Returns:
        The numbers of plans, ``spearman``, ``spearman_whole``, ``spearman_by_joins`` and ``shift_by_joins``.
    """
    pairs: dict[int, list[tuple[float, float]]] = defaultdict(list)
    whole: list[tuple[float, float]] = []
    for record in sample:
        delta = heldout.get_delta_nll(record.plan)
        if math.isfinite(delta):
            pairs[record.num_joins].append((record.loss.delta_nll, delta))
            whole += [pairs[record.num_joins][-1]] if record.proxy_tokens == whole_tokens else []
    everything = [pair for group in pairs.values() for pair in group]
    ranked = {k: rank_correlation(group) for k, group in sorted(pairs.items()) if len(group) >= MIN_PLANS_TO_RANK}
    return {
        "plans": len(everything),
        "whole_plans": len(whole),
        "spearman": rank_correlation(everything) if len(everything) >= MIN_PLANS_TO_RANK else None,
        "spearman_whole": rank_correlation(whole) if len(whole) >= MIN_PLANS_TO_RANK else None,
        "spearman_by_joins": {k: value for k, value in ranked.items() if value is not None},
        "shift_by_joins": {k: statistics.fmean(b - a for a, b in group) for k, group in sorted(pairs.items())},
    }


def describe_winners(winners: Mapping[int, Plan], proxy: Mapping[Plan, float], heldout: DeltaEvaluator) -> list[Any]:
    """Return a row for each number of joins: the winner and its delta_nll on both texts."""
    return [
        {
            "joins": k,
            "plan": [list(group) for group in plan.groups if len(group) > 1],
            "proxy_delta_nll": proxy[plan],
            "heldout_delta_nll": heldout.get_delta_nll(plan),
        }
        for k, plan in winners.items()
    ]


def search_front(
    loaded: LoadedModel, windows: Windows, *, max_group: int, budget: int, seed: int, cache_bytes: int | None
) -> tuple[StudyResult, dict[str, Any]]:
    """Run a study with a separate evaluator; return its result and its cost."""
    evaluator = ModelEvaluator(model=loaded.model, windows=windows, cache_bytes=cache_bytes)
    began_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lpsearch-fronts-") as directory:
        store = StudyStore(f"sqlite:///{Path(directory) / 'study.db'}", study_name="front")
        with store:
            result = run_study(
                evaluator=evaluator,
                space=PlanSpace(loaded.identity.num_layers, max_group),
                budget=budget,
                store=store,
                seed=seed,
            )
    usage = evaluator.cache_usage
    return result, {
        "trials": len(result.results),
        "tokens": result.num_new_tokens,
        "elapsed_s": time.monotonic() - began_at,
        "layers_run": usage.layers_run,
        "layers_asked": usage.layers_asked,
    }


def measure_front(
    loaded: LoadedModel,
    windows: Windows,
    heldout: DeltaEvaluator,
    *,
    max_group: int,
    budget: int,
    num_sampled: int,
    seed: int,
    cache_bytes: int | None,
) -> dict[str, Any]:
    """Search one space, then evaluate its front and a sample of its plans on the held-out windows."""
    num_layers = loaded.identity.num_layers
    result, cost = search_front(loaded, windows, max_group=max_group, budget=budget, seed=seed, cache_bytes=cache_bytes)
    proxy = {record.plan: record.loss.delta_nll for record in result.front if record.num_joins > 0}
    rows = describe_winners(find_winners(proxy, num_layers), proxy, heldout)
    sample = compare_sample(
        sample_records(result.results, num_sampled, seed=seed),
        heldout,
        whole_tokens=windows.num_windows * (windows.seq_len - 1),
    )
    counted = [row for row in rows if row["joins"] <= num_layers // 3]
    shifts = [sample["shift_by_joins"][row["joins"]] for row in counted if row["joins"] in sample["shift_by_joins"]]
    return {
        "max_group": max_group,
        **cost,
        "sample": sample,
        "optimism": _mean([row["heldout_delta_nll"] - row["proxy_delta_nll"] for row in counted]),
        "shift": _mean(shifts),
        "front_heldout": _mean([row["heldout_delta_nll"] for row in counted]),
        "winners": rows,
    }


def measure_blocks(proxy: DeltaEvaluator, heldout: DeltaEvaluator, num_layers: int) -> dict[str, Any]:
    """Find the best blocks on one text and evaluate them on the other."""
    plans = list_blocks(num_layers)
    deltas = {plan: proxy.get_delta_nll(plan) for plan in plans}
    rows = describe_winners(find_winners(deltas, num_layers), deltas, heldout)
    counted = [row["heldout_delta_nll"] for row in rows if row["joins"] <= num_layers // 3]
    tokens = len(plans) * proxy.evaluator.num_windows * (proxy.evaluator.windows.seq_len - 1)
    return {"evaluations": len(plans) + 1, "tokens": tokens, "block_heldout": _mean(counted), "winners": rows}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line, and return the exit code."""
    options = _build_parser().parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        document = _run(options)
    except LpsearchError as error:
        print(f"real_fronts: {error}", file=sys.stderr)
        return error.exit_code
    options.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
    _print_table(document)
    print(json.dumps(_summarise(document)))
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    try:
        max_groups = [int(part) for part in options.max_groups.split(",")]
    except ValueError:
        raise ConfigError(f"--max-groups {options.max_groups}: give numbers with commas between") from None
    check_output_file(options.out)
    device = resolve_device(options.device)
    loaded = load_model(resolve_source(options.model), device=device, dtype=getattr(torch, options.dtype))
    search, heldout_windows = (
        get_windows(str(path), loaded, num_windows=None, seq_len=None)
        for path in (options.search_windows, options.heldout_windows)
    )
    cache_bytes = None if options.cache_gib is None else int(options.cache_gib * 2**30)
    num_layers = loaded.identity.num_layers
    proxy = DeltaEvaluator(loaded, search, cache_bytes=cache_bytes)
    heldout = DeltaEvaluator(loaded, heldout_windows, cache_bytes=cache_bytes)
    blocks = measure_blocks(proxy, heldout, num_layers)
    fronts = []
    for max_group in max_groups:
        print(f"{options.model}: groups of up to {max_group}", file=sys.stderr, flush=True)
        fronts.append(
            measure_front(
                loaded,
                search,
                heldout,
                max_group=max_group,
                budget=options.budget,
                num_sampled=options.sample,
                seed=options.seed,
                cache_bytes=cache_bytes,
            )
        )
    return {
        "model": loaded.identity.model_dump(),
        "search": {"spec": search.spec, "sha256": search.sha256, "nll": proxy.baseline_nll},
        "heldout": {"spec": heldout_windows.spec, "sha256": heldout_windows.sha256, "nll": heldout.baseline_nll},
        "windows": search.num_windows,
        "seq_len": search.seq_len,
        "budget": options.budget,
        "seed": options.seed,
        "dtype": options.dtype,
        "device": describe_device(device),
        "torch": torch.__version__,
        "fronts": fronts,
        "blocks": blocks,
    }


def _print_table(document: Mapping[str, Any]) -> None:
    columns = [(f"max_group {front['max_group']}", front["winners"]) for front in document["fronts"]]
    columns.append(("blocks", document["blocks"]["winners"]))
    print("delta_nll of the winner with at least k joins: on the search windows / held out")
    print(f"{'k':>3}  " + "  ".join(f"{name:>17}" for name, _ in columns))
    for k in range(1, max(len(rows) for _, rows in columns) + 1):
        cells = []
        for _, rows in columns:
            row = next((row for row in rows if row["joins"] == k), None)
            cell = "" if row is None else f"{row['proxy_delta_nll']:7.4f} / {row['heldout_delta_nll']:7.4f}"
            cells.append(f"{cell:>17}")
        print(f"{k:>3}  " + "  ".join(cells))


def _summarise(document: Mapping[str, Any]) -> dict[str, Any]:
    fronts = [
        {
            **{name: value for name, value in front.items() if name not in {"winners", "sample"}},
            "spearman": front["sample"]["spearman"],
            "spearman_by_joins": front["sample"]["spearman_by_joins"],
            "spearman_whole": front["sample"]["spearman_whole"],
            "sampled_plans": front["sample"]["plans"],
            "whole_plans": front["sample"]["whole_plans"],
        }
        for front in document["fronts"]
    ]
    blocks = {name: value for name, value in document["blocks"].items() if name != "winners"}
    return {**document, "model": document["model"]["id"], "fronts": fronts, "blocks": blocks}


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="alias, hub id, directory or .gguf file")
    parser.add_argument("--search-windows", type=Path, required=True, help="an .npz windows file to search on")
    parser.add_argument("--heldout-windows", type=Path, required=True, help="a windows file of another text")
    parser.add_argument("--budget", type=int, default=200, help="plans of a study, the baseline included")
    parser.add_argument("--max-groups", default="2,3,4", help="most layers in a group; one study for each number")
    parser.add_argument("--sample", type=int, default=60, help="plans of a study to evaluate on the held-out windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-gib", type=float, help="most GiB of each evaluator's prefix cache")
    parser.add_argument("--device", default="auto", help="torch device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--out", type=Path, required=True, help="the .json file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
