"""Replay exhaustive tables through the real study, and report how far each sampler stays from the best plans.

A table holds the loss of every plan of a model, as ``enumerate_front.py`` writes it: ``mask`` (bit i set: layers i and
i + 1 are joined), ``nll`` in nats per token and ``L``, the number of layers. The regret after some evaluations is, for
each number of joins k = 1 to L // 3, the least loss found among the evaluated plans with at least k joins minus the
least such loss of the table, averaged over k. A k without any found plan counts as the table's worst plan with k
joins. A plan that the table lacks counts as its worst plan of all. The budget counts every evaluation, the baseline and
the single joins included.

The script replays a table with ``window_nll`` (plans, windows) window by window, so that racing may evaluate most plans
on few windows. Every plan counts as one evaluation, however few its windows were, but a plan counts as found only once
it has all windows. ``mean_windows_evaluated`` says how many windows a study evaluated. ``--unstaged`` turns racing off:
every plan gets all windows at once.

``--checkpoints 60,100,200`` reports what one replay of 200 evaluations had found after 60 and 100 of them. With
``--unstaged`` studies with budgets of 60 and 100 find the same, unless the budget is so small that ``pairset`` thins
its scan of all single groups. With racing, a study completes the windows of its front when its budget is spent, and
the first checkpoints of a longer study do not include that. Then run a separate replay for each budget.

``--freeze`` leaves the frozen layers out: k ends at a third of the others, and the references come from plans that
leave the frozen layers alone. ``--jobs N`` replays in N processes, which changes only the time of asks.

    python studies/search_regret.py --table TABLE.npz --budget 100 --seeds 10 [--plot regret.html]
    python studies/search_regret.py --table TABLE.npz --checkpoints 60,100,200 --seeds 10 --jobs 12
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from numpy.typing import NDArray
from scipy import stats

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.config import parse_layer_list
from lpsearch.errors import ConfigError, LpsearchError
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.plan import Plan
from lpsearch.search import SAMPLER_NAMES, StudyStore, run_study, trials
from studies.tables import Table, load_table

FloatArray = NDArray[np.float64]


class TableEvaluator:
    """Reads losses from a table and records its calls; a :class:`lpsearch.evaluation.PlanEvaluator`.

    Attributes:
        requests: the plans and windows that were evaluated, in order.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self.requests: list[tuple[int, tuple[int, ...]]] = []

    @property
    def num_windows(self) -> int:
        """The number of windows of the table."""
        return self._table.num_windows

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        """Return the table's loss of each window; the table's worst loss for a plan that it lacks."""
        mask = sum(1 << i for i in plan.joins)
        self.requests.append((mask, tuple(window_indices)))
        window_nll = self._table.get_window_nll(mask)
        return WindowLosses(tuple(float(window_nll[index]) for index in window_indices), None, 1)


@dataclass(frozen=True)
class Replay:
    """One study on a table. A plan counts as one evaluation from its first window on.

    Attributes:
        masks: the plans with at least one evaluated window, in the order of their first evaluation.
        found_after: for each plan the number of evaluations after which it had all windows; None if it never had.
        windows_evaluated: after each number of evaluations, the windows evaluated so far, of all plans together.
        asks_ms: time of each ask, sampler and storage together.
    """

    masks: tuple[int, ...]
    found_after: tuple[int | None, ...]
    windows_evaluated: tuple[int, ...]
    asks_ms: tuple[float, ...]


def build_replay(
    requests: Sequence[tuple[int, Sequence[int]]], *, num_windows: int, asks_ms: Sequence[float] = ()
) -> Replay:
    """Build a replay from an evaluator's calls: when each plan got its first window and when it got all.

    Args:
        requests: plans and windows, in order.
        num_windows: windows that make a plan complete.
        asks_ms: time of each ask.
    """
    missing: dict[int, set[int]] = {}
    found_after: dict[int, int] = {}
    windows_evaluated: list[int] = []
    total = 0
    for mask, window_indices in requests:
        if mask not in missing:
            missing[mask] = set(range(num_windows))
            windows_evaluated.append(total)
        total += len(window_indices)
        windows_evaluated[-1] = total
        missing[mask].difference_update(window_indices)
        if not missing[mask]:
            found_after.setdefault(mask, len(missing))
    return Replay(
        masks=tuple(missing),
        found_after=tuple(found_after.get(mask) for mask in missing),
        windows_evaluated=tuple(windows_evaluated),
        asks_ms=tuple(asks_ms),
    )


def replay_study(table: Table, *, sampler: str, budget: int, seed: int, staged: bool = True) -> Replay:
    """Run one study whose losses come from a table, in a temporary database.

    Args:
        table: the losses.
        sampler: one of ``lpsearch.search.SAMPLER_NAMES``.
        budget: evaluations, the baseline included.
        seed: of the sampler.
        staged: let the study race: it evaluates plans on few windows first.
    """
    evaluator = TableEvaluator(table)
    options: dict[str, Any] = {} if staged else {"staged": False}
    with tempfile.TemporaryDirectory(prefix="lpsearch-replay-", ignore_cleanup_errors=True) as directory:
        url = f"sqlite:///{Path(directory) / 'study.db'}"
        with StudyStore(url, study_name="replay") as store, _time_asks() as asks_ms:
            run_study(
                evaluator=evaluator,
                space=table.space,
                budget=budget,
                store=store,
                sampler=sampler,
                seed=seed,
                **options,
            )
    return build_replay(evaluator.requests, num_windows=table.num_windows, asks_ms=asks_ms)


@contextmanager
def _time_asks() -> Iterator[list[float]]:
    """Collect the time in ms of every ask inside the ``with`` statement, sampler and storage together."""
    asks_ms: list[float] = []
    ask = trials.Trials.ask

    def timed_ask(asked: trials.Trials) -> trials.Job | None:
        began_at = time.perf_counter()
        job = ask(asked)
        if job is not None:
            asks_ms.append(1e3 * (time.perf_counter() - began_at))
        return job

    trials.Trials.ask = timed_ask  # type: ignore[method-assign]
    try:
        yield asks_ms
    finally:
        trials.Trials.ask = ask  # type: ignore[method-assign]


def replay_seeds(
    table: Table, *, sampler: str, budget: int, num_seeds: int, staged: bool = True, executor: Executor | None = None
) -> list[Replay]:
    """Run a study for each of the seeds 0, 1, ..., in this process or in those of an executor."""
    options: dict[str, Any] = {"sampler": sampler, "budget": budget, "staged": staged}
    if executor is None:
        return [replay_study(table, seed=seed, **options) for seed in range(num_seeds)]
    futures = [executor.submit(replay_study, table, seed=seed, **options) for seed in range(num_seeds)]
    return [future.result() for future in futures]


def compute_regret(table: Table, replay: Replay, budget: int) -> FloatArray:
    """Return (budget, max_joins): the regret of each k after each number of evaluations, in nats per token.

    Args:
        table: the losses.
        replay: the evaluated plans; the regret after the last plan stays as it is.
        budget: the number of evaluations to report.
    """
    found = np.full((max(budget, len(replay.masks)), table.max_joins), np.inf)
    for mask, found_after in zip(replay.masks, replay.found_after, strict=True):
        if found_after is not None:
            reached = found[found_after - 1, : mask.bit_count()]
            np.minimum(reached, table.get_nll(mask), out=reached)
    found = np.minimum.accumulate(found)
    return (np.where(np.isfinite(found), found, table.missing_nll) - table.least_nll)[:budget]


def summarise(sampler: str, num_evaluations: int, regrets: FloatArray, replays: Sequence[Replay]) -> dict[str, Any]:
    """Return one sampler's results after a number of evaluations.

    Args:
        sampler: its name.
        num_evaluations: reported as the budget.
        regrets: (seeds, evaluations, max_joins) from :func:`compute_regret`.
        replays: the studies, one a seed.
    """
    final = regrets[:, num_evaluations - 1]  # (seeds, max_joins)
    means = final.mean(axis=1)
    half_width = None
    if len(means) > 1:
        half_width = float(stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    mean = float(means.mean())
    return {
        "sampler": sampler,
        "budget": num_evaluations,
        "seeds": len(means),
        "mean_regret_nats": mean,
        "ci95": None if half_width is None else [mean - half_width, mean + half_width],
        "exact_fraction": float((final == 0).all(axis=1).mean()),
        "regret_by_k": final.mean(axis=0).tolist(),
        "asks_ms_median": statistics.median(ask for replay in replays for ask in replay.asks_ms[:num_evaluations]),
        "mean_windows_evaluated": statistics.fmean(
            replay.windows_evaluated[:num_evaluations][-1] for replay in replays
        ),
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
        # A logarithmic axis has no zero, so the curve ends where the front is exact.
        figure.add_scatter(x=evaluations, y=np.where(curve > 0, curve, np.nan), name=sampler, mode="lines")
    figure.update_xaxes(title="evaluations, the baseline included")
    figure.update_yaxes(title="mean regret (nats per token)", type="log")
    figure.update_layout(title=title, template="plotly_white")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay tables, print the results and the JSON lines, and return the exit code."""
    options = _build_parser().parse_args(arguments)
    _quiet_optuna()
    try:
        return _run(options)
    except LpsearchError as error:
        print(f"search_regret: {error}", file=sys.stderr)
        return error.exit_code


def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _run(options: argparse.Namespace) -> int:
    samplers, checkpoints, frozen_layers = _check_options(options)
    budget = checkpoints[-1]
    table = load_table(options.table, frozen_layers=frozen_layers)
    print(
        f"{options.table.name}: {len(table.masks)} plans of {table.space.num_layers} layers on {table.num_windows} "
        f"windows, k = 1 to {table.max_joins}, budget {budget}, {options.seeds} seeds"
    )
    print(
        f"{'sampler':<10} {'after':>5} {'regret':>9} {'+-':>9} {'exact':>6} {'windows':>8} {'ask ms':>7}  regret by k"
    )
    curves: dict[str, FloatArray] = {}
    summaries = []
    with _build_executor(options.jobs) as executor:
        for sampler in samplers:
            replays = replay_seeds(
                table,
                sampler=sampler,
                budget=budget,
                num_seeds=options.seeds,
                staged=not options.unstaged,
                executor=executor,
            )
            curves[sampler] = np.stack([compute_regret(table, replay, budget) for replay in replays])
            for checkpoint in checkpoints:
                summaries.append(summarise(sampler, checkpoint, curves[sampler], replays))
                _print_row(summaries[-1])
    if options.plot is not None:
        title = f"{options.table.name}: {options.seeds} seeds"
        options.plot.write_text(build_figure(curves, title=title).to_html(include_plotlyjs=True), encoding="utf-8")
    about = {"table": options.table.name, "replayed_budget": budget, "staged": not options.unstaged}
    for summary in summaries:
        print(json.dumps({**about, **summary}), flush=True)
    return 0


def _check_options(options: argparse.Namespace) -> tuple[list[str], list[int], tuple[int, ...]]:
    """Return the samplers, the checkpoints in ascending order and the frozen layers."""
    samplers = options.samplers.split(",")
    unknown = sorted(set(samplers) - set(SAMPLER_NAMES))
    if unknown:
        raise ConfigError(f"--samplers {','.join(unknown)}: unknown; choose among {', '.join(SAMPLER_NAMES)}")
    if options.budget is None and options.checkpoints is None:
        raise ConfigError("give --budget, --checkpoints or both")
    try:
        checkpoints = {int(part) for part in (options.checkpoints or "").split(",") if part}
    except ValueError:
        raise ConfigError(f"--checkpoints {options.checkpoints}: give numbers with commas between") from None
    checkpoints |= set() if options.budget is None else {options.budget}
    if not checkpoints or min(checkpoints) < 1 or options.seeds < 1 or options.jobs < 1:
        raise ConfigError("--budget, --checkpoints, --seeds and --jobs must be at least 1")
    if options.budget is not None and max(checkpoints) > options.budget:
        raise ConfigError(f"--checkpoints {options.checkpoints}: none may be above --budget {options.budget}")
    try:
        return samplers, sorted(checkpoints), parse_layer_list(options.freeze)
    except ValueError as error:
        raise ConfigError(f"--freeze: {error}") from None


def _build_executor(num_jobs: int) -> ProcessPoolExecutor | nullcontext[None]:
    if num_jobs == 1:
        return nullcontext()
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_jobs, mp_context=context, initializer=_quiet_optuna)


def _print_row(summary: dict[str, Any]) -> None:
    interval = summary["ci95"]
    half_width = "" if interval is None else f"{(interval[1] - interval[0]) / 2:.5f}"
    by_k = " ".join(f"{value:.4f}" for value in summary["regret_by_k"])
    print(
        f"{summary['sampler']:<10} {summary['budget']:>5} {summary['mean_regret_nats']:>9.5f} {half_width:>9} "
        f"{summary['exact_fraction']:>6.2f} {summary['mean_windows_evaluated']:>8.1f} "
        f"{summary['asks_ms_median']:>7.1f}  {by_k}",
        flush=True,
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Replay an exhaustive table through the real study.")
    parser.add_argument("--table", type=Path, required=True, help="the .npz file")
    parser.add_argument("--budget", type=int, help="evaluations of a study, the baseline included")
    parser.add_argument("--checkpoints", help="numbers of evaluations to report, e.g. 60,100,200; default: the budget")
    parser.add_argument("--seeds", type=int, required=True, help="studies a sampler, with seeds 0, 1, ...")
    names = ["pairset", *(name for name in SAMPLER_NAMES if name != "pairset")]
    parser.add_argument("--samplers", default=",".join(names), help="names, with commas between (default: all)")
    parser.add_argument("--freeze", default="", help="layers to leave alone, e.g. 0,1,29")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--unstaged", action="store_true", help="evaluate every plan on all windows")
    parser.add_argument("--plot", type=Path, help="write the regret against evaluations as an HTML figure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
