"""Replay exhaustive tables through the real study, and say how far each sampler stays from the best plans there are.

A table holds the loss of every plan of a model, as ``enumerate_front.py`` writes it: ``mask`` (bit i set: layers i and
i + 1 are joined), ``nll`` in nats per token and ``L``, the number of layers. The regret after some evaluations is, for
each number of joins k = 1 to L // 3, the least loss found among the evaluated plans with at least k joins minus the
least such loss of the table, averaged over k. A k for which nothing was found counts as the table's worst plan with k
joins; a plan that the table lacks counts as its worst plan of all. Every evaluation is charged, the baseline and the
single joins included.

With ``--freeze``, the frozen layers count for nothing: k ends at a third of the others, and the references are those of
the plans that leave them alone.

    python studies/search_regret.py --table TABLE.npz --budget 100 --seeds 10 [--plot regret.html]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from numpy.typing import NDArray
from scipy import stats

from lpsearch.config import parse_layer_list
from lpsearch.errors import ConfigError, DataError, LpsearchError
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search import SAMPLER_NAMES, JoinSpace, StudyStore, run_study

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_FORM = "arrays mask (integers, one plan each), nll (floats, as many) and L (number of layers)"


@dataclass(frozen=True)
class Table:
    """The losses of all plans of a space.

    Attributes:
        space: the plans that are searched; the table may lack some of them.
        masks: (plans,) the joins of each plan of the space as bits.
        nll: (plans,) losses in nats per token; infinite where the table's were not finite.
        worst_nll: the largest finite loss of the whole table, which also stands for plans that it lacks.
    """

    space: JoinSpace
    masks: IntArray
    nll: FloatArray
    worst_nll: float

    @cached_property
    def nll_of_mask(self) -> dict[int, float]:
        """The loss of each plan by its mask."""
        return dict(zip(self.masks.tolist(), self.nll.tolist(), strict=True))

    @cached_property
    def num_joins(self) -> IntArray:
        """(plans,) the number of joins of each plan."""
        return np.bitwise_count(self.masks).astype(np.int64)

    @property
    def max_joins(self) -> int:
        """The largest number of joins that counts: a third of the layers that are free."""
        num_free = self.space.num_layers - len(self.space.frozen_layers)
        return min(num_free // 3, int(self.num_joins.max()))

    @cached_property
    def least_nll(self) -> FloatArray:
        """(max_joins,) the least loss of a plan with at least k joins, k from 1."""
        return np.array([self.nll[self.num_joins >= k].min() for k in range(1, self.max_joins + 1)])

    @cached_property
    def missing_nll(self) -> FloatArray:
        """(max_joins,) what counts for a k where nothing was found: the worst plan with exactly k joins, k from 1."""
        worst = [self.nll[self.num_joins == k] for k in range(1, self.max_joins + 1)]
        return np.array([values.max() if len(values) else self.worst_nll for values in worst])


def load_table(path: Path, *, frozen_layers: Sequence[int] = ()) -> Table:
    """Read a table.

    Args:
        path: the ``.npz`` file.
        frozen_layers: layers that the replayed searches leave alone; plans that touch them are left out.

    Raises:
        DataError: for a file that is missing or of another form.
        ConfigError: for a frozen layer that does not exist, or if nothing is left to search.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            masks, nll, num_layers = (np.asarray(archive[name]) for name in ("mask", "nll", "L"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such table; make one with studies/enumerate_front.py") from None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(f"{path}: not a table ({error}); expected an .npz file with {_FORM}") from None
    problem = _find_problem(masks, nll, num_layers)
    if problem:
        raise DataError(f"{path}: {problem}; expected {_FORM}, each plan once and the baseline (mask 0) among them")
    masks = masks.astype(np.int64)
    finite = np.isfinite(nll)
    worst_nll = float(nll[finite].max())
    space = JoinSpace(int(num_layers), _find_max_group(masks), tuple(frozen_layers))
    free_bits = sum(1 << i for i in space.free_joins)
    kept = (masks & ~free_bits) == 0
    if kept.sum() < 2:
        raise ConfigError(f"{path}: holds no plan that leaves layers {list(frozen_layers)} alone; freeze fewer layers")
    return Table(space, masks[kept], np.where(finite, nll, worst_nll).astype(np.float64)[kept], worst_nll)


def _find_problem(masks: NDArray[Any], nll: NDArray[Any], num_layers: NDArray[Any]) -> str | None:
    """Say what is wrong with the arrays of a table, or None."""
    if num_layers.ndim != 0 or num_layers.dtype.kind not in "iu" or not 2 <= int(num_layers) <= 63:
        return f"L is {num_layers!r}, not a number of layers from 2 to 63"
    if masks.ndim != 1 or masks.dtype.kind not in "iu" or nll.ndim != 1 or nll.dtype.kind != "f":
        return f"mask is {masks.dtype}{list(masks.shape)} and nll {nll.dtype}{list(nll.shape)}"
    if len(masks) != len(nll) or len(masks) < 2:
        return f"it has {len(masks)} masks and {len(nll)} losses"
    if masks.min() < 0 or int(masks.max()) >= 1 << (int(num_layers) - 1):
        return f"a mask is outside [0, 2^{int(num_layers) - 1})"
    if len(np.unique(masks)) != len(masks):
        return "a plan stands in it twice"
    if not (masks == 0).any() or not np.isfinite(nll[masks == 0]).all():
        return "it has no finite loss of the baseline"
    return None


def _find_max_group(masks: IntArray) -> int:
    """Return the most layers in a group of any plan: the longest run of ones, and one."""
    max_group, runs = 1, masks
    while runs.any():
        max_group += 1
        runs = runs & (runs >> 1)
    return max(2, max_group)


class TableEvaluator:
    """Reads losses from a table and notes what it was asked for; a :class:`lpsearch.evaluation.PlanEvaluator`.

    Attributes:
        masks: the plans that were evaluated, in order.
    """

    num_windows = 1

    def __init__(self, table: Table) -> None:
        """Begin with nothing evaluated."""
        self._table = table
        self.masks: list[int] = []

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        """Return the table's loss for each window, the table's worst for a plan that it lacks."""
        mask = sum(1 << i for i in plan.joins)
        self.masks.append(mask)
        nll = self._table.nll_of_mask.get(mask, self._table.worst_nll)
        return WindowLosses(tuple(nll for _ in window_indices), None, 1)


@dataclass(frozen=True)
class Replay:
    """One study on a table.

    Attributes:
        masks: the plans that were evaluated, in order.
        asks_ms: time of each ask, sampler and storage together.
    """

    masks: tuple[int, ...]
    asks_ms: tuple[float, ...]


def replay_study(table: Table, *, sampler: str, budget: int, seed: int) -> Replay:
    """Run one study whose losses come from a table, in a database of its own.

    Args:
        table: the losses.
        sampler: one of ``lpsearch.search.SAMPLER_NAMES``.
        budget: evaluations, the baseline included.
        seed: of the sampler.
    """
    evaluator = TableEvaluator(table)
    with tempfile.TemporaryDirectory(prefix="lpsearch-replay-", ignore_cleanup_errors=True) as directory:
        url = f"sqlite:///{Path(directory) / 'study.db'}"
        with StudyStore(url, study_name="replay") as store, _time_asks() as asks_ms:
            run_study(evaluator=evaluator, space=table.space, budget=budget, store=store, sampler=sampler, seed=seed)
    return Replay(tuple(evaluator.masks), tuple(asks_ms))


@contextmanager
def _time_asks() -> Iterator[list[float]]:
    """Collect the milliseconds of every ``Study.ask`` of the block."""
    asks_ms: list[float] = []
    ask = optuna.Study.ask

    def timed_ask(*args: Any, **kwargs: Any) -> optuna.Trial:
        began_at = time.perf_counter()
        trial = ask(*args, **kwargs)
        asks_ms.append(1e3 * (time.perf_counter() - began_at))
        return trial

    optuna.Study.ask = timed_ask  # type: ignore[method-assign]
    try:
        yield asks_ms
    finally:
        optuna.Study.ask = ask  # type: ignore[method-assign]


def compute_regret(table: Table, masks: Sequence[int], budget: int) -> FloatArray:
    """Return (budget, max_joins): the regret of each k after each number of evaluations, in nats per token.

    Args:
        table: the losses.
        masks: the evaluated plans, in order; what follows the last of them keeps its regret.
        budget: evaluations to report.
    """
    nll = np.array([table.nll_of_mask.get(mask, table.worst_nll) for mask in masks])
    num_joins = np.array([mask.bit_count() for mask in masks])
    reaches = num_joins[:, None] >= np.arange(1, table.max_joins + 1)
    found = np.minimum.accumulate(np.where(reaches, nll[:, None], np.inf))  # (evaluations, max_joins)
    found = np.where(np.isfinite(found), found, table.missing_nll)
    padding = np.repeat(found[-1:], max(0, budget - len(found)), axis=0)
    return np.concatenate([found, padding])[:budget] - table.least_nll


def summarise(sampler: str, budget: int, regrets: FloatArray, asks_ms: Sequence[float]) -> dict[str, Any]:
    """Return what is reported of one sampler.

    Args:
        sampler: its name.
        budget: evaluations of each study.
        regrets: (seeds, budget, max_joins) from :func:`compute_regret`.
        asks_ms: time of every ask.
    """
    final = regrets[:, -1]  # (seeds, max_joins)
    means = final.mean(axis=1)
    half_width = None
    if len(means) > 1:
        half_width = float(stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    mean = float(means.mean())
    return {
        "sampler": sampler,
        "budget": budget,
        "seeds": len(means),
        "mean_regret_nats": mean,
        "ci95": None if half_width is None else [mean - half_width, mean + half_width],
        "exact_fraction": float((final == 0).all(axis=1).mean()),
        "regret_by_k": final.mean(axis=0).tolist(),
        "asks_ms_median": statistics.median(asks_ms),
    }


def build_figure(regrets: dict[str, FloatArray], *, title: str) -> go.Figure:
    """Draw the mean regret of each sampler against the evaluations spent.

    Args:
        regrets: (seeds, budget, max_joins) by sampler.
        title: of the figure.
    """
    figure = go.Figure()
    for sampler, values in regrets.items():
        curve = values.mean(axis=(0, 2))
        evaluations = np.arange(1, len(curve) + 1)
        # A logarithm has no zero: an exact front ends the curve.
        figure.add_scatter(x=evaluations, y=np.where(curve > 0, curve, np.nan), name=sampler, mode="lines")
    figure.update_xaxes(title="evaluations, the baseline included")
    figure.update_yaxes(title="mean regret (nats per token)", type="log")
    figure.update_layout(title=title, template="plotly_white")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay, print the table and the JSON lines, and return the exit code."""
    options = _build_parser().parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return _run(options)
    except LpsearchError as error:
        print(f"search_regret: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    samplers = options.samplers.split(",")
    unknown = sorted(set(samplers) - set(SAMPLER_NAMES))
    if unknown:
        raise ConfigError(f"--samplers {','.join(unknown)}: unknown; choose among {', '.join(SAMPLER_NAMES)}")
    if options.budget < 1 or options.seeds < 1:
        raise ConfigError(f"--budget {options.budget} --seeds {options.seeds}: both must be at least 1")
    try:
        frozen_layers = parse_layer_list(options.freeze)
    except ValueError as error:
        raise ConfigError(f"--freeze: {error}") from None
    table = load_table(options.table, frozen_layers=frozen_layers)
    print(
        f"{options.table.name}: {len(table.masks)} plans of {table.space.num_layers} layers, k = 1 to "
        f"{table.max_joins}, budget {options.budget}, {options.seeds} seeds"
    )
    print(f"{'sampler':<10} {'regret':>9} {'+-':>9} {'exact':>6} {'ask ms':>7}  regret by k")
    curves: dict[str, FloatArray] = {}
    summaries = []
    for sampler in samplers:
        replays = [
            replay_study(table, sampler=sampler, budget=options.budget, seed=seed) for seed in range(options.seeds)
        ]
        curves[sampler] = np.stack([compute_regret(table, replay.masks, options.budget) for replay in replays])
        asks_ms = [ask_ms for replay in replays for ask_ms in replay.asks_ms]
        summaries.append(summarise(sampler, options.budget, curves[sampler], asks_ms))
        _print_row(summaries[-1])
    if options.plot is not None:
        title = f"{options.table.name}: {options.seeds} seeds"
        options.plot.write_text(build_figure(curves, title=title).to_html(include_plotlyjs=True), encoding="utf-8")
    for summary in summaries:
        print(json.dumps({"table": options.table.name, **summary}), flush=True)
    return 0


def _print_row(summary: dict[str, Any]) -> None:
    interval = summary["ci95"]
    half_width = "" if interval is None else f"{(interval[1] - interval[0]) / 2:.5f}"
    by_k = " ".join(f"{value:.4f}" for value in summary["regret_by_k"])
    print(
        f"{summary['sampler']:<10} {summary['mean_regret_nats']:>9.5f} {half_width:>9} "
        f"{summary['exact_fraction']:>6.2f} {summary['asks_ms_median']:>7.1f}  {by_k}",
        flush=True,
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Replay an exhaustive table through the real study.")
    parser.add_argument("--table", type=Path, required=True, help="the .npz file")
    parser.add_argument("--budget", type=int, required=True, help="evaluations of a study, the baseline included")
    parser.add_argument("--seeds", type=int, required=True, help="studies a sampler, with seeds 0, 1, ...")
    names = ["pairset", *(name for name in SAMPLER_NAMES if name != "pairset")]
    parser.add_argument("--samplers", default=",".join(names), help="names, with commas between (default: all)")
    parser.add_argument("--freeze", default="", help="layers to leave alone, e.g. 0,1,29")
    parser.add_argument("--plot", type=Path, help="write the regret against evaluations as an HTML figure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
