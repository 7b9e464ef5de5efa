"""What a refit of every plan adds to a search: seconds of the same plans with and without it, on a random model.

Ratios depend on shapes alone, so a random Llama of SmolLM2's proportions will do. The plans are those that a search
asks for: every third join alone, then neighbours of one plan of six joins, a third of them on all windows and the
others on the first rung, as in racing. The last line is JSON.

    python studies/refit_cost.py --share 0.5
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lpsearch.data import Windows
from lpsearch.evaluation import ModelEvaluator, PlanEvaluator
from lpsearch.plan import Plan
from lpsearch.recovery import RefitEvaluator
from lpsearch.recovery.evaluator import build_search_refitter, split_cache_bytes
from lpsearch.versions import read_versions

NUM_LAYERS = 30
SIX_JOINS = (4, 7, 17, 21, 24, 26)


def main() -> None:
    """Time both, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=192, help="hidden size; 576 is SmolLM2-135M")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--share", type=float, default=0.5, help="calibration windows for each evaluation window")
    parser.add_argument("--neighbours", type=int, default=18, help="plans of six joins")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    model = _build_model(arguments.hidden, arguments.device)
    num_calibration = round(arguments.share * arguments.windows)
    windows, calibration = (
        _build_windows(count, arguments.seq_len, seed, model.config.vocab_size)
        for count, seed in ((arguments.windows, 0), (num_calibration, 1))
    )
    cache_bytes, refit_bytes = split_cache_bytes(model.device)

    def build_evaluator() -> ModelEvaluator:
        return ModelEvaluator(model=model, windows=windows, cache_bytes=cache_bytes)

    refitter = build_search_refitter(model, calibration, cache_bytes=refit_bytes)
    repaired = RefitEvaluator(model=model, evaluator=build_evaluator(), refitter=refitter)
    plans = {"one join": _list_single(), "six joins": _list_neighbours(arguments.neighbours)}
    seconds = {"raw": _measure(build_evaluator(), plans), "refit": _measure(repaired, plans)}
    print(f"{'plans':<10} {'raw s':>8} {'refit s':>8} {'ratio':>6}")
    for name in plans:
        raw, refit = seconds["raw"][name], seconds["refit"][name]
        print(f"{name:<10} {raw:8.2f} {refit:8.2f} {refit / raw:6.2f}")
    totals = {variant: sum(times.values()) for variant, times in seconds.items()}
    print(f"{'all':<10} {totals['raw']:8.2f} {totals['refit']:8.2f} {totals['refit'] / totals['raw']:6.2f}")
    print(json.dumps({"seconds": seconds, **vars(arguments), "versions": read_versions()}))


def _build_model(hidden_size: int, device: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 192),
        vocab_size=49152 * hidden_size // 576,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval().to(device)


def _build_windows(num_windows: int, seq_len: int, seed: int, vocab_size: int) -> Windows:
    tokens = np.random.default_rng(seed).integers(3, vocab_size, (num_windows, seq_len))
    return Windows(tokens.astype(np.int32), f"random:{seed}")


def _list_single() -> list[Plan]:
    return [Plan.from_joins(NUM_LAYERS, [join]) for join in range(1, NUM_LAYERS - 1, 3)]


def _list_neighbours(count: int) -> list[Plan]:
    """Return plans that differ from one another by one or two joins."""
    draw = random.Random(0)
    plans: dict[Plan, None] = {}
    while len(plans) < count:
        joins = set(SIX_JOINS) - {draw.choice(SIX_JOINS)}
        free = [join for join in range(1, NUM_LAYERS - 2) if all(abs(join - other) > 1 for other in joins)]
        plans[Plan.from_joins(NUM_LAYERS, sorted({*joins, draw.choice(free)}))] = None
    return list(plans)


def _measure(evaluator: PlanEvaluator, plans: dict[str, list[Plan]]) -> dict[str, float]:
    """Return seconds by kind of plan, on a CPU those of the processor; the unmodified model is not counted."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    num_windows = evaluator.num_windows
    evaluator.evaluate_windows(Plan.baseline(NUM_LAYERS), range(num_windows))
    seconds = {}
    for name, some in plans.items():
        began_at = clock()
        for index, plan in enumerate(some):
            evaluator.evaluate_windows(plan, range(num_windows // 4))
            if index % 3 == 0:
                evaluator.evaluate_windows(plan, range(num_windows // 4, num_windows))
        seconds[name] = clock() - began_at
    return seconds


if __name__ == "__main__":
    main()
