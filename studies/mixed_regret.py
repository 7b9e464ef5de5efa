"""Replay a table of plans that join and drop, and report how far searches stay from its best plans at equal time saved.

A table is what ``enumerate_front.py --allow joins,drops --renumber`` writes: the losses of every plan of a few layers.
A search over joins and drops by each sampler is compared with two separate searches by ``pairset``, one over joins and
one over drops. Together they have as many evaluations: half each, but what a whole space of joins does not need goes to
the drops.

The times are made up, since those of these layers depend on the machine: an attention takes 1, an MLP 2, and a stage of
two members takes ``2 - saving`` times as long as one of them (``--join-saving``). On two H100 a pair of the 7B shape
saves about 0.25 of a layer, and shards for eight GPUs about 0.7. The regret at a share of the time is the least loss
found among plans that save at least that share of the time of all layers, minus the table's least; without such a plan
the table's worst loss counts.

    python studies/mixed_regret.py --table smollm2-135m-drops.npz --checkpoints 60,100,200 --seeds 5 --join-saving 0.25
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.config import Allowed
from lpsearch.errors import ConfigError, DataError, LpsearchError
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, run_study

FloatArray = NDArray[np.float64]

SAMPLERS = ("pairset", "evolution", "random")
SEPARATE = "separate"
"""The name of the two separate searches."""

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of the time of all layers at which plans are compared."""

_EVERYTHING: tuple[Allowed, ...] = ("joins", "drop-attention", "drop-mlp")
_DROPS: tuple[Allowed, ...] = ("drop-attention", "drop-mlp")
_MEMBER_TIMES = {"attention": 1.0, "mlp": 2.0}
_OVERHEAD = 1.0
_ROUNDING = 1e-9


@dataclass(frozen=True)
class MixedTable:
    """The losses of every plan of some layers, whatever it joins or drops.

    Attributes:
        num_layers: number of layers.
        nll: losses in nats per token.
    """

    num_layers: int
    nll: Mapping[Plan, float]


class _TableEvaluator:
    """Reads losses from a table and notes the plans in their order."""

    num_windows = 1

    def __init__(self, table: MixedTable) -> None:
        self._table = table
        self.plans: list[Plan] = []

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        self.plans.append(plan)
        return WindowLosses((self._table.nll[plan],) * len(window_indices), None, 1)


def load_mixed_table(path: Path) -> MixedTable:
    """Read a table.

    Raises:
        DataError: for a file that is missing, of another form, or that lacks plans.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            num_layers = int(archive["L"])
            bits = [archive[name].tolist() for name in ("mask", "dropped_attention", "dropped_mlp")]
            nll = archive["nll"].astype(np.float64).tolist()
        plans = [_decode(num_layers, *row) for row in zip(*bits, strict=True)]
        losses = dict(zip(plans, nll, strict=True))
    except FileNotFoundError:
        raise DataError(f"{path}: no such table; make one with studies/enumerate_front.py --allow") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, LpsearchError) as error:
        raise DataError(f"{path}: not a table of plans that join and drop ({error})") from None
    lacking = next(
        (plan for plan in PlanSpace(num_layers, allow=_EVERYTHING).enumerate_plans() if plan not in losses), None
    )
    if lacking is not None or not np.isfinite(nll).all():
        what = "a finite loss of every plan" if lacking is None else f"the plan {lacking.key}"
        raise DataError(f"{path}: it lacks {what}; write it with --layers A-B --renumber --allow joins,drops")
    return MixedTable(num_layers, losses)


def _decode(num_layers: int, joins: int, attention: int, mlp: int) -> Plan:
    def list_bits(value: int) -> list[int]:
        return [i for i in range(num_layers) if value >> i & 1]

    plan = Plan.from_joins(num_layers, list_bits(joins))
    return plan.drop({"attention": list_bits(attention), "mlp": list_bits(mlp)})


def estimate_time(plan: Plan, *, join_saving: float) -> float:
    """Return the made-up time of a plan.

    Args:
        plan: the plan.
        join_saving: what joining two branches of one kind saves, as a share of one of them.
    """
    total = _OVERHEAD
    for group in plan.groups:
        for branch, layers in (("attention", group.attention_layers), ("mlp", group.mlp_layers)):
            total += _MEMBER_TIMES[branch] * max(0.0, len(layers) - join_saving * max(0, len(layers) - 1))
    return total


def replay(
    table: MixedTable, *, sampler: str, budget: int, seed: int, join_saving: float, allow: tuple[Allowed, ...]
) -> list[Plan]:
    """Run one study whose losses come from a table, and return its plans in the order of their evaluation."""
    evaluator = _TableEvaluator(table)
    with (
        tempfile.TemporaryDirectory(prefix="lpsearch-replay-", ignore_cleanup_errors=True) as directory,
        StudyStore(f"sqlite:///{Path(directory) / 'study.db'}", study_name="replay") as store,
    ):
        run_study(
            evaluator=evaluator,
            space=PlanSpace(table.num_layers, allow=allow),
            budget=budget,
            store=store,
            sampler=sampler,
            seed=seed,
            objective="latency",
            estimate_latency_ms=lambda plan: estimate_time(plan, join_saving=join_saving),
        )
    return evaluator.plans


def replay_method(
    table: MixedTable, method: str, *, checkpoints: Sequence[int], seed: int, join_saving: float
) -> list[list[Plan]]:
    """Return the plans that a method had evaluated after each number of evaluations.

    Args:
        table: the losses.
        method: one of ``SAMPLERS``, or ``SEPARATE``.
        checkpoints: numbers of evaluations, ascending.
        seed: of the sampler.
        join_saving: as in :func:`estimate_time`.
    """
    last = checkpoints[-1]
    if method != SEPARATE:
        plans = replay(table, sampler=method, budget=last, seed=seed, join_saving=join_saving, allow=_EVERYTHING)
        return [plans[:count] for count in checkpoints]
    num_joining = PlanSpace(table.num_layers).count_plans()
    joining = replay(table, sampler="pairset", budget=last, seed=seed, join_saving=join_saving, allow=("joins",))
    dropping = replay(table, sampler="pairset", budget=last, seed=seed, join_saving=join_saving, allow=_DROPS)
    shares = [min(count // 2, num_joining) for count in checkpoints]
    return [joining[:share] + dropping[: count - share] for count, share in zip(checkpoints, shares, strict=True)]


def compute_regrets(table: MixedTable, found: Sequence[Plan], *, join_saving: float) -> list[float]:
    """Return the regret of the found plans at each of ``SHARES``, in nats per token."""
    base = estimate_time(Plan.baseline(table.num_layers), join_saving=join_saving)
    savings = {plan: base - estimate_time(plan, join_saving=join_saving) for plan in table.nll}
    worst = max(table.nll.values())
    regrets = []
    for share in SHARES:
        least = share * (base - _OVERHEAD) - _ROUNDING
        best = min(nll for plan, nll in table.nll.items() if savings[plan] >= least)
        regrets.append(min((table.nll[plan] for plan in found if savings[plan] >= least), default=worst) - best)
    return regrets


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay a table, print the regrets and JSON lines, and return the exit code."""
    options = _build_parser().parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        _run(options)
    except LpsearchError as error:
        print(f"mixed_regret: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> None:
    methods = options.methods.split(",")
    unknown = sorted(set(methods) - {*SAMPLERS, SEPARATE})
    if unknown:
        raise ConfigError(f"--methods {','.join(unknown)}: unknown; choose among {', '.join((*SAMPLERS, SEPARATE))}")
    try:
        checkpoints = sorted({int(part) for part in options.checkpoints.split(",")})
    except ValueError:
        raise ConfigError(f"--checkpoints {options.checkpoints}: give numbers with commas between") from None
    if checkpoints[0] < 1 or options.seeds < 1 or not 0 <= options.join_saving <= 1:
        raise ConfigError("--checkpoints and --seeds must be at least 1, --join-saving from 0 to 1")
    table = load_mixed_table(options.table)
    print(f"{options.table.name}: {len(table.nll)} plans, {options.seeds} seeds, regret at {SHARES} of the time saved")
    for method in methods:
        runs = [
            replay_method(table, method, checkpoints=checkpoints, seed=seed, join_saving=options.join_saving)
            for seed in range(options.seeds)
        ]
        for index, count in enumerate(checkpoints):
            regrets = np.array([compute_regrets(table, run[index], join_saving=options.join_saving) for run in runs])
            _print_row(options, method, count, regrets)


def _print_row(options: argparse.Namespace, method: str, count: int, regrets: FloatArray) -> None:
    document: dict[str, Any] = {
        "table": options.table.name,
        "join_saving": options.join_saving,
        "method": method,
        "evaluations": count,
        "seeds": len(regrets),
        "mean_regret_nats": float(regrets.mean()),
        "exact_fraction": float((regrets <= _ROUNDING).all(axis=1).mean()),
        "regret_by_share": {str(share): float(mean) for share, mean in zip(SHARES, regrets.mean(axis=0), strict=True)},
    }
    by_share = " ".join(f"{value:.4f}" for value in document["regret_by_share"].values())
    print(
        f"{method:<10} {count:>5} {document['mean_regret_nats']:>9.5f} {document['exact_fraction']:>5.2f}  {by_share}"
    )
    print(json.dumps(document), flush=True)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Replay a table of plans that join and drop.")
    parser.add_argument("--table", type=Path, required=True, help="the .npz file")
    parser.add_argument("--checkpoints", default="60,100,200", help="numbers of evaluations to report")
    parser.add_argument("--seeds", type=int, required=True, help="studies a method, with seeds 0, 1, ...")
    parser.add_argument("--methods", default=",".join((*SAMPLERS, SEPARATE)), help="names, with commas between")
    parser.add_argument("--join-saving", type=float, default=0.25, help="what joining two branches saves of one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
