"""Time the study of ``search_large.py`` on several GPUs of one machine, beside one: random weights of a model's shape.

Each worker is a process with a GPU of its own; one worker is a process too, so that the rows differ in their number
alone. ``study_s`` runs from the first evaluation to the last tell, when every worker has its model.

    python studies/search_workers.py --model llama2-7b --workers 1,2 --trials 200 --windows 16 --seq-len 2048
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.errors import LpsearchError
from lpsearch.evaluation.losses import PlanEvaluator
from lpsearch.models import load_geometry
from lpsearch.search import EvaluationUpdate, PlanSpace, StudyStore, TrialUpdate, run_study
from lpsearch.search.workers import LocalLauncher, WorkerPool

LOAD_S = 300.0
"""Seconds that workers may take to load; one that fails is left out, and would else be waited for."""


def build_evaluators(
    model: str, device: str, dtype: str, num_windows: int, seq_len: int, metric: Any, seed: int
) -> Mapping[str, PlanEvaluator]:
    """Build what a worker evaluates with; imports torch there alone, once the worker's GPU is chosen."""
    import numpy as np
    import torch

    from lpsearch.data import Windows
    from lpsearch.evaluation import ModelEvaluator
    from studies.search_large import build_random_model

    config = load_geometry(model)
    built = build_random_model(config, device=torch.device(device), dtype=getattr(torch, dtype), seed=seed)
    shape = (num_windows, seq_len)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(config.get_text_config().vocab_size, size=shape, dtype=np.int32)
    windows = Windows(tokens, "uniformly random tokens")
    return {"search": ModelEvaluator(model=built, windows=windows, metric=metric)}


def measure_study(launcher: LocalLauncher, options: argparse.Namespace) -> dict[str, Any]:
    """Run a study with its database on workers that have loaded."""
    began_at: list[float] = []
    told_at: list[float] = []

    def on_evaluation(update: EvaluationUpdate) -> None:
        began_at.append(time.monotonic())

    def on_trial(update: TrialUpdate) -> None:
        told_at.append(time.monotonic())

    num_layers = load_geometry(options.model).get_text_config().num_hidden_layers
    with tempfile.TemporaryDirectory(prefix="lpsearch-workers-") as directory, WorkerPool(launcher) as pool:
        deadline = time.monotonic() + LOAD_S
        while pool.num_slots < launcher.count_places():
            if time.monotonic() > deadline:
                raise LpsearchError(f"{pool.num_slots} of {launcher.count_places()} workers loaded in {LOAD_S:.0f} s")
            time.sleep(0.1)
        with StudyStore(f"sqlite:///{Path(directory) / 'study.db'}", study_name="large") as store:
            result = run_study(
                pool=pool,
                space=PlanSpace(num_layers),
                budget=options.trials,
                store=store,
                seed=options.seed,
                metric=options.metric,
                staged=not options.unstaged,
                on_trial=on_trial,
                on_evaluation=on_evaluation,
            )
        devices = [report.device for report in pool.reports]
    return {
        "workers": launcher.count_places(),
        "study_s": told_at[-1] - began_at[0],
        "trials": len(result.results),
        "evaluations": len(began_at),
        "tokens": result.num_new_tokens,
        "devices": devices,
        "front": [[found.num_joins, found.get_cost(options.metric)] for found in result.front],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Time each number of workers, and print a row and a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b", help="alias, hub id or directory whose geometry is used")
    parser.add_argument("--workers", default="1,2", help="numbers of workers, with commas between")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--windows", type=int, default=16, help="number of windows of random tokens")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in each")
    parser.add_argument("--metric", choices=["kl", "nll"], default="kl")
    parser.add_argument("--unstaged", action="store_true", help="evaluate every plan on all windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    build = partial(
        build_evaluators,
        *(options.model, options.device, options.dtype, options.windows, options.seq_len, options.metric, options.seed),
    )
    print(f"{'workers':>7} {'study s':>9} {'trials/s':>9} {'tokens/s':>9} {'of the first':>12}")
    lines: list[dict[str, Any]] = []
    for num_workers in map(int, options.workers.split(",")):
        places = [
            {"CUDA_VISIBLE_DEVICES": str(index)} if options.device == "cuda" else {} for index in range(num_workers)
        ]
        line = measure_study(LocalLauncher(build, num_workers=num_workers, environments=places), options)
        rate = line["tokens"] / line["study_s"]
        lines.append({"model": options.model, "metric": options.metric, **line, "tokens_per_s": rate})
        print(
            f"{num_workers:7d} {line['study_s']:9.2f} {line['trials'] / line['study_s']:9.2f} {rate:9.0f} "
            f"{lines[0]['study_s'] / line['study_s']:11.2f}x",
            flush=True,
        )
    for line in lines:
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
