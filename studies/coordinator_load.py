"""Measure how many trials a coordinator keeps up with, and that it does not grow: many workers, short evaluations.

Workers only sleep. The rate, the coordinator's CPU time and its memory are printed as the study grows; with ``--plot``
they are drawn.

    python studies/coordinator_load.py --trials 2000 --workers 8 --seconds 0.02 --sampler random
    python studies/coordinator_load.py --storage postgresql+psycopg://USER:PASSWORD@HOST/DATABASE
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import optuna
import plotly.graph_objects as go
import psutil
from plotly.subplots import make_subplots

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.search import SAMPLER_NAMES, PlanSpace, StudyStore, TrialUpdate, run_study
from lpsearch.search.workers import LocalLauncher, WorkerPool
from studies.search_overhead import SleepingEvaluator


@dataclass(frozen=True)
class Point:
    """The coordinator after some trials.

    Attributes:
        num_trials: finished trials.
        trials_per_s: since the point before.
        cpu_ms_per_trial: CPU time of the coordinator's process since then, its pool included.
        memory_mib: resident memory of its process.
    """

    num_trials: int
    trials_per_s: float
    cpu_ms_per_trial: float
    memory_mib: float


def build_evaluators(num_layers: int, num_windows: int, seconds: float) -> Mapping[str, SleepingEvaluator]:
    """Build what a worker evaluates with."""
    return {"sleep": SleepingEvaluator(num_layers, num_windows=num_windows, seconds=seconds)}


def measure_load(
    *,
    storage: str,
    sampler: str,
    num_layers: int,
    num_trials: int,
    num_windows: int,
    num_workers: int,
    seconds: float,
    every: int,
) -> list[Point]:
    """Run one study, and look at the coordinator after every few trials."""
    points: list[Point] = []
    process = psutil.Process()
    looked_at = [0.0, 0.0, 0.0]

    def on_trial(update: TrialUpdate) -> None:
        if update.num_finished % every and update.num_finished != update.budget:
            return
        now, cpu = time.perf_counter(), time.process_time()
        if looked_at[2] and update.num_finished > looked_at[2]:
            count = update.num_finished - looked_at[2]
            points.append(
                Point(
                    update.num_finished,
                    count / (now - looked_at[0]),
                    1e3 * (cpu - looked_at[1]) / count,
                    process.memory_info().rss / 2**20,
                )
            )
            print(
                f"{points[-1].num_trials:6d} {points[-1].trials_per_s:9.1f} {points[-1].cpu_ms_per_trial:9.1f} "
                f"{points[-1].memory_mib:8.1f}",
                flush=True,
            )
        looked_at[:] = [now, cpu, update.num_finished]

    launcher = LocalLauncher(partial(build_evaluators, num_layers, num_windows, seconds), num_workers=num_workers)
    with StudyStore(storage, study_name=f"load-{time.time():.0f}") as store, WorkerPool(launcher) as pool:
        while pool.num_slots < num_workers:
            time.sleep(0.1)
        run_study(
            pool=pool, space=PlanSpace(num_layers), budget=num_trials, store=store, sampler=sampler, on_trial=on_trial
        )
    return points


def build_figure(points: Sequence[Point], *, title: str) -> go.Figure:
    """Draw the rate and the memory against the trials."""
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    numbers = [point.num_trials for point in points]
    figure.add_scatter(x=numbers, y=[point.trials_per_s for point in points], name="trials/s")
    figure.add_scatter(x=numbers, y=[point.memory_mib for point in points], name="memory (MiB)", secondary_y=True)
    figure.update_xaxes(title="finished trials")
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(title=title, template="plotly_white")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the curve and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.02, help="duration of an evaluation on all windows")
    parser.add_argument("--sampler", choices=SAMPLER_NAMES, default="random")
    parser.add_argument("--every", type=int, default=100, help="trials between two points of the curve")
    parser.add_argument("--storage", help="database URL; default: a SQLite file that is deleted again")
    parser.add_argument("--plot", type=Path, help="write the curve as an HTML figure")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(f"{'trials':>6} {'trials/s':>9} {'CPU ms':>9} {'MiB':>8}")
    with tempfile.TemporaryDirectory(prefix="lpsearch-load-") as directory:
        points = measure_load(
            storage=options.storage or f"sqlite:///{Path(directory) / 'study.db'}",
            sampler=options.sampler,
            num_layers=options.layers,
            num_trials=options.trials,
            num_windows=options.windows,
            num_workers=options.workers,
            seconds=options.seconds,
            every=options.every,
        )
    title = f"{options.workers} workers, {1e3 * options.seconds:.0f} ms an evaluation, {options.sampler}"
    if options.plot is not None:
        options.plot.write_text(build_figure(points, title=title).to_html(include_plotlyjs=True), encoding="utf-8")
    print(
        json.dumps(
            {
                "workers": options.workers,
                "seconds": options.seconds,
                "sampler": options.sampler,
                "layers": options.layers,
                "storage": "sqlite" if options.storage is None else options.storage.partition(":")[0],
                "least_trials_per_s": min(point.trials_per_s for point in points),
                "memory_growth_mib": points[-1].memory_mib - points[0].memory_mib,
                "points": [asdict(point) for point in points],
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
